"""Sources: the documented splits and order, and a sentence for everything that can be wrong."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import re
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image
from tar_members import extended, member

from pipeline import sources, storage
from pipeline.params import DataConfig
from pipeline.shards import write_shards
from pipeline.sources import cifar10, fashion_mnist, ffhq, imagenet, imagenet_npz, open_source
from pipeline.sources.decode import FORMATS, OddImage, decode, decode_to_store
from vdvae.config import UserError


def config(source: str, path: object = "", **changes) -> DataConfig:
    return DataConfig(**{"source": source, "path": str(path), "image_size": 8, **changes})


class Found(NamedTuple):
    key: str
    split: str
    image_HWC: np.ndarray


def sound(found):
    """What a source gives, where the first odd file among it is an error."""
    for one in found:
        if isinstance(one, OddImage):
            raise one
        yield one


def read(data: DataConfig):
    """Every image of a source, loaded by a pickled copy of it, as in a worker."""
    source = open_source("r", data)
    items = list(sound(source.items()))
    keys = [item.key for item in items]
    assert len(set(keys)) == len(keys)
    far_source, places = pickle.loads(pickle.dumps((source, [item.at for item in items])))
    converted: Counter[str] = Counter()
    loaded = sound(far_source.load(places, converted))
    images = [
        Found(item.key, item.split or image.split, image.image_HWC)
        for item, image in zip(items, loaded, strict=True)
    ]
    return images, source.notes | ({"converted": dict(converted)} if converted else {})


def parts(images) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for one in images:
        found[one.split].append(one.key)
    return found


def refused(data: DataConfig, words: str) -> str:
    with pytest.raises(UserError, match=words) as caught:
        read(data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# digits


def digits(**changes) -> DataConfig:
    values = {"channels": 1, "num_levels": 17, "validation": 180, "test": 360, **changes}
    return config("digits", **values)


def test_digits_are_scikit_learns_in_the_documented_splits():
    from sklearn.datasets import load_digits

    images, _ = read(digits())
    order = np.random.RandomState(0).permutation(1797)
    assert [one.key for one in images] == [f"digits-{index:05d}" for index in order]
    assert {name: len(keys) for name, keys in parts(images).items()} == {
        "train": 1257,
        "validation": 180,
        "test": 360,
    }
    assert [one.split for one in images] == ["test"] * 360 + ["validation"] * 180 + ["train"] * 1257
    levels = load_digits().images[order]
    stored = np.stack([one.image_HWC[:, :, 0] for one in images])
    np.testing.assert_array_equal(stored, np.floor(levels * 255 / 16 + 0.5))
    assert parts(read(digits(split_seed=1))[0])["test"] != parts(images)["test"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_size": 16}, r"recipes.r.data.image_size: 16 does not suit .* set it to 8"),
        ({"channels": 3}, r"recipes.r.data.channels: 3 does not suit"),
        ({"resize": "crop"}, r"recipes.r.data.resize: 'crop' does not suit"),
        ({"test": 0.1}, r"recipes.r.data.test: 0.1 is not a number of images from 1 to 1796"),
        ({"validation": 1437}, r"recipes.r.data.validation: 1437 is not .* from 1 to 1436"),
    ],
)
def test_digits_refuses_other_settings(changes, words):
    refused(digits(**changes), words)


# Fashion-MNIST


def idx(pictures: np.ndarray, **changes: bytes) -> bytes:
    """An idx file of pictures N 28 28; `header` replaces its first 16 bytes."""
    header = b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in pictures.shape)
    return changes.get("header", header) + pictures.astype(np.uint8).tobytes()


@pytest.fixture
def fashion_folder(tmp_path, monkeypatch) -> Path:
    """The published layout with 10 + 4 pictures, one file of it gzipped."""
    monkeypatch.setattr(fashion_mnist, "IMAGES", {"train": 10, "test": 4})
    random = np.random.RandomState(0)
    pictures = random.randint(0, 256, (14, 28, 28))
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(pictures[:10]))
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(pictures[10:])))
    return tmp_path


def fashion(path: Path, **changes) -> DataConfig:
    values = {"image_size": 8, "channels": 1, "validation": 3, "resize": "mean", **changes}
    return config("fashion_mnist", path, **values)


@pytest.mark.parametrize("size", [8, 16, 32])
def test_fashion_mnist_has_the_published_split_and_means_of_blocks(fashion_folder, size):
    images, notes = read(fashion(fashion_folder, image_size=size))
    order = [f"fashion-mnist-train-{n:05d}" for n in np.random.RandomState(0).permutation(10)]
    assert parts(images) == {
        "validation": order[:3],
        "train": order[3:],
        "test": [f"fashion-mnist-test-{n:05d}" for n in range(4)],
    }
    pictures = np.random.RandomState(0).randint(0, 256, (14, 28, 28))
    assert notes["test sha256"] == hashlib.sha256(pictures[10:].astype(np.uint8)).hexdigest()
    padded = np.pad(pictures[12], 2)
    block = 32 // size
    means = padded.reshape(size, block, size, block).mean(axis=(1, 3))
    (image,) = [one.image_HWC for one in images if one.key == "fashion-mnist-test-00002"]
    np.testing.assert_array_equal(image[:, :, 0], np.floor(means + 0.5))  # exact in float64


def test_fashion_mnist_in_part_is_taken_for_what_it_holds(fashion_folder):
    (fashion_folder / "train-images-idx3-ubyte").write_bytes(idx(np.zeros((5, 28, 28))))
    images, notes = read(fashion(fashion_folder))
    counts = {name: len(keys) for name, keys in parts(images).items()}
    assert counts == {"validation": 2, "train": 3, "test": 4}
    assert "not the published ones: 5 + 4 images" in notes["files"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is no idx file of pictures of 28x28"),
        (idx(np.zeros((4, 27, 28))), "is no idx file of pictures of 28x28"),
        (idx(np.zeros((4, 28, 28)))[:-1], "holds 3,135 bytes where its header says 4 pictures"),
        (idx(np.zeros((4, 28, 28))) + b"0", "holds 3,137 bytes where its header says 4"),
        (idx(np.zeros((5, 28, 28))), "holds 3,137 bytes where its header says 5 pictures"),
        (idx(np.zeros((0, 28, 28))), "holds 0 bytes where its header says 0 pictures"),
        (b"gzip" + bytes(100), "is no idx file"),
        (None, "t10k-images-idx3-ubyte.gz: not found"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_fashion_mnist_refuses_other_files(fashion_folder, content, words, packed):
    (fashion_folder / "t10k-images-idx3-ubyte.gz").unlink()
    if content is not None:
        name = "t10k-images-idx3-ubyte" + ".gz" * packed
        (fashion_folder / name).write_bytes(gzip.compress(content) if packed else content)
    assert "get it anew, from Debian's package" in refused(fashion(fashion_folder), words)


def test_fashion_mnist_refuses_a_damaged_gzip_and_says_where_to_get_it(fashion_folder, monkeypatch):
    path = fashion_folder / "t10k-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    for damaged in (whole[:-20], whole[:100] + b"x" + whole[101:], b"\x1f\x8b"):
        path.write_bytes(damaged)
        refused(fashion(fashion_folder), "cannot be read .*dataset-fashion-mnist")
    monkeypatch.setattr(fashion_mnist, "PACKAGE", "/nowhere")
    refused(fashion(""), "'/nowhere'; install Debian's package dataset-fashion-mnist")


# cifar10


@pytest.fixture
def small_cifar10(monkeypatch):
    """The official layout with 8 images a file instead of 10,000."""
    monkeypatch.setattr(cifar10, "FILE_IMAGES", 8)


def archive(path: Path, images: int = 8, **files: bytes | None) -> Path:
    """An archive in the official layout; `files` replaces members by base name, None leaves out."""
    with tarfile.open(path, "w:gz") as tar:
        for number, name in enumerate((*cifar10.TRAIN_FILES, cifar10.TEST_FILE)):
            random = np.random.RandomState(number)
            records = random.randint(0, 256, (images, cifar10.RECORD)).astype(np.uint8)
            records[:, 0] %= 10
            data = files.get(name.removesuffix(".bin"), records.tobytes())
            if data is not None:
                member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def cifar(path: Path, **changes) -> DataConfig:
    return config("cifar10", path, **{"image_size": 32, "validation": 10, **changes})


def test_cifar10_whole_archive_has_the_published_split(tmp_path, small_cifar10, monkeypatch):
    path = archive(tmp_path / "c.tar.gz")
    monkeypatch.setattr(cifar10, "MD5", hashlib.md5(path.read_bytes()).hexdigest())
    images, notes = read(cifar(path, split_seed=11172018))
    order = [f"cifar10-train-{n:05d}" for n in np.random.RandomState(11172018).permutation(40)]
    assert parts(images) == {
        "validation": order[:10],
        "train": order[10:],
        "test": [f"cifar10-test-{n:05d}" for n in range(8)],
    }
    assert notes == {"md5": cifar10.MD5}
    planes = np.random.RandomState(1).randint(0, 256, (8, 3073)).astype(np.uint8)[3, 1:]
    (image,) = [one.image_HWC for one in images if one.key == "cifar10-train-00011"]
    np.testing.assert_array_equal(image.transpose(2, 0, 1).ravel(), planes)


def test_cifar10_of_the_official_size_must_have_the_official_md5(tmp_path, small_cifar10):
    path = archive(tmp_path / "c.tar.gz")
    found = hashlib.md5(path.read_bytes()).hexdigest()
    sentence = refused(cifar(path), f"c.tar.gz: has md5 {found} where the official archive has")
    assert cifar10.MD5 in sentence and cifar10.URL in sentence


def test_cifar10_in_part_is_taken_for_what_it_holds(tmp_path, small_cifar10):
    images, notes = read(cifar(archive(tmp_path / "c.tar.gz", images=4)))
    assert {name: len(keys) for name, keys in parts(images).items()} == {
        "validation": 5,
        "train": 15,
        "test": 4,
    }
    assert "20 + 4 images instead of 40 + 8" in notes["archive"]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"data_batch_3": None}, "has no data_batch_3.bin"),
        ({"test_batch": bytes(3073 + 1)}, "holds test_batch.bin with 3074 bytes"),
        ({"test_batch": b""}, "holds test_batch.bin with 0 bytes"),
        ({"test_batch": bytes(9 * 3073)}, "holds test_batch.bin with 27657 bytes"),
        ({"test_batch": b"\x0a" * 3073}, "labels above 9"),
    ],
)
def test_cifar10_refuses_other_archives(tmp_path, small_cifar10, files, words):
    sentence = refused(cifar(archive(tmp_path / "c.tar.gz", **files)), rf"c.tar.gz: .*{words}")
    assert cifar10.MD5 in sentence


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-2000],
        lambda data: data[:-6] + bytes(6),
        lambda data: b"no archive",
        lambda data: gzip.compress(b"no tar" * 1000),
        lambda data: b"",
    ],
)
def test_cifar10_refuses_a_damaged_archive(tmp_path, small_cifar10, damage):
    path = archive(tmp_path / "c.tar.gz", images=4)
    path.write_bytes(damage(path.read_bytes()))
    refused(cifar(path), r"c.tar.gz: cannot be read as a gzipped tar")


def test_cifar10_says_where_to_get_it(tmp_path):
    for path in ("", tmp_path / "none.tar.gz", tmp_path):
        sentence = refused(cifar(path), r"recipes.r.data.path: there is no file")
        assert cifar10.URL in sentence and cifar10.MD5 in sentence


# folder


def picture(size=(8, 8), mode: str = "RGB", seed: int = 0) -> Image.Image:
    pixels = np.random.RandomState(seed).randint(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def png(**options) -> bytes:
    out = io.BytesIO()
    picture(**options).save(out, "PNG")
    return out.getvalue()


def folder(path: Path, **changes) -> DataConfig:
    return config("folder", path, **changes)


def test_folder_reads_everything_below_it_in_order(tmp_path):
    paths = ["b/Ünïcode name.PNG", "a/z.png", "a.png", "B.jpeg", "a/.hidden.png", ".git/x.png"]
    for seed, name in enumerate(paths):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture(seed=seed).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("text")
    images, notes = read(folder(tmp_path))
    stems = [one.key[:-17] for one in images]
    assert stems == ["b", "a", "z", "n-code-name"]
    assert all(one.key.replace("-", "").isalnum() for one in images)
    assert notes == {"skipped": {".txt": 1, "hidden": 2}}
    np.testing.assert_array_equal(images[1].image_HWC, np.asarray(picture(seed=2)))


def test_folder_follows_no_links_and_waits_for_no_pipes(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    picture().save(outside / "secret.png")
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "link.png").symlink_to(outside / "secret.png")
    (inside / "folder").symlink_to(outside)
    (inside / "loop").symlink_to(inside)
    os.mkfifo(inside / "pipe.png")
    refused(folder(inside), r"inside: has no images .* 4 other files or links")
    picture(seed=1).save(inside / "own.png")
    images, notes = read(folder(inside))
    assert len(images) == 1 and notes == {"skipped": {".png": 1, "link": 3}}


def test_a_relative_path_is_found_from_another_working_directory(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    picture().save(tmp_path / "images" / "a.png")
    monkeypatch.chdir(tmp_path)
    source = open_source("r", folder("images"))
    items = list(source.items())
    monkeypatch.chdir("/")  # a worker's
    assert len(list(pickle.loads(pickle.dumps(source)).load([items[0].at], Counter()))) == 1
    (tmp_path / "images" / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"^images/a.png: is no image"):
        list(sound(source.load([items[0].at], Counter())))


def test_folder_splits_by_stored_pixels(tmp_path):
    for seed in range(200):
        picture(seed=seed).save(tmp_path / f"{seed:03}.png")
    picture(seed=7).save(tmp_path / "copy.bmp")
    near = np.asarray(picture(seed=9)) ^ 1  # the same on 32 levels
    Image.fromarray(near).save(tmp_path / "near.png")
    images, _ = read(folder(tmp_path, num_levels=32, validation=0.2, test=0.3))
    split = {one.key[:-17]: one.split for one in images}
    assert split["copy"] == split["007"] and split["near"] == split["009"]
    sizes = {name: len(keys) / 202 for name, keys in parts(images).items()}
    assert sizes == pytest.approx({"train": 0.5, "validation": 0.2, "test": 0.3}, abs=0.1)
    (tmp_path / "000.png").unlink()
    fewer, _ = read(folder(tmp_path, num_levels=32, validation=0.2, test=0.3))
    assert {(one.key, one.split) for one in fewer} < {(one.key, one.split) for one in images}
    other, _ = read(folder(tmp_path, num_levels=32, validation=0.2, test=0.3, split_seed=1))
    assert parts(other) != parts(fewer)


@pytest.mark.parametrize(
    ("make", "channels", "expected", "note"),
    [
        (lambda p: picture().convert("L").save(p), 3, picture().convert("L"), "L to RGB"),
        (lambda p: picture().save(p), 1, picture().convert("L"), "RGB to L"),
        (lambda p: picture().convert("P").save(p), 3, picture().convert("P"), "P to RGB"),
        (lambda p: picture().convert("1").save(p), 1, picture().convert("1"), "1 to L"),
        (lambda p: Image.new("RGBA", (8, 8), (9, 9, 9, 0)).save(p), 3,
         Image.new("RGB", (8, 8), "white"), "RGBA laid on white"),
        (lambda p: Image.new("LA", (8, 8), (100, 255)).save(p), 1,
         Image.new("L", (8, 8), 100), "LA laid on white"),
        (lambda p: Image.new("RGB", (8, 8), (9, 9, 9)).save(p, transparency=(9, 9, 9)), 3,
         Image.new("RGB", (8, 8), "white"), "RGB laid on white"),
    ],
)  # fmt: skip
def test_folder_converts_and_counts(tmp_path, make, channels, expected, note):
    make(tmp_path / "a.png")
    images, notes = read(folder(tmp_path, channels=channels))
    wanted = np.asarray(expected.convert({1: "L", 3: "RGB"}[channels])).reshape(8, 8, channels)
    np.testing.assert_array_equal(images[0].image_HWC, wanted)
    assert notes == {"converted": {note: 1}}


def test_folder_converts_cmyk_and_turns_upright(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "red.jpg", quality=100)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    half = Image.new("L", (8, 8), 0)
    half.paste(255, (0, 0, 4, 8))
    half.save(tmp_path / "turned.png", exif=exif)
    images, notes = read(folder(tmp_path))
    red, turned = (one.image_HWC.astype(int) for one in images)
    assert np.abs(red - [255, 0, 0]).max() < 5
    assert turned[:4].min() == 255 and turned[4:].max() == 0
    assert notes["converted"] == {"CMYK to RGB": 1, "L to RGB": 1, "turned upright": 1}


def test_folder_resizes_by_its_rule(tmp_path):
    wide = Image.new("RGB", (32, 16), "black")
    wide.paste((255, 255, 255), (8, 0, 24, 16))
    wide.save(tmp_path / "wide.png")
    refused(
        folder(tmp_path), r"wide.png: is 32x16, not 8x8; set .*recipes.r.data.resize to crop or"
    )
    crop, _ = read(folder(tmp_path, resize="crop"))
    assert crop[0].image_HWC.min() > 200
    stretch, _ = read(folder(tmp_path, resize="stretch"))
    assert stretch[0].image_HWC[:, 0].max() < 60
    _, notes = read(folder(tmp_path, resize="crop", image_size=64))
    assert notes == {"converted": {"enlarged": 1}}


def chunk(name: bytes, data: bytes) -> bytes:
    check = zlib.crc32(name + data).to_bytes(4, "big")
    return len(data).to_bytes(4, "big") + name + data + check


def png_header(width: int, height: int, depth: int, kind: int) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))


def png_of(width: int, height: int, depth: int, kind: int, *chunks: bytes) -> bytes:
    """A PNG with these chunks between its header and its end."""
    signature = b"\x89PNG\r\n\x1a\n"
    return b"".join(
        [signature, png_header(width, height, depth, kind), *chunks, chunk(b"IEND", b"")]
    )


def black_png(width: int, height: int, depth: int, kind: int) -> bytes:
    return png_of(width, height, depth, kind, chunk(b"IDAT", zlib.compress(bytes(10_000))))


CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}  # of a PNG's kinds of colour


def deep_pixels(kind: int) -> np.ndarray:
    return np.random.RandomState(kind).randint(0, 2**16, (8, 8, CHANNELS[kind]))


def deep_png(kind: int, extra: bytes = b"") -> bytes:
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep_pixels(kind))
    return png_of(8, 8, 16, kind, extra, chunk(b"IDAT", zlib.compress(rows)))


def rows_png(
    *chunks: bytes, kind: int = 2, rest: bytes = b"", level: int = 6, cut: bytes = b""
) -> bytes:
    """A PNG of 8x8 pixels of 8 bits, with chunks before its pixels and bytes behind them.

    With `cut` its pixels are in two chunks, between which that is.
    """
    pixels = np.random.RandomState(kind).randint(0, 9, (8, 8, CHANNELS[kind])).cumsum(0)
    rows = b"".join(b"\0" + row.astype(np.uint8).tobytes() for row in pixels)
    data = zlib.compress(rows, level) + rest
    parts = [data[:9], data[9:]] if cut else [data]
    return png_of(8, 8, 8, kind, *chunks, cut.join(chunk(b"IDAT", part) for part in parts))


def grey_png(width: int, height: int, start: bytes = b"") -> bytes:
    """A PNG of random rows that repeat every second one; `start` replaces zlib's header."""
    rows = [b"\0" + np.random.RandomState(row).bytes(width) for row in range(2)]
    data = zlib.compress(b"".join(rows[row % 2] for row in range(height)))
    return png_of(width, height, 8, 0, chunk(b"IDAT", start + data[len(start) :]))


