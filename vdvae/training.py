"""Training (Child 2021, sec. 4.2): one loop, and one state that is everything it resumes from.

Shapes: B batch, C image channels, H W, N latent variables per image, T terms of the bound.
Data order and noise are functions of (seed, step): they are derived, never stored.
"""

from __future__ import annotations

import math
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from vdvae import doctor
from vdvae.checkpoint import (
    LARGEST,
    Resumable,
    StateWriter,
    check_fit,
    check_values,
    read_newest_state,
)
from vdvae.config import AnyModelConfig, TrainConfig, UserError, model_config_of
from vdvae.distributed import SINGLE, Ranks, no_sync
from vdvae.doctor import Finding, Point
from vdvae.model import bits_per_dim
from vdvae.models import ImageModel, build
from vdvae.precision import allow_tf32, autocast, check_precision
from vdvae.randomness import seed_of, training_noise

# A function of the number of images that the run has trained on, over all ranks: this rank's share
# of every batch after those, uint8 [B,C,H,W].
Batches = Callable[[int], Iterator[Tensor]]


class Stopped(Exception):
    """Raised by `validate` or `on_log` to stop the run before they are done."""


@dataclass(frozen=True)
class Progress:
    """The argument of `on_progress`: where a run stands after a step."""

    step: int  # updates done
    steps: int  # of the whole run
    point: Point | None  # of the curves, if this step ends an interval of `log_every`
    saved: bool  # whether a checkpoint of this step is being written (`point` may not be in it)
    history: list[Point]  # all points since the run began, including those before it resumed
    findings: list[Finding] = field(default_factory=list)  # the doctor's, new at this step


@dataclass(kw_only=True)
class TrainState(Resumable):
    """Everything that resumes. Data position, noise and learning rate follow from `step`."""

    model: ImageModel
    ema: ImageModel  # averaged weights: what is evaluated and kept
    optimiser: torch.optim.AdamW
    forward: nn.Module  # the model, or its DDP wrapper
    best: dict[str, Tensor] = field(default_factory=dict)  # weights with `best_bits_per_dim`

    def save(self, writer: StateWriter) -> None:
        """Hands a checkpoint to the writer, which copies the tensors."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            tensors[f"model/{name}"] = parameter.detach()
            for key, value in self.optimiser.state.get(parameter, {}).items():
                tensors[f"optimiser.{key}/{name}"] = value
        tensors |= {f"ema/{name}": value.detach() for name, value in self.ema.named_parameters()}
        tensors |= {f"best/{name}": value for name, value in self.best.items()}
        index = {"config": self.model.config.to_dict(), **self.to_index()}
        writer.write(self.step, tensors, index)

    def bytes(self) -> int:
        """The approximate size of a checkpoint on the disk, with its best weights."""
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        return 5 * weights  # weights, two moments, averages, the best

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Restores the newest checkpoint of a folder, if there is one.

        Raises:
            UserError: the checkpoint is of another model config, or damaged.
        """
        newest = read_newest_state(folder, most_bytes=2 * self.bytes() + 2**24)
        if newest is None:
            return
        tensors, index = newest
        if model_config_of(index["config"], str(folder)) != self.model.config:
            raise UserError(
                f"{folder}: holds checkpoints of another model config; move that folder away, "
                f"or set the config back, then run the same command again"
            )
        self._check(tensors, str(folder))
        for name, parameter in self.model.named_parameters():
            parameter.copy_(tensors[f"model/{name}"])
            if f"optimiser.step/{name}" in tensors:
                self.optimiser.state[parameter] = {
                    "step": tensors[f"optimiser.step/{name}"].to(parameter.device),
                    # In the parameter's own memory layout, as the optimiser makes them.
                    **{
                        key: torch.empty_like(parameter).copy_(tensors[f"optimiser.{key}/{name}"])
                        for key in ("exp_avg", "exp_avg_sq")
                    },
                }
        for name, parameter in self.ema.named_parameters():
            parameter.copy_(tensors[f"ema/{name}"])
            if f"best/{name}" in tensors:
                self.best[name] = tensors[f"best/{name}"].to(parameter.device)
        self.restore(index)

    def _check(self, tensors: dict[str, Tensor], where: str) -> None:
        """Checks a checkpoint's tensors: complete, of this model's shapes, and finite."""
        remedy = "restore the checkpoints, or move that folder away to begin anew"
        weights = dict(self.model.named_parameters())
        scalars = dict.fromkeys(weights, torch.zeros(()))
        parts: dict[str, Mapping[str, Tensor]] = {
            **dict.fromkeys(("model", "ema", "best"), weights),
            **dict.fromkeys(("optimiser.exp_avg", "optimiser.exp_avg_sq"), weights),
            "optimiser.step": scalars,
        }
        held: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}}
        for key, tensor in tensors.items():
            part, _, name = key.partition("/")
            held.setdefault(part, {})[name] = tensor
        optimised = {part for part in held if part.startswith("optimiser.")}
        if not held.keys() <= parts.keys() or len(optimised) not in (0, 3):
            raise UserError(f"{where}: holds other parts than a checkpoint's; {remedy}")
        dtype = next(self.model.parameters()).dtype
        for part, held_tensors in held.items():
            check_fit(held_tensors, parts[part], f"{where}: {part} does not fit the model", remedy)
            check_values(
                held_tensors,
                f"{where}: {part}",
                remedy,
                dtype=torch.float32 if part == "optimiser.step" else dtype,
                largest=torch.finfo(torch.float32).max if part in optimised else LARGEST,
            )

    @torch.no_grad()
    def finished_model(self) -> ImageModel:
        """The averaged weights with the best validation figure, or the last ones."""
        for name, parameter in self.ema.named_parameters():
            if self.best:
                parameter.copy_(self.best[name])
        return self.ema.eval()


