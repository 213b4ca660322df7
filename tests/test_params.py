"""params.yaml: what is refused, in one sentence that names file, key, value and remedy."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from pipeline.dvc import code_of
from pipeline.flows import experiment
from pipeline.params import Places, load_recipe, raw_path, read_params
from pipeline.stages.train import run_digest
from vdvae.config import UserError

ROOT = Path(__file__).parents[1]
LONG = 10**4000


def written(folder: Path, params: Any) -> Path:
    path = folder / "params.yaml"
    path.write_text(params if isinstance(params, str) else yaml.safe_dump(params))
    return path


@pytest.fixture
def params() -> dict[str, Any]:
    """The project's own file, to be spoilt."""
    return yaml.safe_load((ROOT / "params.yaml").read_text())


@pytest.mark.parametrize(
    ("section", "key", "value", "words"),
    [
        pytest.param(
            "train", "batch_size", LONG, "of some 4,001 digits is out of bounds", id="int"
        ),
        pytest.param("train", "beta1", LONG, "4,001 digits is not a finite number", id="float"),
        pytest.param("train", "steps", "x" * 5000, "xxx' is not a whole number", id="text"),
        pytest.param("train", LONG, 1, "a number of some 4,001 digits: unknown key", id="key"),
        ("model", "encoder", "8x100000", "has more than 1,000 blocks"),
        pytest.param("model", "encoder", "8x2," * 2000, "more than 1,000 blocks", id="blocks"),
        pytest.param("model", "decoder", f"1x{LONG}", "the entry '1x10", id="count"),
        ("model", "widths", "8:24,8:48", "gives a width at 8 twice"),
        ("model", "widths", "8:999999", "999999 at 8 is out of bounds"),
        ("model", "width", 10**9, "model.width: 1000000000 is out of bounds"),
        ("data", "path", "a\0b", "data.path: 'a\\x00b' is no path"),
        ("train", "stesp", 3, "train.stesp: unknown key (did you mean 'steps'?)"),
        ("train", "steps", "many", "train.steps: 'many' is not a whole number"),
        ("train", "steps", 0, "train.steps: 0 is out of bounds; it must be from 1 to"),
        ("train", "learning_rate", "2 e-4", "train.learning_rate: '2 e-4' is not a finite number"),
        ("train", "precision", "fp8", "train.precision: 'fp8' is not one of 'fp32'"),
        ("train", "validate_every", 7, "is not a multiple of train.log_every"),
        ("data", "source", "mnist", "data.source: 'mnist' is not one of 'digits'"),
        ("data", "channels", 4, "data.channels: 4 is not 1 or 3"),
        ("data", "image_size", 16, "images are 16x16"),
        ("model", "decoder", "1x1,2m1,8m2", "resolution 2 has no activation"),
        ("model", "encoder", "8x2,4x2", "resolution 4 of '8x2,4x2' cannot be reached"),
        ("model", "num_levels", 17, "model.num_levels: is set by recipes.digits.data.num_levels"),
        ("evaluate", "passes", 0, "evaluate.passes: 0 is out of bounds; it must be from 1 to"),
        ("evaluate", "iwae", -1, "evaluate.iwae: -1 is out of bounds; it must be from 0 to"),
        ("sample", "temperature", -1, "sample.temperature: -1.0 is out of bounds"),
        ("register", "alias", "best", "register.alias: 'best' is not one of 'champion'"),
    ],
)
def test_bad_values_are_named(
    tmp_path: Path, params: dict[str, Any], section: str, key: str, value: Any, words: str
) -> None:
    params["recipes"]["digits"][section][key] = value
    path = written(tmp_path, params)
    with pytest.raises(UserError) as caught:
        load_recipe("digits", path)
    assert words in str(caught.value)
    assert str(caught.value).startswith(f"{path}: recipes.digits")


