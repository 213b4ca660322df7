"""Each fast path of the training step against its plain twin, on the same images and noise."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from conftest import ROOT
from test_training import CPU, MODEL, batches, settings

from pipeline.params import load_recipe
from vdvae import layers
from vdvae.config import ModelConfig, UserError
from vdvae.doctor import Point
from vdvae.layers import Pointwise, after_gelu, gelu
from vdvae.model import VDVAE
from vdvae.precision import check_precision
from vdvae.summary import summarise
from vdvae.training import TrainState, check_machine, start, train, update

PLAIN = {"warmup_steps": 0, "channels_last": False}
# Wide enough for every kind of block: pooling, padding, unpooling, 3x3 and 1x1.
WIDER = ModelConfig(**{**MODEL.to_dict(), "encoder": "4x2,4d2,2x1,2d2,1x1",
                       "decoder": "1x1,2m1,4m2,4x1", "widths": "2:12,1:16"})  # fmt: skip


def stepped(model: ModelConfig = WIDER, steps: int = 3, **changes: Any) -> tuple[TrainState, Point]:
    config = settings(**{**PLAIN, **changes})
    state = start(model, config, CPU)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        noise_BN = torch.randn(4, model.num_latents, generator=generator)
        figures = update(state, config, next(batches(step)), noise_BN)
    return state, figures


def gradients(state: TrainState) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in state.model.parameters() if p.grad is not None])


def test_recomputed_activations_give_the_same_bits() -> None:
    plain, figures = stepped()
    for resolution in (1, 4):
        twin, same = stepped(checkpoint_activations_from=resolution)
        assert same == figures
        assert torch.equal(gradients(twin), gradients(plain))


def kept_bytes(**changes: Any) -> int:
    """Of what the blocks save for the backward pass, counted by autograd's own hooks."""
    state = start(WIDER, settings(**{**PLAIN, **changes}), CPU)
    sizes: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        elbo = state.forward(next(batches(0)), torch.randn(4, WIDER.num_latents))
    assert elbo.rate_nats_B.requires_grad
    weights = {p.untyped_storage().data_ptr() for p in state.model.parameters()}
    return sum(size for pointer, size in sizes.items() if pointer not in weights)


def test_recomputing_keeps_less_for_the_backward_pass() -> None:
    most, less, least = (kept_bytes(checkpoint_activations_from=r) for r in (0, 4, 1))
    assert least < less < 0.8 * most
    least, less, all_of_it = (summarise(WIDER, r).activation_bytes for r in (1, 4, 0))
    assert least < less < 0.8 * all_of_it  # what `vdvae plan` tells


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", [1, 3])
def test_a_gelu_that_is_computed_again_gives_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, kernel: int, dtype: torch.dtype, channels_last: bool
) -> None:
    """A convolution of a GELU that keeps its input alone, and its twin that keeps both."""
    monkeypatch.setattr(layers, "_SMALL", 0)
    monkeypatch.setattr(layers, "_ONEDNN_GELU", 0)
    generator = torch.Generator().manual_seed(0)
    order = torch.channels_last if channels_last else torch.contiguous_format
    convolution = Pointwise(6, 5) if kernel == 1 else torch.nn.Conv2d(6, 5, 3, padding=1)
    reduced = dtype == torch.bfloat16  # as autocast does it: from weights in float32
    convolution.to(torch.float32 if reduced else dtype).to(memory_format=order)  # type: ignore[call-overload]
    x_BDHW = torch.randn(2, 6, 4, 4, generator=generator).to(dtype).to(memory_format=order)
    x_BDHW.requires_grad_()
    grad_BDHW = torch.randn(2, 5, 4, 4, generator=generator).to(dtype)

    def run(keeps_both: bool) -> tuple[torch.Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16, enabled=reduced):
            y = convolution(gelu(x_BDHW)) if keeps_both else after_gelu(convolution, x_BDHW)
        inputs = (x_BDHW, convolution.weight, convolution.bias)
        return (y, *torch.autograd.grad(y, inputs, grad_BDHW))

    for found, wanted in zip(run(False), run(True), strict=True):
        assert (found.dtype, found.stride()) == (wanted.dtype, wanted.stride())
        assert torch.equal(found, wanted)
    if dtype == torch.float64:
        inputs = (x_BDHW, convolution.weight, convolution.bias)
        assert torch.autograd.gradcheck(layers._ConvolutionOfGelu.apply, inputs)


def test_gelu_is_the_same_function_in_both_memory_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "_ONEDNN_GELU", 0)
    x_BDHW = torch.linspace(-9, 9, 6400, dtype=torch.float64).reshape(2, 8, 20, 20)
    exact = x_BDHW * 0.5 * torch.erfc(-x_BDHW / 2**0.5)
    for dtype, atol in ((torch.float64, 1e-14), (torch.float32, 2e-6)):
        for order in (torch.contiguous_format, torch.channels_last):
            found = gelu(x_BDHW.to(dtype).to(memory_format=order))
            assert found.is_contiguous(memory_format=order)
            torch.testing.assert_close(found.double(), exact, rtol=0, atol=atol)


def test_a_step_that_computes_gelus_again_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "_ONEDNN_GELU", 0)
    plain, figures = stepped(channels_last=True)
    kept = summarise(WIDER).activation_bytes
    monkeypatch.setattr(layers, "_SMALL", 0)
    for resolution in (0, 4):  # and with activation checkpointing above it
        twin, same = stepped(channels_last=True, checkpoint_activations_from=resolution)
        assert same == figures
        assert torch.equal(gradients(twin), gradients(plain))
    assert summarise(WIDER).activation_bytes < 0.75 * kept


