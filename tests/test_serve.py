"""`vdvae models serve` answers what it should, refuses the rest in a sentence, and stays alive."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit

import numpy as np
import pytest
import torch
from chromium import chromium
from conftest import ROOT
from PIL import Image
from playwright.sync_api import expect
from registry_project import NAME, Project, enter
from served import application, get, model, post, rest, sentence, served

from pipeline.cli.main import main
from pipeline.registry import connections, serve
from pipeline.registry import use as models
from pipeline.services.definitions import free_ports
from vdvae.levels import levels_to_uint8

pytestmark = pytest.mark.integration

TOKEN = "a token of more than sixteen characters"
DRAW = {"mode": "sample", "n": 3, "temperature": 0.85, "seed": 7}


class Answer(NamedTuple):
    status: int
    body: bytes

    @property
    def error(self) -> str:
        """The sentence, which is all that there is."""
        found = json.loads(self.body)
        assert list(found) == ["error"] and "Traceback" not in found["error"], found
        assert "\n" not in found["error"] and 0 < len(found["error"]) < 400, found
        return found["error"]


class Client:
    """Asks a server on this machine."""

    def __init__(self, port: int) -> None:
        self.port = port

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return Answer(answer.status, answer.read())
        finally:
            connection.close()

    def post(self, value: Any, token: str = TOKEN) -> Answer:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {token}"}
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        return self.ask("POST", "/invocations", body, **headers)


@pytest.fixture(scope="module")
def project(tmp_path_factory, empty_store) -> Iterator[Project]:
    """A project with a registered model; the current folder of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        enter(tmp_path_factory.mktemp("project"), patch, empty_store)
        project = Project()
        project.finish_training(weights=0, bits=2.0)
        project.register()
        patch.setenv("MLFLOW_TRACKING_URI", project.places.tracking_uri)
        patch.delenv("MLFLOW_REGISTRY_URI", raising=False)  # the tracking server's own
        yield project


@pytest.fixture(scope="module")
def server(project) -> Iterator[Client]:
    """A server of that model which asks for a token."""
    (port,) = free_ports(1)
    command = [sys.executable, "-c", "from pipeline.cli.main import main; main()"]
    process = subprocess.Popen(
        [*command, "models", "serve", f"{NAME}@champion", "--port", str(port)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "VDVAE_SERVE_TOKEN": TOKEN},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith(f"{NAME} version 1 at http://127.0.0.1:{port}/ (with a token)"), line
        client = Client(port)
        while True:
            try:
                client.ask("GET", "/ping")
                break
            except ConnectionRefusedError:
                time.sleep(0.1)
        yield client
        assert process.poll() is None  # whatever was asked of it
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)