def test_broken_files_are_named(tmp_path: Path, params: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="not found; run this at the project's root"):
        read_params(tmp_path / "params.yaml")
    for text, words in (
        ("a: [", "not readable as YAML"),
        ("active: [digits]\nrecipes: {digits: {}, digits: {}}", "the key 'digits' is given twice"),
        ("active: [[digits]]\nrecipes: {digits: {}}", r"no recipe \['digits'\]; there are digits"),
        ("active: [{digits: 1}]\nrecipes: {digits: {}}", r"no recipe {'digits': 1}; there are"),
        ("active: [2001-01-01]\nrecipes: {digits: {}}", r"no recipe datetime.date\(2001, 1, 1\)"),
        ("active: [digits, digits]\nrecipes: {digits: {}}", "'digits' is given twice"),
        ("active: [1]\nrecipes: {1: {}}", "the name 1 is not made of letters"),
        ("active: [digits]\nrecipes: {digits: {}, ../../x: {}}", "name '../../x' is not made of"),
        ("active: [digits]\nrecipes: {digits: {}, '': {}}", "the name '' is not made of letters"),
        ("active: [digits]\nrecipes: {digits: {}, $(id): {}}", r"name '\$\(id\)' is not made"),
        (
            "active: [digits]\nrecipes: {digits: {data: {2001-01-01: 1}}}",
            "2001, 1, 1.: unknown key",
        ),
        ("- 1", "has no section 'recipes'"),
        ("active: [digits]\nrecipes: {digits: 3}", r"3 is not a set of sections"),
        ("active: digits\nrecipes: {digits: {}}", "active: 'digits' is not a list of recipes"),
        ("active: [x]\nrecipes: {digits: {}}", "active: no recipe 'x'; there are digits"),
        ("active: [digits]\nrecipes: {digits: {}}\nextra: 1", "unknown key 'extra'"),
        ("active: [digits]\nrecipes: {digits: {data: {}}}", r"data\.source: missing"),
        ("active: [digits]\nrecipes: {digits: {dat: {}}}", r"digits\.dat: unknown section"),
        ("active: [digits]\nrecipes: {digits: {data: [1]}}", "is not a section of keys"),
    ):
        with pytest.raises(UserError, match=words):
            load_recipe("digits", written(tmp_path, text))
    with pytest.raises(UserError, match="no recipe 'digit'; there are cifar10, digits"):
        load_recipe("digit", written(tmp_path, params))


@pytest.mark.parametrize("stage", ["shard", "train", "evaluate", "sample", "register"])
def test_every_stage_ends_with_one_line_and_code_2(
    tmp_path: Path, params: dict[str, Any], stage: str
) -> None:
    params["recipes"]["digits"]["train"]["batch_size"] = 0
    written(tmp_path, params)
    done = subprocess.run(
        [sys.executable, "-m", f"pipeline.stages.{stage}", "digits"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == (
        "error: params.yaml: recipes.digits: train.batch_size: 0 is out of bounds; "
        "it must be from 1 to 1,000,000\n"
    )
    assert done.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]


@pytest.mark.parametrize(
    ("change", "another"),
    [({"learning_rate": 1e-4}, True), ({"precision": "bf16"}, True), ({"seed": 1}, True),
     ({"steps": 7}, False), ({"accumulation": 2}, False), ({"keep_checkpoints": 1}, False),
     ({"evaluate.seed": 1}, True), ({"evaluate.passes": 2}, False)],
)  # fmt: skip
def test_what_determines_the_weights_begins_another_run(
    params: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any], another: bool,
) -> None:  # fmt: skip
    monkeypatch.chdir(ROOT)
    manifest: Any = SimpleNamespace(digest="0" * 64)
    before = run_digest(load_recipe("digits", written(tmp_path, params)), manifest)
    for key, value in change.items():
        section, _, name = key.rpartition(".")
        params["recipes"]["digits"][section or "train"][name] = value
    after = run_digest(load_recipe("digits", written(tmp_path, params)), manifest)
    assert (after != before) == another


