"""A server of `vdvae models serve` in this process, on real sockets, for tests."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

import vdvae
from pipeline.registry import connections, serve
from vdvae.config import ModelConfig


def model(**changes: Any) -> Any:
    """A tiny model as MLflow would load it, without a registry; `changes` are Images' methods."""
    import mlflow
    from mlflow.models import Model

    from pipeline.registry.pyfunc_model import Images
    from pipeline.registry.register import _signature

    config = ModelConfig(
        image_size=8, image_channels=1, encoder="8x1,8d4,2x1", decoder="2x1,8m2", width=8,
        latent_channels=2, mixtures=2,
    )  # fmt: skip
    torch.manual_seed(0)
    images = Images()
    images.model = vdvae.VDVAE(config).eval()
    images.shape_HWC, images.batch = (8, 8, 1), 256

    class Loaded:
        python_model = images

        def predict(self, given: Any, params: dict[str, Any] | None = None) -> Any:
            return images.predict(None, given, params)

    for name, method in changes.items():
        setattr(images, name, method)
    meta = Model(signature=_signature(config, 0, 1), flavors={"python_function": {}})
    return mlflow.pyfunc.PyFuncModel(meta, Loaded())


class Served(NamedTuple):
    port: int
    server: Any

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def asked(self, request: bytes) -> socket.socket:
        """A connection that has said this."""
        connection = self.connect()
        connection.sendall(request)
        return connection

    def ask(self, request: bytes) -> bytes:
        """All that is answered until the server ends the connection."""
        with self.asked(request) as connection:
            return rest(connection)


@contextlib.contextmanager
def served(app: Any, seconds: float = 60) -> Iterator[Served]:
    """Serves until the block ends, and then ends within a minute, whatever is open."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = connections.server(app, seconds)
        began = threading.Event()
        startup = server.startup

        async def told(sockets: Any = None) -> None:
            await startup(sockets)
            began.set()

        server.startup = told
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        assert began.wait(60)
        try:
            yield Served(listener.getsockname()[1], server)
        finally:
            server.should_exit = True
            thread.join(60)
        assert not thread.is_alive()


def application(seconds: float = 60, **changes: Any) -> Any:
    """That of the tiny model, without a token."""
    return serve.application(model(**changes), "tiny", silence=seconds)


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()


def post(value: Any, length: int | None = None) -> bytes:
    """A request to the model; `length` is announced instead of the body's."""
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    return (
        b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Connection: close\r\nContent-Length: %d\r\n\r\n%b"
        % (len(body) if length is None else length, body)
    )


def rest(connection: socket.socket) -> bytes:
    """What a connection still brings until its end."""
    found = b""
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(65536):
            found += part
    return found


def sentence(answer: bytes) -> str:
    """The one of an answer that refuses, the first where there are more."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith((b"HTTP/1.1 4", b"HTTP/1.1 503")), answer[:500]
    found, _ = json.JSONDecoder().raw_decode(body.decode())
    assert list(found) == ["error"] and 0 < len(found["error"]) < 400, answer[:500]
    assert "\n" not in found["error"], answer[:500]
    return found["error"]
