"""`vdvae models serve`: one registered model over HTTP, in MLflow's JSON, and a page of samples.

What comes in is bounded before the model sees it: seconds, bytes, images, passes, parameters. What
is refused gets a 4xx code, or 503, and `{"error": one sentence}`; a stack trace stays in the
server's log. One request at a time is computed, others wait, so memory is bounded too; work ends
when its client has gone. Without a token it listens on loopback.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import html
import io
import ipaddress
import json
import logging
import math
import os
import re
import socket
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.settings import Settings
from vdvae.config import UserError

if TYPE_CHECKING:
    import numpy as np
    from mlflow.pyfunc import PyFuncModel
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

MOST_IMAGES = 256  # of a request, fewer where they are large
_MOST_VALUES = 2**22  # pixels times channels of a request: 21 images of 256x256x3
_BYTES_A_VALUE = 6  # of JSON: "255, " and some brackets
_MOST_PASSES = 4  # of as many images; of fewer images more
_BODY_SECONDS = 30  # for a request to arrive
_WAITING = 32  # requests that are computed or wait for it, and as many largest ones that arrive
_MOST_DIGITS = 40  # of a number in an address
_MOST_TIMEOUT = 600  # seconds
_LEAST_TOKEN = 16  # characters

_log = logging.getLogger(__name__)


def serve(reference: str, host: str, port: int, token_variable: str | None, timeout: float) -> None:
    """Serves until a signal.

    Args:
        reference: of a registered model.
        host: an IP address.
        port: to listen on.
        token_variable: holds the token that requests must bring; None: VDVAE_SERVE_TOKEN.
        timeout: seconds that a connection may take to send a request's headers, or say nothing.

    Raises:
        UserError: no such model, a port that is taken, or an address that wants a token.
    """
    if not 0 < timeout <= _MOST_TIMEOUT:
        raise UserError(
            f"--timeout: {timeout:g} is out of bounds; use up to {_MOST_TIMEOUT} seconds"
        )
    token = _token(token_variable)
    listener = _listen(host, port, token)

    import mlflow

    from pipeline.params import Places
    from pipeline.registry.connections import server
    from pipeline.registry.lineage import check_files
    from pipeline.registry.versions import client_of, download, find

    places = Places.from_env()
    with tempfile.TemporaryDirectory() as folder:
        with client_of(places) as client:
            version = find(client, reference, places)
            root = download(version, places, Path(folder))
        for difference in check_files(root, version.tags.get("files_sha256", "")):
            raise UserError(f"{version}: {difference}; restore the artifacts, or register it again")
        model = mlflow.pyfunc.load_model(str(root))
    app = application(model, str(version), token, timeout)
    host, port = listener.getsockname()[:2]
    print(
        f"{version} at http://{f'[{host}]' if ':' in host else host}:{port}/ "
        f"({'with a token' if token else 'without a token'}); Ctrl-C ends it",
        flush=True,
    )
    with contextlib.suppress(KeyboardInterrupt):
        server(app, timeout).run(sockets=[listener])


def _token(variable: str | None) -> str:
    """The token; empty where none is wanted."""
    name = variable or "VDVAE_SERVE_TOKEN"
    token = os.environ.get(variable, "") if variable else Settings().serve_token
    if variable and not token:
        raise UserError(f"{name}: is not set; export it with the token that requests must bring")
    if token and not (len(token) >= _LEAST_TOKEN and token.isascii() and token.isprintable()):
        raise UserError(
            f"{name}: is not {_LEAST_TOKEN} or more printable ASCII characters; make one with "
            f"'openssl rand -hex 32'"
        )
    return token


def _listen(host: str, port: int, token: str) -> socket.socket:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        raise UserError(f"--host: {host!r} is not an IP address; use 127.0.0.1") from None
    if not address.is_loopback and not token:
        raise UserError(
            f"--host: {host} can be reached from other machines; set VDVAE_SERVE_TOKEN to a token "
            f"that requests must bring, or leave --host out"
        )
    listener = socket.socket(socket.AF_INET6 if address.version == 6 else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        raise UserError(f"--port: cannot listen on {host} port {port} ({error})") from None
    return listener


class Refused(Exception):
    """What the one who asked can mend, now or later: an HTTP code and a sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        self.status, self.sentence = status, sentence


_ENDING = (503, "the server is ending; ask again later")


class _Unwanted(Exception):
    """Nobody waits for the answer any more."""


