"""Likelihoods that can be repeated: every image once, draws from (seed, image), float64 sums.

Shapes: B batch, C image channels, H W, L stochastic layers, P passes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vdvae.config import UserError
from vdvae.model import Elbo, bits_per_dim
from vdvae.models import ImageModel
from vdvae.randomness import evaluation_noise

_PER_IMAGE = ("rate_nats_B", "distortion_nats_B", "kl_nats_BL", "variance_nats2_B", "iwae_nats_B")


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Per-image terms of the bound, float64 NumPy arrays in nats, in the order of the images.

    Each is a mean over `passes` draws of the posterior.
    """

    keys: list[str]
    rate_nats_B: np.ndarray
    distortion_nats_B: np.ndarray
    kl_nats_BL: np.ndarray
    dims: int  # C·H·W
    passes: int = 1
    variance_nats2_B: np.ndarray | None = None  # of the negative ELBO over draws; from 2 passes on
    iwae_nats_B: np.ndarray | None = None  # minus the importance-weighted bound
    iwae: int = 0  # its number of draws; 0: not computed

    @property
    def bits_per_dim_B(self) -> np.ndarray:
        """Negative ELBO in bits/dim, per image."""
        return self._bits(self.rate_nats_B + self.distortion_nats_B)

    def _bits(self, nats: np.ndarray) -> np.ndarray:
        bits = bits_per_dim(torch.from_numpy(nats), self.dims)
        assert isinstance(bits, Tensor)
        return bits.numpy()

    def summary(self) -> dict[str, float | int]:
        """Means over images under the names of metrics.json, with their standard errors.

        `bits_per_dim_se` is the error over images; `bits_per_dim_se_draws`, from 2 passes on, that
        over draws of the posterior for these very images, which more passes make smaller.
        """
        bits = self.bits_per_dim_B
        figures: dict[str, float | int] = {
            "bits_per_dim": float(bits.mean()),
            "bits_per_dim_se": standard_error(bits),
            "rate_bits_per_dim": float(bits_per_dim(self.rate_nats_B.mean(), self.dims)),
            "distortion_bits_per_dim": float(
                bits_per_dim(self.distortion_nats_B.mean(), self.dims)
            ),
            "nats_per_dim": float(bits.mean() * math.log(2)),
            "images": len(bits),
        }
        if self.variance_nats2_B is not None:
            nats = math.sqrt(self.variance_nats2_B.sum() / self.passes) / len(bits)
            figures["bits_per_dim_se_draws"] = float(bits_per_dim(nats, self.dims))
        if self.iwae_nats_B is not None:
            iwae = self._bits(self.iwae_nats_B)
            figures |= {
                "iwae_bits_per_dim": float(iwae.mean()),
                "iwae_bits_per_dim_se": standard_error(iwae),
                "iwae_nats_per_dim": float(iwae.mean() * math.log(2)),
            }
        return figures

    def rate_bits_per_dim_L(self) -> np.ndarray:
        """The mean rate of each stochastic layer in bits/dim, top first; their sum is the rate."""
        return self._bits(self.kl_nats_BL.mean(axis=0))