IEND = chunk(b"IEND", b"")
HIDDEN = os.urandom(2**20)
TURN = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"  # orientation 6
TEXT = {  # Pillow takes such a word for its own note that the rows are interlaced
    "tEXt": chunk(b"tEXt", b"interlace\x001"),
    "zTXt": chunk(b"zTXt", b"interlace\0\0" + zlib.compress(b"1")),
    "iTXt": chunk(b"iTXt", b"interlace\0\0\0\0\x001"),
}
KEPT = {
    "plain": rows_png(),
    "grey": rows_png(kind=0),
    "noted": rows_png(chunk(b"pHYs", bytes(9)), chunk(b"gAMA", bytes(4))),
    **{name: rows_png(text) for name, text in TEXT.items()},
    "bytes in its end": rows_png()[: -len(IEND)] + chunk(b"IEND", HIDDEN),
    "an end without a sum": rows_png()[:-4],
}
ANEW = {
    "compressed in haste": rows_png(level=1),
    "so, behind an empty chunk": rows_png(chunk(b"IDAT", b""), level=1),
    "bytes behind its pixels": rows_png(rest=b"one"),
    "many bytes behind its pixels": rows_png(rest=HIDDEN),
    "bytes behind its end": rows_png() + b"more",
    "two headers": rows_png(png_header(8, 8, 8, 2)),
    "a header behind a note": (lambda png: png[:8] + TEXT["tEXt"] + png[8:])(rows_png()),
    "a transparent colour": rows_png(chunk(b"tRNS", bytes(6))),
    "a palette": rows_png(chunk(b"PLTE", bytes(3))),
    "turned": rows_png(chunk(b"eXIf", TURN)),
    "turned by a profile": rows_png(
        chunk(b"tEXt", b"Raw profile type exif\0\nexif\n34\n" + TURN.hex().encode())
    ),
    "turned by XMP": rows_png(
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + b'tiff:Orientation="6"')
    ),
    "many chunks": rows_png(*[chunk(b"IDAT", b"")] * 2**14),
    "grey with alpha": rows_png(kind=4),
    "16 bits": deep_png(2),
    "grey, a smaller window than is used": grey_png(200, 20, b"\x08\x99"),
    "grey, a million pixels wide": grey_png(1_000_001, 1),
    "no end": rows_png()[: -len(IEND)],
    "a note between its pixels": rows_png(cut=TEXT["tEXt"]),
}


