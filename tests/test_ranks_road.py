"""The stages `train` and `evaluate` on two ranks: one dies, one machine less goes on."""

from __future__ import annotations

import csv
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Project
from test_road import curves, mlflow_runs

from pipeline.system.exits import CANCELLED, UNAVAILABLE
from pipeline.system.launch import _cause, _Log, launch
from pipeline.system.process import environment_of

pytestmark = pytest.mark.integration

TWO = {"VDVAE_RANKS": "2"}


def weights(project: Project) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(project.folder / "results/digits/model/model.safetensors")


def bits(project: Project) -> list[float]:
    with (project.folder / "results/digits/per_image.csv").open() as file:
        return [float(row["bits_per_dim"]) for row in csv.DictReader(file)]


def ranks_of(project: Project) -> dict[int, int]:
    """Process ids by rank of what trains in this project."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            here = os.readlink(entry / "cwd") == str(project.folder.resolve())
            rank = environment_of(int(entry.name)).get("RANK")
        except OSError:
            continue
        if here and rank is not None:
            found[int(rank)] = int(entry.name)
    return found


def forget_training(project: Project) -> None:
    project.run("rm", "-rf", "runs", "mlruns", "results")


def wait_for_step(child: Any, step: int) -> None:
    for line in child.stdout:
        if line.startswith("step ") and int(line.split()[1].partition("/")[0]) >= step:
            return
    raise AssertionError("it ended first")


def test_two_ranks_are_one_and_what_a_kill_leaves_goes_on(project: Project) -> None:
    project.set(lambda params: params["recipes"]["digits"]["train"].update(steps=60))
    project.stage("shard", "digits")
    project.stage("train", "digits")
    alone = weights(project)
    project.stage("evaluate", "digits")
    figures = bits(project)
    metrics = (project.folder / "results/digits/metrics.json").read_bytes()
    (project.folder / "results/digits/metrics.json").unlink()
    project.stage("evaluate", "digits", **TWO)
    assert bits(project) == pytest.approx(figures, rel=1e-6)
    counts = {split: f["images"] for split, f in json.loads(metrics).items()}
    assert counts == {"validation": 180, "test": 360}

    forget_training(project)
    project.stage("train", "digits", **TWO)
    undisturbed = weights(project)
    for name, value in alone.items():
        torch.testing.assert_close(undisturbed[name], value, rtol=1e-3, atol=1e-4)

    forget_training(project)
    command = (sys.executable, "-m", "pipeline.stages.train", "digits")
    child = project.start(*command, **TWO)
    wait_for_step(child, 15)
    os.kill(ranks_of(project)[1], signal.SIGKILL)
    output, _ = child.communicate()
    assert child.returncode == 128 + signal.SIGKILL, output
    assert "rank 1 was killed by signal 9; run the same command again" in output
    assert ranks_of(project) == {}
    output = project.stage("train", "digits", **TWO)
    assert "resuming at step" in output
    again = weights(project)
    assert all(torch.equal(value, again[name]) for name, value in undisturbed.items())
    steps = curves(project)["train/bits_per_dim"]
    assert steps == list(range(5, 61, 5))


def test_more_ranks_than_images_score_each_once(project: Project) -> None:
    few = {"validation": 2, "test": 3}
    project.set(lambda params: params["recipes"]["digits"]["data"].update(few))
    project.stage("shard", "digits")
    project.stage("train", "digits")
    project.stage("evaluate", "digits")
    alone, results = bits(project), project.folder / "results/digits"
    results.joinpath("metrics.json").unlink()
    project.stage("evaluate", "digits", VDVAE_RANKS="4")
    assert bits(project) == pytest.approx(alone, rel=1e-6)
    metrics = json.loads((results / "metrics.json").read_text())
    assert {split: found["images"] for split, found in metrics.items()} == few


def test_it_is_cancelled_on_two_ranks_and_goes_on_with_one(project: Project) -> None:
    project.set(lambda params: params["recipes"]["digits"]["train"].update(steps=200))
    project.stage("shard", "digits")
    child = project.start(sys.executable, "-m", "pipeline.stages.train", "digits", **TWO)
    wait_for_step(child, 20)
    child.terminate()
    output, _ = child.communicate()
    assert child.returncode == CANCELLED, output
    assert "stopped after a checkpoint; run the same command again to go on" in output
    assert "Traceback" not in output
    project.set(lambda params: params["recipes"]["digits"]["train"].update(steps=40))
    assert "resuming at step" in project.stage("train", "digits")
    assert curves(project)["train/bits_per_dim"][-1] >= 40


def test_what_one_rank_alone_meets_is_what_the_command_says(project: Project) -> None:
    """Only the first one opens MLflow; the other, which waits for it, breaks off after it."""
    project.stage("shard", "digits")
    output = project.stage(
        "train", "digits", code=UNAVAILABLE, **TWO, MLFLOW_TRACKING_URI="http://127.0.0.1:9"
    )
    assert output.count("error: ") == 1
    assert "MLflow" in output
    assert "Traceback" not in output
    assert ranks_of(project) == {}


def test_who_was_killed_or_has_a_sentence_is_the_cause() -> None:
    """Ranks that fail within one look: the others' broken connections are not it."""
    assert _cause({0: 1, 1: -9, 2: 1}) == 1
    assert _cause({1: 1, 0: 2}) == 0
    assert _cause({1: 1, 0: UNAVAILABLE}) == 0
    assert _cause({2: 1, 0: 1}) == 2
    assert _cause({1: 1, 0: CANCELLED}) == 0
    assert _cause({}) == 0