def application(
    model: PyFuncModel, name: str, token: str = "", silence: float = _BODY_SECONDS
) -> Starlette:
    """The server as an ASGI application.

    Args:
        model: as `mlflow.pyfunc.load_model` gives it.
        name: of the model, for the page.
        token: that requests to the model must bring; empty: none.
        silence: seconds without a byte after which a request that has begun is given up.
    """
    import mlflow
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
    from starlette.routing import Route

    gate = Gate(model)
    worker = ThreadPoolExecutor(1, "model")
    waiting = arriving = 0  # requests; bytes of requests

    async def compute(request: Request, work: Callable[[], bytes]) -> bytes:
        """The answer; the work ends, or does not begin, where the client goes or we do."""
        nonlocal waiting
        if waiting == _WAITING:
            raise Refused(503, f"{_WAITING} requests are being computed or wait; ask again later")
        unwanted = threading.Event()
        found = asyncio.wrap_future(worker.submit(_unless, unwanted, work))
        gone = asyncio.create_task(_gone(request))
        waiting += 1
        try:
            await asyncio.wait((found, gone), return_when=asyncio.FIRST_COMPLETED)
            if not found.done():
                raise ClientDisconnect
            return found.result()
        except asyncio.CancelledError:
            raise Refused(*_ENDING) from None
        except (Refused, ClientDisconnect):
            raise
        except Exception:
            _log.exception("the model failed")
            raise Refused(500, "the model failed; the server's log says why") from None
        finally:
            waiting -= 1
            unwanted.set()
            found.cancel()
            gone.cancel()

    async def page(request: Request) -> Response:
        text = _PAGE.replace("{name}", html.escape(name)).replace("{most}", str(gate.most))
        text = text.replace("{hidden}", "" if token else "hidden")
        return HTMLResponse(text, headers={"Content-Security-Policy": _POLICY})

    async def sample(request: Request) -> Response:
        _check_token(request, token)
        params = gate.params_of_query(request.query_params.multi_items())
        picture = await compute(request, lambda: gate.picture(params))
        return Response(picture, media_type="image/png")

    async def invocations(request: Request) -> Response:
        nonlocal arriving
        _check_token(request, token)
        kind = request.headers.get("content-type", "").partition(";")[0].strip()
        if kind != "application/json":
            raise Refused(415, f"content-type: {kind[:100]!r} is not application/json")
        body = bytearray()
        try:
            await _arrive(request, body, gate.most_bytes, silence, make_room)
            answer = await compute(request, lambda: gate.answer(body))
            return Response(answer, media_type="application/json")
        finally:
            arriving -= len(body)

    def make_room(size: int) -> None:
        nonlocal arriving
        if arriving + size > _WAITING * gate.most_bytes:
            raise Refused(503, "too many requests arrive; ask again later")
        arriving += size

    async def alive(request: Request) -> Response:
        return PlainTextResponse("\n")

    async def version(request: Request) -> Response:
        return PlainTextResponse(mlflow.__version__)

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else None
        return JSONResponse({"error": error.sentence}, error.status, headers)

    async def left(request: Request, error: Exception) -> Response:
        return Response(status_code=408)  # which nobody reads

    async def unknown(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        sentence = (
            f"{request.method[:20]} {request.scope['path'][:100]!r}: is not served; "
            f"there are GET /, GET /sample.png, POST /invocations, GET /ping and GET /version"
        )
        return JSONResponse({"error": sentence}, error.status_code)

    return Starlette(
        routes=[
            Route("/", page),
            Route("/sample.png", sample),
            Route("/invocations", invocations, methods=["POST"]),
            Route("/ping", alive),
            Route("/health", alive),
            Route("/version", version),
        ],
        exception_handlers={Refused: refused, ClientDisconnect: left, HTTPException: unknown},
    )


def _check_token(request: Request, token: str) -> None:
    given = request.headers.get("authorization", "").encode()
    if token and not hmac.compare_digest(given, f"Bearer {token}".encode()):
        raise Refused(401, "authorization: is not 'Bearer' and the token of this server")


async def _arrive(
    request: Request, body: bytearray, most: int, silence: float, make_room: Callable[[int], None]
) -> None:
    """Appends what a request brings to `body`, in time and in bounds."""
    too_large = Refused(413, f"the request has more than {most:,} bytes; send fewer images")
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or len(length) > 20 or int(length) > most:
        raise too_large  # before it is read
    now = asyncio.get_running_loop().time
    end = now() + _BODY_SECONDS
    try:
        async with asyncio.timeout(silence) as limit:
            async for part in request.stream():
                if len(body) + len(part) > most:
                    raise too_large
                make_room(len(part))
                body += part
                limit.reschedule(min(end, now() + silence))
    except TimeoutError:
        raise Refused(
            408,
            f"the request did not arrive within {_BODY_SECONDS} s, "
            f"or {silence:g} s of it brought nothing",
        ) from None
    except asyncio.CancelledError:
        raise Refused(*_ENDING) from None


async def _gone(request: Request) -> None:
    """Returns when the client of a request that has arrived has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _unless(unwanted: threading.Event, work: Callable[[], bytes]) -> bytes:
    """The work, which ends before its model's next layer once it is unwanted.

    A hook of PyTorch asks, since a registered version brings code of its own.
    """
    from torch.nn.modules.module import register_module_forward_pre_hook

    def ask(*_: object) -> None:
        if unwanted.is_set():
            raise _Unwanted

    hook = register_module_forward_pre_hook(ask)
    try:
        ask()
        return work()
    finally:
        hook.remove()


class Gate:
    """Lets through what the model can answer within bounds, in MLflow's JSON; refuses the rest."""

    def __init__(self, model: PyFuncModel) -> None:
        inputs, params = model.metadata.get_input_schema(), model.metadata.get_params_schema()
        self.model = model
        self.shape_HWC: tuple[int, ...] = tuple(inputs.inputs[0].shape[1:])
        values = math.prod(self.shape_HWC)
        self.most = max(1, min(MOST_IMAGES, _MOST_VALUES // values))  # images of a request
        self.most_bytes = 2**16 + _BYTES_A_VALUE * values * self.most
        passes = next((spec.default for spec in params.params if spec.name == "passes"), 1)
        self.most_passes = max(_MOST_PASSES * self.most, passes)  # times images
        self.params = {spec.name: (spec.dtype.name, spec.default) for spec in params.params}

    def answer(self, body: bytes | bytearray) -> bytes:
        """The JSON for that of a request: `{"inputs": images, "params": {…}}`.

        Images are lists of lists, N H W C, of whole numbers from 0 to 255. For `mode` "sample"
        the list is empty, which MLflow's own server cannot take.

        Raises:
            Refused: for anything else.
        """
        from mlflow.pyfunc.scoring_server import predictions_to_json

        try:
            given = json.loads(body, object_pairs_hook=_once)
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"the request is not JSON ({error})") from None
        if not isinstance(given, dict):
            raise Refused(400, 'the request is not a JSON object; send {"inputs": […]}')
        inputs = [key for key in given if key in ("inputs", "instances")]
        if len(inputs) != 1 or given.keys() - {"inputs", "instances", "params"}:
            raise Refused(400, "the request does not have the keys 'inputs' and, if any, 'params'")
        params = self._checked({} if given.get("params") is None else given["params"])
        if params["mode"] == "sample" and given[inputs[0]] == []:
            images_NHWC = self._no_images()
        else:
            images_NHWC = self._images(given[inputs[0]])
            if len(images_NHWC) * params.get("passes", 1) > self.most_passes:
                raise Refused(
                    422,
                    f"passes: {params['passes']} of {len(images_NHWC)} images; images times passes "
                    f"are {self.most_passes} at most",
                )
        result = io.StringIO()
        predictions_to_json(self._predict(images_NHWC, params), result)
        return result.getvalue().encode()

    def picture(self, params: dict[str, Any]) -> bytes:
        """Samples as a PNG."""
        from pipeline.pictures import save_grid

        images_NHWC = self._predict(self._no_images(), params)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "samples.png"
            save_grid(path, images_NHWC)
            return path.read_bytes()

    def params_of_query(self, query: Sequence[tuple[str, str]]) -> dict[str, Any]:
        """The parameters of a picture from the names and values of its address."""
        kinds = {"n": int, "temperature": float, "seed": int}
        params: dict[str, Any] = {"mode": "sample"}
        for name, text in query:
            if name not in kinds:
                raise Refused(422, f"{name[:40]!r} is not n, temperature or seed")
            if name in params:
                raise Refused(422, f"{name}: is given twice")
            try:
                # Python would take digits of other scripts, spaces and underscores, too.
                if not re.fullmatch(rf"[-+.\w]{{1,{_MOST_DIGITS}}}", text, re.ASCII) or "_" in text:
                    raise ValueError
                params[name] = kinds[name](text)
            except ValueError:
                raise Refused(
                    422, f"{name}: is not a number of at most {_MOST_DIGITS} characters"
                ) from None
        return self._checked(params)

    def _checked(self, params: Any) -> dict[str, Any]:
        """Parameters with the model's defaults, of the right types; bounds are the model's."""
        if not isinstance(params, dict):
            raise Refused(400, "params: is not a JSON object")
        for name, value in params.items():
            if name not in self.params:
                raise Refused(422, f"params: {name[:40]!r} is not {', '.join(self.params)}")
            kind = self.params[name][0]
            if type(value) not in _KINDS[kind]:
                raise Refused(422, f"params: {name}: is not of the type {kind}")
            if kind != "string" and not abs(value) < 2**63:
                raise Refused(422, f"params: {name}: is no number that can be computed with")
        found = {name: default for name, (_, default) in self.params.items()} | params
        if found["mode"] == "sample" and found["n"] > self.most:
            raise Refused(422, f"n: is more than {self.most}, the most images of a request")
        return found

    def _images(self, values: Any) -> np.ndarray:
        import numpy as np

        # Of objects: a type of NumPy's own would be as wide as the longest text among them.
        images = np.asarray(values, object)
        if images.shape[1:] != self.shape_HWC or set(map(type, images.flat)) != {int}:
            wanted = ", ".join(map(str, self.shape_HWC))
            raise Refused(422, f"inputs: are not whole numbers of the shape (N, {wanted})")
        if len(images) > self.most:
            raise Refused(422, f"inputs: {len(images)} images; a request has {self.most} at most")
        if images.min() < 0 or images.max() > 255:
            raise Refused(422, "inputs: a value is not from 0 to 255")
        return images.astype(np.uint8)

    def _no_images(self) -> np.ndarray:
        import numpy as np

        return np.empty((0, *self.shape_HWC), np.uint8)

    def _predict(self, images_NHWC: np.ndarray, params: dict[str, Any]) -> Any:
        try:
            return self.model.predict(images_NHWC, params=params)
        except ValueError as error:  # the model's word for what the user can mend
            raise Refused(422, " ".join(str(error).split())[:300]) from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of a key that it has twice one value would be lost in silence."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise Refused(400, f"the request has the key {key[:40]!r} twice")
        found[key] = value
    return found


_KINDS = {"string": (str,), "long": (int,), "double": (float, int)}  # MLflow's types of parameters

_POLICY = (
    "default-src 'none'; connect-src 'self'; img-src blob:; "
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'"
)

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{name}</title>
<style>
  :root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
  body { max-width: 44rem; margin: 2rem auto; padding: 0 1rem }
  form { display: flex; flex-wrap: wrap; gap: 1rem; align-items: end }
  label:not([hidden]) { display: grid }
  input, button { font: inherit }
  input { width: 9rem }
  img { width: min(100%, 32rem); image-rendering: pixelated }
</style>
<h1>{name}</h1>
<form>
  <label><span>temperature <b></b></span>
    <input name="temperature" type="range" min="0" max="2" step="0.05" value="1"></label>
  <label>seed <input name="seed" type="number" min="0" max="2147483647" value="0"></label>
  <label>images <input name="n" type="number" min="1" max="{most}" value="16"></label>
  <label {hidden}>token <input id="token" type="password" autocomplete="off"></label>
  <button>Draw</button>
</form>
<p role="status"></p>
<img alt="">
<script>
  const form = document.forms[0], image = document.querySelector("img");
  const status = document.querySelector("p"), token = document.getElementById("token");
  form.onsubmit = async event => {
    event.preventDefault();
    const query = new URLSearchParams(new FormData(form));
    status.textContent = "drawing…";
    const headers = token.value ? {Authorization: "Bearer " + token.value} : {};
    try {
      const answer = await fetch("sample.png?" + query, {headers});
      if (!answer.ok) throw new Error((await answer.json()).error);
      URL.revokeObjectURL(image.src);
      image.src = URL.createObjectURL(await answer.blob());
      image.alt = "samples at " + query;
      status.textContent = "";
    } catch (error) {
      status.textContent = error.message;
    }
  };
  form.oninput = () => { form.querySelector("b").textContent = form.temperature.value };
  form.temperature.onchange = () => form.requestSubmit();
  form.oninput();
  form.requestSubmit();
</script>
</html>
"""
