"""Studies: what is declared, what differences tell, and one run whole through the command."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import ROOT, Project, narrow
from scipy import stats

from pipeline import tracking
from pipeline.params import load_recipe
from pipeline.studies.declaration import cells_of, load_study, variants_of
from pipeline.studies.shown import SHOWN
from pipeline.studies.statistics import difference, overall
from vdvae.config import UserError

VDVAE = (sys.executable, "-c", "from pipeline.cli.main import main; main()")

STUDY: dict[str, Any] = {
    "claim": "wider is better",
    "paper": "nowhere",
    "recipe": "digits",
    "seeds": [0, 1],
    "set": {"train.steps": 4, "train.log_every": 2, "train.validate_every": 4},
    "vary": {"model.width": [8, 16]},
    "compare": [["width=16", "width=8"]],
    "mini": {"seeds": [0]},
}


def scores(bits_SN: np.ndarray) -> list[dict[str, float]]:
    return [{f"image-{n}": float(value) for n, value in enumerate(row)} for row in bits_SN]


def test_an_interval_over_seeds_and_images_holds_as_often_as_it_says() -> None:
    """Seeds and images have effects of their own, which both are drawn anew each time."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        seeds, images = rng.normal(0, 0.02, (3, 1)), rng.normal(0, 0.3, (1, 200))
        bits_SN = 0.05 + seeds + images + rng.normal(0, 0.1, (3, 200))
        found = difference(scores(np.zeros((3, 200))), scores(bits_SN), 0.95)
        held += found.low <= 0.05 <= found.high
    assert 0.93 < held / 2000 < 0.98


def test_of_equal_images_the_interval_is_students_over_seeds_and_of_one_seed_over_images() -> None:
    means = np.array([0.1, 0.3, 0.2])
    found = difference(scores(np.zeros((3, 50))), scores(means[:, None] + np.zeros((3, 50))), 0.95)
    low, high = stats.t.interval(0.95, 2, means.mean(), stats.sem(means))
    assert (found.low, found.high) == pytest.approx((low, high))
    assert (found.mean, found.se_images) == pytest.approx((0.2, 0.0), abs=1e-12)

    images = np.random.default_rng(1).normal(0.5, 0.1, (1, 50))
    found = difference(scores(np.zeros((1, 50))), scores(images), 0.9)
    low, high = stats.t.interval(0.9, 49, images.mean(), stats.sem(images[0]))
    assert (found.low, found.high) == pytest.approx((low, high))
    assert found.low > 0 and found.verdict == "undecided"  # no claim is judged from one seed
    assert found.se_seeds is None


def test_a_verdict_follows_the_interval_and_a_claim_needs_all_of_its_comparisons() -> None:
    zeros, ones = np.zeros((2, 3)), np.ones((2, 3))
    assert difference(scores(zeros), scores(ones), 0.95).verdict == "supported"
    assert difference(scores(ones), scores(zeros), 0.95).verdict == "not supported"
    assert difference(scores(ones), scores(ones), 0.95).verdict == "undecided"
    assert overall(["supported", "supported"]) == "supported"
    assert overall(["supported", "undecided"]) == "undecided"
    assert overall(["undecided", "not supported"]) == "not supported"
    with pytest.raises(UserError, match="images differ"):
        difference(scores(zeros), scores(ones[:, :2]), 0.95)


