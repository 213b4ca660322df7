"""`vdvae models serve` and requests that nobody sends by mistake, from seeded generators."""

from __future__ import annotations

import json
import logging
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from repetitions import repetitions
from served import Served, application, get, post, rest, sentence, served

from pipeline.registry import connections

N = repetitions(1000)  # of each kind
SECONDS = 0.2  # for headers, and without a byte of a body
ASKERS = 16
SILENT = 32  # connections that are open meanwhile, as many as there may be

IMAGE = np.zeros((1, 8, 8, 1), int).tolist()
WORDS: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, float("nan"),
    float("inf"), "", "sample", "score", "x" * 5000, "\ud800", "\0", "٣", [], {}, [[]], IMAGE,
    IMAGE * 300, [IMAGE], {"mode": "sample"}, [1, [2]], {"inputs": IMAGE}, [IMAGE[0], None],
]  # fmt: skip
NAMES = [
    "inputs",
    "instances",
    "params",
    "mode",
    "n",
    "seed",
    "passes",
    "temperature",
    "",
    "x" * 99,
]
NUMBERS = [
    "0", "1", "-1", "16", "256", "257", "2147483647", "2147483648", "9" * 39, "9" * 41, "1e3",
    "nan", "inf", "-inf", "1e-400", "0x10", "1_0", "+1", "%2B1", "%00", "%0d%0aX:y", "", "%",
    "%zz", "%D9%A3", "1%20", "0.5", ".", "--1", "None", "true", "[1]", "é", "\x7f",
]  # fmt: skip
LINES = [
    b"Content-Length: 5", b"Content-Length: -1", b"Content-Length: 9" + b"9" * 30,
    b"Content-Length: 5, 5", b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip, chunked",
    b"Expect: 100-continue", b"Connection: Upgrade\r\nUpgrade: websocket", b"Upgrade: h2c",
    b"Connection: keep-alive", b"Host: y", b"Host:", b": nothing", b"no colon", b" folded",
    b"Content-Type: text/csv", b"Content-Type: \xff\xfe", b"Authorization: Bearer \xff",
    b"X: " + b"x" * 70_000, b"\0: \0", b"Range: bytes=0-1", b"Cookie: " + b"a=b;" * 2000,
]  # fmt: skip
STARTS = [
    b"GET / HTTP/1.1", b"GET /ping HTTP/1.0", b"GET /ping HTTP/9.9", b"GET /ping",
    b"PRI * HTTP/2.0", b"GET http://x/ping HTTP/1.1", b"GET //ping HTTP/1.1",
    b"CONNECT x:1 HTTP/1.1", b"OPTIONS * HTTP/1.1", b"X" * 300 + b" / HTTP/1.1",
    b"POST /invocations HTTP/1.1",
    b"GET /%0a%0d%00 HTTP/1.1", b"GET /" + b"a" * 3000 + b" HTTP/1.1", b"GET /\xff HTTP/1.1",
    b"GET /sample.png?n=1 HTTP/1.1", b"\x16\x03\x01\x02\x00\x01", b"", b"GET /../.. HTTP/1.1",
]  # fmt: skip


