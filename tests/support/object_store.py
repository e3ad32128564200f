"""An S3-speaking server on loopback, for tests of object storage."""

from collections.abc import Iterator
from contextlib import contextmanager
from urllib.request import Request, urlopen

import pytest
from moto.server import ThreadedMotoServer
from pyarrow.fs import S3FileSystem


@contextmanager
def loopback_s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Serve an empty bucket, point `AWS_ENDPOINT_URL` at it, and yield its `s3://` URI."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    # The server keeps its buckets for the life of the process.
    urlopen(Request(f"{endpoint}/moto-api/reset", method="POST")).close()
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    try:
        S3FileSystem(endpoint_override=endpoint, region="us-east-1", allow_bucket_creation=True).create_dir(
            "campaigns"
        )
        yield "s3://campaigns"
    finally:
        server.stop()
