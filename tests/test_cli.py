"""The console command: what it prints, and how it ends for the user's errors."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import typer

import vdvae
from pipeline.cli import main
from pipeline.cli.commands import app
from pipeline.commands.output import print_table
from pipeline.flows import run_recipe
from pipeline.flows.overrides import Overrides

ROOT = Path(__file__).resolve().parents[1]


def test_check_names_every_recipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    main(["check"])
    printed = capsys.readouterr().out
    assert re.search(r"\d+ recipes are well formed: digits, .*cifar10, imagenet32", printed)
    assert re.search(r"\d+ studies are well formed: depth, ", printed)


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


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["nope"], "No such command 'nope'; see 'vdvae --help'"),
        (["run"], "Missing argument 'RECIPE'; see 'vdvae run --help'"),
        (["gc", "--older-than", "x"], "Invalid value for '--older-than'"),
        (["gc", "--older-than", "-1"], "Invalid value for '--older-than'"),
        (["evaluate", "digits"], "Missing option '--precision'; see 'vdvae evaluate --help'"),
        (["run", "digits", "--preset", "tiny"], "Invalid value for '--preset'"),
        (["run", "digits", "--steps", "-1"], "error: steps: -1: "),
        (["describe", "digits", "--batch", "0"], "Invalid value for '--batch'"),
    ],
)
def test_words_that_are_none_are_one_sentence(
    capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    printed = capsys.readouterr()
    assert (ended.value.code, printed.out, printed.err.count("\n")) == (2, "", 1)
    assert printed.err.startswith("error: ") and sentence in printed.err


def commands(app: typer.Typer = app, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for command in app.registered_commands:
        yield (*path, str(command.name))
    for group in app.registered_groups:
        assert group.typer_instance is not None
        yield from commands(group.typer_instance, (*path, str(group.name)))


@pytest.mark.parametrize("words", [*commands()], ids=" ".join)
def test_every_command_has_help_with_an_example(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    printed = capsys.readouterr().out
    assert ended.value.code == 0
    assert re.search(rf"Examples:\n    .*vdvae {' '.join(words)}\b", printed)
    assert not set("─│╭\x1b") & set(printed)  # it is piped
    assert max(map(len, printed.splitlines())) <= 100


def test_a_run_has_an_option_for_each_field_of_the_form(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    options = set(re.findall(r"(?m)^  --([a-z-]+)", capsys.readouterr().out)) - {"help"}
    assert options == {name.replace("_", "-") for name in Overrides.model_fields}
    told: list[object] = []
    monkeypatch.setattr(run_recipe, "main", lambda *words: told.extend(words))
    main(["run", "digits"])
    main(["run", "digits", "--batch-size", "8", "--no-register", "--precision", "bf16"])
    chosen = Overrides(batch_size=8, register=False, precision="bf16")
    assert told == ["digits", None, "digits", chosen]


def test_the_command_is_quick_to_say_what_it_can() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    words = (sys.executable, "-c", "from pipeline.cli import main; main()", "--help")
    said = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "Usage: vdvae" in said and " models " in said
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5  # 0.3 s


def test_the_shell_completes_words() -> None:
    asked = {"_VDVAE_COMPLETE": "complete_bash", "COMP_WORDS": "vdvae models ro", "COMP_CWORD": "2"}
    done = subprocess.run(
        [sys.executable, "-c", "from pipeline.cli import main; main()"],
        cwd=ROOT,
        env={**os.environ, **asked},
        capture_output=True,
        text=True,
    )
    assert (done.stdout.split(), done.stderr) == (["rollback"], "")


@pytest.mark.parametrize("terminal", [False, True])
def test_tables_are_plain_where_they_are_piped(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    print_table(("model", "aliases"), [("vdvae-[b]digits", "champion"), ("x" * 90, "")])
    lines = capsys.readouterr().out.splitlines()
    assert any("vdvae-[b]digits" in line and "champion" in line for line in lines)  # no markup
    assert ("x" * 90 in lines) != terminal
    assert ("─" in "".join(lines)) == terminal


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
