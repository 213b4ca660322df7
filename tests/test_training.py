"""The training loop: exact resume, the skip rule, warm-up, averages, the best on validation."""

from __future__ import annotations

import errno
import itertools
import math
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vdvae import checkpoint, training
from vdvae.checkpoint import load, read_newest_state, save
from vdvae.config import ModelConfig, TrainConfig, UserError
from vdvae.evaluate import evaluate, in_batches, score
from vdvae.model import VDVAE
from vdvae.randomness import content_key, evaluation_noise
from vdvae.training import Progress, Stopped, learning_rate, start, train, update

MODEL = ModelConfig(
    image_size=4,
    image_channels=1,
    num_levels=17,
    encoder="4x1,4d4",
    decoder="1x1,4m1",
    width=8,
    latent_channels=2,
    mixtures=2,
    bottleneck=0.5,
)
CPU = torch.device("cpu")


def settings(**changes: Any) -> TrainConfig:
    values = {"steps": 12, "batch_size": 4, "learning_rate": 1e-2, "warmup_steps": 3}
    own = {"log_every": 3, "checkpoint_every": 4, "device": "cpu"}
    return TrainConfig(**{**values, **own, **changes})


def batches(first: int) -> Iterator[torch.Tensor]:
    """Images that depend on their number alone, four at a time."""
    while True:
        generator = torch.Generator().manual_seed(first)
        yield torch.randint(0, 256, (4, 1, 4, 4), generator=generator, dtype=torch.uint8)
        first += 4


def validation(model: VDVAE) -> float:
    x_BCHW = next(batches(10_000))
    return float(score(model, x_BCHW, seed=0).bits_per_dim_B.mean())


def weights(model: VDVAE) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def draw_samples(step: int, model: VDVAE) -> None:
    """Draws from a generator of its own, as pictures do."""
    model.sample(2, generator=torch.Generator().manual_seed(step))


def undisturbed(folder: Path, config: TrainConfig) -> tuple[VDVAE, list[dict[str, float]]]:
    seen: list[Progress] = []
    validate = validation if config.validate_every else None
    model = train(MODEL, config, batches, folder, lambda p: seen.append(p) or True, validate)
    assert model is not None
    return model, seen[-1].history


def without_time(history: list[dict[str, float]]) -> list[dict[str, float]]:
    timed = ("time", "images_per_second", "peak_memory_mib")
    return [{k: v for k, v in point.items() if k not in timed} for point in history]


class Killed(BaseException):
    """Ends training at once, as kill -9 would: nothing after it runs."""


@pytest.mark.parametrize("validate_every", [0, 6])
def test_killed_after_any_step_it_ends_with_the_same_weights(
    tmp_path: Path, validate_every: int
) -> None:
    config = settings(validate_every=validate_every)
    expected, history = undisturbed(tmp_path / "whole", config)
    for last_step in range(1, 12):
        killed_and_resumed(tmp_path / str(last_step), config, last_step, expected, history)


def killed_and_resumed(
    folder: Path,
    config: TrainConfig,
    last_step: int,
    expected: VDVAE,
    history: list[dict[str, float]],
) -> None:

    def kill(progress: Progress) -> bool:
        if progress.step == last_step:
            raise Killed
        return True

    with pytest.raises(Killed):
        train(MODEL, config, batches, folder, kill, validation)
    model, resumed = undisturbed(folder, config)
    assert same(weights(expected), weights(model))
    assert without_time(history) == without_time(resumed)


def test_looking_on_changes_nothing_and_is_not_in_the_time_of_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.count()
    slept = 0.0
    clock = SimpleNamespace(monotonic=lambda: slept + next(ticks) / 1000, time=time.time)
    monkeypatch.setattr(training, "time", clock)
    expected, history = undisturbed(tmp_path / "a", settings())
    seen: list[Progress] = []
    steps: list[int] = []

    def slow_on_log(step: int, model: VDVAE) -> None:
        nonlocal slept
        steps.append(step)
        draw_samples(step, model)
        slept += 1

    config = settings()
    model = train(
        MODEL, config, batches, tmp_path / "b", lambda p: seen.append(p) or True, None, slow_on_log
    )
    assert model is not None
    assert steps == [3, 6, 9, 12]
    assert same(weights(expected), weights(model))
    assert without_time(history) == without_time(seen[-1].history)
    # Twelve images in a second and more, were the second counted.
    assert max(point["images_per_second"] for point in seen[-1].history[1:]) > 15


