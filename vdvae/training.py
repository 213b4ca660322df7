"""Training: one readable loop, and one state that is everything it resumes from.

Shapes: B batch, C image channels, H W, N latent variables an image.
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
from vdvae.checkpoint import LARGEST, StateWriter, check_fit, check_values, read_newest_state
from vdvae.config import ModelConfig, TrainConfig, UserError
from vdvae.distributed import ALONE, Ranks, own_gradients
from vdvae.doctor import Finding, Point
from vdvae.evaluate import seed_of
from vdvae.model import VDVAE, bits_per_dim
from vdvae.precision import autocast, check_precision, rounding

# This rank's share of each batch, uint8 [B,C,H,W], from a number of images that all have seen on.
Batches = Callable[[int], Iterator[Tensor]]


class Stopped(Exception):
    """Raised by `validate` or `look`, where they were asked to stop half-way."""


@dataclass(frozen=True)
class Progress:
    """What a run tells after each step; a false answer makes it write a checkpoint and end."""

    step: int
    steps: int
    point: Point | None  # where this step closed an interval of the curves
    saved: bool  # this step's state is on its way to the disk, with all points or but for `point`
    history: list[Point]  # all points since the run began, on however many machines it ran
    findings: list[Finding] = field(default_factory=list)  # the doctor's, new at this step


@dataclass
class TrainState:
    """Everything that resumes. Data position, noise and learning rate follow from `step`."""

    model: VDVAE
    ema: VDVAE  # averaged weights: what is evaluated and kept
    optimiser: torch.optim.AdamW
    forward: nn.Module  # the model, or what runs it on several ranks
    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    best_bits_per_dim: float = math.inf
    best: dict[str, Tensor] = field(default_factory=dict)  # weights with that validation figure
    validations_since_best: int = 0
    findings_seen: dict[str, int] = field(default_factory=dict)  # the doctor's memory
    history: list[Point] = field(default_factory=list)
    window: dict[str, float] = field(default_factory=dict)  # sums since the last point
    # This step's point, which is not in `history` before it was validated (where it is to be: True)
    # and looked at: both take long, so that a checkpoint is written before them.
    pending: tuple[Point, bool] | None = None

    def save(self, writer: StateWriter) -> None:
        """Hands a checkpoint to the writer, which copies what may change."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            tensors[f"model/{name}"] = parameter.detach()
            for key, value in self.optimiser.state.get(parameter, {}).items():
                tensors[f"optimiser.{key}/{name}"] = value
        tensors |= {f"ema/{name}": value.detach() for name, value in self.ema.named_parameters()}
        tensors |= {f"best/{name}": value for name, value in self.best.items()}
        state = {
            "config": self.model.config.to_dict(),
            "step": self.step,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "best_bits_per_dim": self.best_bits_per_dim if self.best else None,
            "validations_since_best": self.validations_since_best,
            "findings_seen": dict(self.findings_seen),
            "history": list(self.history),
            "window": dict(self.window),
            "pending": self.pending and (dict(self.pending[0]), self.pending[1]),
        }
        writer.write(self.step, tensors, state)

    def bytes(self) -> int:
        """What a checkpoint takes on the disk, about, once there is everything in it."""
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        return 5 * weights  # weights, two moments, averages, the best

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Takes up the newest checkpoint, where there is one.

        Raises:
            UserError: for the checkpoint of another model, or one that is not fit to go on from.
        """
        found = read_newest_state(folder, most_bytes=2 * self.bytes() + 2**24)
        if found is None:
            return
        tensors, state = found
        if state["config"] != self.model.config.to_dict():
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
        self.step = state["step"]
        self.skipped = state["skipped"]
        self.skipped_in_a_row = state["skipped_in_a_row"]
        if state["best_bits_per_dim"] is not None:
            self.best_bits_per_dim = state["best_bits_per_dim"]
        self.validations_since_best = state["validations_since_best"]
        self.findings_seen = state["findings_seen"]
        self.history = state["history"]
        self.window = state["window"]
        if state.get("pending"):  # older states have none
            point, due = state["pending"]
            self.pending = point, due

    def _check(self, tensors: dict[str, Tensor], where: str) -> None:
        """Checks what a checkpoint holds: whole parts of this model's shapes, finite throughout."""
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
        for part, found in held.items():
            check_fit(found, parts[part], f"{where}: {part} does not fit the model", remedy)
            inside = part.startswith("optimiser.")
            check_values(
                found,
                f"{where}: {part}",
                remedy,
                dtype=torch.float32 if part == "optimiser.step" else self.model.decoder.gain.dtype,
                largest=torch.finfo(torch.float32).max if inside else LARGEST,
            )

    @torch.no_grad()
    def finished_model(self) -> VDVAE:
        """The averaged weights with the best validation figure, or the last ones."""
        for name, parameter in self.ema.named_parameters():
            if self.best:
                parameter.copy_(self.best[name])
        return self.ema.eval()