def images(n: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return levels_to_uint8(rng.integers(0, 17, (n, 8, 8, 1)), 17)


def test_scores_and_samples_are_those_of_the_model(server):
    x_NHWC = images(5)
    answer = server.post({"inputs": x_NHWC.tolist()})
    assert answer.status == 200, answer
    import mlflow

    model = mlflow.pyfunc.load_model(f"models:/{NAME}@champion")
    bits = [row["bits_per_dim"] for row in json.loads(answer.body)["predictions"]]
    np.testing.assert_allclose(bits, model.predict(x_NHWC)["bits_per_dim"], rtol=1e-6)
    seeded = server.post({"instances": x_NHWC.tolist(), "params": {"seed": 1}})
    assert json.loads(seeded.body) != json.loads(answer.body)

    drawn = server.post({"inputs": [], "params": DRAW})
    expected = models.sample(NAME, n=3, temperature=0.85, seed=7)
    assert json.loads(drawn.body)["predictions"] == expected.tolist()
    authorization = {"Authorization": f"Bearer {TOKEN}"}
    path = "/sample.png?n=3&temperature=0.85&seed=7"
    picture = server.ask("GET", path, **authorization)
    assert picture.status == 200
    assert picture.body == server.ask("GET", path, **authorization).body
    assert picture.body != server.ask("GET", path.replace("=7", "=8"), **authorization).body
    assert Image.open(io.BytesIO(picture.body)).format == "PNG"
    page = server.ask("GET", "/")
    assert page.status == 200 and f"<h1>{NAME} version 1</h1>".encode() in page.body
    assert b"//" not in page.body  # nothing from elsewhere
    assert [server.ask("GET", path).status for path in ("/ping", "/health", "/version")] == [
        200
    ] * 3


def test_the_page_draws_samples_and_asks_nobody_else(server):
    with chromium() as browser:
        page = browser.new_page()
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        errors: list[object] = []
        page.on("pageerror", lambda error: errors.append(error))
        page.goto(f"http://127.0.0.1:{server.port}/")
        status, image = page.locator("p"), page.locator("img")
        expect(status).to_have_text("authorization: is not 'Bearer' and the token of this server")
        page.get_by_label("token").fill(TOKEN)
        page.get_by_role("button", name="Draw").click()
        expect(image).to_have_attribute("alt", "samples at temperature=1&seed=0&n=16")
        page.get_by_label("temperature").fill("0.5")
        expect(image).to_have_attribute("alt", "samples at temperature=0.5&seed=0&n=16")
        expect(image).to_have_js_property("naturalWidth", 202)  # 4 x 4 images
        expect(status).to_have_text("")
    assert errors == []
    assert {urlsplit(url.removeprefix("blob:")).hostname for url in asked} == {"127.0.0.1"}


X = images(1).tolist()
BAD: dict[str, tuple[Any, int, str]] = {
    "no JSON": (b"{", 400, "is not JSON"),
    "not text": (b"\xff\xfe", 400, "is not JSON"),
    "deep": (b'{"inputs":' + b"[" * 60_000, 400, "is not JSON"),
    "deep and whole": (b'{"inputs":' + b"[" * 100 + b"]" * 100 + b"}", 422, "of the shape"),
    "digits": (b'{"inputs":' + b"9" * 5000 + b"}", 400, "is not JSON"),
    "a list": (X, 400, "not a JSON object"),
    "empty": ({}, 400, "keys 'inputs'"),
    "two inputs": ({"inputs": X, "instances": X}, 400, "keys 'inputs'"),
    "more keys": ({"inputs": X, "other": 1}, 400, "keys 'inputs'"),
    "a table": ({"dataframe_split": {"data": [[1]]}}, 400, "keys 'inputs'"),
    "no images": ({"inputs": []}, 422, "of the shape (N, 8, 8, 1)"),
    "null": ({"inputs": None}, 422, "of the shape"),
    "one image": ({"inputs": X[0]}, 422, "of the shape"),
    "another size": ({"inputs": [[[[1]]]]}, 422, "of the shape"),
    "ragged": ({"inputs": [X[0], X[0][:7]]}, 422, "of the shape"),
    "fractions": ({"inputs": (np.array(X) / 2).tolist()}, 422, "whole numbers"),
    "booleans": ({"inputs": np.array(X, bool).tolist()}, 422, "whole numbers"),
    "long texts": ({"inputs": ["x" * 30_000] + [""] * 20_000}, 422, "whole numbers"),
    "too bright": ({"inputs": (np.array(X) + 256).tolist()}, 422, "from 0 to 255"),
    "too many": ({"inputs": np.zeros((257, 8, 8, 1), int).tolist()}, 422, "256 at most"),
    "too large": (b" " * 200_000, 413, "bytes; send fewer images"),
    "params": ({"inputs": X, "params": [1]}, 400, "params: is not a JSON object"),
    "unknown": ({"inputs": X, "params": {"m": 1}}, 422, "params: 'm' is not mode, n"),
    "type": ({"inputs": X, "params": {"seed": "1"}}, 422, "seed: is not of the type long"),
    "flag": ({"inputs": X, "params": {"seed": True}}, 422, "seed: is not of the type long"),
    "seed": ({"inputs": X, "params": {"seed": -1}}, 422, "seed: -1 is out of bounds"),
    "vast seed": ({"inputs": X, "params": {"seed": 10**300}}, 422, "no number"),
    "nan": (b'{"inputs": [], "params": {"mode": "sample", "temperature": NaN}}', 422, "no number"),
    "mode": ({"inputs": X, "params": {"mode": "draw"}}, 422, "mode: 'draw' is unknown"),
    "n": ({"inputs": [], "params": {"mode": "sample", "n": 257}}, 422, "n: is more than 256"),
    "none": ({"inputs": [], "params": {"mode": "sample", "n": 0}}, 422, "n: 0 is out of bounds"),
    "hot": ({"inputs": [], "params": DRAW | {"temperature": 3}}, 422, "temperature: 3.0 is out"),
    "both": ({"inputs": X, "params": DRAW}, 422, "sampling reads none"),
}


def test_four_at_once_half_of_them_bad(server):
    good = {"inputs": images(16).tolist()}
    bad = list(BAD.items())
    many = int(os.environ.get("VDVAE_TEST_REQUESTS", 80))

    def ask(number: int) -> None:
        if number % 2:
            assert server.post(good).status == 200
            return
        name, (value, status, words) = bad[number // 2 % len(bad)]
        answer = server.post(value)
        assert answer.status == status, (name, answer)
        assert words in answer.error, (name, answer)

    began = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(many)))
    print(f"{many} requests, 4 at once: {many / (time.monotonic() - began):.0f} a second")
    assert server.post(good).status == 200


