"""The console command: what it prints, and how it ends for the user's errors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vdvae
from pipeline.cli import main

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
        ("-c", "from pipeline.cli import main; main(['check'])"),
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