def device_of(config: TrainConfig) -> torch.device:
    """The device that a run is to use.

    Raises:
        UserError: where CUDA is asked for and there is none.
    """
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise UserError(
            "train.device: 'cuda' is asked for but this machine offers no CUDA device; run it "
            "where there is one, or set train.device to 'auto' for a narrower model on the CPU"
        )
    return torch.device("cuda" if available and config.device != "cpu" else "cpu")


def check_machine(config: TrainConfig, device: torch.device) -> None:
    """Refuses what this machine cannot do.

    Raises:
        UserError: it has not the precision, or no compiler where one is needed.
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
    """How many images of a batch are this rank's.

    Raises:
        UserError: where the batch does not part evenly.
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
    model_config: ModelConfig,
    config: TrainConfig,
    device: torch.device,
    ranks: Ranks = ALONE,
    dtype: torch.dtype = torch.float32,
) -> TrainState:
    """The state before the first step: weights from the seed, averaged weights a copy of them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of("weights", config.seed))
        model = VDVAE(model_config)
        ema = VDVAE(model_config)
    ema.load_state_dict(model.state_dict())
    for module in (model, ema):
        module.to(device, dtype)
        if config.channels_last:  # the convolutions' own layout (benchmarks/)
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.train()
    ema.requires_grad_(False).eval()
    model.recompute_from = config.recompute_from
    if config.compile:
        model.compile_parts()
    optimiser = torch.optim.AdamW(
        model.parameters(),
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        fused=True,
    )
    return TrainState(model=model, ema=ema, optimiser=optimiser, forward=ranks.wrapped(model))


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up: update i (from 0) runs at i / warmup_steps of the full rate."""
    warm = step >= config.warmup_steps
    return config.learning_rate * (1.0 if warm else step / config.warmup_steps)


def noise_of(
    config: TrainConfig, step: int, images: range, num_latents: int, device: torch.device
) -> Tensor:
    """The posterior's noise [B,N] for these images of a step's batch, standard normal.

    It is a function of (seed, step, number in the batch), not of who computes it: any number of
    ranks draws the same. On a GPU its own generator draws it, and other numbers than a CPU's.
    """
    generator = torch.Generator(device)
    noise_BN = torch.empty(len(images), num_latents, device=device)
    for row_N, image in zip(noise_BN, images, strict=True):
        generator.manual_seed(seed_of("noise", config.seed, step, image))
        row_N.normal_(generator=generator)
    return noise_BN


def update(
    state: TrainState,
    config: TrainConfig,
    x_BCHW: Tensor,
    noise_BN: Tensor,
    ranks: Ranks = ALONE,
) -> Point:
    """One optimiser step on one batch, of which this rank has its share; returns its figures.

    The update is skipped where loss or gradient norm is not finite, or the norm before clipping
    is over the threshold (Child 2021, sec. 4.2); then the averaged weights stand still while step
    and schedule move on. What decides is the mean over ranks, so that all decide alike.
    """
    dims, parts = state.model.config.dims, config.accumulation
    state.optimiser.zero_grad(set_to_none=True)
    sums: list[Tensor] = []
    with rounding(config.precision):
        for x, noise in zip(x_BCHW.chunk(parts), noise_BN.chunk(parts), strict=True):
            last = len(sums) == parts - 1
            with nullcontext() if last else own_gradients(state.forward):
                with autocast(config.precision, x.device):
                    elbo = state.forward(x, noise)
                # nats/dim, the unit of the published thresholds
                (elbo.neg_elbo_nats_B.mean() / (dims * parts)).backward()
            terms_TB = torch.cat([elbo.distortion_nats_B[None], elbo.kl_nats_LB])
            sums.append(terms_TB.detach().mean(dim=1) / parts)
    parameters: list[Tensor] = list(state.model.parameters())
    norm = torch.nn.utils.clip_grad_norm_(parameters, config.gradient_clip, foreach=True)
    # One look at the device a step.
    found = torch.cat([norm.detach()[None], torch.stack(sums).sum(dim=0)]).cpu()
    gradient_norm, distortion_nats, *kl_nats_L = ranks.mean(found).tolist()
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
    for entry, kl_nats in zip(state.model.decoder.layout, kl_nats_L, strict=True):
        name = f"rate_bits_per_dim/res_{entry.resolution}"
        figures[name] = figures.get(name, 0.0) + float(bits_per_dim(kl_nats, dims))
    return figures