def standard_error(values: np.ndarray) -> float:
    """The standard error of a mean over images, for the population that they are drawn from."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


@torch.no_grad()
def score(
    model: ImageModel,
    x_BCHW: Tensor,
    seed: int,
    keys: list[str] | None = None,
    *,
    passes: int = 1,
    iwae: int = 0,
) -> Scores:
    """The bounds of one batch of images.

    Args:
        model: on its device.
        x_BCHW: images, uint8.
        seed: of the posterior's draws, with each image's content.
        keys: names of the images; by default their numbers.
        passes: draws of the posterior that the ELBO is averaged over.
        iwae: draws of the importance-weighted bound -log 1/K sum p(x,z_k)/q(z_k given x)
            (Burda et al. 2016); 0 leaves it out, 1 is the ELBO with a sampled KL.

    Returns:
        Nats per image.

    Raises:
        UserError: for fewer than 1 pass or 0 importance samples.
    """
    if passes < 1 or iwae < 0:
        raise UserError(f"passes {passes} and iwae {iwae}: must be at least 1 and 0")
    parameter = next(model.parameters())
    x = x_BCHW.to(parameter.device)

    def elbo_of(draw: int, sampled_kl: bool = False) -> Elbo:
        noise_BN = evaluation_noise(x_BCHW, model.config.num_latents, seed, draw)
        elbo: Elbo = model(x, noise_BN.to(parameter), sampled_kl=sampled_kl)
        return elbo

    kl_nats_BL: np.ndarray | float = 0.0
    distortion_nats_B: np.ndarray | float = 0.0
    neg_elbo_nats_PB = []
    for draw in range(passes):
        elbo = elbo_of(draw)
        kl, distortion = elbo.kl_nats_LB.T.double().cpu(), elbo.distortion_nats_B.double().cpu()
        neg_elbo_nats_PB.append((kl.sum(dim=1) + distortion).numpy())
        kl_nats_BL = kl_nats_BL + kl.numpy() / passes
        distortion_nats_B = distortion_nats_B + distortion.numpy() / passes
    assert not isinstance(kl_nats_BL, float)
    assert not isinstance(distortion_nats_B, float)

    log_weights_nats_B: Tensor | None = None
    for draw in range(iwae):
        elbo = elbo_of(draw, sampled_kl=True)
        kl_nats_B = elbo.kl_nats_LB.double().sum(dim=0)
        log_weight_nats_B = -(kl_nats_B + elbo.distortion_nats_B.double()).cpu()
        log_weights_nats_B = (
            log_weight_nats_B
            if log_weights_nats_B is None
            else torch.logaddexp(log_weights_nats_B, log_weight_nats_B)
        )
    return Scores(
        keys=keys if keys is not None else [str(index) for index in range(len(x_BCHW))],
        rate_nats_B=kl_nats_BL.sum(axis=1),
        distortion_nats_B=distortion_nats_B,
        kl_nats_BL=kl_nats_BL,
        dims=model.config.dims,
        passes=passes,
        variance_nats2_B=np.var(neg_elbo_nats_PB, axis=0, ddof=1) if passes > 1 else None,
        iwae_nats_B=None
        if log_weights_nats_B is None
        else (math.log(iwae) - log_weights_nats_B).numpy(),
        iwae=iwae,
    )


def concatenated(parts: Sequence[Scores]) -> Scores:
    """The scores of several batches as one."""

    def whole(name: str) -> np.ndarray | None:
        arrays = [getattr(part, name) for part in parts]
        return None if arrays[0] is None else np.concatenate(arrays)

    arrays: dict[str, Any] = {name: whole(name) for name in _PER_IMAGE}
    return replace(parts[0], keys=[key for part in parts for key in part.keys], **arrays)


def interleaved(parts: Sequence[Scores]) -> Scores:
    """The scores of ranks as one, where rank r of R scored the images r, r + R, r + 2R, ...

    `parts` has no entry for ranks without an image, which come last.
    """
    place = np.concatenate([np.arange(len(p.keys)) * len(parts) + r for r, p in enumerate(parts)])
    order = np.argsort(place)
    whole = concatenated(parts)
    arrays: dict[str, Any] = {
        name: value[order] for name in _PER_IMAGE if (value := getattr(whole, name)) is not None
    }
    return replace(whole, keys=[whole.keys[index] for index in order], **arrays)


def evaluate(
    model: ImageModel,
    batches: Iterable[tuple[list[str], Tensor]],
    seed: int,
    images: int,
    *,
    passes: int = 1,
    iwae: int = 0,
) -> Scores:
    """The bounds of every image of a split, exactly once (Child 2021, sec. 5: test likelihoods).

    Args:
        model: in float32 on its device; TF32 is off unless the caller turned it on.
        batches: image keys and uint8 images, each image once.
        seed: of the posterior's draws.
        images: how many there must be.
        passes: see `score`.
        iwae: see `score`.

    Returns:
        The scores of all images, in the order of the batches.

    Raises:
        UserError: where figures are not finite, keys repeat, or the count is another.
    """
    parts = [score(model, x, seed, keys, passes=passes, iwae=iwae) for keys, x in batches]
    if not parts:
        raise UserError("evaluate: the split holds no images; check its fraction or count")
    return checked(concatenated(parts), images)


def checked(scores: Scores, images: int) -> Scores:
    """The scores, after a check that they are of so many different images and all finite.

    Raises:
        UserError: as `evaluate`.
    """
    if len(scores.keys) != images or len(set(scores.keys)) != images:
        raise UserError(
            f"evaluate: scored {len(scores.keys)} images under {len(set(scores.keys))} keys, the "
            f"manifest has {images}; run the shard stage again with -f"
        )
    finite_B = np.isfinite(scores.bits_per_dim_B)
    if scores.iwae_nats_B is not None:
        finite_B &= np.isfinite(scores.iwae_nats_B)
    bad = int((~finite_B).sum())
    if bad:
        raise UserError(
            f"evaluate: {bad} of {images} images have a bound that is not finite; the model has "
            f"diverged: lower train.learning_rate or train.skip_threshold and train again"
        )
    return scores


def in_batches(
    keys: list[str], x_NCHW: Tensor, batch_size: int
) -> Iterator[tuple[list[str], Tensor]]:
    """Cuts images that are in memory into batches for `evaluate`."""
    for start in range(0, len(x_NCHW), batch_size):
        yield keys[start : start + batch_size], x_NCHW[start : start + batch_size]
