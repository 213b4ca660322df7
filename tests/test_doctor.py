"""The training doctor: each fault is told once, with its remedy; a healthy run hears nothing."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from test_training import MODEL, batches, settings

from pipeline.params import load_recipe
from vdvae.config import ModelConfig, TrainConfig, UserError
from vdvae.doctor import Finding, Point, examine
from vdvae.model import VDVAE
from vdvae.training import Progress, train

DIMS = MODEL.dims


def point(step: int, **changes: float) -> Point:
    """A healthy one, of a model of 16 dims and 17 levels."""
    return {
        **{"step": step, "bits_per_dim": 2.0, "rate_bits_per_dim": 1.0, "gradient_norm": 1.0},
        **{"rate_bits_per_dim/res_1": 0.4, "rate_bits_per_dim/res_4": 0.6},
        **{"skipped": 0, "not_finite": 0},
        **changes,
    }


def told(
    history: list[Point], model: ModelConfig = MODEL, config: TrainConfig | None = None
) -> list[tuple[float, Finding]]:
    """Every finding with its step, as a run hears them."""
    config, seen = config or settings(warmup_steps=0), dict[str, int]()
    return [
        (history[n - 1]["step"], finding)
        for n in range(1, len(history) + 1)
        for finding in examine(model, config, history[:n], seen)
    ]


def only(history: list[Point], **options: Any) -> tuple[float, Finding]:
    (found,) = told(history, **options)
    return found


def test_a_healthy_run_hears_nothing() -> None:
    """The digits' own curves, whose 1x1 layer never carries more than 0.02 nats."""
    recipe = load_recipe("digits", ROOT / "params.yaml")
    with (ROOT / "tests/golden/digits_curves.csv").open() as file:
        history = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    assert len(history) == 56
    assert told(history, recipe.model, recipe.train) == []


def test_a_plateau_near_knowing_nothing_is_told_once() -> None:
    falling = [point(n, bits_per_dim=4.5 - n / 100) for n in range(1, 30)]
    assert told(falling) == []
    flat = [point(100 * n, bits_per_dim=3.6 - 0.2 / n**2) for n in range(1, 60)]
    step, finding = only(flat)
    assert finding.kind == "plateau"
    assert not finding.stops
    assert step < 3500
    assert "near the 4.09 of knowing nothing" in finding.text
    assert "raise train.batch_size" in finding.text
    assert told([{**p, "bits_per_dim": p["bits_per_dim"] - 1.5} for p in flat]) == []  # converged


def test_layers_that_carried_something_and_died_are_named_by_resolution() -> None:
    lived = [point(n) for n in range(1, 10)]
    died = [point(n, **{"rate_bits_per_dim/res_4": 1e-4}) for n in range(10, 20)]
    step, finding = only(lived + died)
    assert (step, finding.kind) == (14, "dead_resolution.4")
    assert "resolution 4 carried 6.65 nats per image and now carry 0.0011" in finding.text
    never = [point(n, **{"rate_bits_per_dim/res_1": 1e-4}) for n in range(1, 30)]
    assert told(never) == []
    later = [{**p, "rate_bits_per_dim/res_1": 1e-5} if p["step"] > 12 else p for p in lived + died]
    assert [(step, finding.kind) for step, finding in told(later)] == [
        (14, "dead_resolution.4"),
        (17, "dead_resolution.1"),
    ]


def test_a_spike_or_a_figure_that_is_none_is_not_what_a_resolution_carries() -> None:
    odd = [point(n, **{"rate_bits_per_dim/res_4": x}) for n, x in enumerate((1e3, math.nan), 1)]
    lived = [*odd, *(point(n) for n in range(3, 30))]
    assert told(lived) == []
    died = [point(n, **{"rate_bits_per_dim/res_4": 1e-4}) for n in range(30, 40)]
    assert only(lived + died)[1].kind == "dead_resolution.4"


def test_latents_that_carry_nothing_are_told() -> None:
    dead = {"rate_bits_per_dim/res_1": 0.0, "rate_bits_per_dim/res_4": 1e-5}
    step, finding = only([point(n, rate_bits_per_dim=1e-5, **dead) for n in range(1, 40)])
    assert (step, finding.kind) == (20, "collapse")