def device_of(config: TrainConfig) -> torch.device:
    """The device of a run.

    Raises:
        UserError: CUDA is asked for and there is none.
    """
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise UserError(
            "train.device: 'cuda' is asked for but this machine offers no CUDA device; run it "
            "where there is one, or set train.device to 'auto' for a narrower model on the CPU"
        )
    return torch.device("cuda" if available and config.device != "cpu" else "cpu")


def check_machine(config: TrainConfig, device: torch.device) -> None:
    """Checks that this machine can train as configured.

    Raises:
        UserError: it lacks the precision, or a compiler where one is needed.
    """
    check_precision(config.precision, device)
    # Triton needs a C compiler on a GPU.
    names = ("gcc", "clang") if device.type == "cuda" else ("g++", "clang++")
    chosen = os.environ.get("CC" if device.type == "cuda" else "CXX", names[0])
    if config.compile and not any(map(shutil.which, (chosen, *names))):
        raise UserError(
            f"train.compile: true needs a compiler, and there is none; install {names[0]}, "
            f"or set train.compile to false"
        )


def share_of(config: TrainConfig, ranks: Ranks) -> int:
    """The number of images of a batch that each rank computes.

    Raises:
        UserError: the batch cannot be divided evenly.
    """
    parts = ranks.size * config.accumulation
    if config.batch_size % parts:
        raise UserError(
            f"train.batch_size: {config.batch_size} cannot be divided by {ranks.size} ranks x "
            f"train.accumulation {config.accumulation} = {parts}; choose a multiple of {parts}, "
            f"or fewer ranks"
        )
    return config.batch_size // ranks.size


