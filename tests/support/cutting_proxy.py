"""A TCP proxy that cuts connections which have sent more than so many bytes."""

import select
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

PIECE = 2**12
AT_ONCE = struct.pack("ii", 1, 0)
"""SO_LINGER of no time: the peer sees a broken connection, not an ended one."""


@dataclass
class Cutting:
    """`endpoint` is where the proxy listens; no connection is cut while `after_bytes` is None."""

    endpoint: str
    after_bytes: int | None = None
    cuts: int = 0


@contextmanager
def cutting_proxy(target: tuple[str, int]) -> Iterator[Cutting]:
    """Stand between clients and `target` while the body runs."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        cutting = Cutting(f"http://127.0.0.1:{listener.getsockname()[1]}")
        threading.Thread(target=_accept, args=(listener, target, cutting), daemon=True).start()
        try:
            yield cutting
        finally:
            listener.shutdown(socket.SHUT_RDWR)


def _accept(listener: socket.socket, target: tuple[str, int], cutting: Cutting) -> None:
    while True:
        try:
            client, _ = listener.accept()
        except OSError:  # the listener is closed
            return
        threading.Thread(target=_pass_on, args=(client, target, cutting), daemon=True).start()


def _pass_on(client: socket.socket, target: tuple[str, int], cutting: Cutting) -> None:
    sent = 0
    with client, socket.create_connection(target) as server:
        while True:
            for source in select.select([client, server], [], [])[0]:
                try:
                    piece = source.recv(PIECE)
                    (server if source is client else client).sendall(piece)
                except OSError:
                    return
                if not piece:
                    return
                sent += len(piece) if source is client else 0
            if cutting.after_bytes is not None and sent > cutting.after_bytes:
                cutting.cuts += 1
                for end in (client, server):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, AT_ONCE)
                return
