"""torch.compile: each kind of block takes seconds, to minutes, to compile."""

from __future__ import annotations

import shutil

import pytest
import torch
from test_fast_paths import WIDER, gradients, stepped
from test_training import batches, settings

from vdvae import layers
from vdvae.training import start


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile wants a C++ compiler")
def test_compiled_blocks_of_every_kind_are_the_same_step() -> None:
    plain, figures = stepped()
    twin, same = stepped(compile=True)
    assert any(block._compiled_call_impl for block in twin.model.decoder.blocks)
    assert same == pytest.approx(figures, rel=1e-4, abs=1e-7)
    torch.testing.assert_close(gradients(twin), gradients(plain), rtol=1e-3, atol=1e-5)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile wants a C++ compiler")
def test_compiled_blocks_keep_no_more_than_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each keeps what its GELUs read, not what they give."""

    monkeypatch.setattr(layers, "_SMALL", 0)

    def kept(compile: bool) -> int:
        config = settings(compile=compile, channels_last=True)
        state = start(WIDER, config, torch.device("cpu"))
        sizes: dict[int, int] = {}

        def pack(x: torch.Tensor) -> torch.Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            state.forward(next(batches(0)), torch.randn(4, WIDER.num_latents))
        weights = {p.untyped_storage().data_ptr() for p in state.model.parameters()}
        return sum(size for pointer, size in sizes.items() if pointer not in weights)

    assert kept(True) < 1.05 * kept(False)
