"""The console command: what it prints, and how it ends for the user's errors."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vdvae
from pipeline.cli.main import main

ROOT = Path(__file__).resolve().parents[1]


def test_check_names_every_recipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    main(["check"])
    assert "7 recipes are well formed: digits, cifar10" in capsys.readouterr().out


def test_info_tells_what_a_model_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = vdvae.ModelConfig(
        image_size=4, image_channels=1, encoder="4x1,4d4", decoder="1x1,4m1", width=8, mixtures=2
    )
    model = vdvae.VDVAE(config)
    vdvae.save(model, tmp_path)
    main(["info", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "2 stochastic layers, 272 latents an image" in printed
    count = sum(torch.numel(parameter) for parameter in model.parameters())
    assert f"{count:,} parameters" in printed


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["show", "digit"], "error: params.yaml: no recipe 'digit'"),
        (["run", "digit"], "error: params.yaml: no recipe 'digit'"),
        (["run", "cifar10"], "set 'active: [digits, cifar10]' there"),
        (["show", "imagenet64"], "not found; run 'dvc repro evaluate@imagenet64'"),
        (["evaluate", "digits", "--precision", "fp32,fp8"], "precision: 'fp8' is not one of fp32"),
        (["info", "nowhere"], "error: nowhere/config.json: not found"),
    ],
)
def test_the_users_errors_are_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert sentence in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "words",
    [
        ("-c", "from pipeline.cli.main import main; main(['check'])"),
        ("-m", "pipeline.services", "status"),
    ],
)
def test_a_reader_that_has_gone_is_no_error_of_ours(
    words: tuple[str, ...], unbuffered: str
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    assert done.stderr == ""
    assert done.returncode == 141


METRICS = {
    split: {"bits_per_dim": 2.0, "bits_per_dim_se": 0.1, "rate_bits_per_dim": 1.0,
            "distortion_bits_per_dim": 1.0, "images": 3}
    for split in ("validation", "test")
}  # fmt: skip
REGISTERED = {"name": "vdvae-digits", "version": 1, "alias": None, "mlflow_run_id": "0"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.json", "[" * 10**5),
        ("metrics.json", "[1]"),
        ("metrics.json", json.dumps(METRICS).replace("2.0", '"two"')),
        ("registered.json", "{}"),
        ("registered.json", '{"name": 1, "name": 2}'),
        ("curves.csv", "step,time\n1,1\n"),
        ("curves.csv", "step\n1,2,3\n"),
        ("model/model.safetensors", "\x7f" * 20),
        ("metrics.json", None),
        ("curves.csv", None),
        ("model/model.safetensors", None),
    ],
    ids=range(11),
)
def test_damaged_results_are_named_in_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: str | None,
) -> None:
    results = tmp_path / "results/digits"
    (results / "model").mkdir(parents=True)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    header = b'{"a": {"shape": [2, 3]}}'
    (results / "metrics.json").write_text(json.dumps(METRICS))
    (results / "registered.json").write_text(json.dumps(REGISTERED))
    (results / "curves.csv").write_text("step,time,images_per_second\n1,1,1\n")
    (results / "model/model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    if content is None:  # a FIFO, which nobody writes to
        (results / name).unlink()
        os.mkfifo(results / name)
    else:
        (results / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["show", "digits"])
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert printed.err.startswith("error: results/digits") and printed.err.count("\n") == 1
    assert len(printed.err) < 600 and printed.out == ""


def test_paths_that_cannot_be_are_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "circle").symlink_to("circle")
    os.mkfifo(tmp_path / "fifo")
    for words, sentence in (
        (["info", "n" * 300], "File name too long"),
        (["info", "a/" * 3000], "File name too long"),
        (["info", "circle"], "circle"),
        (["info", "~/model"], f"{tmp_path}/model/config.json: not found"),
        (["models", "score", "x", ".", "-o", "fifo"], "fifo: is a FIFO; name a file to write"),
        (["models", "score", "x", ".", "-o", "circle"], "circle: cannot be used (Too many levels"),
        (["models", "score", "x", ".", "-o", "n" * 300], "File name too long"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(words)
        printed = capsys.readouterr().err
        assert (ended.value.code, printed.count("\n")) == (2, 1) and sentence in printed, printed
    assert {path.name for path in tmp_path.iterdir()} == {"circle", "fifo"}