def test_code_that_dvc_lists_begins_another_run(
    params: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    manifest: Any = SimpleNamespace(digest="0" * 64)
    recipe = load_recipe("digits", written(tmp_path, params))
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    for path in code_of("train"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text("")
    before = run_digest(recipe, manifest)
    Path("vdvae/randomness.py").write_text("# another seed_of")
    assert run_digest(recipe, manifest) != before


PLACES = ("VDVAE_STORE", "VDVAE_RUNS", "VDVAE_CACHE", "MLFLOW_TRACKING_URI")


@pytest.mark.parametrize("copy", ["tmp4x_a", "standalone/tmp9b"])  # of the queue; of --temp
def test_a_copy_that_dvc_works_in_has_the_places_of_its_origin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copy: str
) -> None:
    origin, here = tmp_path / "project", tmp_path / "project/.dvc/tmp/exps" / copy
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    for name in PLACES:
        monkeypatch.delenv(name, raising=False)
    assert Places.from_env().runs == here / "runs"  # a folder is taken for a copy by DVC's word
    (tmp_path / "link").symlink_to(origin)
    for root in (origin, tmp_path / "link"):
        monkeypatch.setenv("DVC_ROOT", str(root))
        found = Places.from_env()
        assert found == Places(
            store_url=f"file://{root}/store",
            runs=root / "runs",
            tracking_uri=f"sqlite:///{root}/mlruns/mlflow.db",
            cache=root / "cache",
        )
        assert not found.results("digits").is_absolute()  # what DVC keeps is made here
    for name in PLACES[1:3]:
        monkeypatch.setenv(name, "../elsewhere")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mine.db?timeout=5")
    relative = Places.from_env()
    assert relative.runs == relative.cache == root / "../elsewhere"
    assert relative.tracking_uri == f"sqlite:///{root}/mine.db?timeout=5"


def test_dvc_root_alone_moves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other/.dvc/tmp/exps").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    plain = Places.from_env()
    for root in (tmp_path, tmp_path / "other", tmp_path.parent, "other", ""):
        monkeypatch.setenv("DVC_ROOT", str(root))
        assert Places.from_env() == plain


def test_raw_data_that_git_does_not_track_are_the_origins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin, here = tmp_path, tmp_path / ".dvc/tmp/exps/tmp1"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    monkeypatch.setenv("DVC_ROOT", str(origin))
    for path in (origin / "images/a.png", origin / "tracked/b.png", here / "tracked/b.png"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (here / "images").mkdir()
    (here / "images/.gitkeep").touch()  # is all that git has of it
    assert raw_path("images") == origin / "images"
    assert raw_path("tracked") == here / "tracked"
    assert raw_path("images/a.png") == origin / "images/a.png"
    assert raw_path("/elsewhere") == Path("/elsewhere")


def test_a_project_whose_path_no_database_url_can_hold_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "what?").mkdir()
    monkeypatch.chdir(tmp_path / "what?")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for given in ("", "sqlite:///mine.db"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
        with pytest.raises(UserError, match=r"rename the folder, or set MLFLOW_TRACKING_URI to"):
            Places.from_env()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    assert Places.from_env().store_url == f"file://{tmp_path}/what?/store"


@pytest.mark.parametrize("name", ["ü 日本", "what?", "100%", "a, #1 'b' \"c\""])
def test_a_clone_shares_dvcs_cache_whatever_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from dvc.config import Config

    (tmp_path / ".dvc").mkdir()
    monkeypatch.chdir(tmp_path)
    subprocess.run(["git", "init", "-q"], check=True)
    monkeypatch.setenv("VDVAE_DVC_CACHE", str(tmp_path / name))
    experiment.prepare(None)
    assert Config.load_file(".dvc/config.local")["cache"] == {"dir": str(tmp_path / name)}
