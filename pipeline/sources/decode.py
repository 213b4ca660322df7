"""Decodes image files of unknown origin: the right pixels, or an error that names the file."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vdvae.config import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
_EXIF_ORIENTATION = 0x0112
_SIXTEEN_BITS = ("I;16", "I;16B", "I")  # grey; colour comes from Pillow with 8
_EIGHT_BITS = ("1", "L", "P", "LA", "PA", "RGB", "RGBA", "CMYK", "YCbCr")


def decode(
    file: BinaryIO,
    name: str,
    channels: int,
    converted: Counter[str] | None = None,
    formats: tuple[str, ...] = FORMATS,
) -> Image.Image:
    """One upright 8-bit image in mode L (`channels` 1) or RGB (3).

    The EXIF orientation is applied; of 16 bits a channel the upper 8 are taken; transparent images
    are laid on white; grey is the luma of ITU-R 601-2; colour profiles are ignored. What was done
    is counted in `converted`.

    Raises:
        UserError: for anything but a whole, still image of one of `formats`, or one with more
            pixels than Image.MAX_IMAGE_PIXELS.
    """
    counts: Counter[str] = Counter() if converted is None else converted
    header = file.read(25)
    file.seek(0)
    deep = header.startswith(b"\x89PNG") and header[24:] == b"\x10"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture: Image.Image = Image.open(file, formats=formats)
            # Not by the warning: where threads decode, one may switch it off under another.
            if picture.width * picture.height > (Image.MAX_IMAGE_PIXELS or 0):
                raise Image.DecompressionBombError
            picture.verify()  # a PNG's checksums; decoding ignores them
            file.seek(0)
            picture = Image.open(file, formats=formats)
            # A JPEG with previews inside opens as MPO; its first image is the picture.
            if picture.format != "MPO" and getattr(picture, "n_frames", 1) > 1:
                raise UserError(f"{name}: is animated; take one image out of it")
            mode = picture.mode
            if mode not in (*_EIGHT_BITS, *(_SIXTEEN_BITS if deep else ())):
                raise UserError(f"{name}: has pixels of mode {mode}; convert it to 8 bits")
            if picture.getexif().get(_EXIF_ORIENTATION, 1) != 1:
                counts["turned upright"] += 1
            picture = ImageOps.exif_transpose(picture)
            if deep:
                if "transparency" in picture.info:  # Pillow compares its 16 bits with 8
                    raise UserError(
                        f"{name}: has 16 bits a channel and a transparent colour; convert it to 8"
                    )
                counts["16 bits to 8"] += 1
                if mode in _SIXTEEN_BITS:
                    mode = "L"
                    picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
            wanted = {1: "L", 3: "RGB"}[channels]
            if picture.has_transparency_data:
                counts[f"{mode} laid on white"] += 1
                picture = picture.convert("RGBA")
                white = Image.new("RGBA", picture.size, "white")
                white.alpha_composite(picture)
                picture = white
            elif mode != wanted:
                counts[f"{mode} to {wanted}"] += 1
            if mode not in ("1", "L"):
                picture = picture.convert("RGB")  # palettes and CMYK go to grey by way of colour
            return picture.convert(wanted)
    except UserError:
        raise
    except UnidentifiedImageError:
        raise UserError(
            f"{name}: is no image in {', '.join(formats)}, or is damaged; convert it or take it out"
        ) from None
    except Image.DecompressionBombError:
        limit = (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        raise UserError(
            f"{name}: has more than {limit:.0f} million pixels, a decompression bomb or too large "
            f"to be of use; shrink it or take it out"
        ) from None
    except Exception as error:  # decoders raise all sorts of things at damaged files
        raise UserError(
            f"{name}: cannot be decoded ({error}); replace it or take it out"
        ) from error