@pytest.fixture
def params(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes the project's params.yaml with a changed STUDY in it, and gives its path."""
    monkeypatch.chdir(ROOT)

    def write(**changes: Any) -> Path:
        document = yaml.safe_load((ROOT / "params.yaml").read_text())
        study = {**STUDY, **changes}
        document["studies"] = {"wide": {k: v for k, v in study.items() if v is not None}}
        path = tmp_path / "params.yaml"
        path.write_text(yaml.safe_dump(document, sort_keys=False))
        return path

    return write


def test_a_grid_and_a_list_make_cells_seed_by_seed(params: Any) -> None:
    path = params(vary={"model.width": [8, 16], "model.mixtures": [3]}, compare=[])
    cells = cells_of(load_study("wide", path), path=path)
    assert [(cell.variant, cell.seed) for cell in cells] == [
        ("width=8,mixtures=3", 0),
        ("width=16,mixtures=3", 0),
        ("width=8,mixtures=3", 1),
        ("width=16,mixtures=3", 1),
    ]
    last = cells[-1].recipe
    assert (last.model.width, last.model.mixtures, last.train.seed, last.train.steps) == (
        16, 3, 1, 4,
    )  # fmt: skip
    named = {"thin": {"model.width": 8}, "wide": {"model.width": 16, "train.steps": 9}}
    mini = {"seeds": [0], "set": {"train.steps": 2}}
    path = params(vary=None, variants=named, compare=[["wide", "thin"]], mini=mini)
    study = load_study("wide", path)
    assert [cell.recipe.model.width for cell in cells_of(study, path=path)] == [8, 16, 8, 16]
    assert [cell.recipe.train.steps for cell in cells_of(study, path=path)] == [4, 9, 4, 9]
    short = cells_of(study, mini=True, path=path)
    assert [(cell.seed, cell.recipe.train.steps) for cell in short] == [(0, 2), (0, 2)]
    assert variants_of(study) == named


def test_a_cell_is_found_by_what_determines_its_figures(params: Any) -> None:
    def experiments(**changes: Any) -> list[str]:
        path = params(**changes)
        return [cell.experiment for cell in cells_of(load_study("wide", path), path=path)]

    plain = experiments()
    assert len({*plain}) == 4
    assert experiments(claim="another", compare=[]) == plain
    assert experiments(vary={"model.width": [16, 8]}) == [plain[i] for i in (1, 0, 3, 2)]
    assert not {*experiments(set={"train.steps": 5})} & {*plain}
    assert not {*experiments(set={**STUDY["set"], "evaluate.seed": 1})} & {*plain}
    assert experiments(set={**STUDY["set"], "sample.seed": 1}) == plain


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"claim": None}, r"studies\.wide\.claim: .*Field required"),
        ({"seeds": []}, r"studies\.wide\.seeds: "),
        ({"seeds": ["x"]}, r"studies\.wide\.seeds\.0: 'x': "),
        ({"seeds": [0, 0]}, r"studies\.wide\.seeds: .*has a seed twice"),
        ({"mini": {"seeds": [1, 1]}}, r"studies\.wide\.mini\.seeds: .*has a seed twice"),
        ({"vary": {"model.width": []}, "compare": []}, r"studies\.wide\.vary\.model\.width: "),
        ({"set": {"train.seed": 3}}, r"train\.seed is set by the study's seeds"),
        (
            {"vary": {"evaluate.seed": [0, 1]}, "compare": []},
            "seed=1 has other settings of evaluate",
        ),
        ({"vary": {"data.split_seed": [0, 1]}, "compare": []}, "=1 has other settings of data"),
        ({"extra": 1}, r"studies\.wide\.extra: 1: Extra inputs"),
        ({"variants": {"a": {}}}, "needs either `vary` or `variants`"),
        ({"vary": None}, "needs either `vary` or `variants`"),
        (
            {"compare": [["width=16", "width=9"]]},
            "there is no variant 'width=9'; there are width=8",
        ),
        ({"recipe": "none"}, "no recipe 'none'"),
        ({"set": {"steps": 3}}, "'steps' is not a setting as train.steps is"),
        ({"set": {"train.stepps": 3}}, r"train\.stepps: unknown key \(did you mean 'steps'"),
        ({"vary": {"model.width": [0]}, "compare": []}, r"model\.width: 0 is out of bounds"),
        (
            {"seeds": [*range(100)], "vary": {"model.width": [*range(1, 12)]}, "compare": []},
            "1100 cells",
        ),
        ({"vary": {"model.width": [8, 8]}, "compare": []}, "has the same variant twice"),
    ],
)
def test_a_declaration_that_does_not_do_is_one_sentence(
    params: Any, changes: dict[str, Any], words: str
) -> None:
    path = params(**changes)
    with pytest.raises(UserError, match=words) as caught:
        load_study("wide", path)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no study 'other'; there are wide"):
        load_study("other", path)