def test_what_is_no_request_to_the_model(server):
    json_type = {"Content-Type": "application/json"}
    for token in ("", "wrong", TOKEN[:-1], TOKEN + "x"):
        answer = server.post({"inputs": X}, token)
        assert answer.status == 401 and "authorization: is not 'Bearer'" in answer.error
    assert server.ask("POST", "/invocations", b"{}", **json_type).status == 401
    assert server.ask("GET", "/sample.png").status == 401
    allowed = {"Authorization": f"Bearer {TOKEN}"}
    for query, words in (
        ("n=x", "n: is not a number"),
        ("n=1e3", "n: is not a number"),
        ("n=999", "n: is more than 256"),
        ("temperature=inf", "temperature: is no number"),
        ("temperature=9", "temperature: 9.0 is out of bounds"),
        (f"seed={2**31}", "seed: 2147483648 is out of bounds"),
        ("mode=score", "'mode' is not n, temperature or seed"),
    ):
        answer = server.ask("GET", f"/sample.png?{query}", **allowed)
        assert answer.status == 422 and words in answer.error, answer
    for method, path, status in (
        ("GET", "/invocations", 405),
        ("POST", "/", 405),
        ("GET", "/docs", 404),
        ("GET", "/../etc/passwd", 404),
    ):
        answer = server.ask(method, path, **allowed)
        assert answer.status == status and "is not served; there are" in answer.error
    assert server.ask("POST", "/invocations", b"1,2", **allowed).status == 415
    # More than was announced, a length that is none, and no HTTP at all.
    headers = f"POST /invocations HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
    headers += "Content-Type: application/json\r\n"
    for text, status in (
        (headers + "Transfer-Encoding: chunked\r\n\r\n" + "30000\r\n" + "x" * 196_608, "413"),
        (headers + "Content-Length: 999999999\r\n\r\n", "413"),
        (headers + "Content-Length: -1\r\n\r\n", "4"),
        ("nonsense\r\n\r\n", "4"),
    ):
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
            connection.sendall(text.encode())
            assert connection.recv(100).decode().startswith(f"HTTP/1.1 {status}"), text[:200]


def test_a_failure_of_ours_is_told_to_the_log_alone(project, caplog):
    import mlflow
    from starlette.testclient import TestClient

    class Broken:
        metadata = mlflow.pyfunc.load_model(f"models:/{NAME}@champion").metadata

        def predict(self, *_: Any, **__: Any) -> None:
            raise RuntimeError("out of memory at 0x7f")

    client = TestClient(serve.application(Broken(), NAME))
    answer = client.post("/invocations", json={"inputs": X})
    assert answer.status_code == 500
    assert answer.json() == {"error": "the model failed; the server's log says why"}
    assert "out of memory at 0x7f" in caplog.text


@pytest.mark.parametrize(
    ("words", "environment", "sentence"),
    [
        (["--host", "0.0.0.0"], {}, "--host: 0.0.0.0 can be reached from other machines; set"),
        (["--host", "localhost"], {}, "--host: 'localhost' is not an IP address"),
        (["--token-env", "MINE"], {}, "MINE: is not set; export it"),
        ([], {"VDVAE_SERVE_TOKEN": "short"}, "VDVAE_SERVE_TOKEN: is not 16 or more printable"),
        (["--port", "99999"], {}, "--port: cannot listen on 127.0.0.1 port 99999"),
    ],
)
def test_an_address_or_a_token_that_will_not_do(monkeypatch, capsys, words, environment, sentence):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        main(["models", "serve", NAME, *words])
    assert ended.value.code == 2
    assert f"error: {sentence}" in capsys.readouterr().err