@pytest.mark.parametrize("name", [*KEPT, *ANEW])
def test_a_png_that_is_kept_has_the_decoded_pixels_and_nothing_else(name: str) -> None:
    content = (KEPT | ANEW)[name]
    channels = 1 if "grey" in name else 3
    try:
        picture, png = decode_to_store(content, name, channels, Counter())
    except OddImage:
        assert name in ("no end", "a header behind a note", "a note between its pixels")
        return
    assert (png is not None) == (name in KEPT)
    if name.startswith("turned"):
        unturned = decode(KEPT["plain"], name, channels)
        assert picture.tobytes() == unturned.transpose(Image.Transpose.ROTATE_270).tobytes()
    if png is not None:
        with Image.open(io.BytesIO(png), formats=["PNG"]) as stored:  # as a shard's are read
            assert stored.mode == picture.mode and stored.tobytes() == picture.tobytes()
        plain = KEPT["grey" if channels == 1 else "plain"]
        assert png == plain and picture.tobytes() == decode(plain, name, channels).tobytes()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", CHANNELS)
def test_of_sixteen_bits_the_upper_eight_are_taken(tmp_path, kind, channels):
    (tmp_path / "a.png").write_bytes(deep_png(kind))
    turn = Image.Exif()
    turn[0x0112] = 6
    (tmp_path / "b.png").write_bytes(deep_png(kind, chunk(b"eXIf", turn.tobytes()[6:])))
    images, notes = read(folder(tmp_path, channels=channels))
    shallow = Image.fromarray(np.squeeze((deep_pixels(kind) >> 8).astype(np.uint8)))
    shallow.save(tmp_path / "a.png")
    shallow.save(tmp_path / "b.png", exif=turn)
    wanted, _ = read(folder(tmp_path, channels=channels))
    for one, other in zip(images, wanted, strict=True):
        np.testing.assert_array_equal(one.image_HWC, other.image_HWC)
    assert notes["converted"]["16 bits to 8"] == notes["converted"]["turned upright"] * 2 == 2
    assert "laid on white" in str(notes) or kind in (0, 2)