def start(
    model_config: AnyModelConfig,
    config: TrainConfig,
    device: torch.device,
    ranks: Ranks = SINGLE,
    dtype: torch.dtype = torch.float32,
) -> TrainState:
    """The state before the first step.

    Args:
        model_config: the model.
        config: how it is trained; its seed determines the weights.
        device: of all tensors.
        ranks: that train it together.
        dtype: of the weights.

    Returns:
        A state whose averaged weights equal the weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of("weights", config.seed))
        model = build(model_config)
        ema = build(model_config)
    ema.load_state_dict(model.state_dict())
    for module in (model, ema):
        module.to(device, dtype)
        if config.channels_last:  # the convolutions' own layout (benchmarks/)
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.train()
    ema.requires_grad_(False).eval()
    model.checkpoint_activations_from = config.checkpoint_activations_from
    if config.compile:
        model.compile_parts()
    optimiser = torch.optim.AdamW(
        model.parameters(),
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        fused=True,
    )
    return TrainState(model=model, ema=ema, optimiser=optimiser, forward=ranks.wrap_ddp(model))


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up: update i (from 0) has i / warmup_steps of the full learning rate."""
    warm = step >= config.warmup_steps
    return config.learning_rate * (1.0 if warm else step / config.warmup_steps)


def update(
    state: TrainState,
    config: TrainConfig,
    x_BCHW: Tensor,
    noise_BN: Tensor,
    ranks: Ranks = SINGLE,
) -> Point:
    """One optimiser step on one batch.

    The update is skipped if loss or gradient norm is not finite, or the norm before clipping is
    over the threshold (Child 2021, sec. 4.2); then the averaged weights do not change, while step
    and schedule advance. The mean over ranks decides, so all ranks decide alike.

    Args:
        state: is changed in place.
        config: how to train.
        x_BCHW: this rank's share of the batch, uint8.
        noise_BN: standard normal noise of the posterior.
        ranks: that train together.

    Returns:
        Means over the batch of all ranks in bits/dim, rates by resolution, and the gradient norm.
    """
    dims, parts = state.model.config.dims, config.accumulation
    state.optimiser.zero_grad(set_to_none=True)
    sums: list[Tensor] = []
    with allow_tf32(config.precision):
        for x, noise in zip(x_BCHW.chunk(parts), noise_BN.chunk(parts), strict=True):
            last = len(sums) == parts - 1
            with nullcontext() if last else no_sync(state.forward):
                with autocast(config.precision, x.device):
                    elbo = state.forward(x, noise)
                # nats/dim, the unit of the published thresholds
                (elbo.neg_elbo_nats_B.mean() / (dims * parts)).backward()
            terms_TB = torch.cat([elbo.distortion_nats_B[None], elbo.kl_nats_LB])
            sums.append(terms_TB.detach().mean(dim=1) / parts)
    parameters: list[Tensor] = list(state.model.parameters())
    norm = torch.nn.utils.clip_grad_norm_(parameters, config.gradient_clip, foreach=True)
    # One copy from the device per step.
    terms = torch.cat([norm.detach()[None], torch.stack(sums).sum(dim=0)]).cpu()
    gradient_norm, distortion_nats, *kl_nats_L = ranks.all_reduce_mean(terms).tolist()
    rate_nats = sum(kl_nats_L)
    finite = math.isfinite(rate_nats + distortion_nats + gradient_norm)
    if finite and gradient_norm <= config.skip_threshold:
        for group in state.optimiser.param_groups:
            group["lr"] = learning_rate(config, state.step)
        state.optimiser.step()
        with torch.no_grad():
            averages: list[Tensor] = list(state.ema.parameters())
            torch._foreach_lerp_(averages, parameters, 1 - config.ema_decay)
        state.skipped_in_a_row = 0
    else:
        state.skipped += 1
        state.skipped_in_a_row += 1
    state.step += 1
    figures = {
        "rate_bits_per_dim": float(bits_per_dim(rate_nats, dims)),
        "distortion_bits_per_dim": float(bits_per_dim(distortion_nats, dims)),
        "gradient_norm": gradient_norm,
    }
    for resolution, kl_nats in zip(state.model.latent_resolutions, kl_nats_L, strict=True):
        name = f"rate_bits_per_dim/res_{resolution}"
        figures[name] = figures.get(name, 0.0) + float(bits_per_dim(kl_nats, dims))
    return figures


