"""Damaged and made-up images by the thousand: pixels or a reason, and never anything else."""

from __future__ import annotations

import io
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from repetitions import repetitions

from pipeline.params import DataConfig
from pipeline.registry import use as models
from pipeline.sources import open_source
from pipeline.sources.decode import OddImage, decode
from vdvae.config import ModelConfig, UserError

N = repetitions(400)  # files of each kind; each is read three times
SIZE = 24
MODEL = ModelConfig(image_size=SIZE, encoder=f"{SIZE}x1", decoder=f"{SIZE}x1", width=8)

NOTES = PngInfo()
NOTES.add_text("Comment", "of more bytes than its pixels " * 60)
KINDS: dict[str, tuple[str, dict[str, object]]] = {
    "png": ("RGB", {"format": "PNG"}),
    "png-noted": ("RGB", {"format": "PNG", "pnginfo": NOTES}),
    "png-palette": ("P", {"format": "PNG"}),
    "png-alpha": ("RGBA", {"format": "PNG"}),
    "jpg": ("RGB", {"format": "JPEG"}),
    "jpg-progressive": ("RGB", {"format": "JPEG", "progressive": True}),
    "jpg-restarts": ("RGB", {"format": "JPEG", "restart_marker_blocks": 2}),
    "jpg-cmyk": ("CMYK", {"format": "JPEG"}),
    "webp": ("RGB", {"format": "WEBP"}),
    "webp-lossless": ("RGBA", {"format": "WEBP", "lossless": True}),
    "bmp": ("RGB", {"format": "BMP"}),
    "bmp-palette": ("P", {"format": "BMP"}),
    "gif": ("P", {"format": "GIF"}),
    "gif-transparent": ("P", {"format": "GIF", "transparency": 3}),
    "tif": ("RGB", {"format": "TIFF"}),
    "tif-lzw": ("RGB", {"format": "TIFF", "compression": "tiff_lzw"}),
    "tif-deflate": ("L", {"format": "TIFF", "compression": "tiff_adobe_deflate"}),
    "tif-jpeg": ("RGB", {"format": "TIFF", "compression": "jpeg"}),
    "tif-packbits": ("RGB", {"format": "TIFF", "compression": "packbits"}),
    "tif-fax": ("1", {"format": "TIFF", "compression": "group4"}),
}


def whole(kind: str, random: np.random.RandomState) -> bytes:
    mode, options = KINDS[kind]
    steps = random.randint(-20, 21, (SIZE, SIZE, 3)).cumsum(1) + 128
    out = io.BytesIO()
    Image.fromarray(steps.clip(0, 255).astype(np.uint8)).convert(mode).save(out, **options)
    return out.getvalue()


def mutated(data: bytes, random: np.random.RandomState) -> bytes:
    """What happens to files, and what somebody does to them who knows their format."""
    changed = bytearray(data)
    for _ in range(random.randint(1, 4)):
        at, length = random.randint(len(changed)), random.randint(1, 60)
        kind = random.randint(8)
        if kind == 0:
            changed[at] ^= 1 << random.randint(8)
        elif kind == 1:
            del changed[at : at + length]
        elif kind == 2:
            changed[at:at] = changed[at : at + length]
        elif kind == 3:
            changed[at : at + length] = random.bytes(length)
        elif kind == 4:  # cut, with the end marker of a JPEG, a GIF and a PNG behind
            end = (b"\xff\xd9", b"\0;", b"\0\0\0\0IEND\xaeB`\x82", b"")[random.randint(4)]
            changed[max(at, 1) :] = end
        elif kind == 5:  # a number in the header: sizes, counts, offsets
            at = random.randint(min(len(changed), 200))
            number = (0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1)[random.randint(6)]
            order = "<>"[random.randint(2)]
            form = "IH"[random.randint(2)]
            changed[at : at + 4] = struct.pack(
                order + form, number % (2**32 if form == "I" else 2**16)
            )
        elif kind == 6:
            changed += random.bytes(length)
        else:
            changed[at : at + length] = bytes(length)
    return with_right_sums(bytes(changed)) if random.randint(2) else bytes(changed)


def with_right_sums(data: bytes) -> bytes:
    """A PNG whose checksums are right again, so that what is behind them is reached."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    out, at = bytearray(data), 8
    while at + 12 <= len(out):
        (length,) = struct.unpack_from(">I", out, at)
        end = at + 8 + length
        if end + 4 > len(out):
            break
        struct.pack_into(">I", out, end, zlib.crc32(out[at + 4 : end]))
        at = end + 4
    return bytes(out)


def rows_that_were_not_written(data: bytes) -> bool:
    """Whether what is decoded depends on what was in memory before, found the slow way."""
    seen = set()
    for mark in (0, 0xA5, 0x3C):
        picture = Image.open(io.BytesIO(data))
        size = getattr(picture, "_tile_size", picture.size)
        bands = len(picture.getbands())
        picture.im = Image.new(picture.mode, size, mark if bands == 1 else (mark,) * bands).im
        seen.add(picture.tobytes())
    return len(seen) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_every_image_gives_pixels_or_a_reason(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    random = np.random.RandomState(zlib.crc32(kind.encode()))
    path = tmp_path / f"a.{kind.partition('-')[0]}"
    data = DataConfig(source="folder", path=str(tmp_path), image_size=SIZE, resize="stretch")
    found: Counter[str] = Counter()
    for number in range(N):
        content = mutated(whole(kind, random), random)
        path.write_bytes(content)
        source = open_source("r", data)
        (item,) = source.items()
        (one,) = source.load([item.at], Counter())
        if not isinstance(one, OddImage):
            assert one.image_HWC.shape == (SIZE, SIZE, 3)
            if one.png:  # goes into the shards as it is
                there = Image.open(io.BytesIO(one.png), formats=["PNG"])
                assert there.mode == "RGB" and there.tobytes() == one.image_HWC.tobytes()
                assert decode(one.png, "f", 3).tobytes() == one.image_HWC.tobytes()
                found["handed through"] += 1
            found["pixels"] += 1
            if not kind.startswith(("jpg", "webp")):
                assert not rows_that_were_not_written(content), (kind, number)
        else:
            assert str(one).startswith(f"{path}: ") and str(one).isprintable()
            found[one.reason] += 1
        try:
            read = models._read(path, MODEL)
        except UserError as error:
            assert str(error).startswith(f"{path}: ") and str(error).isprintable()
        else:
            assert not isinstance(one, OddImage) and read.shape == (3, SIZE, SIZE)
    with capsys.disabled():
        print(f"\n{kind}: {N} files, {dict(found.most_common())}")
    assert found["pixels"] < N
    assert kind != "png-noted" or found["handed through"]


@pytest.mark.parametrize("kind", KINDS)
def test_whole_images_are_taken(kind: str) -> None:
    random = np.random.RandomState(1)
    for _ in range(N // 4):
        content = whole(kind, random)
        plain = Image.open(io.BytesIO(content))
        found = decode(content, "f", 3)
        if not plain.has_transparency_data:
            assert found.tobytes() == plain.convert("RGB").tobytes()
