"""Sources of images, one file each: what the raw data are and how they fall into splits."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.params import DataConfig
from pipeline.sources.source import Source

__all__ = ["Source", "open_source"]


def open_source(recipe: str, data: DataConfig) -> Source:
    """The source that a recipe names; its raw data are looked for, not read.

    Raises:
        UserError: where the raw data are missing or the settings do not suit them.
    """
    from pipeline.sources.cifar10 import Cifar10
    from pipeline.sources.digits import Digits
    from pipeline.sources.fashion_mnist import FashionMnist
    from pipeline.sources.ffhq import Ffhq
    from pipeline.sources.folder import Folder
    from pipeline.sources.imagenet import ImageNet
    from pipeline.sources.imagenet_npz import ImageNetNpz

    kinds: dict[str, Callable[[str, DataConfig], Source]] = {
        "digits": Digits,
        "cifar10": Cifar10,
        "fashion_mnist": FashionMnist,
        "imagenet": ImageNet,
        "imagenet-npz": ImageNetNpz,
        "ffhq": Ffhq,
        "folder": Folder,
    }
    return kinds[data.source](recipe, data)
