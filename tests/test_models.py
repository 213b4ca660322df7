"""`vdvae models`: found by name, checked to the byte, used without half a result."""

from __future__ import annotations

import copy
import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from registry_project import NAME, Project, enter

import vdvae
from pipeline.cli.main import main
from pipeline.registry import use as models
from pipeline.registry.model_card import model_card
from pipeline.shards import Manifest
from pipeline.sources.source import on_levels
from pipeline.stages.evaluate import evaluate
from pipeline.stages.shard import shard
from vdvae import UserError
from vdvae.files import sha256_of

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator[Project]:
    """A model of random weights, whose images, figures and registration are real."""
    with pytest.MonkeyPatch.context() as patch:
        enter(tmp_path_factory.mktemp("registered"), patch, empty_store)
        params = yaml.safe_load(Path("params.yaml").read_text())
        params["recipes"]["tiny"]["data"] |= {"validation": 0.3, "test": 0.3}
        Path("params.yaml").write_text(yaml.safe_dump(params))
        rng = np.random.default_rng(0)
        Path("images").mkdir()
        for index in range(30):
            Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(f"images/i{index}.png")
        shard("tiny")
        project = Project()
        torch.manual_seed(0)
        vdvae.save(vdvae.VDVAE(project.recipe.model), project.results / "model")
        evaluate("tiny")
        entry = {
            "cmd": "exec python -m pipeline.stages.train tiny",
            "params": {"params.yaml": {"recipes.tiny.train": {"steps": 2}}},
            "outs": [{"path": "results/tiny/model", "md5": "0" * 32}],
        }
        names = ("train@tiny", "evaluate@tiny", "train@other")
        stages = {name: copy.deepcopy(entry) for name in names}
        Path("dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}))
        patch.setenv("VDVAE_FLOW_RUN", "a-flow-run")
        project.register()
        patch.delenv("VDVAE_FLOW_RUN")
        yield project


@pytest.fixture(autouse=True)
def _inside(request: pytest.FixtureRequest) -> None:
    if "registered" in request.fixturenames:
        request.getfixturevalue("registered")


def ended(words: list[str]) -> int:
    with pytest.raises(SystemExit) as end:
        main(["models", *words])
    return int(str(end.value.code))


def test_show_leads_from_the_version_to_its_source(
    registered: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = json.loads((registered.results / "metrics.json").read_text())["validation"]
    figure = f"{metrics['bits_per_dim']:.4f} ± {metrics['bits_per_dim_se']:.4f}"
    main(["models", "list"])
    (_, row) = capsys.readouterr().out.splitlines()
    assert row.startswith(f"{NAME}/1  champion  {figure}")
    main(["models", "list", "--json"])
    [listed] = json.loads(capsys.readouterr().out)
    assert listed["bits_per_dim"]["validation"]["mean"] == pytest.approx(metrics["bits_per_dim"])
    main(["models", "show", NAME, "--verify", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert (facts["version"], facts["verified"]["differences"]) == (1, [])
    manifest = json.loads(registered.places.manifest("tiny").read_text())
    tars = [tar for split in manifest["splits"].values() for tar in split["shards"]]
    weights = sha256_of(registered.results / "model/model.safetensors")
    run = json.loads((registered.results / "registered.json").read_text())["mlflow_run_id"]
    for reference in (NAME, f"{NAME}@champion", f"{NAME}/1", f"models:/{NAME}@champion"):
        main(["models", "show", reference])
        shown = capsys.readouterr().out
        for fact in (
            f"{NAME} version 1", figure, weights, run, "train@tiny, evaluate@tiny\n",
            manifest["source"]["fingerprint"], "a-flow-run", "champion: none -> 1, first",
            *(f"{tar['name']}  {tar['sha256']}" for tar in tars),
        ):  # fmt: skip
            assert fact in shown, fact


def flip(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)


def replace(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new, 1))


VERSION = "mlruns/artifacts/*/artifacts/models/*"


@pytest.mark.parametrize(
    ("where", "spoil", "words"),
    [
        ("store/shards/tiny/*.tar", flip, "shard tiny-{}.tar: its bytes in the store have changed"),
        ("store/shards/tiny/*.tar", Path.unlink, ".tar: is not in the store, at file://"),
        (f"{VERSION}/artifacts/model/model.safetensors", flip,
         "version 1: artifacts/model/model.safetensors: has changed"),
        (f"{VERSION}/code/vdvae/model.py", flip, "version 1: code/vdvae/model.py: has changed"),
        (f"{VERSION}/SHA256SUMS", lambda p: flip(p, 0), "version 1: SHA256SUMS: has changed"),
        (f"{VERSION}/evaluation/per_image.csv", Path.unlink, "per_image.csv: is missing"),
        ("results/tiny/model/model.safetensors", flip,
         "results/tiny/model/model.safetensors: is not the model that was registered"),
        ("data/manifests/tiny.json", flip, "differs: data/manifests/tiny.json: has changed"),
        ("dvc.lock", lambda p: replace(p, "steps: 2", "steps: 3"),
         "dvc.lock: evaluate@tiny: params params.yaml recipes.tiny.train steps is 3, {} was 2"),
        ("dvc.lock", lambda p: replace(p, "outs:", "outs"), "dvc.lock: is damaged"),
        ("dvc.lock", Path.unlink, "dvc.lock: is missing"),
    ],
)  # fmt: skip
def test_verify_names_what_differs(
    registered: Project, capsys: pytest.CaptureFixture[str], where: str, spoil, words: str
) -> None:
    path = sorted(Path().glob(where))[0]
    before = path.read_bytes()
    spoil(path)
    try:
        assert ended(["show", NAME, "--verify"]) == 1
    finally:
        path.write_bytes(before)
    shown = capsys.readouterr().out
    found = [line for line in shown.splitlines() if line.startswith("differs: ")]
    wanted = words.split("{}")
    assert len(found) == 1 and all(part in found[0] for part in wanted), shown
    assert shown.endswith("1 differences\n")


def test_verify_is_content_with_whole_bytes(
    registered: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["models", "show", NAME, "--verify"])
    assert "entries of dvc.lock: no differences\n" in capsys.readouterr().out


@pytest.mark.parametrize("other", ["weights", "run"])
def test_verify_tells_another_training_from_a_changed_byte(
    registered: Project, capsys: pytest.CaptureFixture[str], other: str
) -> None:
    """Where the checkout has gone on, its dvc.lock rightly differs."""
    lock = Path("dvc.lock")
    paths = {"weights": "model/model.safetensors", "run": "run.json"}
    changed = registered.results / paths[other]
    before = changed.read_bytes(), lock.read_bytes()
    if other == "weights":
        flip(changed)
    else:
        changed.write_text(json.dumps({"run_key": "0" * 32}))
    lock.write_text(lock.read_text().replace("0" * 32, "1" * 32))
    main(["models", "show", NAME, "--verify"])
    changed.write_bytes(before[0])
    lock.write_bytes(before[1])
    shown = capsys.readouterr().out
    assert "note: this checkout is of another training" in shown
    assert "no differences\n" in shown


def test_a_damaged_version_is_refused_and_registering_again_mends_it(registered: Project) -> None:
    (path,) = Path().glob(f"{VERSION}/artifacts/model/model.safetensors")
    flip(path)
    with pytest.raises(UserError, match=r"version 1: its model\.safetensors is not what was") as no:
        models.load(NAME)
    assert "'dvc repro -f -s register@tiny'" in str(no.value)
    assert registered.register().version == 1
    assert models.load(NAME).config == registered.recipe.model
    assert models.verify(NAME).differences == []


def test_scores_are_evaluates(registered: Project, capsys: pytest.CaptureFixture[str]) -> None:
    with (registered.results / "per_image.csv").open() as file:
        recorded = {row["key"].split("-")[0]: row for row in csv.DictReader(file)}
    main(["models", "score", NAME, "images"])
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [row["image"] for row in rows] == sorted(os.listdir("images"))
    matched = [(row, recorded[Path(row["image"]).stem]) for row in rows
               if Path(row["image"]).stem in recorded]  # fmt: skip
    assert len(matched) == len(recorded) > 5  # validation and test
    for ours, theirs in matched:
        assert float(ours["bits_per_dim"]) == pytest.approx(float(theirs["bits_per_dim"]), rel=1e-6)
    main(["models", "score", NAME, "images", "-o", "made/scores.csv"])
    assert capsys.readouterr().out.startswith("30 images, ")
    assert list(csv.DictReader(Path("made/scores.csv").read_text().splitlines())) == rows


def test_images_that_do_not_fit_are_named_one_by_one_and_nothing_is_written(
    registered: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    Image.new("L", (8, 8)).save(folder / "good.png")
    Image.new("L", (9, 8)).save(folder / "large.png")
    (folder / "broken.png").write_bytes((folder / "good.png").read_bytes()[:-20])
    Image.new("L", (8, 8)).save(
        folder / "moving.gif", save_all=True, append_images=[Image.new("L", (8, 8), 9)]
    )
    (folder / "notes.txt").write_text("no image")
    for words in (["score"], ["encode"], ["reconstruct"]):
        assert ended([*words, NAME, str(folder), "-o", str(tmp_path / "out")]) == 2
        told = capsys.readouterr()
        assert told.out == ""
        broken, large, moving = told.err.splitlines()
        assert large == (
            f"error: {folder}/large.png: is 9x8, this model reads 8x8; crop or resize it"
        )
        assert broken.startswith(f"error: {folder}/broken.png: cannot be decoded")
        assert moving.startswith(f"error: {folder}/moving.gif: is animated")
    assert ended(["interpolate", NAME, str(folder / "good.png"), "none.png", "-o", "x.png"]) == 2
    assert capsys.readouterr().err.startswith("error: none.png: cannot be read (No such file")
    os.mkfifo(tmp_path / "pipe.png")
    assert ended(["interpolate", NAME, str(tmp_path / "pipe.png"), "-", "-o", "x.png"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/pipe.png: is no regular file")
    (tmp_path / "pipe.png").unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["odd"]


def test_latents_come_by_layer(registered: Project) -> None:
    main(["models", "encode", NAME, "images", "-o", "made/latents.npz"])
    with np.load("made/latents.npz") as made:
        assert made.files == ["keys", "layer_000_2x2", "layer_001_8x8"]
        keys = made["keys"].tolist()
        assert keys == sorted(os.listdir("images"))
        picture = np.asarray(Image.open(f"images/{keys[3]}"))
        x_BCHW = torch.from_numpy(picture.copy())[None, None]
        for name, z_BZHW in zip(
            made.files[1:], models.load(NAME).encode(x_BCHW, True), strict=True
        ):
            assert made[name].dtype == np.float32
            np.testing.assert_allclose(made[name][3:4], z_BZHW, atol=1e-5)
    assert sorted(path.name for path in Path("made").iterdir() if "latents" in path.name) == [
        "latents.npz"
    ]


def test_pictures_are_drawn(registered: Project, capsys: pytest.CaptureFixture[str]) -> None:
    first, last = "images/i0.png", "images/i1.png"
    main(["models", "sample", NAME, "--n", "4", "--seed", "7", "-o", "made/grid.png"])
    main(["models", "reconstruct", NAME, "images", "--n", "3", "-o", "made/ladder.png"])
    main(["models", "interpolate", NAME, first, last, "--steps", "5", "-o", "made/way.png"])
    capsys.readouterr()
    cell = 48 + 2  # pixels of an enlarged image and the gap
    for name, columns, rows in (("grid", 2, 2), ("ladder", 3, 3), ("way", 5, 1)):
        with Image.open(f"made/{name}.png") as picture:
            assert picture.size == (columns * cell + 2, rows * cell + 2)
    ladder, images = models.reconstruct(NAME, Path("images"), 3)
    assert len(ladder) == 2 and images.shape == (3, 8, 8, 1)
    picture = np.asarray(Image.open("images/i0.png"))
    assert np.array_equal(images[0, :, :, 0], on_levels(picture, 17))


def test_an_exported_folder_needs_no_mlflow_and_comes_whole(
    registered: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "exported"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt))
        models.export(NAME, folder)
    assert list(tmp_path.iterdir()) == []
    main(["models", "export", NAME, str(folder)])
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", "model.safetensors", "model_card.md",
    ]  # fmt: skip
    loaded = vdvae.load(folder).state_dict()
    for name, tensor in vdvae.load(registered.results / "model").state_dict().items():
        assert torch.equal(loaded[name], tensor)
    assert ended(["export", NAME, str(folder)]) == 2


def test_the_card_counts_what_was_left_out(registered: Project) -> None:
    manifest = Manifest.load(registered.places.manifest("tiny"))
    notes = {"left out": {"damaged": 2, "is animated": 1}}
    source = manifest.source.model_copy(update={"notes": notes})
    card = model_card(
        name="vdvae-tiny",
        config=registered.recipe.model,
        parameters=1,
        manifest=manifest.model_copy(update={"source": source}),
        metrics={},
        conditions={"seed": 0},
        tags={"weights_sha256": "", "environment": ""},
        settings=registered.recipe.flat(),
    )
    assert "Files left out as no images: 3 (damaged 2, is animated 1)." in card


def test_the_card_says_what_somebody_should_know(registered: Project) -> None:
    version = models.get(NAME)
    (path,) = Path().glob(f"{VERSION}/model_card.md")
    card = path.read_text()
    assert version.description == card
    assert len(card) <= 5000  # what MLflow keeps on every database
    metrics = json.loads((registered.results / "metrics.json").read_text())
    manifest = json.loads(registered.places.manifest("tiny").read_text())
    for fact in (
        f"{metrics['test']['bits_per_dim']:.4f} ± {metrics['test']['bits_per_dim_se']:.4f}",
        f"validation {manifest['splits']['validation']['images']}, ",
        manifest["source"]["terms"], "17 levels", "in fp32 on cpu", "dvc repro register@tiny",
        "normalised: probabilities", f"`{registered.recipe.model.encoder}`", "## Limits",
    ):  # fmt: skip
        assert fact in card, fact
    page = registered.client.get_registered_model(NAME)
    assert "tries 40 equal\ncandidates must expect one to pass" in page.description


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["show", "a/b/c"], "error: 'a/b/c' names no model; write NAME@ALIAS, NAME/VERSION"),
        (["show", f"{NAME}/7"], f"{NAME} has no version 7; 'vdvae models list' shows"),
        (["show", "vdvae-none@best"], "no version of vdvae-none has the alias 'best'"),
        (["sample", NAME, "--n", "0", "-o", "x.png"], "error: n: 0 is out of bounds"),
        (["sample", NAME, "-o", "images"], "error: images: is a folder; name a file to write"),
        (["sample", NAME, "-o", "/proc/x/y.png"], "error: /proc/x/y.png: cannot be written"),
        (["score", NAME, "nowhere"], "error: nowhere: is no folder"),
        (["score", NAME, "mlruns"], "error: mlruns: has no images (.png, "),
        (["interpolate", NAME, "images/i0.png", "images/i1.png", "--steps", "1", "-o", "x.png"],
         "error: steps: 1 leaves no way"),
        (["rollback", NAME], f"error: {NAME}@champion: no earlier version to go back to (it is at"),
        (["rollback", f"{NAME}/1"], "is one version; to go back, name an alias, such as"),
    ],
)  # fmt: skip
def test_the_users_errors_are_one_sentence(
    registered: Project, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    assert ended(words) == 2
    told = capsys.readouterr()
    assert sentence in told.err and told.err.count("\n") == 1
    assert told.out == ""
    assert not Path("x.png").exists()


def test_looking_makes_no_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert ended(["list"]) == 2
    assert "mlflow.db: there is no MLflow database; set MLFLOW" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