def test_skips_and_figures_that_are_not_finite_are_told_by_interval() -> None:
    counts = (0, 1, 9, 9, 30, *[30] * 30, 60)
    history = [point(50 * n, skipped=skipped) for n, skipped in enumerate(counts, 1)]
    assert [(step, finding.kind) for step, finding in told(history)] == [
        (150, "skips"),
        (1800, "skips"),  # gone for long, so told again
    ]
    step, finding = only([point(50), point(100, not_finite=3), point(150)])
    assert (step, finding.kind) == (100, "not_finite")
    assert "or train with fp32" not in finding.text
    bf16 = settings(warmup_steps=0, precision="bf16")
    assert "or train with fp32, not bf16" in only([point(50, not_finite=3)], config=bf16)[1].text


def hears(
    folder: Path, config: TrainConfig, stream: Any = batches, validate: Any = None
) -> list[tuple[int, Finding]]:
    seen: list[tuple[int, Finding]] = []

    def on_progress(progress: Progress) -> bool:
        seen.extend((progress.step, finding) for finding in progress.findings)
        return True

    train(MODEL, config, stream, folder, on_progress, validate)
    return seen


def test_a_run_that_learns_nothing_hears_of_its_plateau(tmp_path: Path) -> None:
    frozen = settings(steps=60, log_every=1, learning_rate=1e-12)
    findings = hears(tmp_path, frozen)
    assert {finding.kind: step for step, finding in findings} == {"collapse": 23, "plateau": 25}
    assert len(findings) == 2


def test_weights_that_diverge_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = VDVAE.forward

    def overflows(self: VDVAE, x: torch.Tensor, noise: torch.Tensor) -> Any:
        elbo = plain(self, x, noise)
        return replace(elbo, distortion_nats_B=elbo.distortion_nats_B * math.inf)

    monkeypatch.setattr(VDVAE, "forward", overflows)
    config = settings(steps=50, log_every=5, max_skipped_in_a_row=8)
    seen: list[Finding] = []
    with pytest.raises(UserError, match=r"last 8 updates .* not finite: .* lower train.learning"):
        train(MODEL, config, batches, tmp_path, lambda p: seen.extend(p.findings) or True)
    assert [finding.kind for finding in seen] == ["not_finite", "skips", "streak"]


def test_training_ends_when_validation_has_not_been_better_for_long(tmp_path: Path) -> None:
    figures = iter([3.0, 2.0, 2.5, 2.5, 2.5, 1.0])
    config = settings(steps=18, validate_every=3, patience=2)
    seen: list[Progress] = []

    def run(steps: int) -> VDVAE | None:
        def on_progress(progress: Progress) -> bool:
            seen.append(progress)
            return progress.step < steps

        return train(MODEL, config, batches, tmp_path, on_progress, lambda model: next(figures))

    assert run(10) is None
    assert run(99) is not None
    assert seen[-1].step == 12
    assert seen[-1].saved
    assert run(99) is not None  # the same command again goes no further
    assert seen[-1].step == 12
    with pytest.raises(UserError, match=r"patience: 2 validations, but .*validate_every is 0"):
        settings(patience=2)


def test_means_leave_out_what_is_not_finite(tmp_path: Path) -> None:
    def stream(seen: int) -> Iterator[torch.Tensor]:
        yield from batches(seen)

    calls = iter(range(100))
    plain = VDVAE.forward

    def sometimes(self: VDVAE, x: torch.Tensor, noise: torch.Tensor) -> Any:
        elbo = plain(self, x, noise)
        scale = math.nan if next(calls) == 4 else 1.0
        return replace(elbo, distortion_nats_B=elbo.distortion_nats_B * scale)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VDVAE, "forward", sometimes)
        seen: list[Progress] = []
        train(MODEL, settings(), stream, tmp_path, lambda p: seen.append(p) or True)
    history = seen[-1].history
    assert [p["not_finite"] for p in history] == [0, 1, 0, 0]
    assert all(math.isfinite(p["bits_per_dim"]) for p in history)
