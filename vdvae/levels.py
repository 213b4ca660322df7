"""Grey levels and how they are stored: level k of L as uint8 round(255 k / (L - 1)).

NumPy arrays and torch tensors alike; neither is imported here.
"""

from __future__ import annotations

from typing import Any


def stored_value(level: Any, num_levels: int) -> Any:
    """round(255 k / (L - 1)), halves up, in whole numbers so that it is exact.

    Args:
        level: k, 0 to L - 1: an int, or integers in an array or tensor.
        num_levels: L, 2 to 256.

    Returns:
        Values 0 to 255, of the type of `level`.
    """
    return (510 * level + (num_levels - 1)) // (2 * (num_levels - 1))


def levels_to_uint8(level: Any, num_levels: int) -> Any:
    """The stored value of each level.

    Args:
        level: integers 0 to L - 1, a NumPy array or torch tensor of any shape.
        num_levels: L, 2 to 256.

    Returns:
        uint8, of the same shape.
    """
    value = stored_value(level, num_levels)
    return value.astype("uint8") if hasattr(value, "astype") else value.byte()


def uint8_to_levels(value: Any, num_levels: int) -> Any:
    """The level of each stored value v: floor(v L / 256).

    The inverse of `levels_to_uint8` for every number of levels that a ModelConfig accepts.

    Args:
        value: uint8, a NumPy array or torch tensor of any shape.
        num_levels: L, 2 to 256.

    Returns:
        int32, 0 to L - 1, of the same shape.
    """
    wide = value.astype("int32") if hasattr(value, "astype") else value.int()
    return wide * num_levels // 256