@pytest.mark.parametrize(
    ("recipe", "images", "parts", "precision"),
    [("digits", 512, 1, "fp32"), ("cifar10", 1, 2, "fp32"), ("cifar10", 1, 1, "bf16")],
)
def test_a_step_holds_what_is_told_before(
    recipe: str, images: int, parts: int, precision: str
) -> None:
    """`describe` and `plan` against the resident memory of steps, without what malloc keeps."""
    found = summarise(load_recipe(recipe, ROOT / "params.yaml").model, precision=precision)
    told = found.training_bytes(images, keeps_gradients=parts > 1)
    words = [sys.executable, "tests/step_memory.py", recipe, str(images), str(parts), precision]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        # glibc gives each piece of memory back to the system when it is freed.
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    done = subprocess.run(words, check=True, cwd=ROOT, env=environment, text=True,
                          stdout=subprocess.PIPE)  # fmt: skip
    assert int(done.stdout) == pytest.approx(told, rel=0.1)


def test_the_baseline_of_the_benchmarks_is_the_same_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from published_arithmetic import negative_elbo, train_step

    config = replace(WIDER, num_levels=256, image_channels=3, likelihood="published")
    generator = torch.Generator().manual_seed(0)
    x_BCHW = torch.randint(0, 256, (4, 3, 4, 4), generator=generator, dtype=torch.uint8)
    noise_BN = torch.randn(4, config.num_latents, generator=generator)
    model = VDVAE(config).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    found = []
    for run in (lambda *given: model(*given).neg_elbo_nats_B, partial(negative_elbo, model)):
        nats_B = run(x_BCHW, noise_BN.double())
        found.append((nats_B, torch.autograd.grad(nats_B.sum(), [*model.parameters()])))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)

    train = settings(**PLAIN)
    ours, twin = (start(config, train, CPU) for _ in range(2))
    for network in (ours.model, ours.ema, twin.model, twin.ema):
        network.double()
    for _ in range(3):
        update(ours, train, x_BCHW, noise_BN.double())
        train_step(twin, train, x_BCHW, noise_BN.double())
    assert twin.step == ours.step == 3
    for one, other in ((twin.model, ours.model), (twin.ema, ours.ema)):
        torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=1e-9, atol=1e-9)


def test_channels_last_is_the_same_step() -> None:
    plain, figures = stepped()
    twin, same = stepped(channels_last=True)
    assert same == pytest.approx(figures, rel=1e-5, abs=1e-8)  # a rate is a small difference
    torch.testing.assert_close(gradients(twin), gradients(plain), rtol=1e-4, atol=1e-6)


def test_compiling_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    for device, name in ((CPU, "g++"), (torch.device("cuda"), "gcc")):
        sentence = f"train.compile: true needs a compiler, and there is none; install {name}, or"
        with pytest.raises(UserError, match=re.escape(sentence)):
            check_machine(settings(compile=True), device)
    with pytest.raises(UserError, match=r"train.compile: true needs a compiler"):
        train(MODEL, settings(compile=True), batches, CPU, lambda p: True)  # type: ignore[arg-type]


def test_bfloat16_is_near_and_its_critical_parts_are_float32() -> None:
    plain, figures = stepped(steps=1)
    twin, near = stepped(steps=1, precision="bf16")
    assert near != figures
    for name in ("rate_bits_per_dim", "distortion_bits_per_dim", "gradient_norm"):
        assert near[name] == pytest.approx(figures[name], rel=0.03)
    one, other = gradients(plain), gradients(twin)
    assert torch.nn.functional.cosine_similarity(one, other, dim=0) > 0.995
    assert {p.dtype for p in twin.model.parameters()} == {torch.float32}
    assert {p.dtype for p in twin.ema.parameters()} == {torch.float32}
    assert all(value["exp_avg"].dtype == torch.float32 for value in twin.optimiser.state.values())
    with torch.autocast("cpu", torch.bfloat16):
        elbo = twin.model(next(batches(0)), torch.zeros(4, WIDER.num_latents))
        features = torch.randn(2, WIDER.width, 4, 4)
        parameters = twin.model.decoder.likelihood_parameters(features)
    assert (elbo.distortion_nats_B.dtype, elbo.kl_nats_LB.dtype) == (torch.float32,) * 2
    assert torch.equal(parameters, twin.model.decoder.likelihood_parameters(features))


def test_training_in_bfloat16_learns() -> None:
    _, first = stepped(MODEL, steps=1)
    _, last = stepped(MODEL, steps=40, precision="bf16", learning_rate=3e-3)
    bits = [f["rate_bits_per_dim"] + f["distortion_bits_per_dim"] for f in (first, last)]
    assert bits[1] < bits[0] - 0.1


def test_a_precision_that_the_machine_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"tf32 needs a CUDA device, not cpu; use fp32 or bf16"):
        check_precision("tf32", CPU)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    with pytest.raises(UserError, match=r"this machine's cpu has no bfloat16; use fp32"):
        check_precision("bf16", CPU)


def test_freed_memory_is_kept_for_the_next_step() -> None:
    """Pages that the system clears while 32 MiB are allocated and freed, over and over."""
    code = """
import resource, numpy as np
{}
for _ in range(3): np.ones(2**22)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10): np.ones(2**22)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    keep = "from pipeline.system.process import keep_freed_memory; keep_freed_memory()"
    twin, ours = (
        int(subprocess.run([sys.executable, "-c", code.format(words)], check=True, text=True,
                           cwd=ROOT, stdout=subprocess.PIPE).stdout)
        for words in ("", keep)
    )  # fmt: skip
    assert ours < 100
    assert twin > 10 * ours


def test_noise_comes_from_outside() -> None:
    """Twice the same step with the same noise is the same bits: nothing else is drawn."""
    (one, a), (other, b) = stepped(), stepped()
    assert a == b
    assert torch.equal(gradients(one), gradients(other))
