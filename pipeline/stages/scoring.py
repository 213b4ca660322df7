"""Scores of a split, shared among ranks: for `evaluate`, and for the validations of `train`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from pipeline.shards import ShardReader
from pipeline.system.progress import counted

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.params import EvaluateConfig
    from vdvae.distributed import Ranks
    from vdvae.evaluate import Scores
    from vdvae.models import ImageModel

    Batch = tuple[list[str], Tensor]  # names of images, and the images

_CAVEATS = {
    "published": "the published likelihood, off 1 in its sums by up to 1e-5",
    "published_5bit": "the published 5-bit likelihood, which is not normalised: compares with the "
    "published 0.61 alone",
}


def scores_of(
    group: Ranks,
    model: ImageModel,
    reader: ShardReader,
    settings: EvaluateConfig,
    passes: int = 1,
    iwae: int = 0,
    watched: Callable[[Iterator[Batch]], Iterator[Batch]] = iter,
) -> Scores | None:
    """Scores a split's images; each rank takes its share.

    Args:
        group: the ranks.
        model: on its device.
        reader: of the split.
        settings: batch size and seed.
        passes: see `vdvae.evaluate.score`.
        iwae: see `vdvae.evaluate.score`.
        watched: wraps the iterator of this rank's batches, on every rank.

    Returns:
        The scores of all images on rank 0, None on the others.

    Raises:
        UserError: as `vdvae.evaluate.evaluate`.
    """
    from vdvae.evaluate import checked, evaluate, interleaved

    batches = watched(reader.scan(settings.batch_size, group.rank, group.size))
    if watched is iter and not group.rank:  # not within training, which has a bar
        batches = counted(batches, f"scoring {reader.split}", reader.images, group.size)
    images = len(range(group.rank, reader.images, group.size))
    scores = None  # stays so on ranks without an image
    if images or group.is_main:  # rank 0 reports an empty split
        scores = evaluate(model, batches, settings.seed, images, passes=passes, iwae=iwae)
    else:
        next(batches, None)  # ends at once, but `watched` runs on every rank
    parts = [part for part in group.gather(scores) if part is not None]
    return checked(interleaved(parts), reader.images) if parts else None


def tell(split: str, scores: Scores, likelihood: str) -> None:
    """Prints the figures of a split in one line, with the caveat of its likelihood."""
    figures = scores.summary()
    text = (
        f"{split}: {figures['bits_per_dim']:.4f} ± {figures['bits_per_dim_se']:.4f} bits/dim "
        f"({figures['nats_per_dim']:.4f} nats/dim) over {figures['images']} images"
    )
    if scores.passes > 1:
        text += (
            f", {scores.passes} draws of the posterior (error over draws "
            f"{figures['bits_per_dim_se_draws']:.5f} bits/dim)"
        )
    if scores.iwae:
        text += (
            f"; importance-weighted by {scores.iwae} draws {figures['iwae_bits_per_dim']:.4f} ± "
            f"{figures['iwae_bits_per_dim_se']:.4f} bits/dim "
            f"({figures['iwae_nats_per_dim']:.4f} nats/dim)"
        )
    if likelihood in _CAVEATS:
        text += f" ({_CAVEATS[likelihood]})"
    print(text, flush=True)