def train(
    model_config: AnyModelConfig,
    config: TrainConfig,
    batches: Batches,
    folder: Path,
    on_progress: Callable[[Progress], bool],
    validate: Callable[[ImageModel], float] | None = None,
    on_log: Callable[[int, ImageModel], None] | None = None,
    ranks: Ranks = SINGLE,
) -> ImageModel | None:
    """Trains to the last step, from the newest checkpoint in `folder` if there is one.

    To resume, call it again with the same arguments: in float32 on one machine with one number of
    threads, on one rank or two, the finished weights are the same, bit for bit, as without the
    interruption. With more ranks, or another number of them, data and noise stay the same, but sums
    are rounded differently.

    Args:
        model_config: the model.
        config: how to train it.
        batches: gives this rank's share of each batch, uint8 [B,C,H,W]; called once, with the
            number of images that the run has trained on so far.
        folder: of the checkpoints, which rank 0 writes and all ranks read.
        on_progress: called after every step. If it returns False on any rank, all ranks write a
            checkpoint and return.
        validate: bits/dim of a model on validation images, the same on every rank; called every
            `validate_every` steps, after that step's checkpoint. It may raise `Stopped` on every
            rank, and `on_log` on any: then all return, and validate that step when they resume.
        on_log: called at every point of the curves with the step and the averaged model. Its time
            and that of `validate` do not count in images/s. It must not draw from PyTorch's global
            generator.
        ranks: that train together.

    Returns:
        The finished model, or None if the run was stopped before the last step.

    Raises:
        UserError: the doctor ends the run, the batch cannot be divided evenly, or the machine lacks
            the precision or the room on its disk.
    """
    device, share = device_of(config), share_of(config, ranks)
    check_machine(config, device)
    state = start(model_config, config, device, ranks)
    state.load(folder)
    ranks.check_equal("the step of the newest checkpoint", state.step)
    own_images = range(ranks.rank * share, (ranks.rank + 1) * share)  # their numbers in a batch
    with StateWriter(folder, config.keep_checkpoints) as writer:

        def save_checkpoint() -> None:
            if ranks.is_main:
                state.save(writer)

        if ranks.is_main:
            writer.check_room(state.bytes())
        if state.step:
            if ranks.is_main:
                print(f"resuming at step {state.step}/{config.steps}", flush=True)
            # The checkpoint's last points may not have been logged before the run was interrupted.
            resumed = Progress(state.step, config.steps, None, True, state.history)
            if not ranks.all_true(on_progress(resumed)):
                return None
        # The next batch is copied to a GPU while this one is computed.
        stream = (
            x_BCHW.to(device, non_blocking=True)
            for x_BCHW in batches(state.step * config.batch_size)
        )
        next_BCHW = next(stream, None)
        clock, clock_step, saved_at = time.monotonic(), state.step, time.monotonic()
        while state.pending or not _finished(state, config):
            findings: list[Finding] = []
            saved = True  # if a resumed step is still to be validated
            if state.pending is None:
                noise_BN = training_noise(
                    config.seed, state.step, own_images, model_config.num_latents, device
                )
                assert next_BCHW is not None, "batches ended"
                x_BCHW, next_BCHW = next_BCHW, next(stream, None)
                figures = update(state, config, x_BCHW, noise_BN, ranks)
                _add_to_window(state.window, figures)
                findings += doctor.streak(config, state.skipped_in_a_row, figures["gradient_norm"])
                last = state.step == config.steps
                if state.step % config.log_every == 0 or last:
                    seconds = time.monotonic() - clock
                    images_per_second = (state.step - clock_step) * config.batch_size / seconds
                    point = _close_window(state, config, images_per_second) | _peak_memory(device)
                    due = config.validate_every and (
                        state.step % config.validate_every == 0 or last
                    )
                    state.pending = point, bool(due)
                minutes = (time.monotonic() - saved_at) / 60
                late = 0 < config.checkpoint_minutes <= minutes
                saved = last or late or state.step % config.checkpoint_every == 0
                if saved:
                    saved_at = time.monotonic()
                    save_checkpoint()
            new_point: Point | None = None
            if state.pending:
                new_point = _log_pending(state, validate, on_log, ranks)
                if new_point is None:
                    if not saved:
                        save_checkpoint()
                    return None
                clock, clock_step = time.monotonic(), state.step
                findings += doctor.examine(model_config, config, state.history, state.findings_seen)
            last = _finished(state, config)
            if last and not saved:  # patience ended
                saved = True
                save_checkpoint()
            progress = Progress(state.step, config.steps, new_point, saved, state.history, findings)
            go_on = ranks.all_true(on_progress(progress))
            for finding in findings:
                if finding.stops:
                    raise UserError(f"train: {finding.text}")
            if not go_on and not last:
                if not saved:
                    save_checkpoint()
                return None
    return state.finished_model()