def test_a_port_that_is_taken_and_a_model_that_is_not_what_was_registered(project, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        with pytest.raises(SystemExit):
            main(["models", "serve", NAME, "--port", str(other.getsockname()[1])])
        assert "Address already in use" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["models", "serve", f"{NAME}/9", "--port", str(free_ports(1)[0])])
    assert f"{NAME} has no version 9" in capsys.readouterr().err
    [code] = Path("mlruns").rglob("pyfunc_model.py")
    text = code.read_text()
    code.write_text(text + "\n")
    with pytest.raises(SystemExit):
        main(["models", "serve", NAME, "--port", str(free_ports(1)[0])])
    assert f"{NAME} version 1: pyfunc_model.py: has changed" in capsys.readouterr().err
    code.write_text(text)


OPEN = b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
ONE = {"inputs": X}


def test_any_number_of_connections_that_ask_nothing_stop_nobody(monkeypatch):
    monkeypatch.setattr(connections, "MOST_OPEN", 16)
    with served(application()) as at:
        begun = (b"", b"GET /pi", OPEN, OPEN + b"Content-Length: 9\r\n\r\n", get("/ping")[:-2])
        silent = [at.asked(begun[number % len(begun)]) for number in range(40)]
        assert at.ask(get("/ping")).startswith(b"HTTP/1.1 200")
        assert at.ask(post(ONE)).startswith(b"HTTP/1.1 200")
        assert rest(silent[0]) == b""  # the oldest gave way
        for connection in silent:
            connection.close()


def test_a_connection_has_so_many_seconds_to_ask_something():
    with served(application(0.2), 0.2) as at:
        # Silence; headers that drip; an answer, and then silence; what drips after a refusal.
        assert at.ask(b"") == at.ask(OPEN) == b""
        kept = at.asked(get("/ping").replace(b"close", b"keep-alive"))
        assert rest(kept).startswith(b"HTTP/1.1 200")
        for begun in (OPEN + b"A: ", OPEN + b"Content-Length: 999999999\r\n\r\n"):
            connection = at.asked(begun)
            answer = b""
            with contextlib.suppress(ConnectionError):
                while True:
                    connection.sendall(b"a")
                    if select.select([connection], [], [], 0.01)[0]:
                        part = connection.recv(65536)
                        answer += part
                        if not part:
                            break
            assert answer == b"" or sentence(answer).startswith("the request has more than")
        # A body that is late, and one that drips: `silence` and the whole time.
        assert "did not arrive within" in sentence(at.ask(post(b"", 9)))


def test_a_body_that_drips_has_a_time_too(monkeypatch):
    monkeypatch.setattr(serve, "_BODY_SECONDS", 0.2)
    with served(application()) as at, at.asked(post(b"", 9999)) as connection:
        while not select.select([connection], [], [], 0.01)[0]:
            connection.sendall(b" ")
        assert "did not arrive within 0.2 s" in sentence(rest(connection))


def test_an_answer_that_nobody_takes_is_given_up(monkeypatch):
    monkeypatch.setattr(connections, "_ANSWER_SECONDS", 0.1)
    from starlette.responses import Response

    with served(Response(b"x" * 2**25)) as at, at.asked(get("/")):
        while not at.server.server_state.total_requests:
            time.sleep(0.01)
        while at.server.server_state.connections:
            time.sleep(0.01)


class Endless:
    """A `score` that computes until it is stopped."""

    def __init__(self) -> None:
        self.began, self.ended = threading.Semaphore(0), threading.Semaphore(0)
        self.layer = torch.nn.Identity()

    def __call__(self, *_: Any) -> None:
        self.began.release()
        try:
            while True:
                self.layer(torch.zeros(()))
        finally:
            self.ended.release()


def test_work_ends_when_its_client_has_gone_and_so_much_may_wait():
    endless = Endless()
    with served(application(score=endless)) as at:
        at.asked(post(ONE)).close()
        assert endless.ended.acquire(timeout=60)
        # One is computed, the others wait, the one more is refused; the rest lives.
        waiting = [at.asked(post(ONE)) for _ in range(serve._WAITING + 1)]
        refused, _, _ = select.select(waiting, [], [], 60)
        assert "32 requests are being computed or wait" in sentence(rest(refused[0]))
        assert at.ask(get("/ping")).startswith(b"HTTP/1.1 200")
        for connection in waiting:
            connection.close()  # what is in work ends, what waits does not begin, or ends, too
        assert at.ask(get("/sample.png?n=1")).startswith(b"HTTP/1.1 200")