def test_the_rate_is_told_by_resolution(tmp_path: Path) -> None:
    _, history = undisturbed(tmp_path, settings(validate_every=6))
    for point in history:
        parts = {k: v for k, v in point.items() if k.startswith("rate_bits_per_dim/")}
        assert list(parts) == ["rate_bits_per_dim/res_1", "rate_bits_per_dim/res_4"]
        assert sum(parts.values()) == pytest.approx(point["rate_bits_per_dim"], rel=1e-5)
    state = start(MODEL, settings(warmup_steps=0), CPU)
    elbo = state.model(next(batches(0)), noise())
    figures = update(state, settings(warmup_steps=0), next(batches(0)), noise())
    for resolution, layer in ((1, 0), (4, 1)):
        bits = elbo.kl_nats_LB[layer].mean().item() / (MODEL.dims * math.log(2))
        assert figures[f"rate_bits_per_dim/res_{resolution}"] == pytest.approx(bits)


def test_asked_to_stop_it_writes_a_checkpoint_first(tmp_path: Path) -> None:
    expected, _ = undisturbed(tmp_path / "a", settings())
    folder = tmp_path / "b"
    assert train(MODEL, settings(), batches, folder, lambda p: p.step < 7, None) is None
    found = read_newest_state(folder)
    assert found is not None
    assert found[1]["step"] == 7
    model, _ = undisturbed(folder, settings())
    assert same(weights(expected), weights(model))


def cut_off(folder: Path, config: TrainConfig, work: str, call: int, end: BaseException) -> None:
    """Trains until the so-many-th (from 0) validation or pictures, in which it ends so."""
    done: list[str] = []

    def begins(what: str) -> None:
        done.append(what)
        if done.count(work) > call:
            raise end

    def validate(model: VDVAE) -> float:
        begins("validation")
        return validation(model)

    def pictures(step: int, model: VDVAE) -> None:
        begins("pictures")

    model = train(MODEL, config, batches, folder, lambda p: True, validate, pictures)
    assert model is None


@pytest.mark.parametrize("work", ["validation", "pictures"])
@pytest.mark.parametrize("end", [Killed(), Stopped()])
def test_cut_off_between_a_checkpoint_and_what_follows_it_loses_no_step(
    tmp_path: Path, work: str, end: BaseException
) -> None:
    """Steps 4, 8 and 12, the last, are each saved, then validated, then looked at."""
    config = settings(validate_every=4, log_every=4, learning_rate=0.3, ema_decay=0.0)
    expected, history = undisturbed(tmp_path / "whole", config)
    assert sum("validation_bits_per_dim" in point for point in history) == 3
    for call, step in enumerate((4, 8, 12)):
        folder = tmp_path / str(step)
        with nullcontext() if isinstance(end, Stopped) else pytest.raises(Killed):
            cut_off(folder, config, work, call, end)
        found = read_newest_state(folder)
        assert found is not None
        assert found[1]["step"] == step
        model, resumed = undisturbed(folder, config)
        assert same(weights(expected), weights(model))
        assert without_time(history) == without_time(resumed)


def test_stopped_in_a_validation_without_a_checkpoint_it_writes_one(tmp_path: Path) -> None:
    config = settings(validate_every=6)
    expected, history = undisturbed(tmp_path / "whole", config)

    folder = tmp_path / "cut"
    cut_off(folder, config, "validation", 0, Stopped())
    found = read_newest_state(folder)
    assert found is not None
    assert found[1]["step"] == 6
    model, resumed = undisturbed(folder, config)
    assert same(weights(expected), weights(model))
    assert without_time(history) == without_time(resumed)


def test_a_run_cut_off_in_its_last_validation_keeps_it_when_it_is_to_go_on(tmp_path: Path) -> None:
    """That validation was due since the run was to end there, and is part of its curves."""
    cut_off(tmp_path, settings(validate_every=6, steps=5), "validation", 0, Stopped())
    _, history = undisturbed(tmp_path, settings(validate_every=6))
    validated = [point["step"] for point in history if "validation_bits_per_dim" in point]
    assert validated == [5, 6, 12]


def test_a_longer_run_goes_on_from_a_finished_one(tmp_path: Path) -> None:
    expected, _ = undisturbed(tmp_path / "a", settings(steps=16))
    undisturbed(tmp_path / "b", settings(steps=8))
    model, _ = undisturbed(tmp_path / "b", settings(steps=16))
    assert same(weights(expected), weights(model))