def raw(rng: random.Random) -> bytes:
    """A request's bytes, some of which are others than they should be."""
    head = [rng.choice(STARTS), b"Host: x", *rng.sample(LINES, rng.randrange(4))]
    body = rng.choice([b"", b"{}", b"5\r\nhello\r\n0\r\n\r\n", b"fffffffff\r\n", post({})])
    whole = bytearray(
        rng.choice([b"\r\n", b"\n", b"\r\n", b"\r\n"]).join(head) + b"\r\n\r\n" + body
    )
    if rng.random() < 0.3:
        whole = bytearray(rng.choice([get("/ping"), post({"inputs": IMAGE}), get("/sample.png")]))
    for _ in range(rng.randrange(4)):
        where = rng.randrange(len(whole) + 1)
        if rng.random() < 0.5:
            whole[where : where + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
        elif rng.random() < 0.3:
            del whole[where:]
    return bytes(whole)


def value(rng: random.Random, depth: int = 0) -> Any:
    """Something that JSON, or Python's idea of it, can say."""
    if depth < 4 and rng.random() < 0.3:
        return {rng.choice(NAMES): value(rng, depth + 1) for _ in range(rng.randrange(3))}
    if depth < 4 and rng.random() < 0.2:
        return [value(rng, depth + 1) for _ in range(rng.randrange(3))]
    return rng.choice(WORDS)


def body(rng: random.Random) -> bytes:
    """A request with something for the model."""
    names = ("mode", "n", "seed", "passes", "temperature", "m")
    params = {name: value(rng, 3) for name in rng.sample(names, rng.randrange(4))}
    given: Any = {"inputs": rng.choice([IMAGE, [], value(rng)]), "params": params}
    if rng.random() < 0.3:
        given = value(rng)
    text = json.dumps(given).encode()
    if rng.random() < 0.2:
        text = text.replace(b"{", b'{"inputs": [], ', 1)  # a key twice
    if rng.random() < 0.2:
        text = rng.choice([b"[" * 50_000, b"{" + text, text[: len(text) // 2], b"\xff" + text])
    return post(text)


def address(rng: random.Random) -> bytes:
    """A request for a picture."""
    names = ["n", "seed", "temperature", "n", "mode", "", "n%00", "x" * 3000]
    pairs = [f"{rng.choice(names)}={rng.choice(NUMBERS)}" for _ in range(rng.randrange(4))]
    path = "/sample.png?" + rng.choice("&&&;").join(pairs)
    return get(path).replace(b"n=256", b"n=2")


def slow(rng: random.Random) -> bytes:
    """What does not come to its end."""
    whole = rng.choice([get("/ping"), post({"inputs": IMAGE}), post(b"", 10**6), post(b"x", 100)])
    return whole[: rng.randrange(len(whole) + 1)]


def check(answer: bytes) -> str:
    """The kind of an answer, which is one that there may be."""
    answer = answer.removeprefix(b"HTTP/1.1 100 \r\n\r\n")
    answer = answer.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
    if answer == b"":
        return "none"  # of what was no whole request
    status = answer[9:12].decode()
    if answer.startswith(b"HTTP/1.1 200"):
        return status
    sentence(answer)
    return status


@pytest.mark.parametrize("make", [raw, body, address, slow])
def test_every_request_is_answered_or_refused_in_a_sentence(make, monkeypatch):
    monkeypatch.setattr(connections, "MOST_OPEN", SILENT)
    total: Counter[str] = Counter()
    faults: list[str] = []
    listener = logging.Handler(logging.ERROR)
    listener.emit = lambda record: faults.append(record.getMessage())  # type: ignore[method-assign]

    def ask(at: Served, number: int) -> str:
        request = make(random.Random(number))
        if make is slow and number % 2:
            at.asked(request).close()
            return "left"
        try:
            return check(at.ask(request))
        except (AssertionError, ValueError, OSError) as error:
            raise AssertionError(f"number {number}: {request[:300]!r}: {error!r}") from error

    with served(application(SECONDS), SECONDS) as at:
        for name in ("uvicorn.error", "asyncio", "pipeline.registry.serve"):
            monkeypatch.setattr(logging.getLogger(name), "handlers", [listener])
        with ThreadPoolExecutor(ASKERS) as pool:
            for start in range(0, N, 200):
                silent = [at.connect() for _ in range(SILENT)]
                total.update(pool.map(lambda n: ask(at, n), range(start, min(N, start + 200))))
                assert at.ask(get("/ping")).startswith(b"HTTP/1.1 200"), start
                assert [rest(connection) for connection in silent] == [b""] * SILENT
                for connection in silent:
                    connection.close()
        assert at.ask(post({"inputs": IMAGE})).startswith(b"HTTP/1.1 200")
    print(f"{make.__name__}: {sum(total.values())} tried: {dict(total)}")
    assert faults == []
