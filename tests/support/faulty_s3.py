"""An S3-speaking server whose calls fail at random: errors, slow answers, cut connections.

It stands between clients and another server, and passes on the calls that it lets through. Which calls
fail follows from a seed and from how many there were before.
"""

import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import urlsplit

Fault = Literal["slow_down", "internal_error", "slow", "cut_before", "cut_after", "cut_amid"]
FAULTS: tuple[Fault, ...] = ("slow_down", "internal_error", "slow", "cut_before", "cut_after", "cut_amid")
"""`cut_before` the call arrives, `cut_after` it was done and before its answer, `cut_amid` the answer."""

STATUS = {"slow_down": (503, "SlowDown"), "internal_error": (500, "InternalError")}
SLOW_S = (0.1, 1.0)
AT_ONCE = struct.pack("ii", 1, 0)
"""SO_LINGER of no time: the peer sees a broken connection, not an ended one."""
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding"}


@dataclass
class Faults:
    """Where the server listens, what goes wrong there, and what went wrong so far.

    `upcoming` are the faults of the next calls, one each (None: none); after them, each call fails with
    probability `rate`. `only` limits both to calls of one method, such as PUT.
    """

    endpoint: str = ""
    rate: float = 0.0
    seed: int = 0
    upcoming: list[Fault | None] = field(default_factory=list)
    only: str | None = None
    calls: int = 0
    done: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def draw(self, method: str) -> Fault | None:
        """Return the fault of the next call."""
        with self._lock:
            if self.only not in (None, method):
                return None
            self.calls += 1
            drawn: Fault | None = None
            if self.upcoming:
                drawn = self.upcoming.pop(0)
            else:
                chance = random.Random(f"{self.seed}-{self.calls}")
                drawn = chance.choice(FAULTS) if chance.random() < self.rate else None
            if drawn:
                self.done[drawn] += 1
            return drawn


@contextmanager
def faulty_s3(target: str, seed: int = 0, rate: float = 0.0) -> Iterator[Faults]:
    """Stand before the server at the URL `target` while the body runs."""
    faults = Faults(rate=rate, seed=seed)
    place = urlsplit(target)

    class Handler(_Handler):
        server_at = (place.hostname or "", place.port or 80)
        plan = faults

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    faults.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield faults
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_at: tuple[str, int]
    plan: Faults

    def _serve(self) -> None:
        body = self._body()
        fault = self.plan.draw(self.command)
        if fault == "cut_before":
            self._cut()
        elif fault in STATUS:
            self._fail(*STATUS[fault])
        else:
            if fault == "slow":
                time.sleep(random.uniform(*SLOW_S))
            self._pass_on(body, fault)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        pieces = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _pass_on(self, body: bytes, fault: Fault | None) -> None:
        connection = http.client.HTTPConnection(*self.server_at, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP_BY_HOP}
        headers["Content-Length"] = str(len(body))
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        if fault == "cut_after":
            self._cut()
            return
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in HOP_BY_HOP | {"content-length"}:
                self.send_header(name, value)
        # The answer to HEAD tells the length of what it leaves out.
        length = answer.getheader("Content-Length") if self.command == "HEAD" else None
        self.send_header("Content-Length", length or str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if fault == "cut_amid" else content)
        if fault == "cut_amid":
            self.wfile.flush()
            self._cut()

    def _fail(self, status: int, code: str) -> None:
        content = f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _cut(self) -> None:
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, AT_ONCE)
        self.connection.close()

    def handle(self) -> None:
        try:
            super().handle()
        except (OSError, ValueError):  # the peer is gone, or the connection was cut here
            self.close_connection = True

    def finish(self) -> None:
        with suppress(OSError, ValueError):
            super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing; `Faults` counts."""
