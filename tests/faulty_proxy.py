"""A proxy before a server that lets some connections fail or be cut, for tests; real sockets."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
from collections.abc import Iterator
from typing import NamedTuple
from urllib.parse import urlsplit


class Faults(NamedTuple):
    """Where the proxy answers, and what it did."""

    endpoint: str
    counts: dict[str, int]


@contextlib.contextmanager
def faulty_proxy(endpoint: str, share: float, seed: int = 0) -> Iterator[Faults]:
    """Passes connections on; of each answer's pieces a `share` is the last before a cut.

    A request whose first piece is chosen fails as a whole.
    """
    address = urlsplit(endpoint)
    choose = random.Random(seed)
    counts = {"requests": 0, "failed": 0, "cut": 0}
    listener = socket.create_server(("127.0.0.1", 0))

    def up(client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while piece := client.recv(65536):
                server.sendall(piece)

    def serve(client: socket.socket) -> None:
        with contextlib.suppress(OSError), client:
            server = socket.create_connection((str(address.hostname), address.port or 80))
            with server:
                threading.Thread(target=up, args=(client, server), daemon=True).start()
                while piece := server.recv(65536):
                    head = piece.startswith(b"HTTP/1.1")
                    counts["requests"] += head
                    if choose.random() < share:
                        counts["failed" if head else "cut"] += 1
                        if not head:
                            client.sendall(piece[: len(piece) // 2])
                        for side in (server, client):
                            side.shutdown(socket.SHUT_RDWR)
                        return
                    client.sendall(piece)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                threading.Thread(target=serve, args=(client,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield Faults(f"http://127.0.0.1:{listener.getsockname()[1]}", counts)
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
