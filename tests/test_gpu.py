"""`make gpu` where there is no GPU: the same code in sizes of seconds, with PyTorch alone."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT

from pipeline.params import load_recipe
from vdvae.model import VDVAE

# A Python with torch, numpy and safetensors alone, and no CUDA device.
BARE = """
import runpy, sys
sys.modules.update(dict.fromkeys({hidden}))  # to import one raises ModuleNotFoundError
sys.path.insert(0, "benchmarks")
sys.argv = ["gpu.py", *{words}]
runpy.run_path("benchmarks/gpu.py", run_name="__main__")
"""
HIDDEN = {"yaml", "PIL", "mlflow", "dvc", "prefect", "boto3", "webdataset", "sklearn", "scipy",
          "pandas", "psutil", "pydantic", "ruamel", "distributed", "conftest", "_pytest",
          "pytest"}  # fmt: skip


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(sys, "path", [*sys.path])  # it adds the checkout
    import gpu

    return gpu


def bench(gpu: ModuleType, folder: Path) -> Any:
    return gpu.Bench(torch.device("cpu"), True, folder / "rows.csv")


def run_bare(folder: Path, hidden: set[str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BARE.format(hidden=hidden, words=words)],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "HOME": str(folder), "TMPDIR": str(folder),
             "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )  # fmt: skip


def test_the_whole_of_it_runs_dry_with_pytorch_alone(tmp_path: Path) -> None:
    kept = (ROOT / "benchmarks/recipe.csv").read_bytes()
    done = run_bare(tmp_path, HIDDEN)
    assert done.returncode == 0, done.stdout + done.stderr
    first, *_ = done.stdout.splitlines()
    assert first.startswith("make gpu: no CUDA device here: the same code runs on the CPU")
    table = done.stdout.partition("\n\n")[2]
    assert len(re.findall(r"^good {3}", table, re.M)) == 5
    assert "WRONG" not in table
    assert "failed" not in table
    assert (ROOT / "benchmarks/recipe.csv").read_bytes() == kept
    (written,) = tmp_path.glob("vdvae-gpu-*/recipe.csv")
    with written.open(newline="") as file:
        rows = list(csv.DictReader(file))
    timed = [row for row in rows if row["ours_ms"]]
    assert {row["part"] for row in timed} == {"step", "evaluate", "sample"}
    assert {row["compile"] for row in timed} == {"True", "False"}
    assert all(float(row["gbytes"]) > 0 and float(row["copy_share"]) >= 0 for row in timed)
    assert {row["note"] for row in rows if not row["ours_ms"]} == {
        "precision: tf32 needs a CUDA device, not cpu; use fp32 or bf16"
    } | ({row["note"] for row in rows if "no bfloat16" in row["note"]})


def test_a_python_without_what_it_needs_is_told_in_a_sentence(tmp_path: Path) -> None:
    done = run_bare(tmp_path, {"torch"})
    assert done.returncode == 2
    assert re.fullmatch(r"make gpu: \S+ has no torch; name a Python that .*\n", done.stderr)


def test_the_recipes_are_those_of_params_yaml(gpu: ModuleType) -> None:
    import plain_params

    text = plain_params.without_studies(plain_params.PARAMS.read_text())
    assert plain_params.read_plain_yaml(text) == yaml.safe_load(text)
    for name in gpu.RECIPES:
        whole = load_recipe(name, plain_params.PARAMS)
        found = plain_params.recipe(name)
        assert found == (whole.model, whole.train, whole.evaluate.batch_size)
    for text in (
        "a: 0x11",
        "a: no",
        "a: 1e3",
        "- a",
        "a:\n  b",
        "a: 1\na: 2",
        "a: |",
        "a: {b: [1, 2]}",
    ):
        with pytest.raises(ValueError, match=r"line [12]: "):
            plain_params.read_plain_yaml(text)


def test_what_is_wrong_makes_the_exit_code(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(gpu.tempfile, "mkdtemp", lambda prefix: str(tmp_path))
    monkeypatch.setattr(gpu, "ending_after", lambda seconds: gpu.contextlib.nullcontext())
    parts = gpu.parts_of

    def some(bench: Any) -> Any:
        return [part for part in parts(bench) if part.name == "golden figures"]

    monkeypatch.setattr(gpu, "parts_of", some)
    assert gpu.main(["--dry-run"]) == 0
    after = VDVAE.likelihood_parameters

    def off(*given: Any, **more: Any) -> torch.Tensor:
        return after(*given, **more) + 1e-4

    monkeypatch.setattr(VDVAE, "likelihood_parameters", off)
    assert gpu.main(["--dry-run"]) == 1
    assert "WRONG  golden figures: terms" in capsys.readouterr().out


def test_what_does_not_fit_the_time_is_left_out_by_name(gpu: ModuleType, tmp_path: Path) -> None:
    ran: list[str] = []
    clock = iter([100.0, 15.0, 8.0, 8.0])

    def cut() -> None:
        raise gpu.OutOfTime

    found = bench(gpu, tmp_path)
    found.dry = False
    found.run(
        [
            gpu.Part("first", lambda: ran.append("first")),
            gpu.Part("long", lambda: ran.append("long"), seconds=60),
            gpu.Part("cut", cut, seconds=5),
            gpu.Part("short", lambda: ran.append("short"), seconds=5),
        ],
        lambda: next(clock),
    )
    assert ran == ["first", "short"]
    assert gpu.table(found).splitlines()[-1] == "left out: long; cut (cut off)"


def test_a_step_without_room_is_a_row_and_half_of_it_is_tried(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import measure

    real, tried = measure.update, []

    def update(state: Any, config: Any, x_BCHW: torch.Tensor, noise_BN: torch.Tensor) -> Any:
        tried.append(len(x_BCHW))
        if len(x_BCHW) > 2:
            raise RuntimeError("CUDA error: out of memory")
        return real(state, config, x_BCHW, noise_BN)

    monkeypatch.setattr(measure, "update", update)
    found = bench(gpu, tmp_path)
    found.timed("cifar10", ["fp32"], compiled=False)
    first, second, *_ = found.rows
    assert (first["batch"], first["note"]) == (4, "out of memory")
    assert (second["part"], second["batch"], second["note"]) == ("step", 2, "")
    assert tried[:3] == [4, 2, 2]
    assert "cifar10  fp32  4      out of memory" in gpu.table(found)

    # Nothing fits: a row each, and no error.
    monkeypatch.setattr(measure, "update", lambda *_: update(*[torch.zeros(4)] * 4))
    found = bench(gpu, tmp_path)
    found.timed("cifar10", ["fp32"], compiled=False)
    assert [row["batch"] for row in found.rows] == [4, 1]
    assert not found.checks


def test_a_failed_compilation_is_a_row_and_another_failure_is_wrong(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any, *_: Any) -> None:
        raise RuntimeError("Cannot find a working triton installation.\nmore")

    monkeypatch.setattr(gpu.Bench, "_fitting", fail)
    found = bench(gpu, tmp_path)
    found.timed("cifar10", ["bf16"], compiled=True)
    assert not found.checks
    found.timed("cifar10", ["bf16"], compiled=False)
    words = "failed: RuntimeError: Cannot find a working triton installation."
    assert [row["note"] for row in found.rows] == [f"compiling {words}", words]
    assert found.checks == [("rows cifar10 bf16", False, words)]


def test_a_new_column_leaves_earlier_rows_readable(gpu: ModuleType, tmp_path: Path) -> None:
    import rows

    path = tmp_path / "rows.csv"
    path.write_bytes((ROOT / "benchmarks/recipe.csv").read_bytes())
    columns, before = rows.read(path)
    rows.append(path, {"recipe": "x", "a new one": 1})
    more, after = rows.read(path)
    assert more[: len(columns)] == columns
    assert [{name: row[name] for name in columns} for row in after[:-1]] == before
    assert (after[-1]["recipe"], after[-1]["a new one"]) == ("x", "1")


def test_bytes_are_those_that_each_operation_reads_and_writes(gpu: ModuleType) -> None:
    from measure import Traffic

    x, y = torch.zeros(10), torch.zeros(10)
    with Traffic() as traffic:
        x.view(2, 5)
        x + y
    assert traffic.bytes == 3 * 40
    with Traffic() as traffic:
        torch._foreach_add_([x], [y])
    assert traffic.bytes == 3 * 40


def test_published_batches_are_what_is_measured(gpu: ModuleType, tmp_path: Path) -> None:
    found = replace(bench(gpu, tmp_path), dry=False)
    batches = {name: found._recipe(name)[1].batch_size for name in gpu.RECIPES}
    assert batches == {"cifar10": 32, "imagenet32": 256, "imagenet64": 128, "ffhq256": 32,
                       "ffhq1024": 32}  # fmt: skip