def _log_pending(
    state: TrainState,
    validate: Callable[[ImageModel], float] | None,
    on_log: Callable[[int, ImageModel], None] | None,
    ranks: Ranks,
) -> Point | None:
    """Validates and logs the pending point, and moves it to the history.

    Returns:
        The point; None, with nothing changed, if any rank was stopped.
    """
    assert state.pending is not None
    point, due = state.pending
    bits: float | None = None
    stopped = False
    try:
        if validate is not None and due:
            bits = validate(state.ema)
        if on_log is not None:
            on_log(state.step, state.ema)
    except Stopped:
        stopped = True
    if not ranks.all_true(not stopped):
        return None
    if bits is not None:
        point = point | {"validation_bits_per_dim": bits}
        _select_best(state, bits)
    state.history.append(point)
    state.pending = None
    return point


def _finished(state: TrainState, config: TrainConfig) -> bool:
    impatient = 0 < config.patience <= state.validations_since_best
    return state.step >= config.steps or impatient


def _add_to_window(window: dict[str, float], figures: Point) -> None:
    """Adds an update's figures to the sums; if they are not all finite it is only counted."""
    finite = all(map(math.isfinite, figures.values()))
    for name, figure in figures.items():
        before = window.get(name, 0.0)
        if name == "gradient_norm":
            window[name] = max(before, math.inf if math.isnan(figure) else figure)
        else:
            window[name] = before + (figure if finite else 0.0)
    window["steps"] = window.get("steps", 0) + 1
    window["not_finite"] = window.get("not_finite", 0) + (not finite)


def _close_window(state: TrainState, config: TrainConfig, images_per_second: float) -> Point:
    """A point of the curves: means since the last one, the greatest gradient norm, counters."""
    window, state.window = state.window, {}
    norm, not_finite = window.pop("gradient_norm"), window.pop("not_finite")
    count = window.pop("steps") - not_finite
    means = {name: total / count if count else math.nan for name, total in window.items()}
    return {
        "step": state.step,
        "time": time.time(),
        "bits_per_dim": means["rate_bits_per_dim"] + means["distortion_bits_per_dim"],
        **means,
        "gradient_norm": norm,
        "skipped": state.skipped,
        "not_finite": not_finite,
        "learning_rate": learning_rate(config, state.step - 1),
        "images_per_second": images_per_second,
    }


def _peak_memory(device: torch.device) -> Point:
    """The peak memory of this process since its start, MiB."""
    peak = {"peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    if device.type == "cuda":
        peak["peak_gpu_memory_mib"] = torch.cuda.max_memory_allocated(device) / 2**20
    return peak


@torch.no_grad()
def _select_best(state: TrainState, bits: float) -> None:
    best = math.inf if state.best_bits_per_dim is None else state.best_bits_per_dim
    if bits < best:
        state.best_bits_per_dim = bits
        state.best = {name: value.clone() for name, value in state.ema.named_parameters()}
        state.validations_since_best = 0
    else:
        state.validations_since_best += 1