_SPEAKS = """
import os, pathlib, signal, sys, time
here = pathlib.Path(os.environ["HERE"])
def wait_for(name):
    while not (here / name).exists():
        time.sleep(0.01)
if os.environ["RANK"] == "1":
    print("warming up", file=sys.stderr, flush=True)
    wait_for("heard")
    print("cut off in the mid", end="", file=sys.stderr, flush=True)
    (here / "said").touch()
    os.kill(os.getpid(), signal.SIGKILL)
wait_for("said")
sys.exit("[rank0]: Traceback (most recent call last): the other has gone")
"""


def test_what_ranks_say_is_passed_on_as_it_comes_and_outlives_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "speaks.py").write_text(_SPEAKS)
    for name, value in (("PYTHONPATH", tmp_path), ("HERE", tmp_path), ("VDVAE_RUNS", tmp_path)):
        monkeypatch.setenv(name, str(value))
    say = _Log._print

    def heard(log: _Log, text: str) -> None:
        say(log, text)
        (tmp_path / "heard").touch()  # rank 1 waits for it

    monkeypatch.setattr(_Log, "_print", heard)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert launch("speaks", "digits", 2) == 128 + signal.SIGKILL
    output, errors = capfd.readouterr()
    assert errors.splitlines() == ["rank 1: warming up", "rank 1: cut off in the mid"]
    (folder,) = (tmp_path / "ranks").iterdir()
    assert output.splitlines() == [
        "rank 1 was killed by signal 9; run the same command again to go on",
        f"what each rank said on stderr: {folder}",
    ]
    assert (folder / "rank-0.log").read_text().endswith("the other has gone\n")
    assert (folder / "rank-1.log").read_text() == "warming up\ncut off in the mid"


def test_what_the_doctor_finds_is_in_mlflow(project: Project) -> None:
    def never_learns(params: dict[str, Any]) -> None:
        params["recipes"]["digits"]["train"].update(
            gradient_clip=1e-9, skip_threshold=1e-9, max_skipped_in_a_row=7
        )

    project.set(never_learns)
    project.stage("shard", "digits")
    output = project.stage("train", "digits", code=2)
    (run,) = mlflow_runs(project)
    assert run.info.status == "FAILED"
    told = run.data.tags["doctor.streak"]
    assert told.startswith("step 7: the last 7 updates were all skipped")
    assert f"doctor: {told}" in output


@pytest.mark.parametrize(
    ("ranks", "sentence"),
    [
        ("3", "train.batch_size: 8 cannot be divided by 3 ranks x train.accumulation 1 = 3"),
        ("0", "VDVAE_RANKS: '0' is not a whole number from 1 to 64"),
        ("many", "VDVAE_RANKS: 'many' is not a whole number"),
    ],
)
def test_ranks_that_do_not_fit_are_refused(project: Project, ranks: str, sentence: str) -> None:
    project.stage("shard", "digits")
    output = project.stage("train", "digits", code=2, VDVAE_RANKS=ranks)
    assert output.count("error: ") == 1
    assert sentence in output
    assert "Traceback" not in output
    assert not (project.folder / "results/digits/model").exists()
