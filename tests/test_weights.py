"""Weights from outside: float32, finite, of the right shapes, in regular files, or refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

import vdvae
from pipeline.commands import published
from pipeline.commands.published import import_published, read_checkpoint
from pipeline.flows.overrides import shrink
from pipeline.params import load_recipe
from vdvae.checkpoint import CONFIG, WEIGHTS, read_newest_state, write_state
from vdvae.config import ModelConfig, TrainConfig, UserError
from vdvae.published import to_published
from vdvae.training import start

ROOT = Path(__file__).resolve().parents[1]
MODEL = ModelConfig(
    image_size=4, encoder="4x1,4d4,1x1", decoder="1x1,4m1", width=4, latent_channels=2, mixtures=2,
    bottleneck=0.5,
)  # fmt: skip


def with_value(tensors: dict[str, torch.Tensor], value: float) -> dict[str, torch.Tensor]:
    name = list(tensors)[3]
    return {**tensors, name: torch.full_like(tensors[name], value)}


def of_type(tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


BAD_VALUES = (torch.nan, torch.inf, -torch.inf, 1e30)
BAD_TYPES = (torch.float16, torch.float64, torch.complex64, torch.int64)
ODD: dict[str, Callable[[Path], object]] = {
    "is a folder": Path.mkdir,
    "is a FIFO": os.mkfifo,
    "cannot be used (Too many levels of symbolic links)": lambda path: path.symlink_to(path.name),
    "has more than": lambda path: (path.touch(), os.truncate(path, 2**40)),
}


def refusal(work: Callable[[], object]) -> str:
    with pytest.raises(UserError) as refused:
        work()
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_model_is_float32_and_finite_in_regular_files(tmp_path: Path) -> None:
    model = vdvae.VDVAE(MODEL)
    vdvae.save(model, tmp_path)
    tensors = {name: value.detach() for name, value in model.named_parameters()}
    for value in BAD_VALUES:
        save_file(with_value(tensors, value), tmp_path / WEIGHTS)
        assert "has a value that is not finite, or beyond ±1e+06" in refusal(
            lambda: vdvae.load(tmp_path)
        )
    for dtype in BAD_TYPES:
        save_file(of_type(tensors, dtype), tmp_path / WEIGHTS)
        assert f"is {dtype}, torch.strided, where torch.float32" in refusal(
            lambda: vdvae.load(tmp_path)
        )
    assert "call model.float() first" in refusal(lambda: vdvae.save(model.double(), tmp_path))
    for name in (WEIGHTS, CONFIG):
        for words, make in ODD.items():
            vdvae.save(model.float(), tmp_path)
            (tmp_path / name).unlink()
            make(tmp_path / name)
            assert words in refusal(lambda: vdvae.load(tmp_path))
            path = tmp_path / name
            path.rmdir() if words == "is a folder" else path.unlink()
    vdvae.save(model, tmp_path)
    (tmp_path / CONFIG).write_text("[" * 100_000)
    assert "not readable as JSON" in refusal(lambda: vdvae.load(tmp_path))


def test_a_checkpoint_that_is_not_fit_to_go_on_from_stays(tmp_path: Path) -> None:
    """Its hash is right, so nothing older is taken in its place, and nothing is removed."""
    state = start(
        MODEL, TrainConfig(steps=1, batch_size=1, learning_rate=1e-3), torch.device("cpu")
    )
    tensors = {f"{part}/{name}": value.detach().clone() for part in ("model", "ema")
               for name, value in state.model.named_parameters()}  # fmt: skip
    index: dict[str, Any] = {
        "config": MODEL.to_dict(), "step": 1, "skipped": 0, "skipped_in_a_row": 0,
        "best_bits_per_dim": None, "validations_since_best": 0, "findings_seen": {},
        "history": [{"step": 1, "bits_per_dim": float("inf")}], "window": {},
    }  # fmt: skip
    write_state(tmp_path, 1, tensors, index)
    state.load(tmp_path)
    assert state.step == 1
    second = {**index, "step": 2}
    cases: list[tuple[dict[str, torch.Tensor], str]] = [
        (with_value(tensors, torch.nan), "has a value that is not finite"),
        (of_type(tensors, torch.float16), "is torch.float16"),
        ({**tensors, "other/x": torch.zeros(1)}, "holds other parts than a checkpoint's"),
        (dict(list(tensors.items())[1:]), "1 parameters are missing, extra or misshapen"),
    ]
    for changed, words in cases:
        write_state(tmp_path, 2, changed, second)
        there = sorted(tmp_path.iterdir())
        assert words in refusal(lambda: state.load(tmp_path))
        assert sorted(tmp_path.iterdir()) == there and len(there) == 4
    for suffix in (".json", ".safetensors"):
        for words, make in ODD.items():
            write_state(tmp_path, 2, tensors, second)
            path = tmp_path / f"step-000000002{suffix}"
            path.unlink()
            make(path)
            assert words in refusal(lambda: state.load(tmp_path))
            path.rmdir() if words == "is a folder" else path.unlink()
    # An index that is none is damage: the state before is taken.
    write_state(tmp_path, 2, tensors, {**second, "step": 3})
    found = read_newest_state(tmp_path)
    assert found is not None and found[1]["step"] == 1


def test_a_refused_checkpoint_is_not_held_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    shrink(params["recipes"]["cifar10"])
    params["recipes"]["cifar10"]["model"]["width"] = 8
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("cifar10")
    model = vdvae.VDVAE(replace(recipe.model, likelihood="published"))
    tensors, file = to_published(model), tmp_path / "made.th"
    monkeypatch.setattr(published.Manifest, "load", lambda path: None)

    class Measured(Exception):
        """It got as far as that."""

    def measure(recipe: Any, places: Any) -> None:
        raise Measured

    monkeypatch.setattr(published, "measure", measure)
    damaged = b"PK\x03\x04" + bytes(100)
    bad = [of_type(tensors, dtype) for dtype in BAD_TYPES]
    bad += [with_value(tensors, value) for value in BAD_VALUES]
    for content in (damaged, {"x": torch.zeros(1)}, *bad):
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            torch.save(content, file)
        refusal(lambda: import_published("cifar10", file=file))
        assert not published.SUMS.exists()
    torch.save(tensors, file)
    with pytest.raises(Measured):
        import_published("cifar10", file=file)
    assert list(json.loads(published.SUMS.read_text())) == ["made.th"]
    torch.save(of_type(tensors, torch.float16), file)
    assert "data/published.json says" in refusal(lambda: import_published("cifar10", file=file))


def test_pickles_that_pytorch_stumbles_over_are_damaged(tmp_path: Path) -> None:
    """Each of these ended in another exception: KeyError, IndexError, AssertionError, ..."""
    file = tmp_path / "made.th"
    for content in (
        b"\x80\x02h\x05.",
        b"\x80\x02K\x01R.",
        b"\x80\x02.",
        b"\x80\x02X\xff",
        b"",
        b"N.",
    ):
        file.write_bytes(content)
        said = refusal(lambda: read_checkpoint(file))
        assert "is damaged" in said or "was refused" in said or "no mapping" in said
    for words, make in ODD.items():
        file.unlink()
        make(file)
        assert words in refusal(lambda: read_checkpoint(file))
        if file.is_dir():
            file.rmdir()
            file.touch()
