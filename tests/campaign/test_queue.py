"""Grids through DVC's own queue, again and again, and every other way to work in DVC's copies."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import Project, narrow
from dvc_queue import check_everything_arrived, experiments, run_grid
from PIL import Image
from repetitions import repetitions

pytestmark = [pytest.mark.integration, pytest.mark.timeout(3600)]
FEW = 10  # steps


@pytest.fixture
def few(project: Project) -> Project:
    """A project whose commit has a recipe of few steps."""
    project.set(lambda params: narrow(params, FEW))
    project.run("git", "commit", "-qam", "few steps")
    return project


def test_a_grid_through_dvcs_queue_ends_with_every_run_where_its_origin_keeps_them(
    project: Project,
) -> None:
    """Two at once, in copies that DVC deletes, with shards that were made before."""
    project.set(lambda params: narrow(params, steps=10))
    project.repro("shard@digits")
    project.run("git", "add", "-A")
    project.run("git", "commit", "-qm", "shards")
    run_grid(project, "-S", "recipes.digits.train.seed=range(0,2)")
    check_everything_arrived(project, [0, 1])


def test_grids_of_three_two_at_once_from_nothing(few: Project) -> None:
    """Both first ones want to make the shards; later grids find them."""
    seeds: list[int] = []
    for number in range(repetitions(2)):
        run_grid(few, "-S", f"recipes.digits.train.seed=range({3 * number},{3 * number + 3})")
        seeds += range(3 * number, 3 * number + 3)
        check_everything_arrived(few, seeds)


def test_temp_runs_end_with_their_origin_and_a_set_dvc_root_changes_nothing(few: Project) -> None:
    for seed in range(2):
        few.run("dvc", "exp", "run", "--temp", "-S", f"recipes.digits.train.seed={seed}")
    check_everything_arrived(few, [0, 1])

    few.run("dvc", "repro", DVC_ROOT=str(few.folder.parent))
    assert json.loads((few.folder / "results/digits/registered.json").read_text())["version"] == 1
    assert not (few.folder.parent / "runs").exists()


def test_experiments_that_share_a_training_wait_for_it(few: Project) -> None:
    run_grid(few, "-S", "recipes.digits.sample.seed=range(0,2)")
    assert len(experiments(few)) == 2
    assert len(list(few.folder.glob("runs/digits-*.lock"))) == 1


def test_raw_data_that_git_does_not_track_are_found_in_a_copy(few: Project) -> None:
    """Of a path below the project, which the copy does not have."""
    folder = few.folder / "images"
    folder.mkdir()
    chance = np.random.default_rng(0)
    for number in range(60):
        pixels = chance.integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    few.run(
        *("dvc", "exp", "run", "--temp", "shard@digits"),
        *("-S", "recipes.digits.data.source=folder", "-S", "recipes.digits.data.path=images"),
        *("-S", "recipes.digits.data.validation=0.1", "-S", "recipes.digits.data.test=0.1"),
    )
    [found] = experiments(few).values()
    assert "data/manifests/digits.json" in found["outs"]
    assert list(few.folder.glob("store/shards/digits/*.tar"))


def test_names_that_a_url_or_ascii_cannot_hold(tmp_path: Path) -> None:
    """The five stages, and a run with settings of its own, in a project of such a name."""
    for number, name in enumerate(("ü #1 %41", "100%#, 'a' \"b\"")):
        (tmp_path / str(number)).mkdir()
        project = Project(tmp_path / str(number) / name)
        project.set(lambda params: narrow(params, FEW))
        project.run("git", "commit", "-qam", "few steps")
        vdvae = ("python", "-c", "from pipeline.cli.main import main; main()")
        project.run(*vdvae, "run", "digits")
        project.run(*vdvae, "run", "digits", "--steps", "5")
        assert len(experiments(project)) == 1
        assert (project.folder / "mlruns/mlflow.db").exists()
        assert [entry.name for entry in project.folder.parent.iterdir()] == [name]
        assert "no differences" in project.run(*vdvae, "models", "show", "vdvae-digits", "--verify")
