"""What a form may choose, and what becomes of it in params.yaml."""

from __future__ import annotations

import difflib
import re
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from pipeline.flows.overrides import Overrides, apply, shrink
from pipeline.params import load_recipe
from vdvae import ModelConfig, UserError
from vdvae.config import parse_decoder, parse_encoder
from vdvae.models import build

RECIPES = list(yaml.safe_load((ROOT / "params.yaml").read_text())["recipes"])


@pytest.fixture
def params(tmp_path: Path) -> Path:
    return Path(shutil.copy(ROOT / "params.yaml", tmp_path / "params.yaml"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_smoke_keeps_resolutions_levels_and_likelihood(params: Path, recipe: str) -> None:
    full = load_recipe(recipe, params)
    smoke = apply(Overrides(preset="smoke"), recipe, params)
    if isinstance(full.model, ModelConfig):
        assert isinstance(smoke.model, ModelConfig)
        for parse, side in ((parse_encoder, "encoder"), (parse_decoder, "decoder")):
            ours, theirs = (set(parse(getattr(r.model, side))) for r in (smoke, full))
            assert ours == theirs  # every kind of block: resolution and pooling or unpooling
        assert len(parse_decoder(smoke.model.decoder)) <= len(parse_decoder(full.model.decoder))
        assert max(smoke.model.width_at(2**k) for k in range(11)) <= 32
    assert smoke.data == full.data
    for name in ("image_size", "image_channels", "num_levels", "likelihood", "shift", "scale"):
        assert getattr(smoke.model, name) == getattr(full.model, name)
    assert (smoke.train.steps, smoke.train.batch_size, smoke.train.device) == (30, 4, "cpu")
    assert sum(p.numel() for p in build(smoke.model).parameters()) < 300_000


def test_only_what_was_chosen_changes_and_comments_stay(params: Path) -> None:
    before = params.read_text()
    chosen = Overrides(steps=7, batch_size=3, learning_rate=0.01, seed=5, gpus=1)
    recipe = apply(chosen, "ffhq256", params)
    assert (recipe.train.steps, recipe.train.batch_size) == (7, 3)
    assert (recipe.train.learning_rate, recipe.train.seed) == (0.01, 5)
    assert recipe.train.device == "cuda"
    ours, theirs = params.read_text().splitlines(), before.splitlines()
    changed = [line for line in difflib.ndiff(theirs, ours) if line[:1] in "+-"]
    changed = [line.partition(" #")[0] for line in changed]
    assert sorted(changed) == [
        "+       accumulation: 1",  # 3 images at once are fewer than the recipe's 4
        "+       batch_size: 3",
        "+       learning_rate: 0.01",
        "+       seed: 5",
        "+       steps: 7",
        "+ active: [digits, ffhq256]",  # never narrowed
        "-       accumulation: 8",
        "- active: [digits]",
    ]


def test_a_refused_choice_leaves_the_file_as_it_was(params: Path) -> None:
    before = params.read_text()
    with pytest.raises(UserError, match="no recipe 'nothing'"):
        apply(Overrides(), "nothing", params)
    with pytest.raises(UserError, match=r"^data: "):
        apply(Overrides(data="file:///nowhere"), "digits", params)
    with pytest.raises(UserError, match=r"^gpus: 0 would train ffhq256 on the CPU"):
        apply(Overrides(gpus=0), "ffhq256", params)
    assert params.read_text() == before


def test_a_field_that_is_left_alone_changes_nothing(params: Path) -> None:
    own = {"seed": 7, "precision": "tf32", "device": "cuda", "accumulation": 2}
    settings = "".join(f"      {key}: {value}\n" for key, value in own.items())
    merges = "    train: {<<: *digits_train}\n"
    as_block = f"    train:\n      <<: *digits_train\n{settings}"
    text = params.read_text().replace(merges, as_block, 1)
    params.write_text(text)
    before = load_recipe("digits", params)
    assert before.train.to_dict().items() >= own.items()
    assert apply(Overrides(), "digits", params) == before
    assert params.read_text() == text
    chosen = Overrides(seed=0, precision="fp32", gpus=0, preset="smoke")
    train = apply(chosen, "digits", params).train
    assert (train.seed, train.precision, train.device) == (0, "fp32", "cpu")


def test_a_folder_becomes_the_source_at_the_recipes_size(
    params: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "my photos"
    folder.mkdir()
    monkeypatch.setenv("VDVAE_DATA_ROOTS", f"/nowhere,{tmp_path}")
    chosen = Overrides(data=f"file://{tmp_path}/my%20photos", gpus=1)
    data = apply(chosen, "ffhq256", params).data
    assert (data.source, data.path, data.resize) == ("folder", str(folder), "crop")
    assert (data.validation, data.test, data.image_size, data.num_levels) == (0.1, 0.1, 256, 32)


def test_data_lie_below_the_allowed_roots_alone(
    params: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    (root / "images").mkdir(parents=True)
    (root / "out").symlink_to("/etc")
    monkeypatch.setenv("VDVAE_DATA_ROOTS", str(root))
    apply(Overrides(data=f"file://{root}/images"), "digits", params)
    for path in (
        "/etc",
        f"{root}/out",
        f"{root}/../../etc",
        f"{root}/images/%2e%2e/%2e%2e",
        f"{root}-too",
        f"{root}/none",
    ):
        with pytest.raises(UserError, match=r"^data: "):
            apply(Overrides(data=f"file://{path}"), "digits", params)


def test_s3_prefixes_lie_below_the_allowed_ones_alone(
    params: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VDVAE_DATA_ROOTS", "/nowhere, s3://bucket/a/,s3://own")
    for data in ("s3://bucket/a", "s3://bucket/a/b c%20/", "s3://own", "s3://own/x"):
        found = apply(Overrides(data=data, gpus=1), "ffhq256", params).data
        assert (found.source, found.path) == ("folder", data.rstrip("/"))
        assert (found.validation, found.test, found.resize) == (0.1, 0.1, "crop")
    for data in ("s3://bucket/ab", "s3://bucket", "s3://owner/x", "file:///nowhere-else"):
        with pytest.raises(UserError, match=r"^data: .* not below /nowhere or s3://bucket/a"):
            apply(Overrides(data=data), "digits", params)
    for data in ("s3://bucket/a/../ab", "s3://bucket/a//b", "s3://bucket/a/./b"):
        with pytest.raises(UserError, match=r"^data: .* without empty parts"):
            apply(Overrides(data=data), "digits", params)


def test_the_widest_roots_are_every_folder_and_every_bucket(
    params: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = (f"file://{tmp_path}", "s3://bucket/x")
    for roots, allowed in (("/", places[:1]), ("s3://", places[1:]), ("/,s3://", places)):
        monkeypatch.setenv("VDVAE_DATA_ROOTS", roots)
        for data in places:
            if data in allowed:
                apply(Overrides(data=data), "digits", params)
            else:
                with pytest.raises(UserError, match=r"^data: .* is not below"):
                    apply(Overrides(data=data), "digits", params)


@pytest.mark.parametrize("entry", ["s3://me:pass@bucket", "relative", "s3://UP", "s3://b/../c"])
def test_a_root_that_is_none_is_named_without_its_secret(
    params: Path, monkeypatch: pytest.MonkeyPatch, entry: str
) -> None:
    monkeypatch.setenv("VDVAE_DATA_ROOTS", f"/,{entry}")
    with pytest.raises(UserError, match=r"^VDVAE_DATA_ROOTS: .* is neither") as caught:
        apply(Overrides(data="s3://bucket"), "digits", params)
    assert "pass" not in str(caught.value).replace("password", "")


BAD = {
    "preset": ["tiny", "", 3],
    "data": ["/plain/path", "file://host/x", "file://u:secret@host/x", "file:///x?token=secret",
             "http://x/y", "https://bucket.host/x?X-Amz-Signature=secret", "s3:bucket", "s3://",
             "s3:///x", "s3://BUCKET/x", "s3://key:secret@bucket/x", "s3://key:sec/ret@bucket/x",
             "s3://bucket/x?versionId=secret", "s3://bucket/x#y", "s3://bucket/\x00",
             "s3://bucket\n", "S3://bucket/x", " s3://bucket", "s3://bucket/" + "x" * 1000],
    "steps": [-1, 10_000_001, "many", 1.5],
    "batch_size": [-1, 5000],
    "learning_rate": [-0.1, 1, float("nan")],
    "seed": [-2, 2**31],
    "precision": ["fp8", ""],
    "gpus": [9, -2],
    "evaluate": ["perhaps"],
    "note": ["x" * 501],
}  # fmt: skip


@pytest.mark.parametrize(("field", "value"), [(k, v) for k, vs in BAD.items() for v in vs])
def test_bad_values_are_refused_with_the_fields_name(field: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"^{field}: ") as caught:
        Overrides(**{field: value})  # type: ignore[arg-type]
    assert not re.search("secret|sec/ret", str(caught.value))


def test_tf32_is_for_gpus(params: Path) -> None:
    for chosen in ({"gpus": 0}, {"preset": "smoke"}):
        with pytest.raises(UserError, match=r"^precision: tf32 needs a GPU, and this run"):
            apply(Overrides(precision="tf32", **chosen), "digits", params)  # type: ignore[arg-type]
    assert apply(Overrides(precision="tf32", gpus=1), "digits", params).train.precision == "tf32"


def test_a_batch_that_gpus_cannot_share_is_refused(params: Path) -> None:
    apply(Overrides(gpus=8, precision="bf16"), "cifar10", params)
    with pytest.raises(UserError, match=r"^gpus: a batch of 32 images cannot be divided by 5 GPUs"):
        apply(Overrides(gpus=5), "cifar10", params)


@pytest.mark.parametrize(
    ("gpus", "batch_size", "parts"), [(1, 0, 8), (2, 0, 4), (8, 0, 1), (1, 64, 16), (1, 10, 5)]
)
def test_a_device_computes_no_more_at_once_than_the_recipe_lets_it(
    params: Path, gpus: int, batch_size: int, parts: int
) -> None:
    """ffhq256 lets it 4 images, of a batch of 32 in 8 parts."""
    found = apply(Overrides(gpus=gpus, batch_size=batch_size), "ffhq256", params).train
    assert found.accumulation == parts


def test_a_smoke_run_is_computed_at_once(params: Path) -> None:
    assert apply(Overrides(preset="smoke"), "ffhq1024", params).train.accumulation == 1


def test_register_needs_what_it_registers() -> None:
    for missing in ("evaluate", "sample"):
        with pytest.raises(UserError, match=rf"^register: needs {missing}, which is off"):
            Overrides(**{missing: False})  # type: ignore[arg-type]
    assert Overrides(evaluate=False, register=False).stages == ("shard", "train", "sample")


def test_smoke_widths_may_only_grow(params: Path) -> None:
    sections = yaml.safe_load(params.read_text())["recipes"]["ffhq1024"]
    shrink(sections)
    assert sections["model"]["width"] == 16
    assert sections["model"]["widths"].startswith("512:32,256:32")
