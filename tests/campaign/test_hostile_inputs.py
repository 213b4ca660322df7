"""What others wrote, drawn at random from a seed: each is taken, or refused in one sentence.

Everything that is written lies in the test's own folder. A failure names its surface and number:
`draw(surface, number)` makes that input again.
"""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from repetitions import repetitions

from pipeline import tracking
from pipeline.cli.main import main
from pipeline.flows.overrides import allowed_place
from pipeline.params import load_recipe
from pipeline.services.settings import Settings
from pipeline.shards import BlockCache, Manifest
from pipeline.storage import open_store
from pipeline.system.exits import as_a_command
from pipeline.system.launch import ranks_here
from vdvae.config import UserError
from vdvae.files import atomic_write
from vdvae.summary import summarise

ROOT = Path(__file__).parents[2]
N = repetitions(200)  # inputs of each surface
MOST_CPU_SECONDS = 2.0
HANGS_AFTER_SECONDS = 10
LONGEST_SENTENCE = 2100


class Hang(BaseException):
    """Nothing came back."""


def _hang(number: int, frame: object) -> None:
    raise Hang


def scalar(draw: random.Random) -> str:
    """A value of YAML that nobody would write by accident."""
    many = int(10 ** draw.uniform(0, 5.5))
    return draw.choice(
        [
            "!!int abc", "!!float x", "!!bool perhaps", "!!timestamp x", "!!binary 3", "!!set {a}",
            "2001-01-01", "2001-99-99", "9" * many, "-" + "9" * many, "0x" + "f" * many, ".nan",
            "-.inf", "1e400", "1.0e+400", "~", "yes","''", "[]", "{}", "- 1", "{a: 1, a: 2}",
            "&a [*a]", "*nothing", "? [a]\n  : b", '"\\0"', '"\\ud800"', "'\u202e\u2028'",
            "!!python/object/apply:os.system [id]", "!!python/name:os.system", "[" * many,
            "{a: " * many, ":".join(["1"] * many), "x" * many, "'" + "8x2," * many + "8x2'",
            f"8x{many}", "8x" + "9" * many, f"8x2,{'8d2,' * min(many, 999)}1x1", "8:24,8:48",
            f"'{'8:24,' * many}8:24'", "../../x", "$(id)", "s3://[", "http://[", "%", "@", "`", "|",
            "!", "&", "<<: *a", "\t", "\0", "\x85", "[[digits]]", "[{digits: 1}]",
            "[2001-01-01]", str(10**9), "-1", "1e-400", "true", "null",
        ]
    )  # fmt: skip


def bomb(draw: random.Random) -> str:
    """Aliases of aliases."""
    wide, deep = draw.randrange(2, 12), draw.randrange(2, 30)
    lines = ["a0: &a0 x"]
    for level in range(deep):
        lines.append(f"a{level + 1}: &a{level + 1} [{', '.join([f'*a{level}'] * wide)}]")
    return "\n".join(lines)