def test_a_checkpoint_that_was_damaged_is_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected, _ = undisturbed(tmp_path, settings())
    newest = sorted(tmp_path.glob("*.safetensors"))[-1]
    with newest.open("r+b") as file:
        file.seek(-3, 2)
        file.write(b"\x55")
    model, _ = undisturbed(tmp_path, settings())
    assert "passed over" in capsys.readouterr().out
    assert same(weights(expected), weights(model))
    # An index that was never written: the state does not exist.
    sorted(tmp_path.glob("*.json"))[-1].unlink()
    found = read_newest_state(tmp_path)
    assert found is not None
    assert found[1]["step"] == 8


def test_checkpoints_that_cannot_be_read_now_are_not_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed(tmp_path, settings())
    there = sorted(tmp_path.iterdir())

    read = checkpoint.read_regular
    for suffix in (".json", ".safetensors"):

        def fails(path: Path, most_bytes: int, remedy: str, suffix: str = suffix) -> bytes:
            if path.suffix == suffix:
                raise UserError(f"{path}: cannot be used (Input/output error); {remedy}")
            return read(path, most_bytes, remedy)

        with monkeypatch.context() as patched, pytest.raises(UserError, match="Input/output"):
            patched.setattr(checkpoint, "read_regular", fails)
            undisturbed(tmp_path, settings(steps=99))
        assert sorted(tmp_path.iterdir()) == there
    for path in tmp_path.glob("*.safetensors"):
        path.write_bytes(b"rot")
    with pytest.raises(UserError, match="no checkpoint in it is whole; restore one of them"):
        undisturbed(tmp_path, settings(steps=99))
    assert sorted(tmp_path.iterdir()) == there


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("No space in memory")]
)
def test_a_checkpoint_that_cannot_be_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """The checkpoint is written beside training; what went wrong there ends it all the same."""
    written = checkpoint.write_state

    def full(folder: Path, step: int, tensors: Any, state: Any) -> None:
        if step > 4:
            raise error
        written(folder, step, tensors, state)

    monkeypatch.setattr(checkpoint, "write_state", full)
    with pytest.raises(type(error), match="No space"):
        train(MODEL, settings(), batches, tmp_path, lambda p: True)
    monkeypatch.undo()
    found = read_newest_state(tmp_path)
    assert found is not None
    assert found[1]["step"] == 4
    expected, _ = undisturbed(tmp_path / "b", settings())
    model, _ = undisturbed(tmp_path, settings())
    assert same(weights(expected), weights(model))


def test_a_disk_without_room_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: room)
    with pytest.raises(UserError, match=r"0.00 GiB are free, but 3 checkpoints need"):
        train(MODEL, settings(), batches, tmp_path, lambda p: True)


def test_a_step_does_not_wait_for_the_checkpoint_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, next_step = checkpoint.write_state, threading.Event()
    in_time: list[bool] = []

    def slow(*state: Any) -> None:
        in_time.append(next_step.wait(timeout=30))
        written(*state)

    def on_progress(progress: Progress) -> bool:
        if progress.step == 5:  # the one after the first checkpoint
            next_step.set()
        return True

    monkeypatch.setattr(checkpoint, "write_state", slow)
    train(MODEL, settings(), batches, tmp_path, on_progress)
    assert in_time == [True] * 3


def test_checkpoints_are_written_by_the_clock_too(tmp_path: Path) -> None:
    saved: list[int] = []

    def on_progress(progress: Progress) -> bool:
        saved.extend([progress.step] * progress.saved)
        return True

    for minutes, steps in ((0.0, [12]), (1e3, [12]), (1e-9, [*range(1, 13)])):
        config = settings(checkpoint_every=10**6, checkpoint_minutes=minutes)
        train(MODEL, config, batches, tmp_path / str(minutes), on_progress)
        assert saved == steps
        saved.clear()


def test_only_the_newest_two_checkpoints_are_kept(tmp_path: Path) -> None:
    (tmp_path / ".step-000000004.safetensors.x.tmp").write_bytes(b"killed half-way")
    (tmp_path / "step-000000004.safetensors").write_bytes(b"killed before its index")
    undisturbed(tmp_path, settings())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-000000008.json",
        "step-000000008.safetensors",
        "step-000000012.json",
        "step-000000012.safetensors",
    ]


