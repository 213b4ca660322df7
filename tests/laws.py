"""Laws that distributions must obey, in float64, for any of them to be held to."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def total_probability(
    log_prob: Callable[[Tensor], Tensor], num_levels: int, channels: int, batch: int = 4096
) -> float:
    """Sum of exp(log_prob) over all values of one pixel, `channels` levels each, in float64.

    Args:
        log_prob: nats of a batch of one-pixel images of levels [B,C,1,1].
    """
    levels = torch.arange(num_levels, dtype=torch.int16)
    values = torch.cartesian_prod(*[levels] * channels).reshape(-1, channels)
    parts = [log_prob(part[:, :, None, None]).exp().sum() for part in values.split(batch)]
    return float(torch.stack(parts).sum())