def params(draw: random.Random) -> bytes:
    """The project's own file with something done to it."""
    text = (ROOT / "params.yaml").read_text()
    lines = text.splitlines()
    place = draw.randrange(len(lines))
    key = lines[place].partition(":")[0]
    way = draw.randrange(9)
    if way < 4:
        lines[place] = f"{key}: {scalar(draw)}"
    elif way == 4:
        lines.insert(
            place, draw.choice([lines[draw.randrange(len(lines))], f"{key}:", scalar(draw)])
        )
    elif way == 5:
        indent = " " * (len(key) - len(key.lstrip()))
        lines[place] = f"{indent}{scalar(draw)}: 1"
    elif way == 6:
        lines = [*bomb(draw).splitlines(), *lines]
        lines[-1] += draw.choice(["", f"\nactive: {scalar(draw)}"])
    elif way == 7:
        name = draw.choice(["../../x", "", "$(id)", "a b", "\u00e4", "x" * 61, "1", "null", "1.5"])
        lines.append(f"  {draw.choice([repr(name), name])}: {{}}")
    else:
        data = bytearray(text.encode())
        for _ in range(draw.randrange(1, 6)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        return bytes(data[: draw.randrange(1, len(data))] if draw.random() < 0.3 else data)
    return "\n".join(lines).encode("utf-8", "replace")


def json_value(draw: random.Random) -> Any:
    """A value of JSON that stands where another one should."""
    many = int(10 ** draw.uniform(0, 5))
    nested: Any = 1
    for _ in range(min(many, 900)):
        nested = draw.choice([[nested], {"a": nested}])
    return draw.choice(
        [None, True, -1, 0, 10**18, 10**300, 1e308, 0.5, "", "x" * many, "\ud800", "\0", "../../x",
         [], {}, nested, [1] * many, {"a": many}, "0" * 64, "\u202e", [[]], {"bits_per_dim": "x"}]
    )  # fmt: skip


def spoilt_json(draw: random.Random, value: Any) -> bytes:
    """A JSON file of this value with something done to it."""
    value = copy.deepcopy(value)
    for _ in range(draw.randrange(1, 3)):
        spot, parent, key = value, None, None
        while isinstance(spot, dict | list) and spot and draw.random() < 0.85:
            parent = spot
            key = draw.choice(list(spot)) if isinstance(spot, dict) else draw.randrange(len(spot))
            spot = spot[key]
        if parent is None:
            value = json_value(draw) if draw.random() < 0.2 else value
        elif draw.random() < 0.2:
            del parent[key]
        else:
            parent[key] = json_value(draw)
    text = json.dumps(value)
    many = int(10 ** draw.uniform(0, 5.5))
    way = draw.randrange(12)
    if way == 0:
        text = text.replace(
            ": ", draw.choice([f": {'9' * many}, ", ": NaN, ", f": {'[' * many}"]), 1
        )
    elif way == 1:
        start = text.find('"')
        text = f"{text[:start]}{text[start : start + 20]}{text[start:]}"
    elif way == 2:
        text = text[: draw.randrange(len(text) + 1)]
    elif way == 3:
        text = draw.choice(
            ["[" * many, '{"a":' * many, "9" * many, "Infinity", "", "\0", "{}", "[]"]
        )
    elif way == 4 and text.startswith("{") and isinstance(value, dict) and value:
        twice = draw.choice(list(value))
        text = f"{text[:-1]}, {json.dumps(twice)}: 1}}"
    data = bytearray(text.encode("utf-8", "surrogatepass"))
    if way == 5 and data:
        data[draw.randrange(len(data))] = draw.randrange(256)
    return bytes(data)


def spoilt_csv(draw: random.Random) -> bytes:
    """A file of curves with something done to it."""
    cells = [["step", "time", "images_per_second"], *[[str(i), "1", "2"] for i in range(3)]]
    row = draw.choice(cells)
    row[draw.randrange(3)] = draw.choice(
        ["", "x", "nan", '"', "\0", "9" * 400, "x" * 200_000, "1,1", "\n", "\udcff"]
    )
    return "\n".join(",".join(row) for row in cells).encode("utf-8", "surrogateescape")


def word(draw: random.Random) -> str:
    """What an environment variable or an address might hold."""
    many = int(10 ** draw.uniform(0, 4.5))
    return draw.choice(
        ["", "0", "-1", "1.5", "nan", "inf", "1e999", "9" * many, "\u0663", "x" * many, "8" * many,
         "http://[", "http://[::1", "tls://", "tcp://", "sqlite://", "sqlite:///:memory:",
         "sqlite:////", "file://", "file:///", "s3://", "s3://[", "s3://b/../x", "~", "~nobody/x",
         "::1", "0.0.0.0", "999.1.1.1", "a:b", "a:", ":", "http://u:p@h", "\n", "\x1b[0m", "$HOME",
         f"file:///{'x' * many}", f"sqlite:///{'y' * many}", f"s3://{'z' * many}", "65536", "1 "]
    )  # fmt: skip


def path_in(draw: random.Random, folder: Path) -> Path:
    """A path below the folder that may be anything but a plain new file."""
    many = int(10 ** draw.uniform(0, 4))
    names = ["fifo", "circle", "dangling", "link-to-fifo", "folder", "file", "device", "new"]
    return folder / draw.choice(
        [*names, "n" * many, "\u00e9" * (many // 2 + 1), "a/" * (many // 2 + 1), "file/below",
         "circle/below", "fifo/below", "folder/../fifo", "a\nb", "a\x1bb", "?#%", "a b", "-o"]
    )  # fmt: skip


def odd_folder(folder: Path) -> Path:
    """One of each kind of thing."""
    (folder / "folder").mkdir(parents=True)
    os.mkfifo(folder / "fifo")
    (folder / "file").write_text("{}")
    for link, target in (("circle", "circle"), ("dangling", "nothing"), ("link-to-fifo", "fifo")):
        (folder / link).symlink_to(target)
    try:
        os.mknod(folder / "device", 0o020600, os.makedev(1, 3))
    except OSError:
        os.mkfifo(folder / "device")
    return folder


def kinds(folder: Path) -> dict[str, int]:
    """What lies there, by kind: what is no file must stay what it was."""
    return {p.name: p.lstat().st_mode & 0o170000 for p in folder.iterdir()}


FIGURES = {
    split: {
        "bits_per_dim": 2.0, "bits_per_dim_se": 0.1, "images": 3, "rate_bits_per_dim": 1.0,
        "distortion_bits_per_dim": 1.0,
    }
    for split in ("validation", "test")
}  # fmt: skip
REGISTERED = {"name": "vdvae-digits", "version": 1, "alias": "champion", "mlflow_run_id": "0" * 32}
SHARD = {"bytes": 2048, "sha256": "0" * 64, "images": 2, "key": f"shards/digits/{'0' * 64}.tar"}
MANIFEST = {
    "recipe": "digits", "shape": [8, 8, 1], "num_levels": 17, "mean": 1.0, "std": 1.0,
    "source": {"name": "digits", "terms": "none", "fingerprint": "0" * 64, "notes": {}},
    "splits": {
        split: {"images": 2, "shards": [{**SHARD, "name": f"digits-{split}-000000.tar"}]}
        for split in ("train", "validation", "test")
    },
}  # fmt: skip


def make(surface: str, draw: random.Random, folder: Path) -> Callable[[], object]:
    """Writes one input into the folder; what reads it."""
    if surface == "params.yaml":
        (folder / "params.yaml").write_bytes(params(draw))
        words = draw.choice([["check"], ["check"], ["check"], ["describe", "digits"]])
        return lambda: main(words)
    if surface == "manifests":
        path = folder / "digits.json"
        path.write_bytes(spoilt_json(draw, MANIFEST))
        return lambda: Manifest.load(path)
    if surface == "results":
        results = folder / "results" / "digits"
        (results / "model").mkdir(parents=True)
        shutil.copy(ROOT / "params.yaml", folder)
        header = b'{"a": {"shape": [2, 3]}}'
        files = {
            "metrics.json": json.dumps(FIGURES).encode(),
            "registered.json": json.dumps(REGISTERED).encode(),
            "curves.csv": b"step,time,images_per_second\n1,1,1\n",
            "model/model.safetensors": len(header).to_bytes(8, "little") + header,
        }
        name = draw.choice(list(files))
        files[name] = {
            "metrics.json": lambda: spoilt_json(draw, FIGURES),
            "registered.json": lambda: spoilt_json(draw, REGISTERED),
            "curves.csv": lambda: spoilt_csv(draw),
            "model/model.safetensors": lambda: draw.randbytes(8) + draw.randbytes(40),
        }[name]()
        for file, data in files.items():
            (results / file).write_bytes(data)
        if draw.random() < 0.1:
            (results / name).unlink()
            os.mkfifo(results / name)
        return lambda: main(["show", "digits"])
    if surface == "environment":
        text = word(draw)
        name = draw.choice(
            ["VDVAE_PREFECT_PORT", "VDVAE_S3", "VDVAE_HOST", "VDVAE_AUTH", "VDVAE_ORIGIN",
             "VDVAE_RUNS_AT_ONCE"]
        )  # fmt: skip
        names = [name, "VDVAE_RANKS", "VDVAE_SHARD_WORKERS", "VDVAE_CACHE_GIB"]
        os.environ |= {draw.choice(names): text}
        recipe: Any = SimpleNamespace(train=SimpleNamespace(device="cpu"))
        return draw.choice(
            [
                Settings,
                lambda: ranks_here(recipe),
                BlockCache.from_env,
                lambda: open_store(text),
                lambda: tracking.sqlite_path(text),
                lambda: allowed_place(text),
            ]
        )
    path = path_in(draw, odd_folder(folder / "odd"))

    def check_kinds(act: Callable[[], object]) -> None:
        before = kinds(folder / "odd")
        try:
            act()
        finally:
            after = kinds(folder / "odd")
            assert {name: after.get(name) for name in before} == before, "it was replaced"

    act = draw.choice(
        [
            lambda: atomic_write(path, "new"),
            lambda: allowed_place(f"file://{path}"),
            lambda: main(["info", str(path)]),
            lambda: Manifest.load(path),
            lambda: tracking.connect(f"sqlite:///{path}") if path.exists() else None,
            lambda: main(["models", "score", "vdvae-none", str(folder), "-o", str(path)]),
        ]
    )
    return lambda: check_kinds(act)


def sentence_or_success(act: Callable[[], object], errors: Callable[[], str]) -> str | None:
    """What is wrong with how it ended; None where nothing is."""
    said, started = "", time.process_time()
    signal.alarm(HANGS_AFTER_SECONDS)
    try:
        with as_a_command():  # as every command runs
            act()
    except UserError as error:
        said = str(error)
    except SystemExit as end:
        said = errors()
        if end.code != 2 or not said.startswith("error: ") or said.count("\n") != 1:
            return f"exit {end.code}: {said[:200]}"
    except (Exception, Hang) as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        signal.alarm(0)
    seconds = time.process_time() - started
    if seconds > MOST_CPU_SECONDS:
        return f"{seconds:.1f} s of computing"
    return f"a sentence of {len(said)} characters" if len(said) > LONGEST_SENTENCE else None


@pytest.fixture(autouse=True)
def _alarm() -> Iterator[None]:
    before = signal.signal(signal.SIGALRM, _hang)
    yield
    signal.signal(signal.SIGALRM, before)


@pytest.mark.timeout(0)
@pytest.mark.parametrize("surface", ["params.yaml", "manifests", "results", "environment", "paths"])
def test_hostile_inputs_are_taken_or_refused_in_a_sentence(
    surface: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    failed, ends = {}, Counter[str]()
    tracking.connect(
        f"sqlite:///{tmp_path / 'mlflow.db'}"
    )  # imports and tables are not the input's
    tried = N // 4 if surface == "paths" else N  # some of them open a model's database
    summarise(load_recipe("digits", ROOT / "params.yaml").model)  # so are its imports
    for number in range(tried):
        folder = tmp_path / str(number)
        folder.mkdir()
        with monkeypatch.context() as patched:
            patched.setattr(os, "environ", os.environ.copy())
            patched.chdir(folder)
            os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{tmp_path / 'mlflow.db'}"
            act = make(surface, random.Random(f"{surface} {number}"), folder)
            capsys.readouterr()
            wrong = sentence_or_success(act, lambda: capsys.readouterr().err)
        ends["failed" if wrong else "held"] += 1
        if wrong:
            failed[number] = wrong
        shutil.rmtree(folder)
    with capsys.disabled():
        print(f"\n{surface}: {tried} inputs, {len(failed)} failed")
    assert sum(ends.values()) == tried
    assert not failed, "\n".join(f"{surface} {n}: {why}" for n, why in failed.items())
