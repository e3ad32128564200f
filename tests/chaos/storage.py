"""Runs of the small campaign on an S3-speaking server whose calls fail at random."""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from moto.server import ThreadedMotoServer
from pyarrow.fs import FileSelector, FileType, S3FileSystem, copy_files

from tests.support.faulty_s3 import Faults, faulty_s3

BUCKET = "chaos"
RATE = 0.05
"""Of the calls fail."""


@contextmanager
def faulty_storage(seed: int) -> Iterator[tuple[S3FileSystem, Faults]]:
    """Serve a bucket whose calls fail; yield the file system that sees it without faults, and the faults.

    What is started meanwhile finds the faulty server in its environment.
    """
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a call
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
    }
    try:
        clean = S3FileSystem(endpoint_override=endpoint, region="us-east-1", allow_bucket_creation=True)
        clean.create_dir(BUCKET)
        with faulty_s3(endpoint, seed, RATE) as faults:
            os.environ["AWS_ENDPOINT_URL"] = faults.endpoint
            yield clean, faults
    finally:
        os.environ.pop("AWS_ENDPOINT_URL", None)
        server.stop()


def download(clean: S3FileSystem, uri: str, run: Path) -> None:
    """Copy a run to the local disk, with the times at which its files were written."""
    root = urlsplit(uri).netloc + urlsplit(uri).path
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True)
    copy_files(root, str(run), source_filesystem=clean)
    for info in clean.get_file_info(FileSelector(root, recursive=True)):
        if info.type == FileType.File:
            # Object stores cut the time to whole seconds.
            written = info.mtime.timestamp() + 1.0
            os.utime(run / info.path.removeprefix(f"{root}/"), (written, written))
