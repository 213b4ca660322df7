"""Decodes image files of unknown origin: the right pixels, or an error that names the file."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import re
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from imagecodecs import PngError, png_decode
from PIL import Image, ImageOps, UnidentifiedImageError

from vdvae.config import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
_EXIF_ORIENTATION = 0x0112
_SIXTEEN_BITS = ("I;16", "I;16B", "I")  # grey; colour comes from Pillow with 8
_EIGHT_BITS = ("1", "L", "P", "LA", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
_PNG_COLOURS = {1: 0, 3: 2}  # its number for so many channels
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
# Of a PNG: how its 8-bit pixels are to be shown, by whom and when they were made.
_NOTES = (
    *(*_TEXTS, b"tIME", b"pHYs", b"bKGD"),
    *(b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"sBIT"),
)
# The words of texts that may hold an orientation, which Pillow then applies.
_TURNING = re.compile(rb"raw profile type |xml:com\.adobe\.xmp\0|xmp\0|exif\0", re.IGNORECASE)
_FILTERS = 5  # of a PNG's row, numbered from 0
_MOST_CHUNKS = 2**14  # of a PNG that is handed through: with more it is encoded anew
_HEADER_BYTES = 1024  # that a PNG may have beside its pixels
_COMPRESSED_WELL = (2, 3)  # FLEVEL: by zlib's level 6, which is the default, or a higher one
_MOST_TOLD = 20  # odd files that are named one by one
_MOST_SCANS = 100  # of a JPEG: each costs as much as the whole image
# What ends a JPEG's scan: any marker but a restart; 00 after FF stands for FF itself.
_END_OF_SCAN = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_HUFFMAN = {0xC0, 0xC1, 0xC2}  # frames whose scans a decoder could not read beyond their end
_GARBAGE = hashlib.sha512(b"any bytes").digest().replace(b"\xff", b"\0")


class OddImage(UserError):
    """A file that is no image to learn from: a sentence, and for counts its reason in a few words.

    A machine that cannot give a file is another matter: it may give it the next time.
    """

    def __init__(self, sentence: str, reason: str) -> None:
        super().__init__(sentence)
        self.reason = reason


class OddImages(UserError):
    """Several of them: the first 20 are named one by one."""

    def __init__(self, sentences: Sequence[str], remedy: str = "") -> None:
        left = len(sentences) - _MOST_TOLD
        last = [f"and {left} more"] if left > 0 else []
        if remedy:
            last = ["; ".join([*last, remedy])]
        self.sentences = [*sentences[:_MOST_TOLD], *last]
        super().__init__("; ".join(self.sentences))


def decode(
    content: bytes,
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
        OddImage: for anything but a whole, still image of one of `formats`, or one with more
            pixels than Image.MAX_IMAGE_PIXELS.
    """
    counts: Counter[str] = Counter() if converted is None else converted
    deep = content.startswith(b"\x89PNG") and content[24:25] == b"\x10"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd tags, and of bombs, which are refused below
            picture: Image.Image = Image.open(io.BytesIO(content), formats=formats)
            # Not by the warning: where threads decode, one may switch it off under another.
            if picture.width * picture.height > (Image.MAX_IMAGE_PIXELS or 0):
                raise Image.DecompressionBombError
            picture.verify()  # a PNG's checksums; decoding ignores them
            picture = Image.open(io.BytesIO(content), formats=formats)
            # A JPEG with previews inside opens as MPO; its first image is the picture.
            if picture.format != "MPO" and getattr(picture, "is_animated", False):
                what = "has several pages" if picture.format == "TIFF" else "is animated"
                raise OddImage(f"{name}: {what}; take one image out of it", what)
            mode = picture.mode
            if mode not in (*_EIGHT_BITS, *(_SIXTEEN_BITS if deep else ())):
                raise OddImage(
                    f"{name}: has pixels of mode {mode}; convert it to 8 bits", f"mode {mode}"
                )
            turned = picture.format == "TIFF" and _is_turned(picture)  # Pillow turns it as it loads
            picture = _whole(picture, content, name, formats)
            if turned or _is_turned(picture):
                counts["turned upright"] += 1
            picture = ImageOps.exif_transpose(picture)
            if deep:
                if "transparency" in picture.info:  # Pillow compares its 16 bits with 8
                    raise OddImage(
                        f"{name}: has 16 bits a channel and a transparent colour; convert it to 8",
                        "16 bits and a transparent colour",
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
    except (OddImage, MemoryError):
        raise
    except UnidentifiedImageError:
        raise OddImage(
            f"{name}: is no image in {', '.join(formats)}, or is damaged; convert it or take it "
            f"out",
            "no image, or damaged",
        ) from None
    except Image.DecompressionBombError:
        limit = (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        raise OddImage(
            f"{name}: has more than {limit:.0f} million pixels, a decompression bomb or too large "
            f"to be of use; shrink it or take it out",
            "too large",
        ) from None
    except Exception as error:  # decoders raise all sorts of things at damaged files
        reason = " ".join(str(error).split())[:200]
        raise OddImage(
            f"{name}: cannot be decoded ({reason}); replace it or take it out", "damaged"
        ) from error


def decode_to_store(
    content: bytes,
    name: str,
    channels: int,
    converted: Counter[str],
    formats: tuple[str, ...] = FORMATS,
) -> tuple[Image.Image, bytes | None]:
    """As `decode`; with a PNG of this very image where it need not be encoded anew."""
    png = _plain_png(content, channels)
    if png is not None:
        with contextlib.suppress(PngError):  # what libpng is stricter in
            return Image.fromarray(png_decode(png)), png  # as a shard's are read
    return decode(content, name, channels, converted, formats), None


def png_head(height: int, width: int, channels: int) -> bytes:
    """What a PNG of 8-bit pixels, not interlaced, begins with: up to its first chunk's CRC."""
    facts = struct.pack(">IIBBBBB", width, height, 8, _PNG_COLOURS[channels], 0, 0, 0)
    return PNG_SIGNATURE + struct.pack(">I", len(facts)) + b"IHDR" + facts


def _plain_png(content: bytes, channels: int) -> bytes | None:
    """A PNG without its notes, or None where it is better encoded anew, or refused.

    That is where it has other pixels than 8 bits of `channels` (1 grey, 3 RGB), is interlaced, has
    chunks that might change its pixels, is damaged, holds less than its pixels or more; or where it
    is too large: it was compressed in haste, as its zlib header says (RFC 1950, FLEVEL), or takes
    more bytes than its pixels.
    """
    width, height = struct.unpack(">II", content[16:24].ljust(8, b"\0"))
    if not content.startswith(png_head(height, width, channels)):
        return None
    if not 0 < width * height <= (Image.MAX_IMAGE_PIXELS or 0):
        return None
    most = height * width * channels + _HEADER_BYTES
    header, *others = itertools.islice(_chunks(content), _MOST_CHUNKS + 1)
    if not _has_its_sum(header) or len(others) == _MOST_CHUNKS:
        return None
    parts, size, ended = [PNG_SIGNATURE, header], 0, False
    kind = b"IHDR"
    for chunk in others:
        before, kind = kind, chunk[4:8]
        if ended or kind not in (b"IDAT", b"IEND", *_NOTES):
            return None
        if kind in _TEXTS and _TURNING.match(chunk, 8):
            return None
        ended = kind == b"IEND"
        if not ended and not _has_its_sum(chunk):
            return None
        if kind == b"IDAT":
            size += len(chunk)
            if size > most or (parts[2:] and before != kind):
                return None
            parts.append(chunk)
    if not ended:
        return None
    pixels = b"".join(part[8:-4] for part in parts[2:])
    if not pixels[1:] or pixels[1] >> 6 not in _COMPRESSED_WELL:
        return None
    if not _holds_rows(pixels, height, 1 + width * channels):
        return None
    return b"".join([*parts, PNG_END])


def _holds_rows(compressed: bytes, height: int, row_bytes: int) -> bool:
    """Whether a PNG's pixels are all there and nothing else, each row with a filter that exists."""
    inflate = zlib.decompressobj()
    try:
        rows = inflate.decompress(compressed, height * row_bytes + 1)
    except zlib.error:
        return False
    whole = inflate.eof and not inflate.unused_data and len(rows) == height * row_bytes
    return whole and max(rows[::row_bytes]) < _FILTERS


def _chunks(content: bytes) -> Iterator[bytes]:
    """Those of a PNG, and whatever follows: the last one may be cut."""
    at = len(PNG_SIGNATURE)
    while at < len(content):
        end = at + 12 + int.from_bytes(content[at : at + 4], "big")
        yield content[at:end]
        at = end


def _has_its_sum(chunk: bytes) -> bool:
    return zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")


def _is_turned(picture: Image.Image) -> bool:
    return bool(picture.getexif().get(_EXIF_ORIENTATION, 1) != 1)


def _whole(
    picture: Image.Image, content: bytes, name: str, formats: tuple[str, ...]
) -> Image.Image:
    """The picture, decoded. Pillow completes some files in silence: those are refused.

    Rows that are missing keep what was in memory before, so this is chosen; where it shows in a
    corner, the file is decoded again onto something else. A JPEG's decoder writes grey where a scan
    has ended too soon; there, as in files of several scans, what follows a scan is changed, which a
    decoder that has all it needs does not read.

    Raises:
        OddImage: it is not whole.
    """
    if picture.format in ("JPEG", "MPO"):
        changed = _beyond_scans(content, name)
        picture.load()
        if changed is None or not (changed[0] > 1 or _is_grey(picture)):
            return picture
        again = changed[1]
    elif picture.format == "WEBP":
        picture.load()
        return picture  # its decoder refuses what is cut
    else:
        bands = len(picture.getbands())
        mark = 0xA5 if bands == 1 else (0xA5,) * bands
        size = getattr(picture, "_tile_size", picture.size)  # of a TIFF before it is turned
        picture.im = Image.new(picture.mode, size, mark).im
        picture.load()
        if not _has_in_a_corner(picture, 255 if picture.mode == "1" else mark):
            return picture
        again = content
    other = Image.open(io.BytesIO(again), formats=formats)
    if picture.tobytes() != other.tobytes():
        raise OddImage(
            f"{name}: ends before its last pixel; replace it or take it out", "incomplete"
        )
    return picture


def _has_in_a_corner(picture: Image.Image, mark: int | tuple[int, ...]) -> bool:
    # Two pixels each way: rows and columns of interlaced images alternate.
    ends = [{0, min(1, size - 1), max(0, size - 2), size - 1} for size in picture.size]
    return any(picture.getpixel((x, y)) == mark for x in ends[0] for y in ends[1])


def _is_grey(picture: Image.Image) -> bool:
    """Whether the last pixel has the value that stands for none."""
    last = picture.crop((picture.width - 1, picture.height - 1, picture.width, picture.height))
    if picture.mode == "RGB":
        last = last.convert("L")  # brightness is what the last block alone decides
    return all(abs(value - 128) <= 2 for value in last.tobytes())


def _beyond_scans(content: bytes, name: str) -> tuple[int, bytes] | None:
    """How many scans a JPEG has, and its bytes with garbage behind each.

    None where that could change a whole image: in arithmetic coding, zeros at the end may be left
    out.

    Raises:
        OddImage: there are so many that it was made to keep a decoder busy.
    """
    parts, done, at, huffman = [], 0, 2, False
    while 0 <= (at := content.find(b"\xff", at)) < len(content) - 3:
        marker = content[at + 1]
        if marker == 0xD9:
            break
        if marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD8:  # without a length
            at += 1
            continue
        huffman = huffman or marker in _HUFFMAN
        at += 2 + int.from_bytes(content[at + 2 : at + 4], "big")
        if marker == 0xDA:
            end = _END_OF_SCAN.search(content, at)
            at = end.start() if end else len(content)
            parts.append(content[done:at])
            done = at
    if len(parts) > _MOST_SCANS:
        raise OddImage(
            f"{name}: has {len(parts)} scans, more than {_MOST_SCANS}; save it anew or take it out",
            "too many scans",
        )
    if not huffman:
        return None
    return len(parts), _GARBAGE.join([*parts, content[done:]])