def animation() -> bytes:
    out = io.BytesIO()
    picture().save(out, "PNG", save_all=True, append_images=[picture(seed=1)])
    return out.getvalue()


def flipped(data: bytes) -> bytes:
    changed = bytearray(data)
    changed[len(data) // 2] ^= 1
    return bytes(changed)


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.png", b"", "is no image in PNG, JPEG, WEBP, BMP, GIF, TIFF, or is damaged"),
        ("a.jpg", b"text", "is no image"),
        ("a.png", b"GIF89a" + bytes(100), "is no image"),
        ("a.png", png()[:-40], "cannot be decoded"),
        ("a.png", png()[:40], "or is damaged"),
        ("a.png", flipped(png()), "cannot be decoded"),
        ("a.png", black_png(20_000, 20_000, 8, 2), "more than 89 million pixels, a decompression"),
        ("a.png", black_png(10_000, 10_000, 8, 2), "more than 89 million pixels, a decompression"),
        ("a.png", deep_png(0, chunk(b"tRNS", bytes(2))), "16 bits a channel and a transparent"),
        ("a.png", deep_png(2, chunk(b"tRNS", bytes(6))), "16 bits a channel and a transparent"),
        ("a.png", animation(), "is animated"),
        ("a.heic", b"", "images are not read"),
        ("a.JXL", b"", "images are not read"),
        ("b/line\nbreak.png", b"", r"line\\nbreak.png"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else None,
)
def test_folder_names_the_file_that_is_bad(tmp_path, name, data, words):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(data)
    sentence = refused(folder(tmp_path), words)
    assert ascii(name)[1:-1] in sentence


def test_folder_refuses_a_truncated_jpeg(tmp_path):
    picture(size=(64, 64)).save(tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(data[: len(data) // 2])
    refused(folder(tmp_path, image_size=64), r"a.jpg: cannot be decoded \(image file is truncated")


def short_png(rows: int) -> bytes:
    """A PNG that says 32x32 and has fewer rows, in a stream of zlib that is whole."""
    whole = np.asarray(picture(size=(32, 32)))[:rows]
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in whole))
    return png_of(32, 32, 8, 2, chunk(b"IDAT", data))


def jpeg(size=(64, 64), mode: str = "RGB", **options) -> bytes:
    out = io.BytesIO()
    picture(size=size, mode=mode).save(out, "JPEG", **options)
    return out.getvalue()


def cut_jpeg(data: bytes) -> bytes:
    """Cut inside its last scan, with an end marker put behind."""
    scan = data.rindex(b"\xff\xda")
    return data[: scan + (len(data) - scan) // 2].rstrip(b"\xff") + b"\xff\xd9"


def of_another_height(data: bytes, height: int) -> bytes:
    """A JPEG whose header says another height."""
    frame = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
    return data[: frame + 5] + struct.pack(">H", height) + data[frame + 7 :]


def tiff_of_fewer_strips() -> bytes:
    out = io.BytesIO()
    picture(size=(32, 16)).save(out, "TIFF")
    data = bytearray(out.getvalue())
    (start,) = struct.unpack_from("<I", data, 4)
    (tags,) = struct.unpack_from("<H", data, start)
    for at in range(start + 2, start + 2 + 12 * tags, 12):
        if struct.unpack_from("<H", data, at)[0] == 257:  # ImageLength
            struct.pack_into("<I", data, at + 8, 32)
    return bytes(data)


JPEGS = {
    "sequential": {},
    "sequential 4:4:4": {"subsampling": 0},
    "progressive": {"progressive": True},
    "grey": {"mode": "L"},
    "CMYK": {"mode": "CMYK"},
}
INCOMPLETE = {
    "PNG with half its rows": short_png(16),
    "PNG without its last row": short_png(31),
    "TIFF without its last strip": tiff_of_fewer_strips(),
    "JPEG whose header says 640 rows": of_another_height(jpeg(), 640),
    **{f"JPEG cut, {name}": cut_jpeg(jpeg(**options)) for name, options in JPEGS.items()},
}


@pytest.mark.parametrize("data", INCOMPLETE.values(), ids=INCOMPLETE)
def test_an_image_that_pillow_completes_in_silence_is_refused(data):
    Image.open(io.BytesIO(data)).load()  # it does
    with pytest.raises(OddImage, match="f: ends before its last pixel; replace it") as caught:
        decode(data, "f", 3)
    assert caught.value.reason == "incomplete"


@pytest.mark.parametrize("size", [(1, 1), (16, 16), (33, 17), (65, 64)])
def test_whole_images_are_not_taken_for_incomplete(size):
    grey = Image.new("RGB", size, (128, 128, 128))  # what a decoder writes where data are missing
    black, mark = Image.new("RGB", size), Image.new("RGB", size, (0xA5, 0xA5, 0xA5))
    options = [
        *({"format": "JPEG"} | extra | {"progressive": progressive}
          for extra in ({}, {"subsampling": 0}, {"restart_marker_rows": 1}, {"optimize": True})
          for progressive in (False, True)),
        *({"format": kind} for kind in ("PNG", "BMP", "GIF", "TIFF", "WEBP")),
        {"format": "TIFF", "compression": "tiff_lzw"},
    ]  # fmt: skip
    for image in (grey, black, mark, picture(size=size)):
        for mode in ("RGB", "L", "1", "P", "CMYK"):
            for option in options:
                out = io.BytesIO()
                try:
                    image.convert(mode).save(out, **option)
                except (OSError, ValueError):  # this format has no such mode
                    continue
                plain = Image.open(io.BytesIO(out.getvalue())).convert("RGB")
                assert decode(out.getvalue(), "f", 3).tobytes() == plain.tobytes()


def test_gif_and_tiff_of_one_frame_are_read_upright_and_of_several_are_not(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    half = Image.new("L", (8, 8), 0)
    half.paste(255, (0, 0, 4, 8))
    half.save(tmp_path / "a.gif")
    half.save(tmp_path / "b.tif", exif=exif)
    images, notes = read(folder(tmp_path, channels=1))
    left, turned = (one.image_HWC for one in images)
    assert left[:, :4].min() == turned[:4].min() == 255
    assert left[:, 4:].max() == turned[4:].max() == 0
    assert notes["converted"]["turned upright"] == 1
    for kind, words in (("GIF", "is animated"), ("TIFF", "has several pages")):
        out = io.BytesIO()
        half.save(out, kind, save_all=True, append_images=[picture().convert("L")])
        with pytest.raises(OddImage, match=f"f: {words}; take one image out of it"):
            decode(out.getvalue(), "f", 3)


def test_a_jpeg_of_a_thousand_scans_is_refused_before_it_is_decoded():
    data = jpeg(progressive=True)
    scan = data.rindex(b"\xff\xda")
    with pytest.raises(OddImage, match="scans, more than 100"):
        decode(data[:scan] + data[scan:-2] * 1000 + b"\xff\xd9", "f", 3)


def test_a_machine_that_cannot_give_a_file_is_no_odd_file(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png())
    source = open_source("r", folder(tmp_path))
    (item,) = source.items()
    path.unlink()
    with pytest.raises(UserError, match=r"a.png: cannot be read \(No such file") as caught:
        list(source.load([item.at], Counter()))
    assert not isinstance(caught.value, OddImage)
    os.mkfifo(path)  # put in its place meanwhile: nothing waits for its writer
    (odd,) = source.load([item.at], Counter())
    assert odd.reason == "no regular file"


def test_folder_that_is_none_or_empty(tmp_path):
    refused(
        folder(""),
        r"recipes.r.data.path: there is no folder ''; set this key to your folder of images",
    )
    refused(folder(tmp_path / "none"), r"there is no folder '.*none'")
    refused(folder(tmp_path), r"has no images \(.png, .*recipes.r.data.path")


# a folder in S3


def upload(url: str, root: Path) -> None:
    """Puts every file below a folder, links left out, below a prefix."""
    bucket, prefix = storage.s3_address(url)
    client = storage._s3_client(os.getpid())
    for path in (path for path in root.rglob("*") if path.is_file() and not path.is_symlink()):
        key = f"{prefix}/{path.relative_to(root).as_posix()}"
        client.put_object(Bucket=bucket, Key=key, Body=path.read_bytes())


def test_a_prefix_gives_the_shards_and_the_manifest_of_the_same_folder(tmp_path, s3_url):
    root = tmp_path / "images"
    names = ["b/Ünïcode name.PNG", "a/z.png", "a.png", "B.jpeg", "b/100%?#+&.webp", "a/line\n.png"]
    hidden = ["a/.hidden.png", ".git/x.png", "a/.git/z.png", "a/.git/b/.y.png"]
    for seed, name in enumerate([*names, *hidden, *(f"{i:02}.png" for i in range(20))]):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(seed=seed, mode="L" if seed == 2 else "RGB").save(root / name)
    for name in ("notes.txt", "a/README", ".DS_Store"):
        (root / name).write_text("text")
    upload(s3_url, root)
    client = storage._s3_client(os.getpid())
    near = s3_url.removeprefix("s3://bucket/")
    for key in (f"{near}/marker/", f"{near}-too/a.png", f"{near}.png"):
        client.put_object(Bucket="bucket", Key=key, Body=b"" if key.endswith("/") else png())
    pages = []
    client.meta.events.register(
        "provide-client-params.s3.ListObjectsV2",
        lambda params, **_: pages.append(1) or {**params, "MaxKeys": 5},
    )
    made = {}
    for path in (root, s3_url):
        data = folder(path, validation=0.2, test=0.2)
        store = storage.open_store(f"file://{tmp_path}/store-{len(made)}")
        source = open_source("r", data)
        manifest = write_shards("r", data, source, store, tmp_path / f"{len(made)}.json")
        keys = [shard.key for split in manifest.splits.values() for shard in split.shards]
        made[path] = (manifest, [store.get(key) for key in keys], read(data)[0])
    assert len(pages) > 5
    (one, bytes_one, images_one), (other, bytes_other, images_other) = made.values()
    assert one == other and bytes_one == bytes_other
    assert (tmp_path / "0.json").read_bytes() == (tmp_path / "1.json").read_bytes()
    assert [image.key for image in images_one] == [image.key for image in images_other]
    assert one.source.notes == {
        "converted": {"L to RGB": 1},
        "skipped": {".txt": 1, "hidden": 4, "no suffix": 1},
    }
    assert sum(split.images for split in one.splits.values()) == 26


def test_object_names_are_hashed_and_shown_only(tmp_path, monkeypatch):
    names = ["../up.png", "a/../../up.png", "a/./b.png", "a//b.png", "/a/b.png", "a/b.png", ".png"]
    names += ["\x1b[2J.png", "line\nbreak.png", "\u202egnp.png", "marker/", "a" * 900 + ".png"]
    listed = [storage.Stored(name, 1, 0.0) for name in names]
    monkeypatch.setattr(storage.S3Folder, "list", lambda self: iter(listed))
    monkeypatch.setattr(storage.S3Folder, "read", lambda self, name, limit: png())
    images, notes = read(folder("s3://bucket/p"))
    assert notes["skipped"] == {"hidden": 4, "no suffix": 1}
    assert len(images) == 7  # and as many keys: read() holds that
    assert all(re.fullmatch("[a-z0-9-]{1,57}", one.key) for one in images)
    monkeypatch.setattr(storage.S3Folder, "read", lambda self, name, limit: b"text")
    sentence = refused(folder("s3://bucket/p"), r"'s3://bucket/p/\\x1b\[2J.png': is no image")
    assert sentence.isprintable()


def test_an_object_too_large_for_an_image_is_named_and_not_read(s3_url, tmp_path, monkeypatch):
    (tmp_path / "huge.png").write_bytes(png(size=(64, 64)))
    upload(s3_url, tmp_path)
    size = (tmp_path / "huge.png").stat().st_size
    monkeypatch.setattr(sources.raw, "OBJECT_BYTES", size - 1)
    refused(folder(s3_url), rf"{s3_url}/huge.png: has more than {size - 1:,} bytes; shrink it or")
    monkeypatch.setattr(sources.raw, "OBJECT_BYTES", size)
    assert len(read(folder(s3_url, image_size=64))[0]) == 1


def test_bad_images_of_a_prefix_are_named_as_those_of_a_folder(s3_url, tmp_path):
    refused(folder(s3_url), rf"{s3_url}: has no images .* 0 other files.*recipes.r.data.path")
    (tmp_path / "a.png").write_bytes(png()[:-40])
    upload(s3_url, tmp_path)
    refused(folder(f"{s3_url}/"), rf"^{s3_url}/a.png: cannot be decoded")
    (tmp_path / "b.heic").write_bytes(b"")
    upload(s3_url, tmp_path)
    refused(folder(s3_url), rf"^{s3_url}/b.heic: .heic images are not read")


@pytest.mark.parametrize(
    ("changes", "bucket", "reason"),
    [
        ({}, "no-such-bucket", "NoSuchBucket"),
        ({"AWS_SECRET_ACCESS_KEY": "wrong-secret"}, "bucket", "SignatureDoesNotMatch"),
        ({"AWS_ACCESS_KEY_ID": "nobody-known"}, "bucket", "InvalidAccessKeyId"),
        ({"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, "bucket", "Unable to locate"),
        ({"AWS_ENDPOINT_URL": "http://me:secret@127.0.0.1:9"}, "bucket", "Could not connect"),
    ],
)
def test_a_prefix_that_cannot_be_listed(s3_url, monkeypatch, changes, bucket, reason):
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setattr(storage, "_ATTEMPTS", 2)  # not for up to 31 s
    for name, value in changes.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    words = rf"^s3://{bucket}/p: cannot be listed: .*{reason}.*; check its name, AWS_ENDPOINT_URL"
    sentence = refused(folder(f"s3://{bucket}/p"), words)
    assert not re.search("secret|tester|nobody-known", sentence)


def test_an_object_that_cannot_be_read(s3_url, monkeypatch):
    gone = storage.Stored("gone.png", 1, 0.0)
    monkeypatch.setattr(storage.S3Folder, "list", lambda self: iter([gone]))
    refused(folder(s3_url), rf"^{s3_url}/gone.png: cannot be read: NoSuchKey .*run the same")


@pytest.mark.parametrize(
    "path", ["s3://me:pass@bucket/p", "s3://bucket/../p", "s3://", "https://x/?token=pass"]
)
def test_a_path_that_is_no_address_is_refused_without_its_secret(path):
    sentence = refused(folder(path), r"^params.yaml: recipes.r.data.path: .*set this key to your")
    assert "pass" not in sentence.replace("password", "")


# imagenet


def imagenet_tar(path: Path, seeds: list[int], size: int = 32) -> None:
    with tarfile.open(path, "w") as tar:
        for seed in seeds:
            data = png(size=(size, size), seed=seed)
            member = tarfile.TarInfo(f"part/{seed:07d}.png")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def test_imagenet_is_in_the_order_of_its_names(tmp_path):
    imagenet_tar(tmp_path / "train_32x32.tar", [5, 3, 9, 1, 7])
    imagenet_tar(tmp_path / "valid_32x32.tar", [20, 10])
    data = config("imagenet", tmp_path, image_size=32, validation=2, split_seed=42)
    images, notes = read(data)
    assert notes == {"tars": "not the official ones: 5 + 2 images instead of 1281149 + 49999"}
    last = sorted(np.random.RandomState(42).permutation(5)[-2:])
    found = parts(images)
    assert found["validation"] == [f"imagenet32-train-{rank:07d}" for rank in last]
    assert found["test"] == ["imagenet32-test-0000000", "imagenet32-test-0000001"]
    for one, seed in zip(images, [1, 3, 5, 7, 9, 10, 20], strict=True):
        np.testing.assert_array_equal(one.image_HWC, np.asarray(picture((32, 32), seed=seed)))


def test_imagenet_refuses_the_later_release_and_damaged_tars(tmp_path, monkeypatch):
    data = config("imagenet", tmp_path, image_size=32, validation=2)
    refused(
        data, r"train_32x32.tar: not found; .*get http://www.image-net.org/small/train_32x32.tar"
    )
    (tmp_path / "val_data.npz").write_bytes(b"")
    refused(data, r"holds the later npz release, .*get http://www.image-net.org/small/train_32x32")
    imagenet_tar(tmp_path / "train_32x32.tar", [1, 2, 3])
    imagenet_tar(tmp_path / "valid_32x32.tar", [4, 5])
    monkeypatch.setattr(imagenet, "LATER_RELEASE", 2)
    refused(data, r"valid_32x32.tar: has 2 images, so it is the later release")
    imagenet_tar(tmp_path / "valid_32x32.tar", [4], size=64)
    refused(data, r"valid_32x32.tar: 'part/0000004.png': is 64x64, not 32x32")
    jpeg = io.BytesIO()
    picture((32, 32)).save(jpeg, "JPEG")
    (tmp_path / "valid_32x32.tar").write_bytes(member("a.png", jpeg.getvalue()) + bytes(1024))
    refused(data, r"valid_32x32.tar: 'a.png': is no image in PNG, or is damaged")
    (tmp_path / "valid_32x32.tar").write_bytes(b"no tar")
    refused(data, r"valid_32x32.tar: cannot be read as a tar")


def test_an_odd_image_in_a_tar_does_not_hide_those_behind_it(tmp_path):
    imagenet_tar(tmp_path / "valid_32x32.tar", [4])
    files = [png(size=(32, 32)), png(size=(32, 32))[:-40], b"text", png(size=(9, 9)), short_png(7)]
    files.append(png(size=(32, 32), seed=1))
    tar = b"".join(member(f"{number}.png", data) for number, data in enumerate(files))
    (tmp_path / "train_32x32.tar").write_bytes(tar + bytes(1024))
    source = open_source("r", config("imagenet", tmp_path, image_size=32, validation=2))
    found = list(source.load([item.at for item in source.items()], Counter()))
    assert [one.reason if isinstance(one, OddImage) else "image" for one in found] == [
        "image", "damaged", "no image, or damaged", "another size", "incomplete", "image", "image"
    ]  # fmt: skip


# What a tar may hold to do harm; each was a traceback, a hang or was taken for good.
HOSTILE = {
    "size of -512": member("b.png", size=-512),
    "size of -512 of a link": member("b.png", kind=tarfile.SYMTYPE, linkname="c", size=-512),
    "size of -1024 by an extended header": extended({"size": "-1024"}) + member("b.png", b"1"),
    "size of 2**62": member("b.png", size=2**62),
    "extended header of 2**62 bytes": extended({}, size=2**62) + member("b.png"),
    "extended header of 2**20 digits": member("x", b"1" * 2**20, b"x") + member("b.png"),
    "sparse map of no numbers": extended({"GNU.sparse.map": "abc", "GNU.sparse.size": "9"})
    + member("b.png", b"1"),
    "sparse file": extended({"GNU.sparse.map": "0,1", "GNU.sparse.size": str(2**20)})
    + member("b.png", b"1"),
    "name of 300 bytes": member("a" * 300 + ".png", b"1"),
}


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE)
def test_tars_that_are_made_to_do_harm_are_refused(tmp_path, small_cifar10, hostile):
    head = member("a.png", png(size=(32, 32)))
    imagenet_tar(tmp_path / "valid_32x32.tar", [8])
    (tmp_path / "train_32x32.tar").write_bytes(head + hostile + bytes(1024))
    data = config("imagenet", tmp_path, image_size=32, validation=1)
    refused(data, r"train_32x32.tar: cannot be read as a tar \(.+\); get it anew")
    (tmp_path / "c.tar.gz").write_bytes(gzip.compress(head + hostile + bytes(1024)))
    refused(cifar(tmp_path / "c.tar.gz"), r"c.tar.gz: (cannot be read as a gzipped|has no data_b)")


def test_links_and_devices_in_a_tar_are_left_out(tmp_path):
    imagenet_tar(tmp_path / "valid_32x32.tar", [8])
    kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)
    (tmp_path / "train_32x32.tar").write_bytes(
        b"".join(member(f"../{name}.png", png(size=(32, 32))) for name in "ab")
        + b"".join(member("c.png", kind=kind, linkname="/etc/passwd") for kind in kinds)
        + bytes(1024)
    )
    images, notes = read(config("imagenet", tmp_path, image_size=32, validation=1))
    assert len(images) == 3 and notes["skipped"] == {"link": 4}


# imagenet, the later release


def npz_of(shape: str, method: int = zipfile.ZIP_DEFLATED, inside: bytes = b"") -> bytes:
    """An archive whose header says what it likes, and with bytes put over its compressed data."""
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}}}".encode()
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        archive.writestr("data.npy", b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header)
    data = out.getvalue()
    start = 30 + len("data.npy") + 15
    return data[:start] + inside + data[start + len(inside) :] if inside else data


def test_the_later_release_has_a_name_of_its_own(tmp_path):
    random = np.random.RandomState(0)
    rows = {}
    for name in (*imagenet_npz.TRAIN_FILES, imagenet_npz.TEST_FILE):
        rows[name] = random.randint(0, 256, (3, 3 * 32 * 32)).astype(np.uint8)
        np.savez_compressed(tmp_path / name, data=rows[name], labels=np.arange(3))
    data = config("imagenet-npz", tmp_path, image_size=32, validation=4)
    images, notes = read(data)
    found = parts(images)
    assert [len(found[split]) for split in ("train", "validation", "test")] == [26, 4, 3]
    last = sorted(np.random.RandomState(0).permutation(30)[-4:])
    assert found["validation"] == [f"imagenet32npz-train-{index:07d}" for index in last]
    every = np.concatenate(list(rows.values()))
    for image, row in zip(images, every, strict=True):
        np.testing.assert_array_equal(image.image_HWC.transpose(2, 0, 1).ravel(), row)
    assert "later" in notes["release"]
    path = tmp_path / "train_data_batch_3.npz"
    whole = path.read_bytes()
    changed = bytearray(whole)
    changed[500] ^= 1
    unfit = io.BytesIO()
    np.savez(unfit, data=np.array([{}]))
    entry = whole.index(b"PK\x01\x02")
    encrypted, unknown_method = bytearray(whole), bytearray(whole)
    encrypted[entry + 8], unknown_method[entry + 10] = 1, 99
    for damaged in (
        *(whole[:-100], bytes(changed), unfit.getvalue(), b"text", encrypted, unknown_method),
        *(npz_of(shape) for shape in ("(-1, 3072)", f"({10**15}, 3072)", "((")),
        npz_of("(3, 3072)", zipfile.ZIP_LZMA, b"damaged"),
    ):
        path.write_bytes(damaged)
        refused(data, r"train_data_batch_3.npz: cannot be read as such an npz file")
    path.unlink()
    refused(data, r"train_data_batch_3.npz: not found; get Imagenet32_train")


# ffhq


@pytest.fixture
def small_ffhq(monkeypatch):
    for name, value in (("IMAGES", 20), ("TEST_256", 4), ("TEST_1024", 3)):
        monkeypatch.setattr(ffhq, name, value)


def test_ffhq_array_has_the_published_test_set(tmp_path, small_ffhq):
    array = np.random.RandomState(0).randint(0, 256, (20, 256, 256, 3)).astype(np.uint8)
    np.save(tmp_path / "ffhq.npy", array)
    data = config("ffhq", tmp_path / "ffhq.npy", image_size=256, validation=5)
    images, _ = read(data)
    assert [one.key for one in images] == [f"ffhq-{index:05d}" for index in range(20)]
    np.testing.assert_array_equal(np.stack([one.image_HWC for one in images]), array)
    found = parts(images)
    assert found["test"] == [
        f"ffhq-{n:05d}" for n in sorted(np.random.RandomState(5).permutation(20)[-4:])
    ]
    assert len(found["validation"]) == 5 and len(found["train"]) == 11
    np.save(tmp_path / "ffhq.npy", array[:10])
    refused(data, r"ffhq.npy: is uint8 \(10, 256, 256, 3\), not")
    np.save(tmp_path / "ffhq.npy", np.array([{}]), allow_pickle=True)
    refused(data, r"ffhq.npy: is object \(1,\), not")
    (tmp_path / "ffhq.npy").write_bytes(b"\x93NUMPY\1\0\2\0((")
    refused(data, r"ffhq.npy: cannot be read as .npy")
    (tmp_path / "ffhq.npy").write_bytes(b"")
    refused(data, r"ffhq.npy: cannot be read as .npy")


def test_ffhq_folder_in_both_layouts(tmp_path, small_ffhq):
    for index in range(20):
        path = tmp_path / ("00000" if index % 2 else "") / f"{index:05d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (1024, 1024), (index, 0, 0)).save(path)
    data = config("ffhq", tmp_path, image_size=1024, validation=5)
    images, _ = read(data)
    assert parts(images)["test"] == [f"ffhq-{index:05d}" for index in (17, 18, 19)]
    data = config("ffhq", tmp_path, image_size=256, validation=5)
    refused(data, r"recipes.r.data.resize: '' does not suit the source ffhq; set it to 'stretch'")
    data = config("ffhq", tmp_path, image_size=256, validation=5, resize="stretch")
    small, _ = read(data)
    assert [one.image_HWC[0, 0, 0] for one in small] == list(range(20))
    assert small[0].image_HWC.shape == (256, 256, 3)
    Image.new("RGB", (1024, 1024)).save(tmp_path / "00004.png", "JPEG")
    refused(data, r"00004.png: is no image in PNG, or is damaged")
    (tmp_path / "00004.png").unlink()
    refused(data, r"00004.png: not found; all of 00000.png to 00019.png")


# raw data of the published sets in S3


@pytest.mark.parametrize("kind", ["cifar10", "imagenet", "ffhq array", "ffhq folder"])
def test_raw_data_in_s3_give_what_the_same_files_give(
    tmp_path, s3_url, small_cifar10, small_ffhq, monkeypatch, kind
):
    monkeypatch.setattr(storage, "_RANGE_BYTES", 10_000)  # of the tars and arrays: many requests
    source, name, size = kind.split()[0], "", 32
    options = {"validation": 5}
    if kind == "cifar10":
        name = "c.tar.gz"
        archive(tmp_path / name, images=4)
    elif kind == "imagenet":
        imagenet_tar(tmp_path / "train_32x32.tar", [*range(20)])
        imagenet_tar(tmp_path / "valid_32x32.tar", [30, 31])
    elif kind == "ffhq array":
        name, size = "f.npy", 16
        array = np.random.RandomState(0).randint(0, 256, (20, 16, 16, 3)).astype(np.uint8)
        np.save(tmp_path / name, array)
    else:
        options["resize"] = "crop"
        for index in range(20):
            path = tmp_path / ("00000" if index % 2 else "") / f"{index:05d}.png"
            path.parent.mkdir(exist_ok=True)
            Image.new("RGB", (1024, 1024), (index, 0, 0)).save(path)
    upload(s3_url, tmp_path)
    found = []
    for root in (tmp_path, s3_url):
        path = f"{root}/{name}" if name else root
        found.append(read(config(source, path, image_size=size, **options)))
    (here, notes_here), (there, notes_there) = found
    assert [(one.key, one.split) for one in here] == [(one.key, one.split) for one in there]
    for one, other in zip(here, there, strict=True):
        np.testing.assert_array_equal(one.image_HWC, other.image_HWC)
    assert notes_here == notes_there
    missing = f"{s3_url}/none/{name}" if name else f"{s3_url}/none"
    words = "there is no file" if name else "not found"
    assert "vdvae fetch" in refused(config(source, missing, image_size=size, **options), words) or (
        kind == "ffhq folder"
    )


# 200 fuzzed files


def fuzzed(data: bytes, random: np.random.RandomState) -> bytes:
    """One of what happens to files: bits flip, a part is lost, doubled or overwritten."""
    changed = bytearray(data)
    for _ in range(random.randint(1, 4)):
        at, length = random.randint(len(changed)), random.randint(1, 40)
        kind = random.randint(5)
        if kind == 0:
            changed[at] ^= 1 << random.randint(8)
        elif kind == 1:
            del changed[at : at + length]
        elif kind == 2:
            changed[at:at] = changed[at : at + length]
        elif kind == 3:
            changed[at : at + length] = random.bytes(min(length, len(changed) - at))
        else:
            del changed[max(at, 1) :]
    return bytes(changed)


@pytest.mark.parametrize("kind", FORMATS)
def test_fuzzed_images_are_read_right_or_refused(kind):
    random = np.random.RandomState(0)
    out = io.BytesIO()
    original = picture(size=(24, 16))
    original.save(out, kind)
    refusals = 0
    for _ in range(20):
        try:
            found = decode(fuzzed(out.getvalue(), random), "f", 3)
        except UserError as error:
            assert "\n" not in str(error)
            refusals += 1
            continue
        assert found.mode == "RGB"
        if kind == "PNG":  # which alone has checksums: what is accepted is what was written
            assert found.tobytes() == original.tobytes()
    assert refusals >= (19 if kind == "PNG" else 4)


def test_fuzzed_tars_give_their_images_or_are_refused(tmp_path):
    random = np.random.RandomState(1)
    seeds = [*range(8)]
    imagenet_tar(tmp_path / "valid_32x32.tar", [8])
    imagenet_tar(tmp_path / "train_32x32.tar", seeds)
    path = tmp_path / "train_32x32.tar"
    whole = path.read_bytes()
    originals = {np.asarray(picture((32, 32), seed=seed)).tobytes() for seed in seeds}
    data = config("imagenet", tmp_path, image_size=32, validation=2)
    accepted = 0
    for number in range(40):
        # Every other one is cut between two files, where tarfile sees nothing.
        cut = whole[: 512 * random.randint(1, len(whole) // 512)]
        path.write_bytes(cut if number % 2 else fuzzed(whole, random))
        try:
            images, _ = read(data)
        except UserError:
            continue
        accepted += 1
        assert {one.image_HWC.tobytes() for one in images[:-1]} == originals
    assert accepted < 30
