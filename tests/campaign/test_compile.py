"""torch.compile: each kind of block takes seconds, to minutes, to compile."""

from __future__ import annotations

import shutil

import pytest
import torch
from test_fast_paths import gradients, kept_bytes, stepped

from vdvae import layers


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
    plain = kept_bytes(channels_last=True)
    assert kept_bytes(channels_last=True, compile=True) < 1.05 * plain
