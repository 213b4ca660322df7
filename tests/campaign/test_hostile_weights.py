"""Model folders, checkpoints and published pickles that nobody made in good faith: success or one
sentence, within seconds. Seeded; nothing is written outside of the scratch folder."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from repetitions import repetitions
from safetensors.torch import save as to_bytes

import vdvae
from pipeline.commands.published import read_checkpoint
from vdvae.checkpoint import CONFIG, WEIGHTS
from vdvae.config import ModelConfig, TrainConfig, UserError
from vdvae.published import load_published, to_published
from vdvae.training import start, train

N = repetitions(300)  # inputs of each of the three kinds
SECONDS = 20.0  # for one input, on a machine that does much else
MODEL = ModelConfig(
    image_size=4, num_levels=32, encoder="4x1,4d4,1x1", decoder="1x1,4m1", width=4,
    latent_channels=2, mixtures=2, bottleneck=0.5,
)  # fmt: skip
TRAIN = TrainConfig(steps=2, batch_size=2, learning_rate=1e-3, warmup_steps=0, device="cpu")
NUMBERS = (0, -1, 1.5, 1e400, float("nan"), 10**9, 10**30, 10**4000, True, None, "x", [], {}, [[1]])
DTYPES = (torch.float16, torch.float64, torch.complex64, torch.bfloat16, torch.int64, torch.bool)


def outcome(work: Callable[[], object], what: str) -> str:
    """What became of one input: "read" or "refused"; anything else is a failure."""
    began = time.monotonic()
    try:
        work()
        said = "read"
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 6000, (what, str(error)[:2000])
        said = "refused"
    except BaseException as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {str(error)[:300]}") from error
    assert time.monotonic() - began < SECONDS, f"{what}: took {time.monotonic() - began:.0f} s"
    return said


def bytes_changed(random: random.Random, data: bytes) -> bytes:
    """The data cut, lengthened, or with some bytes changed, mostly near the front."""
    kind = random.randrange(4)
    if kind == 0:
        return data[: random.randrange(len(data))]
    if kind == 1:
        return data + random.randbytes(random.randrange(1, 100))
    changed = bytearray(data)
    for _ in range(random.randrange(1, 6)):
        most = len(data) if kind == 2 else min(len(data), 400)
        changed[random.randrange(most)] = random.randrange(256)
    return bytes(changed)


def tensors_changed(random: random.Random, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """One tensor of another type, shape, name or value, or left out."""
    found = dict(tensors)
    name = random.choice(list(found))
    kind = random.randrange(6)
    if kind == 0:
        found[name] = found[name].to(random.choice(DTYPES))
    elif kind == 1:
        found = {key: value.to(random.choice(DTYPES)) for key, value in found.items()}
    elif kind == 2:
        value = found[name].clone()
        value.view(-1)[0] = random.choice((torch.nan, torch.inf, -torch.inf, 1e30, -1e7))
        found[name] = value
    elif kind == 3:
        found[name] = torch.zeros(random.choice(((), (0,), (1,), (3, 2), (1, 1, 1, 1, 1))))
    elif kind == 4:
        found["x" * random.choice((1, 10_000))] = found.pop(name)
    else:
        del found[name]
    return found


def odd_file(random: random.Random, path: Path) -> None:
    """In the place of a file: a folder, a FIFO, a link in a circle or to nothing, a giant."""
    path.unlink(missing_ok=True)
    kind = random.randrange(5)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        os.mkfifo(path)
    elif kind == 2:
        path.symlink_to(path.name)
    elif kind == 3:
        path.symlink_to("nothing")
    else:
        path.touch()
        os.truncate(path, 2**42)


def json_changed(random: random.Random, value: dict[str, Any]) -> str:
    """JSON with one value exchanged, left out, given twice or nested, or that is none."""
    kind = random.randrange(6)
    text = json.dumps(value)
    if kind == 0:
        depth = random.choice((10, 1000, 100_000))
        return "[" * depth + "]" * depth
    if kind == 1:
        return bytes_changed(random, text.encode()).decode("latin-1")
    if kind == 2:
        return f'{{"width": 1, {text[1:]}'
    key = random.choice(list(value))
    if kind == 3:
        return json.dumps({name: other for name, other in value.items() if name != key})
    if isinstance(value[key], dict) and value[key] and random.random() < 0.5:
        inner = {**value[key], random.choice(list(value[key])): random.choice(NUMBERS[:6])}
        return json.dumps({**value, key: inner})
    chosen = random.choice(NUMBERS)
    if isinstance(chosen, int) and chosen > 10**4000 - 1:
        return text.replace(json.dumps(key), f'{json.dumps(key)}: 1{"0" * 5000}, "other"', 1)
    return json.dumps({**value, key: chosen})


def emptied(folder: Path) -> Path:
    for path in folder.iterdir() if folder.exists() else ():
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    folder.mkdir(exist_ok=True)
    return folder


def test_model_folders(tmp_path: Path) -> None:
    chance = random.Random(1)
    model = vdvae.VDVAE(MODEL)
    tensors = {name: value.detach() for name, value in model.named_parameters()}
    whole, config, found = to_bytes(tensors), MODEL.to_dict(), []
    for number in range(N):
        folder = emptied(tmp_path / "model")
        (folder / CONFIG).write_text(json.dumps(config))
        (folder / WEIGHTS).write_bytes(whole)
        kind = chance.randrange(4)
        if kind == 0:
            (folder / CONFIG).write_text(json_changed(chance, config))
        elif kind == 1:
            (folder / WEIGHTS).write_bytes(bytes_changed(chance, whole))
        elif kind == 2:
            (folder / WEIGHTS).write_bytes(to_bytes(tensors_changed(chance, tensors)))
        else:
            odd_file(chance, folder / chance.choice((CONFIG, WEIGHTS)))

        def work(folder: Path = folder) -> None:
            loaded = vdvae.load(folder)
            assert all(p.dtype == torch.float32 for p in loaded.parameters())
            assert all(p.isfinite().all() for p in loaded.parameters())

        found.append(outcome(work, f"model {number}, kind {kind}"))
    print(f"{N} model folders: {found.count('read')} read, {found.count('refused')} refused")
    assert found.count("refused") > N / 2


def test_checkpoints(tmp_path: Path) -> None:
    chance = random.Random(2)

    def batches(first: int) -> Any:
        while True:
            yield torch.zeros(2, 3, 4, 4, dtype=torch.uint8)

    made = tmp_path / "made"
    train(MODEL, TRAIN, batches, made, lambda progress: True)
    (index,) = made.glob("*.json")
    state, data = json.loads(index.read_text()), index.with_suffix(".safetensors").read_bytes()
    from safetensors.torch import load as from_bytes

    from vdvae.checkpoint import write_state

    tensors, found = from_bytes(data), []
    for number in range(N):
        folder = emptied(tmp_path / "checkpoints")
        path = folder / index.name
        path.write_text(json.dumps(state))
        path.with_suffix(".safetensors").write_bytes(data)
        kind = chance.randrange(4)
        if kind == 0:
            path.write_text(json_changed(chance, state))
        elif kind == 1:
            path.with_suffix(".safetensors").write_bytes(bytes_changed(chance, data))
        elif kind == 2:  # with the right hash
            rest = {key: value for key, value in state.items() if key != "sha256"}
            write_state(folder, 2, tensors_changed(chance, tensors), rest)
        else:
            odd_file(chance, path.with_suffix(chance.choice((".json", ".safetensors"))))
        there = sorted(folder.iterdir())
        what = f"checkpoint {number}, kind {kind}"
        found.append(outcome(lambda folder=folder: fresh().load(folder), what))  # type: ignore[misc]
        assert sorted(folder.iterdir()) == there, f"{what}: something was removed"
    print(f"{N} checkpoints: {found.count('read')} read, {found.count('refused')} refused")
    assert found.count("refused") > N / 2


def fresh() -> Any:
    return start(MODEL, TRAIN, torch.device("cpu"))


class Shell:
    """What a hostile pickle would have run."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], tuple(self.call[1:])


