"""`vdvae recipe new` and `vdvae plan`: from a folder of images to figures."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, Project
from PIL import Image

from pipeline.cli.main import main
from pipeline.commands.new_recipe import blocks, pools_of, widths
from pipeline.params import load_recipe
from vdvae.config import ModelConfig, UserError, parse_decoder

CLI = (sys.executable, "-c", "from pipeline.cli.main import main; main()")


@pytest.mark.parametrize("size", [2, 4, 8, 28, 32, 48, 96, 100, 224, 256, 512, 1024])
@pytest.mark.parametrize("depth", [2, 22])
def test_blocks_stand_at_every_resolution_down_to_1(size: int, depth: int) -> None:
    pools = pools_of(size)
    assert math.prod(pools) == size
    encoder, decoder = blocks(size, pools, depth)
    width, pairs = widths(size, pools, 64)
    ModelConfig(image_size=size, encoder=encoder, decoder=decoder, width=width, widths=pairs)
    reached = [size // math.prod(pools[:i]) for i in range(len(pools) + 1)]
    assert {block.resolution for block in parse_decoder(decoder)} == set(reached)


@pytest.mark.parametrize("size", [0, 1, 97, 5000])
def test_a_size_without_sensible_blocks_is_refused(size: int) -> None:
    with pytest.raises(UserError, match=f"--size: {size} "):
        pools_of(size)


def test_odd_files_are_named_together_and_may_be_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (ROOT / "params.yaml").read_bytes()
    (tmp_path / "params.yaml").write_bytes(before)
    (tmp_path / "images").mkdir()
    for number in range(60):
        size = (20 + number, 30)
        Image.effect_noise(size, 50).save(
            tmp_path / f"images/{number}.{'gif' if number % 2 else 'tif'}"
        )
    for number in range(25):
        (tmp_path / f"images/odd-{number:02}.png").write_bytes(b"text")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VDVAE_RUNS", raising=False)
    words = ["recipe", "new", "mine", "--data", "images", "--size", "8", "--memory", "1"]
    with pytest.raises(SystemExit) as exit:
        main(words)
    assert exit.value.code == 2 and Path("params.yaml").read_bytes() == before
    *lines, last = capsys.readouterr().err.splitlines()
    assert [line.partition(" is ")[0] for line in lines] == [
        f"error: images/odd-{number:02}.png:" for number in range(20)
    ]
    path = tmp_path / "runs/shards/mine-unreadable.txt"
    assert last.startswith(f"error: and 5 more; all 25 are in {path}; mend")
    assert last.endswith("or leave them out by --unreadable skip")
    assert len(path.read_text().splitlines()) == 25
    main([*words, "--unreadable", "skip"])
    assert load_recipe("mine").data.unreadable == "skip"
    assert "1 channels" in capsys.readouterr().out


@pytest.mark.integration
def test_a_folder_of_images_becomes_a_model_with_figures(tmp_path: Path) -> None:
    project = Project(tmp_path / "project")
    images = project.folder / "images"
    images.mkdir()
    draw = np.random.default_rng(0)
    for index in range(40):
        shape = (*draw.integers(9, 30, 2), 3)
        pixels = draw.integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{index}.png")
    before = (ROOT / "params.yaml").read_text()
    words = ("recipe", "new", "mine", "--data", "images", "--size", "12")
    printed = project.run(*CLI, *words, "--active")
    assert "40 images, 3 channels" in printed
    assert "dvc repro register@mine" in printed
    after = (project.folder / "params.yaml").read_text()
    recipes, studies = before.replace("active: [digits]", "active: [digits, mine]").split(
        "\n# What of the paper is claimed"
    )
    assert after.startswith(recipes.rstrip()) and after.endswith(studies)
    assert "mine: is there already" in project.run(*CLI, *words, code=2)

    def five_steps(params: dict[str, Any]) -> None:
        params["recipes"]["mine"]["train"] |= {
            "steps": 5, "log_every": 5, "validate_every": 5, "checkpoint_every": 5
        }  # fmt: skip
        params["recipes"]["mine"]["model"] |= {"width": 12, "mixtures": 2}

    project.set(five_steps)
    planned = project.run(*CLI, "plan", "mine")
    assert "5 steps" in planned
    assert "s a step" in planned
    project.repro("evaluate@mine")
    metrics = json.loads((project.folder / "results/mine/metrics.json").read_text())
    assert metrics["validation"]["images"] + metrics["test"]["images"] < 40
    assert math.isfinite(metrics["test"]["bits_per_dim"])
    planned = project.run(*CLI, "plan", "mine", "--no-probe")
    assert [line.split()[1] for line in planned.splitlines()[-5:-2]] == ["reused"] * 3