def train(
    model_config: ModelConfig,
    config: TrainConfig,
    batches: Batches,
    folder: Path,
    on_progress: Callable[[Progress], bool],
    validate: Callable[[VDVAE], float] | None = None,
    look: Callable[[int, VDVAE], None] | None = None,
    ranks: Ranks = ALONE,
) -> VDVAE | None:
    """Trains to the last step, from the newest checkpoint in `folder` where there is one.

    To resume, call it again with the same arguments: in float32 on one machine with one number of
    threads, on one rank or two, the finished weights are the same, bit for bit, as if nothing had
    happened. With more ranks, or another number of them, data and noise stay the same, and sums are
    rounded otherwise.

    Args:
        model_config: the model.
        config: how to train it.
        batches: gives this rank's share of each batch, uint8 [B,C,H,W], from a number of images
            that all ranks have seen on.
        folder: of the checkpoints, which the first rank writes and all read.
        on_progress: told after every step; where any rank answers no, all end.
        validate: bits/dim of a model on validation images, the same on every rank; called every
            `validate_every` steps, after that step's checkpoint. It may raise `Stopped`, on every
            rank; so may `look`: then all end, and validate that step once more when they go on.
        look: shown the step and the averaged weights at every point of the curves; its time and
            validation's are not in images/s. It draws from generators of its own.
        ranks: who takes part.

    Returns:
        The finished model, or None where it was asked to stop.

    Raises:
        UserError: where the doctor stops the run, the batch does not part evenly, or the machine
            has not the precision or the room on disk.
    """
    device, share = device_of(config), share_of(config, ranks)
    check_machine(config, device)
    state = start(model_config, config, device, ranks)
    state.load(folder)
    ranks.check_equal("the step of the newest checkpoint", state.step)
    mine = range(ranks.rank * share, (ranks.rank + 1) * share)  # of the images of a batch
    with StateWriter(folder, config.keep_checkpoints) as writer:
        if ranks.first:
            writer.check_room(state.bytes())
        if state.step:
            if ranks.first:
                print(f"resuming at step {state.step}/{config.steps}", flush=True)
            # Points of the checkpoint may not have reached their reader before the run was cut off.
            resumed = Progress(state.step, config.steps, None, True, state.history)
            if not ranks.all_agree(on_progress(resumed)):
                return None
        # The next batch goes to a GPU while this one is worked on.
        stream = (
            x_BCHW.to(device, non_blocking=True)
            for x_BCHW in batches(state.step * config.batch_size)
        )
        following = next(stream, None)
        clock, clock_step, saved_at = time.monotonic(), state.step, time.monotonic()
        while state.pending or not _finished(state, config):
            findings: list[Finding] = []
            saved = True  # where a resumed step is still to be validated
            if state.pending is None:
                noise_BN = noise_of(config, state.step, mine, model_config.num_latents, device)
                assert following is not None, "batches ended"
                x_BCHW, following = following, next(stream, None)
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
                    if ranks.first:
                        state.save(writer)
            closed: Point | None = None
            if state.pending:
                closed = _validated(state, validate, look, ranks)
                if closed is None:
                    if not saved and ranks.first:
                        state.save(writer)
                    return None
                clock, clock_step = time.monotonic(), state.step
                findings += doctor.examine(model_config, config, state.history, state.findings_seen)
            last = _finished(state, config)
            if last and not saved:  # patience ended
                saved = True
                if ranks.first:
                    state.save(writer)
            told = Progress(state.step, config.steps, closed, saved, state.history, findings)
            go_on = ranks.all_agree(on_progress(told))
            for finding in findings:
                if finding.stops:
                    raise UserError(f"train: {finding.text}")
            if not go_on and not last:
                if not saved and ranks.first:
                    state.save(writer)
                return None
    return state.finished_model()


def _validated(
    state: TrainState,
    validate: Callable[[VDVAE], float] | None,
    look: Callable[[int, VDVAE], None] | None,
    ranks: Ranks,
) -> Point | None:
    """Moves the pending point to the history; where any rank is stopped in it, nothing changes."""
    assert state.pending is not None
    point, due = state.pending
    bits: float | None = None
    stopped = False
    try:
        if validate is not None and due:
            bits = validate(state.ema)
        if look is not None:
            look(state.step, state.ema)
    except Stopped:
        stopped = True
    if not ranks.all_agree(not stopped):
        return None
    if bits is not None:
        _select_best(state, point, bits)
    state.history.append(point)
    state.pending = None
    return point


def _finished(state: TrainState, config: TrainConfig) -> bool:
    impatient = 0 < config.patience <= state.validations_since_best
    return state.step >= config.steps or impatient


def _add_to_window(window: dict[str, float], figures: Point) -> None:
    """Sums for the means; figures of an update that are not finite are counted instead."""
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
    """Means since the last point, the greatest gradient norm, and where the run stands."""
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
    """What this process held at most since it was started, MiB."""
    peak = {"peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    if device.type == "cuda":
        peak["peak_gpu_memory_mib"] = torch.cuda.max_memory_allocated(device) / 2**20
    return peak


@torch.no_grad()
def _select_best(state: TrainState, point: Point, bits: float) -> None:
    point["validation_bits_per_dim"] = bits
    if bits < state.best_bits_per_dim:
        state.best_bits_per_dim = bits
        state.best = {name: value.clone() for name, value in state.ema.named_parameters()}
        state.validations_since_best = 0
    else:
        state.validations_since_best += 1
