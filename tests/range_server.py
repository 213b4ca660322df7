"""An HTTP server that serves one file with ranges, and breaks off when told to."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(BaseHTTPRequestHandler):
    """Its file is under every name; `cut` makes the next answer end after so many bytes.

    With `chunked` that is an answer of no length told before; `tells_size` is whether one that has
    no more bytes says how many there are in all.
    """

    protocol_version = "HTTP/1.1"  # which knows chunks
    content = b""
    etag: str | None = None
    cut: int | None = None
    chunked = False
    tells_size = True
    ranges: list[str | None]

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        type(self).ranges.append(asked)
        condition = self.headers.get("If-Range")
        if condition is not None and condition != self.etag:
            asked = None
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        body = self.content[start:]
        missing = "gone" in self.path
        status = 404 if missing else 416 if asked and not body else 206 if asked else 200
        self.send_response(status)
        if status == 416 and self.tells_size:
            self.send_header("Content-Range", f"bytes */{len(self.content)}")
        if self.chunked:
            self.send_header("Transfer-Encoding", "chunked")
            body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        else:
            self.send_header("Content-Length", str(len(body)))
        if self.etag:
            self.send_header("ETag", self.etag)
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body[: self.cut])
        type(self).cut = None

    def log_message(self, *arguments: object) -> None:
        pass


@contextlib.contextmanager
def range_server() -> Iterator[str]:
    """Its address while it runs."""
    Server.content, Server.etag, Server.ranges, Server.cut = b"", None, [], None
    Server.chunked, Server.tells_size = False, True
    listening = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listening.server_port}"
    listening.shutdown()
    thread.join()
    listening.server_close()