def test_a_damaged_newest_checkpoint_does_not_outlive_the_good_ones(tmp_path: Path) -> None:
    config = settings(keep_checkpoints=1, checkpoint_every=1)
    expected, _ = undisturbed(tmp_path / "a", config)
    folder = tmp_path / "b"
    train(MODEL, config, batches, folder, lambda p: p.step < 5)
    index = folder / "step-000000005.json"
    whole = index.read_text()
    index.with_stem("step-000000009").write_text(whole)  # names bytes that are not there
    train(MODEL, config, batches, folder, lambda p: p.step < 6)
    assert [path.name for path in folder.glob("*.json")] == ["step-000000006.json"]
    model, _ = undisturbed(folder, config)
    assert same(weights(expected), weights(model))


def test_checkpoints_of_another_model_are_refused(tmp_path: Path) -> None:
    undisturbed(tmp_path, settings())
    wider = ModelConfig(**{**MODEL.to_dict(), "width": 12})
    with pytest.raises(UserError, match="holds checkpoints of another model config"):
        train(wider, settings(), batches, tmp_path, lambda _: True)


def noise(batch: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(batch, MODEL.num_latents, generator=generator)


@pytest.mark.parametrize("fault", ["norm over the threshold", "loss not finite"])
def test_a_bad_update_is_skipped_whole(fault: str) -> None:
    config = settings(warmup_steps=0)
    if fault == "norm over the threshold":
        config = settings(warmup_steps=0, gradient_clip=1e-9, skip_threshold=1e-8)
    state = start(MODEL, config, CPU)
    if fault == "loss not finite":
        with torch.no_grad():
            next(iter(state.model.decoder.blocks)).project.weight.fill_(math.nan)
    before, average = weights(state.model), weights(state.ema)
    for times in (1, 2):
        update(state, config, next(batches(0)), noise())
        assert (state.step, state.skipped, state.skipped_in_a_row) == (times, times, times)
    after = weights(state.model)
    assert all(torch.equal(before[k].nan_to_num(), after[k].nan_to_num()) for k in before)
    assert same(average, weights(state.ema))


def test_a_streak_of_skips_stops_the_run_and_says_what_to_do(tmp_path: Path) -> None:
    config = settings(
        steps=50, gradient_clip=1e-9, skip_threshold=1e-8, max_skipped_in_a_row=5, warmup_steps=0
    )
    steps: list[int] = []
    with pytest.raises(UserError, match=r"last 5 updates were all skipped.*raise train\.skip_thr"):
        train(MODEL, config, batches, tmp_path, lambda p: steps.append(p.step) or True)
    assert steps == [1, 2, 3, 4, 5]  # the last one with the doctor's finding


def test_warm_up_is_linear_from_zero_and_the_first_update_changes_nothing() -> None:
    config = settings(warmup_steps=100, learning_rate=0.5)
    rates = [learning_rate(config, step) for step in (0, 1, 50, 100, 1000)]
    assert rates == [0, 0.005, 0.25, 0.5, 0.5]
    assert learning_rate(settings(warmup_steps=0), 0) == 1e-2
    state = start(MODEL, config, CPU)
    before = weights(state.model)
    update(state, config, next(batches(0)), noise())
    assert same(before, weights(state.model))


def test_averages_follow_the_weights() -> None:
    config = settings(warmup_steps=0, ema_decay=0.9)
    state = start(MODEL, config, CPU)
    expected = weights(state.model)
    for step in range(3):
        update(state, config, next(batches(step)), noise())
        for name, value in state.model.named_parameters():
            expected[name] = 0.9 * expected[name] + 0.1 * value.detach()
    for name, value in state.ema.named_parameters():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7)


def test_one_update_is_adamw_on_the_clipped_gradient_of_nats_per_dim() -> None:
    """A plain twin of the fused update, in float64."""
    config = settings(warmup_steps=0, gradient_clip=1e-3, skip_threshold=1e9)
    state = start(MODEL, config, CPU)
    state.model.double()
    state.ema.double()
    twin = VDVAE(MODEL).double()
    twin.load_state_dict(state.model.state_dict())
    x_BCHW, noise_BN = next(batches(0)), noise().double()
    update(state, config, x_BCHW, noise_BN)

    (twin(x_BCHW, noise_BN).neg_elbo_nats_B.mean() / MODEL.dims).backward()
    gradients = [p.grad for p in twin.parameters() if p.grad is not None]
    norm = torch.sqrt(sum((g**2).sum() for g in gradients))
    scale = min(1.0, 1e-3 / (norm.item() + 1e-6))
    with torch.no_grad():
        for parameter in twin.parameters():
            assert parameter.grad is not None
            g = parameter.grad * scale
            # First step: both bias corrections cancel the decays.
            parameter.mul_(1 - config.learning_rate * config.weight_decay)
            parameter.sub_(config.learning_rate * g / (g.abs() + 1e-8))
    for name, value in state.model.named_parameters():
        torch.testing.assert_close(
            value, dict(twin.named_parameters())[name], rtol=1e-9, atol=1e-12
        )


