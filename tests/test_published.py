"""A published checkpoint's way into the registry, over a real HTTP server, and what is refused."""

from __future__ import annotations

import json
import os
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Project
from PIL import Image
from range_server import Server, range_server

from pipeline.flows.overrides import shrink

pytestmark = pytest.mark.integration
VDVAE = (sys.executable, "-c", "from pipeline.cli.main import main; main()")


@pytest.fixture
def server() -> Iterator[str]:
    with range_server() as address:
        yield f"{address}/seed0-ema.th"


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """cifar10, narrow, on a few made images."""
    made = Project(tmp_path / "project")
    images = made.folder / "images"
    images.mkdir()
    random = np.random.default_rng(0)
    for index in range(24):
        pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{index}.png")

    def change(params: dict[str, Any]) -> None:
        cifar10 = params["recipes"]["cifar10"]
        shrink(cifar10)
        cifar10["data"] |= {"source": "folder", "path": "images", "validation": 0.3, "test": 0.3}
        cifar10["model"]["width"] = 8
        cifar10["train"]["device"] = "cpu"
        params["active"] = ["cifar10"]

    made.set(change)
    made.repro("shard@cifar10")
    return made


def published_weights(project: Project) -> bytes:
    """The bytes of a checkpoint as the authors write them, of the project's model."""
    script = """
import sys, torch
from pipeline.params import load_recipe
from vdvae.model import VDVAE
from vdvae.published import to_published
torch.manual_seed(3)
model = VDVAE(load_recipe("cifar10").model)
torch.save({f"module.{k}": v for k, v in to_published(model).items()}, sys.argv[1])
"""
    path = project.folder / "made.th"
    project.run(sys.executable, "-c", script, str(path))
    return path.read_bytes()


def test_a_checkpoint_is_fetched_measured_and_registered(project: Project, server: str) -> None:
    whole = Server.content = published_weights(project)
    words = ("published", "import", "cifar10", "--url", server)

    Server.cut = 20_000  # the connection ends early
    said = project.run(*VDVAE, *words, code=2)
    assert "run the same command again to go on" in said
    said = project.run(*VDVAE, *words)
    assert Server.ranges == [None, "bytes=20000-"]
    assert (project.folder / "data/raw/published/seed0-ema.th").read_bytes() == whole
    assert "registered vdvae-cifar10 version 1 (published: imported)" in said
    for words_said in ("the published likelihood, off 1", "test, normalised: "):
        assert words_said in said

    results = project.folder / "results/published/cifar10"
    metrics = json.loads((results / "metrics.json").read_text())
    manifest = json.loads((project.folder / "data/manifests/cifar10.json").read_text())
    images = manifest["splits"]["test"]["images"]
    assert metrics["test"]["images"] == metrics["test_normalised"]["images"] == images
    ours, theirs = (metrics[name]["bits_per_dim"] for name in ("test_normalised", "test"))
    assert ours == pytest.approx(theirs, abs=1e-3)
    assert ours != theirs
    shown = project.run(*VDVAE, "models", "show", "vdvae-cifar10@published")
    assert "published" in shown
    card = next((project.folder / "mlruns").rglob("model_card.md")).read_text()
    assert "The authors' published weights, from `seed0-ema.th`" in card
    assert "vdvae published import cifar10" in card

    # The same again changes nothing; other bytes under the name are not taken.
    again = project.run(*VDVAE, *words)
    assert "version 1 (published: imported)" in again
    file = project.folder / "data/raw/published/seed0-ema.th"
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    said = project.run(*VDVAE, *words, code=2)
    assert "data/published.json says" in said
    assert len(said.splitlines()) == 1


class Shell:
    """What a hostile file would have run."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch ran",)


def test_what_is_no_checkpoint_of_this_model_is_refused(project: Project) -> None:
    whole = published_weights(project)
    weights = torch.load(project.folder / "made.th", weights_only=True)
    first = next(iter(weights))
    not_a_number = {**weights, first: torch.full_like(weights[first], torch.nan)}
    cases: list[tuple[bytes | Any, str]] = [
        (pickle.dumps({"decoder.gain": Shell()}), "was refused, nothing of it was run"),
        ({"decoder.gain": Shell()}, "was refused, nothing of it was run"),
        (whole[: len(whole) // 2], "is damaged"),
        ([1, 2], "is no mapping of names to tensors"),
        (
            {name: weights[name] for name in list(weights)[1:]},
            "is missing",
        ),
        (not_a_number, "not finite"),
        ({**weights, first: torch.zeros(1, 2, 3)}, "has shape (1, 2, 3), the model"),  # another's
    ]
    for number, (content, words) in enumerate(cases):
        path = project.folder / f"{number}.th"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        said = project.run(*VDVAE, "published", "import", "cifar10", "--file", str(path), code=2)
        assert said.startswith("error: "), said
        assert words in said
        assert len(said.splitlines()) == 1
    assert not (project.folder / "ran").exists()
    assert not (project.folder / "results/published").exists()
    said = project.run(*VDVAE, "published", "import", "cifar10", "--seed", "7", code=2)
    assert "seed: cifar10 was published with seeds 0 to 3, not 7" in said
    assert not Path(project.folder / "mlruns").exists()