def test_published_pickles(tmp_path: Path) -> None:
    chance = random.Random(3)
    published = MODEL.from_dict({**MODEL.to_dict(), "likelihood": "published_5bit"})
    tensors = to_published(vdvae.VDVAE(published))
    forms = []
    for zipped in (True, False):
        content = io.BytesIO()
        torch.save(tensors, content, _use_new_zipfile_serialization=zipped)
        forms.append(content.getvalue())
    ran, found = tmp_path / "ran", []
    path = tmp_path / "made.th"
    for number in range(N):
        if path.is_symlink() or path.exists():
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        kind = chance.randrange(5)
        if kind == 0:
            path.write_bytes(bytes_changed(chance, chance.choice(forms)))
        elif kind == 1:
            torch.save(
                tensors_changed(chance, tensors),
                path,
                _use_new_zipfile_serialization=chance.random() < 0.5,
            )
        elif kind == 2:
            odd_file(chance, path)
        elif kind == 3:  # bytes of a pickle inside a whole archive, changed or hostile
            name = "archive/data.pkl"
            with zipfile.ZipFile(io.BytesIO(forms[0])) as old, zipfile.ZipFile(path, "w") as new:
                for part in old.infolist():
                    content_of = old.read(part)
                    if part.filename.endswith("data.pkl"):
                        name = part.filename
                        content_of = bytes_changed(chance, content_of)
                    if part.filename != name or chance.random() < 0.95:
                        new.writestr(part.filename, content_of)
        else:
            value: Any = chance.choice(
                (
                    {"x": Shell(os.system, f"touch {ran}")},
                    {"x": Shell(bytearray, 2**40)},
                    {"x": torch.zeros(1).expand(2**40)},
                    {next(iter(tensors)): torch.zeros(1).expand(2**20, 2**20)},
                    {"x": torch.zeros(2, 2).to_sparse()},
                    {"x": torch.zeros(2, device="meta")},
                    {1: torch.zeros(1)}, [1, 2], {}, None, "text", np.zeros(3),
                )
            )  # fmt: skip
            if chance.random() < 0.3:
                path.write_bytes(
                    pickle.dumps(value) if not isinstance(value, dict) else b"\x80\x02"
                )
            elif chance.random() < 0.1:
                with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
                    bomb.writestr("archive/data.pkl", b"\0" * 2**24)
                content_of = path.read_bytes()
                path.write_bytes(content_of.replace(struct.pack("<I", 2**24), b"\xf0\xff\xff\xff"))
            else:
                torch.save(value, path)

        def work() -> None:
            loaded = load_published(published, read_checkpoint(path))
            assert all(p.isfinite().all() for p in loaded.parameters())

        found.append(
            "refused"
            if not path.exists() and not path.is_symlink()
            else outcome(lambda: _or_missing(work), f"pickle {number}, kind {kind}")
        )
        assert not ran.exists()
    print(f"{N} pickles: {found.count('read')} read, {found.count('refused')} refused")
    assert found.count("refused") > N / 2


def _or_missing(work: Callable[[], object]) -> None:
    """A name that leads nowhere is the caller's to refuse."""
    try:
        work()
    except FileNotFoundError:
        raise UserError("missing") from None


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__, "-s"]))
