"""The training doctor: diagnoses a run from the points of its curves, and names remedies.

The thresholds are judgements; docs/gpus.md says what each is to detect.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vdvae.config import ImageModelConfig, TrainConfig

Point = dict[str, float]  # one point of the curves: step, time (unix seconds) and named figures

_WINDOW = 10  # points whose mean is compared with the mean of as many before
_FLAT = 1e-3  # relative fall of the loss between two windows, below which it stands
_KNOWS_NOTHING = 0.8  # of log2(levels): a model of independent pixels is about there
_SKIPPED = 0.1  # share of an interval's updates
_ALIVE_NATS = 0.1  # per image: a resolution that once carried this was in use
_DIED = 0.01  # of what a resolution carried most of the time
_DEAD_POINTS = 5  # in a row
_QUIET_POINTS = 20


@dataclass(frozen=True)
class Finding:
    """One diagnosis with its remedy."""

    kind: str  # not_finite, skips, streak, plateau, collapse or dead_resolution.<resolution>
    text: str
    stops: bool = False  # whether training ends, since nothing more would be learnt


def examine(
    model: ImageModelConfig, config: TrainConfig, history: Sequence[Point], seen: dict[str, int]
) -> list[Finding]:
    """Diagnoses the newest point of the curves.

    Args:
        model: the model's config.
        config: how it is trained.
        history: all points so far.
        seen: for each kind of finding, the number of points when it was last made; updated.

    Returns:
        New findings: one that persists is reported again only after `_QUIET_POINTS` points
        without it.
    """
    findings, now = _examine(model, config, history), len(history)
    new = [f for f in findings if now - seen.get(f.kind, -_QUIET_POINTS) >= _QUIET_POINTS]
    seen.update((finding.kind, now) for finding in findings)
    return new


def streak(config: TrainConfig, skipped_in_a_row: int, norm: float) -> list[Finding]:
    """A finding that stops the run, after `max_skipped_in_a_row` skipped updates.

    Args:
        config: how the model is trained.
        skipped_in_a_row: updates, up to the newest.
        norm: gradient norm of the newest, nats/dim.
    """
    if skipped_in_a_row < config.max_skipped_in_a_row:
        return []
    so = f"the last {skipped_in_a_row} updates were all skipped"
    if math.isfinite(norm):
        text = (
            f"{so} (gradient norm {norm:.4g}, train.skip_threshold {config.skip_threshold:g}), so "
            f"nothing is learnt; raise train.skip_threshold or lower train.learning_rate"
        )
    else:
        text = (
            f"{so}, since loss or gradient norm is not finite: the weights have diverged; lower "
            f"train.learning_rate or train.skip_threshold, and train with precision fp32"
        )
    return [Finding("streak", text, stops=True)]


def _examine(
    model: ImageModelConfig, config: TrainConfig, history: Sequence[Point]
) -> list[Finding]:
    if not history:
        return []
    checks = (_not_finite, _skips, _plateau, _collapse)
    findings = [finding for check in checks if (finding := check(model, config, history))]
    return [*findings, *_dead_resolutions(model, config, history)]


def _not_finite(
    _: ImageModelConfig, config: TrainConfig, history: Sequence[Point]
) -> Finding | None:
    count = int(history[-1].get("not_finite", 0))
    if not count:
        return None
    return Finding(
        "not_finite",
        f"{count} of the last updates had a loss or gradient norm that is not finite, and were "
        f"skipped; where it goes on, lower train.learning_rate"
        + ("" if config.precision == "fp32" else f", or train with fp32, not {config.precision}"),
    )


def _skips(_: ImageModelConfig, config: TrainConfig, history: Sequence[Point]) -> Finding | None:
    before = history[-2] if len(history) > 1 else {"step": 0, "skipped": 0}
    steps = history[-1]["step"] - before["step"]
    skipped = history[-1]["skipped"] - before["skipped"]
    if skipped < 2 or skipped <= _SKIPPED * steps:
        return None
    return Finding(
        "skips",
        f"{skipped:.0f} of the last {steps:.0f} updates were skipped (greatest gradient norm "
        f"{history[-1]['gradient_norm']:.4g}, train.skip_threshold {config.skip_threshold:g}); "
        f"healthy runs skip under 0.01%: raise train.skip_threshold or lower train.learning_rate",
    )


def _warm(config: TrainConfig, history: Sequence[Point]) -> Sequence[Point]:
    return [point for point in history if point["step"] > config.warmup_steps]


def _plateau(
    model: ImageModelConfig, config: TrainConfig, history: Sequence[Point]
) -> Finding | None:
    points = _warm(config, history)[-2 * _WINDOW :]
    if len(points) < 2 * _WINDOW:
        return None
    losses = [point["bits_per_dim"] for point in points]
    before, now = (sum(half) / _WINDOW for half in (losses[:_WINDOW], losses[_WINDOW:]))
    uniform = math.log2(model.num_levels)
    if not (now > _KNOWS_NOTHING * uniform and before - now < _FLAT * before):
        return None
    steps = points[-1]["step"] - points[0]["step"]
    return Finding(
        "plateau",
        f"the loss has stood at {now:.3f} bits/dim for {steps:.0f} steps, near the {uniform:.2f} "
        f"of knowing nothing; small batches do that: raise train.batch_size (or "
        f"train.accumulation where memory is short), or try another train.learning_rate",
    )


def _collapse(
    model: ImageModelConfig, config: TrainConfig, history: Sequence[Point]
) -> Finding | None:
    points = _warm(config, history)[-2 * _WINDOW :]
    if not model.num_latents:
        return None
    nats = [point["rate_bits_per_dim"] * model.dims * math.log(2) for point in points]
    if len(points) < 2 * _WINDOW or not max(nats) < _ALIVE_NATS:
        return None
    return Finding(
        "collapse",
        f"the latents carry {nats[-1]:.2g} nats per image, so nothing: the decoder does without "
        f"them; check model.shift and model.scale against the images, lower train.learning_rate",
    )


def _dead_resolutions(
    model: ImageModelConfig, config: TrainConfig, history: Sequence[Point]
) -> Iterator[Finding]:
    points = _warm(config, history)
    for key in points[-1] if points else ():
        if not key.startswith("rate_bits_per_dim/res_"):
            continue
        rates = [point[key] for point in points if math.isfinite(point.get(key, math.nan))]
        nats = [rate * model.dims * math.log(2) for rate in rates]
        if len(nats) < 2 * _DEAD_POINTS:
            continue
        # The median: a spike after the warm-up is not what a resolution carries.
        usual, now = statistics.median(nats[:-_DEAD_POINTS]), max(nats[-_DEAD_POINTS:])
        if usual > _ALIVE_NATS and now < _DIED * usual:
            resolution = key.rpartition("_")[2]
            yield Finding(
                f"dead_resolution.{resolution}",
                f"the layers at resolution {resolution} carried {usual:.3g} nats per image and "
                f"now carry {now:.2g}: they have died; start afresh with a lower "
                f"train.learning_rate or train.skip_threshold",
            )