def test_the_server_ends_with_work_in_progress(monkeypatch):
    monkeypatch.setattr(connections, "_END_SECONDS", 0.1)
    endless = Endless()
    with served(application(score=endless)) as at:
        asked = at.asked(post(ONE)), at.asked(post(b"", 9)), at.connect()
        assert endless.began.acquire(timeout=60)
    assert endless.ended.acquire(timeout=60)
    assert "the server is ending" in sentence(rest(asked[0]))
    assert [rest(connection)[:12] for connection in asked[1:]] == [b"HTTP/1.1 503", b""]


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("seed=" + "0" * 40 + "7", "seed: is not a number of at most 40"),
        ("n=3&n=4", "n: is given twice"),
        ("n=3&n=3", "n: is given twice"),
        ("n=", "n: is not a number"),
        ("seed=1_0", "seed: is not a number"),
        ("seed=%D9%A3", "seed: is not a number"),  # a digit of another script
        ("seed=%207", "seed: is not a number"),
        ("seed=7%0a", "seed: is not a number"),
        ("seed=7.0", "seed: is not a number"),
        ("temperature=nan", "temperature: is no number"),
        ("temperature=1e999", "temperature: is no number"),
        ("temperature=true", "temperature: is not a number"),
        ("%F0%9F=1", "is not n, temperature or seed"),
        ("x" * 9000, "is not n, temperature or seed"),
    ],
)
def test_an_address_is_not_understood_half(query, words):
    gate = serve.Gate(model())
    with pytest.raises(serve.Refused) as refused:
        gate.params_of_query(parse_qsl(query, keep_blank_values=True))
    assert refused.value.status == 422 and words in refused.value.sentence
    assert len(refused.value.sentence) < 200


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b'{"inputs": [], "inputs": []}', 400, "has the key 'inputs' twice"),
        (b'{"inputs": [], "params": {"seed": 1, "seed": 2}}', 400, "has the key 'seed' twice"),
        (b'{"inputs": [], "params": false}', 400, "params: is not a JSON object"),
        (b'{"inputs": [], "params": {"mode": "sample", "n": null}}', 422, "n: is not of the type"),
        ({"inputs": X * 256, "params": {"passes": 5}}, 422, "images times passes are 1024"),
        ({"inputs": X, "params": {"passes": 1025}}, 422, "images times passes are 1024"),
        ({"inputs": X, "params": {"passes": 0}}, 422, "passes: 0 is out of bounds"),
    ],
)
def test_a_body_is_not_understood_half(body, status, words):
    gate = serve.Gate(model())
    with pytest.raises(serve.Refused) as refused:
        gate.answer(body if isinstance(body, bytes) else json.dumps(body).encode())
    assert refused.value.status == status and words in refused.value.sentence


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"seed": None}, "seed: None is not a whole number"),
        ({"seed": True}, "seed: True is not a whole number"),
        ({"seed": 1.5}, "seed: 1.5 is not a whole number"),
        ({"seed": "7" * 9999}, "seed: '7777"),
        ({"passes": None}, "passes: None is not a whole number"),
        ({"mode": ["x" * 9999]}, "is unknown; use 'score' or 'sample'"),
        ({"mode": "sample", "n": None}, "n: None is not a whole number"),
        ({"mode": "sample", "temperature": None}, "temperature: None is not a number"),
        ({"mode": "sample", "temperature": float("nan")}, "temperature: nan is out of bounds"),
    ],
)
def test_the_models_parameters_are_what_they_should_be(params, words):
    images = model().unwrap_python_model()
    x_NHWC = np.zeros((0 if "sample" in params.values() else 1, 8, 8, 1), np.uint8)
    with pytest.raises(ValueError) as refused:
        images.predict(None, x_NHWC, params)
    assert words in str(refused.value) and len(str(refused.value)) < 200


def test_a_masked_image_is_refused_and_one_without_a_mask_is_not():
    x_NHWC = np.ma.masked_array(np.array(X, np.uint8), mask=False)
    assert len(model().predict(x_NHWC)) == 1
    x_NHWC[0, 0, 0, 0] = np.ma.masked
    with pytest.raises(ValueError, match="images: some values are masked"):
        model().predict(x_NHWC)
