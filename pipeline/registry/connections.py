"""An HTTP server whose connections are bounded in time and number, whoever opens them.

uvicorn's own bounds do not do: `limit_concurrency` counts connections that say nothing, its timer
starts after the first answer, and any byte stops it.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any, cast

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

MOST_OPEN = 256  # connections; more, and those that have not asked anything give way
_ANSWER_SECONDS = 30  # for an answer to be taken
_END_SECONDS = 3  # for work in progress after SIGTERM
_BACKLOG = 128  # connections that the system may hand over at once


class Connection(H11Protocol):
    """One connection: a request's headers arrive in time, an answer is taken in time.

    `timeout_keep_alive` of the configuration counts from the connection, or from the end of an
    answer, to the end of the next request's headers, whatever else arrives. Bodies are the
    application's.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Starts the clock; where too many are open, ends the oldest that has asked nothing."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # whatever is left to write, `pause_writing` is called
        self.since = self.loop.time()
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive, self.timeout_keep_alive_handler
        )
        if len(self.connections) > MOST_OPEN:
            ours = cast("set[Connection]", self.connections)
            oldest = min((each for each in ours if each.asks_nothing), key=lambda each: each.since)
            self.connections.discard(oldest)
            oldest.transport.abort()

    @property
    def asks_nothing(self) -> bool:
        """Whether no request has come in whole that is not yet answered."""
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

    def data_received(self, data: bytes) -> None:
        """As uvicorn's, but that the clock goes on until a request has come."""
        self.conn.receive_data(data)
        self.handle_events()

    def pause_writing(self) -> None:
        """An answer waits to be taken."""
        super().pause_writing()
        self.untaken = self.loop.call_later(_ANSWER_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """It has been."""
        super().resume_writing()
        self.untaken.cancel()

    def send_400_response(self, msg: str) -> None:
        """For what is no HTTP: our kind of answer, where none has begun, and the end."""
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            body = json.dumps({"error": f"the request is not HTTP/1.1 ({msg})"}).encode()
            self.transport.write(
                b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\nConnection: close\r\n\r\n%b" % (len(body), body)
            )
        self.transport.close()


def server(app: Any, seconds: float) -> uvicorn.Server:
    """A server of an ASGI application; `run(sockets=[…])` of it lasts until a signal.

    Args:
        app: answers every request; it bounds its work and the time of bodies.
        seconds: that a connection has for its next request's headers.
    """
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            loop="asyncio",
            log_level="warning",
            backlog=_BACKLOG,
            timeout_keep_alive=seconds,  # type: ignore[arg-type]  # asyncio takes fractions
            timeout_graceful_shutdown=_END_SECONDS,
        )
    )