def test_the_model_kept_is_the_best_on_validation(tmp_path: Path) -> None:
    config = settings(validate_every=3, learning_rate=0.3, ema_decay=0.0)
    model, history = undisturbed(tmp_path, config)
    figures = [p["validation_bits_per_dim"] for p in history if "validation_bits_per_dim" in p]
    assert len(figures) == 4
    assert validation(model) == min(figures)


def test_training_learns(tmp_path: Path) -> None:
    """Stripes in one of two directions: a uniform model pays log2(17) = 4.09 bits/dim."""
    stripes = torch.zeros(4, 1, 4, 4, dtype=torch.uint8)
    stripes[:2, :, ::2], stripes[2:, :, :, ::2] = 255, 255

    def striped(_: int) -> Iterator[torch.Tensor]:
        while True:
            yield stripes

    seen: list[Progress] = []
    config = settings(steps=120, log_every=40)
    train(MODEL, config, striped, tmp_path, lambda p: seen.append(p) or True)
    assert seen[-1].history[-1]["bits_per_dim"] < 2.5


def test_scores_do_not_depend_on_the_batch_and_can_be_repeated() -> None:
    torch.manual_seed(0)
    model = VDVAE(MODEL).double()
    x_BCHW = torch.cat([next(batches(i)) for i in range(6)])
    keys = [str(index) for index in range(len(x_BCHW))]
    runs = [evaluate(model, in_batches(keys, x_BCHW, size), 3, 24) for size in (1, 7, 24)]
    for other in runs[1:]:
        np.testing.assert_allclose(other.bits_per_dim_B, runs[0].bits_per_dim_B, rtol=1e-12)
    assert (score(model, x_BCHW, 4).bits_per_dim_B != runs[0].bits_per_dim_B).any()
    summary = runs[0].summary()
    bits = runs[0].bits_per_dim_B
    assert summary["bits_per_dim"] == pytest.approx(bits.mean())
    assert summary["bits_per_dim_se"] == pytest.approx(bits.std(ddof=1) / math.sqrt(24))
    assert summary["nats_per_dim"] == pytest.approx(bits.mean() * math.log(2))
    rate, distortion = summary["rate_bits_per_dim"], summary["distortion_bits_per_dim"]
    assert rate + distortion == pytest.approx(bits.mean())


def test_noise_belongs_to_the_image() -> None:
    x_BCHW = next(batches(0))
    pair = torch.stack([x_BCHW[2], x_BCHW[0]])
    noise_BN = evaluation_noise(x_BCHW, 6, 0)
    assert torch.equal(evaluation_noise(pair, 6, 0), noise_BN[[2, 0]])
    assert content_key(x_BCHW[0]) != content_key(x_BCHW[0].flip(-1))


def test_evaluation_counts_and_refuses_figures_that_are_not_finite() -> None:
    torch.manual_seed(0)
    model = VDVAE(MODEL)
    x_BCHW = next(batches(0))
    with pytest.raises(UserError, match="scored 4 images under 4 keys, the manifest has 5"):
        evaluate(model, in_batches(list("abcd"), x_BCHW, 2), 0, 5)
    with pytest.raises(UserError, match="scored 4 images under 3 keys"):
        evaluate(model, in_batches(list("abca"), x_BCHW, 2), 0, 4)
    with torch.no_grad():
        model.decoder.gain[0, 0] = math.inf
    with pytest.raises(UserError, match="4 of 4 images have a bound that is not finite"):
        evaluate(model, in_batches(list("abcd"), x_BCHW, 2), 0, 4)


def test_a_model_comes_back_from_its_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = VDVAE(MODEL)
    save(model, tmp_path)
    back = load(tmp_path)
    assert back.config == MODEL
    assert same(weights(model), weights(back))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_broken_model_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not found; is .* a model's folder"):
        load(tmp_path)
    save(VDVAE(MODEL), tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load(tmp_path)
    save(VDVAE(ModelConfig(**{**MODEL.to_dict(), "width": 12})), tmp_path / "wider")
    path.write_bytes((tmp_path / "wider" / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match="does not fit"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not readable as JSON"):
        load(tmp_path)