def test_norms_that_are_not_finite_are_counted_beside_the_percentiles() -> None:
    """JSON has no infinity, and a percentile would be one."""
    recipe = load_recipe("digits", ROOT / "params.yaml")

    def columns(*of_seeds: list[float]) -> dict[str, list[float]]:
        return SHOWN["gradients"].columns(
            [{"recipe": recipe, "curves": [{"train/gradient_norm": norm} for norm in norms]}
             for norms in of_seeds]
        )  # fmt: skip

    found = columns([1.0, math.inf, 3.0], [2.0, 2.0, 2.0])
    assert found["gradient norm, median"] == [2.0, 2.0]
    assert found["gradient norm, greatest"] == [3.0, 2.0]
    assert found["intervals with a norm that is not finite"] == [1.0, 0.0]
    at_start = found["features at the output before training, RMS"]
    assert at_start[0] == at_start[1] > 0
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert "intervals with a norm that is not finite" not in columns([1.0])


@pytest.mark.integration
def test_a_study_runs_compares_and_judges_once(tmp_path: Path) -> None:
    project = Project(tmp_path / "project")
    project.set(narrow)
    study = {**STUDY, "shows": "resolutions"}
    project.set(lambda params: params.update(studies={"wide": study}, active_studies=["wide"]))
    words = ("study", "wide", "--mini", "--jobs", "2")
    refused = project.run(*VDVAE, *words, code=2)
    assert "params.yaml: differs from the commit" in refused
    project.run("git", "commit", "-qam", "study")
    listed = project.run(*VDVAE, *words, "--dry-run")
    assert "2 cells of wide, 2 to run" in listed

    # As the form starts it: in a clone, from where the cells' experiments come back.
    project.run("git", "clone", "-q", str(project.folder), str(tmp_path / "clone"))
    flow = "from pipeline.studies.flow import study; study('wide', mini=True, jobs=2)"
    logged = project.run(sys.executable, "-c", f"import os; os.chdir('../clone'); {flow}")
    assert "to have it in the origin: 'vdvae study wide --mini'" in logged

    printed = project.run(*VDVAE, *words)
    assert "begins" not in printed
    folder = project.folder / "results/studies/wide-mini"
    table = json.loads((folder / "table.json").read_text())
    assert [(cell["variant"], cell["steps"]) for cell in table["cells"]] == [
        ("width=8", 4),
        ("width=16", 4),
    ]
    [found] = table["comparisons"]
    bits = {cell["variant"]: cell["test"]["bits_per_dim"] for cell in table["cells"]}
    assert found["mean"] == pytest.approx(bits["width=8"] - bits["width=16"])
    assert (found["images"], found["seeds"], table["verdict"]) == (360, 1, "undecided")
    assert (folder / "table.md").read_text() in printed
    assert "| width=16 | 1 |" in printed
    assert (folder / "figure.svg").read_text().startswith("<svg xmlns=")
    assert "share of rate at 8x8" in printed
    shares = table["variants"]["width=8"]["shown"]  # of a layer each at 1x1, 4x4 and 8x8
    assert shares["share of latents at 8x8"] == [64 / 81]
    for picture in ("figure.png", "reconstructions.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "conditions.json").read_text())["split"] == "test"
    assert "results/studies" in project.run("git", "status", "--porcelain", "-uall")

    # The cells' runs stand below the study's, and the same again makes nothing new.
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    again = project.run(*VDVAE, *words)
    assert "begins" not in again
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    client = tracking.connect(f"sqlite:///{project.folder}/mlruns/mlflow.db")
    experiment = client.get_experiment_by_name(tracking.EXPERIMENT)
    runs = client.search_runs([experiment.experiment_id])
    [parent] = [run for run in runs if "vdvae_study" in run.data.tags]
    children = [run for run in runs if run is not parent]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert sorted(run.data.tags["study.wide-mini"] for run in children) == [
        "width=16, seed 0",
        "width=8, seed 0",
    ]

    # DVC's stage trains what the whole study has beside that: the cells of the other seed.
    repro = ("-m", "dvc", "repro", "study@wide")
    made = project.run(sys.executable, *repro, cold=True)
    assert made.count(": begins") == 2 and "width=8, seed 1 (1 of 2): done" in made
    whole = json.loads((project.folder / "results/studies/wide/table.json").read_text())
    assert [cell["seed"] for cell in whole["cells"]] == [0, 0, 1, 1]
    assert whole["cells"][:2] == table["cells"]
    assert "up to date" in project.run(sys.executable, *repro)
    shown = project.run(sys.executable, "-m", "dvc", "plots", "show", "--json")
    assert "results/studies/wide/figure.png" in shown
