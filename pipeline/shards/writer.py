"""Writes shards: tars of PNG files that any WebDataset reader understands.

A job makes a shard, or where the pixels decide of the split one of each split, wherever there is a
processor; this process lists the images, hands out the jobs in order and sums up what they found.
The result does not depend on who made which shard.

Shapes: H W pixels, C channels.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import hashlib
import io
import itertools
import json
import math
import re
import shutil
import struct
import tempfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.params import DataConfig, check_name
from pipeline.shards.duplicates import HASH_BYTES, find_duplicates
from pipeline.shards.jobs import Workers, read_record
from pipeline.shards.manifest import (
    KEY,
    LEFT_OUT,
    SHARD_BYTES,
    SPLITS,
    Manifest,
    Shard,
    SourceFacts,
    Split,
    shard_key,
    shard_name,
)
from pipeline.sources.decode import PNG_END, OddImage, OddImages, png_head
from pipeline.sources.source import Item, Loaded, Source, on_levels
from pipeline.storage import Store
from pipeline.system.process import exclusive_lock
from vdvae.config import UserError
from vdvae.files import atomic_write, atomic_write_json, sha256_of

STATES = "shards"  # in VDVAE_RUNS: what sharding that was interrupted goes on from
_LARGER = 1.06  # an image may be where it is then encoded much faster
_TRIED_BYTES = 48 * 2**10  # of an image, by which its encoder is chosen
_HERE = Path(__file__).parent


def write_shards(
    recipe: str,
    data: DataConfig,
    source: Source,
    store: Store,
    manifest_path: Path,
    on_progress: Callable[[int], None] = lambda images: None,
    *,
    workers: Workers | None = None,
    runs: Path | None = None,
    before_manifest: Callable[[Manifest], None] = lambda manifest: None,
) -> Manifest:
    """Puts every image of a source into the store and writes the manifest, last and atomically.

    The same files give the same bytes and the same manifest, however many workers there are. A run
    that was stopped leaves whole shards and a record of each job in `runs`; the next one goes on
    after them.

    Files that are no images to learn from are looked for to the end. They are named in
    `runs`/shards/<recipe>-unreadable.txt, and then either refused all together or left out and
    counted by reason, as `data.unreadable` says; who makes the shards does not know of that.

    Args:
        on_progress: called with the number of images so far, after each job.
        workers: where the shards are made; by default in this process.
        runs: VDVAE_RUNS; where it is not given, a run begins from nothing.
        before_manifest: called when all shards are in the store.

    Raises:
        OddImages: for files that are no images to learn from.
        UserError: for other bad raw data, a split without images, or a store that cannot be
            written.
    """
    check_name(recipe)
    with _state(recipe, data, store, runs) as state:
        odd_list = runs and odd_list_of(runs, recipe)
        manifest = _write(
            recipe, data, source, store, workers or Workers(), state, odd_list, on_progress
        )
        try:
            before_manifest(manifest)
        except UserError:
            # It refuses a shard, perhaps, which the next run would else take for good again.
            shutil.rmtree(state)
            raise
        atomic_write_json(manifest_path, manifest.to_dict())
        # Whoever runs it again from here on wants it done again.
        shutil.rmtree(state)
    return manifest


@contextlib.contextmanager
def _state(recipe: str, data: DataConfig, store: Store, runs: Path | None) -> Iterator[Path]:
    """A folder for records, found again by whatever determines the shards but the raw data."""
    if runs is None:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            yield Path(folder)
        return
    facts = {
        "recipe": recipe,
        # What to do about files that are no images is decided when all is known.
        "data": {key: value for key, value in data.to_dict().items() if key != "unreadable"},
        "store": store.root,
        "encoder": encoder(),
        "code": [sha256_of(_HERE / "writer.py")]
        + [sha256_of(path) for path in sorted((_HERE.parent / "sources").glob("*.py"))],
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    state = runs / STATES / f"{recipe}-{digest}"
    with exclusive_lock(state.with_suffix(".lock"), math.inf, doing=f"sharding {recipe}"):
        state.mkdir(exist_ok=True)
        yield state


def odd_list_of(runs: Path, recipe: str) -> Path:
    """Where the files of a recipe's data that are no images are named, a line each."""
    return runs / STATES / f"{recipe}-unreadable.txt"


def refuse_or_skip(
    recipe: str, policy: str, odd: Sequence[OddImage], odd_list: Path | None, skip: str = ""
) -> dict[str, int]:
    """Writes down files that are no images, if any; how many are left out for which reason.

    Args:
        recipe: whose data they are among.
        policy: `refuse` or `skip`.
        odd: all of them.
        odd_list: gets a line for each.
        skip: how a person asks for that policy, where the recipe does not stand in params.yaml.

    Raises:
        OddImages: for the policy `refuse`.
    """
    if not odd:
        if odd_list:
            odd_list.unlink(missing_ok=True)  # what another run found
        return {}
    sentences = sorted(map(str, odd))
    where = ""
    if odd_list:
        atomic_write(odd_list, "".join(f"{sentence}\n" for sentence in sentences))
        where = f"all {len(odd)} are in {odd_list}; "
    if policy == "refuse":
        raise OddImages(
            sentences,
            f"{where}mend them or take them out, or leave them out by "
            + (skip or f"params.yaml: recipes.{recipe}.data.unreadable: skip"),
        )
    return dict(sorted(Counter(one.reason for one in odd).items()))


def encoder() -> list[str]:
    """The versions of what makes the bytes: another one may make others of the same images."""
    import PIL
    import webdataset
    from imagecodecs import png_version
    from PIL import features

    return [
        f"Pillow {PIL.__version__}",
        *(f"{name} {features.version(name)}" for name in ("zlib", "zlib_ng", "jpg", "webp")),
        f"Python's zlib {zlib.ZLIB_RUNTIME_VERSION}",
        png_version(),  # decides whether a PNG can be handed through
        f"NumPy {np.__version__}",
        f"webdataset {webdataset.__version__}",
    ]


def _write(
    recipe: str,
    data: DataConfig,
    source: Source,
    store: Store,
    workers: Workers,
    state: Path,
    odd_list: Path | None,
    on_progress: Callable[[int], None],
) -> Manifest:
    shape = (data.image_size, data.image_size, data.channels)
    most = min(data.shard_images, max(1, SHARD_BYTES // math.prod(shape)))

    odd: list[OddImage] = []

    def images() -> Iterator[Item]:
        for item in source.items():
            if isinstance(item, OddImage):
                odd.append(item)
            else:
                yield item

    # Once it is known that all will be refused, the rest is looked at and no longer stored.
    jobs = (
        (items, data.unreadable == "refuse" and bool(odd))
        for items in _jobs(recipe, images(), most)
    )
    make = functools.partial(_make_shards, recipe, data, source, store, encoder())
    shards: dict[str, list[Shard]] = {split: [] for split in SPLITS}
    records: dict[str, list[tuple[Path, int]]] = {split: [] for split in SPLITS}
    hashes = {split: bytearray() for split in SPLITS}
    raw = {split: hashlib.sha256() for split in SPLITS}
    histogram = np.zeros(256, np.int64)  # of train: sums of whole numbers have no order
    converted: Counter[str] = Counter()
    done = 0

    def lost(made: dict[str, Any]) -> list[str]:
        return [one["key"] for one in made["shards"] if store.size(one["key"]) != one["bytes"]]

    for made, record in workers.run(make, jobs, state, lambda made: not lost(made)):
        if workers.elsewhere and (keys := lost(made)):
            raise UserError(
                f"store {store.root}: has no {keys[0]}, which a worker has just stored: its "
                f"store is another one; set VDVAE_STORE to a folder that all machines share, or to "
                f"s3://bucket/prefix"
            )
        odd += (OddImage(*one) for one in made["odd"])
        converted += Counter(made["converted"])
        for place, one in enumerate(made["shards"]):
            split = one["split"]
            shard = Shard(
                name=shard_name(recipe, split, len(shards[split])),
                **{field: one[field] for field in ("key", "bytes", "sha256", "images")},
            )
            shards[split].append(shard)
            records[split].append((record, place))
            hashes[split] += bytes.fromhex(one["hashes"])
            raw[split].update(
                "\0".join([*one["keys"], ""]).encode() + bytes.fromhex(one["raw_hashes"])
            )
            if split == "train":
                histogram += one["histogram"]
            done += shard.images
        on_progress(done)
    left_out = refuse_or_skip(recipe, data.unreadable, odd, odd_list)
    images_of = {split: sum(shard.images for shard in found) for split, found in shards.items()}
    _check_splits(recipe, images_of)
    mean, std = mean_std(histogram)
    notes = {
        **source.notes,
        **({LEFT_OUT: left_out} if left_out else {}),
        **({"converted": dict(sorted(converted.items()))} if converted else {}),
    }
    splits = {
        split: Split(images=images_of[split], shards=tuple(found))
        for split, found in shards.items()
    }

    ends = {
        split: [*itertools.accumulate(shard.images for shard in found)]
        for split, found in shards.items()
    }

    def key(split: str, row: int) -> str:
        number = bisect.bisect_right(ends[split], row)
        row -= ends[split][number] - shards[split][number].images
        record, place = records[split][number]
        return read_record(record)["shards"][place]["keys"][row]

    return Manifest(
        recipe=recipe,
        shape=shape,
        num_levels=data.num_levels,
        mean=mean,
        std=std,
        source=SourceFacts(
            name=source.name,
            terms=source.terms,
            fingerprint=hashlib.sha256(b"".join(one.digest() for one in raw.values())).hexdigest(),
            notes=notes,
        ),
        splits=splits,
        duplicates=find_duplicates(hashes, key),
    )


def _jobs(recipe: str, items: Iterable[Item], most: int) -> Iterator[tuple[Item, ...]]:
    """Images of one split, `most` at once, in the order in which they are full; then the rests.

    Those whose pixels decide of the split are together until then.

    Raises:
        UserError: a split has no images, where that is known.
    """
    waiting: dict[str, list[Item]] = {split: [] for split in ("", *SPLITS)}
    counts: Counter[str] = Counter()
    for item in items:
        assert re.fullmatch(KEY, item.key), item.key
        waiting[item.split].append(item)
        if len(waiting[item.split]) == most:
            yield tuple(waiting[item.split])
            waiting[item.split] = []
        counts[item.split] += 1
    if counts and not counts[""]:
        _check_splits(recipe, counts)
    yield from (tuple(rest) for rest in waiting.values() if rest)


def _check_splits(recipe: str, images: Mapping[str, int]) -> None:
    if not all(images.get(split) for split in SPLITS):
        found = ", ".join(f"{split} {images.get(split, 0)}" for split in SPLITS)
        raise UserError(
            f"params.yaml: recipes.{recipe}.data: too few images for three splits ({found}); add "
            f"images, or change validation, test or split_seed"
        )


class _ShardWriter:
    """A shard that is being made."""

    def __init__(self) -> None:
        import webdataset

        self._file = io.BytesIO()
        self._tar = webdataset.TarWriter(
            self._file, encoder=False, mtime=0, user="vdvae", group="vdvae"
        )
        self._encode: dict[int, Callable[[NDArray[np.uint8]], bytes]] = {}
        self._histogram = np.zeros(256, np.int64)
        self._raw_hashes, self._hashes = bytearray(), bytearray()
        self._keys: list[str] = []

    def add(self, key: str, found: Loaded, num_levels: int) -> None:
        raw_HWC = found.image_HWC
        image_HWC = on_levels(raw_HWC, num_levels)
        self._keys.append(key)
        self._raw_hashes += _hash(raw_HWC)
        self._hashes += self._raw_hashes[-HASH_BYTES:] if image_HWC is raw_HWC else _hash(image_HWC)
        self._histogram += np.bincount(image_HWC.ravel(), minlength=256)
        png = found.png if found.png and image_HWC is raw_HWC else self._encoded(image_HWC)
        self._tar.write({"__key__": key, "png": png})

    def _encoded(self, image_HWC: NDArray[np.uint8]) -> bytes:
        """A PNG by the fastest way that makes it not much larger than the smallest.

        Chosen by a part of the first of the shard's images in its class: of those that the fastest
        way compresses about equally well, in steps of 20%.
        """
        png = _ENCODERS[0](image_HWC)
        kind = round(math.log(image_HWC.size / len(png), 1.2))
        encode = self._encode.get(kind)
        if encode is None:
            encode = self._encode[kind] = _encoder_for(image_HWC)
        return png if encode is _ENCODERS[0] else encode(image_HWC)

    def store(self, recipe: str, split: str, store: Store) -> dict[str, Any]:
        """Closes and stores it; what the manifest needs to know of it."""
        self._tar.close()
        content = self._file.getvalue()
        sha256 = hashlib.sha256(content).hexdigest()
        key = shard_key(recipe, sha256)
        store.put(key, content)
        return {
            "split": split,
            "key": key,
            "bytes": len(content),
            "sha256": sha256,
            "images": len(self._keys),
            "keys": self._keys,
            "raw_hashes": self._raw_hashes.hex(),
            "hashes": self._hashes.hex(),
            "histogram": self._histogram.tolist(),
        }


def _make_shards(
    recipe: str,
    data: DataConfig,
    source: Source,
    store: Store,
    encoder_there: list[str],
    job: tuple[Sequence[Item], bool],
) -> dict[str, Any]:
    """Loads images, stores a shard for each split that they are of; what is to be known of them.

    Args:
        job: the images, and whether they are only looked at.
    """
    items, only_look = job
    if encoder() != encoder_there:
        raise UserError(
            f"a worker has {', '.join(encoder())} where the stage has {', '.join(encoder_there)}: "
            f"its bytes may be others; install the same versions on both"
        )
    shape = (data.image_size, data.image_size, data.channels)
    converted: Counter[str] = Counter()
    odd: list[tuple[str, str]] = []
    shards: defaultdict[str, _ShardWriter] = defaultdict(_ShardWriter)
    for item, found in zip(items, source.load((item.at for item in items), converted), strict=True):
        if isinstance(found, OddImage):
            odd.append((str(found), found.reason))
            continue
        image_HWC = found.image_HWC
        assert image_HWC.shape == shape and image_HWC.dtype == np.uint8, (item.key, image_HWC.shape)
        if not only_look:
            shards[item.split or found.split].add(item.key, found, data.num_levels)
    splits = sorted(shards, key=SPLITS.index)
    return {
        "shards": [shards[split].store(recipe, split, store) for split in splits],
        "odd": odd,
        "converted": dict(converted),
    }


def _hash(image_HWC: NDArray[np.uint8]) -> bytes:
    return hashlib.sha256(image_HWC.tobytes()).digest()[:HASH_BYTES]


def _averaged(image_HWC: NDArray[np.uint8]) -> bytes:
    """A PNG whose pixels are stored as differences from the average of those to the left and above.

    That suits a photograph almost as well as a choice among all filters for each row, which takes
    Pillow twice the time, and whose most frequent one takes readers half as long again to undo.
    """
    height, width, channels = image_HWC.shape
    padded = np.zeros((height + 1, width + 1, channels), np.int16)
    padded[1:, 1:] = image_HWC
    differences = padded[1:, 1:] - ((padded[1:, :-1] + padded[:-1, 1:]) >> 1)
    rows = np.full((height, 1 + width * channels), _AVERAGE, np.uint8)
    rows[:, 1:] = differences.astype(np.uint8).reshape(height, -1)
    compressor = zlib.compressobj(strategy=zlib.Z_RLE)
    head = png_head(height, width, channels)
    pixels = b"IDAT" + compressor.compress(rows.data) + compressor.flush()
    start = head + _crc(head[12:]) + struct.pack(">I", len(pixels) - 4)
    return start + pixels + _crc(pixels) + PNG_END


def _crc(chunk: bytes) -> bytes:
    return struct.pack(">I", zlib.crc32(chunk))


def _by_pillow(image_HWC: NDArray[np.uint8], strategy: int = -1) -> bytes:
    picture = Image.fromarray(image_HWC[:, :, 0] if image_HWC.shape[2] == 1 else image_HWC)
    file = io.BytesIO()
    picture.save(file, "PNG", compress_type=strategy)
    return file.getvalue()


_AVERAGE = 3  # the filter's number in PNG's specification
# From the fastest to the smallest. Of a filtered photograph zlib saves nearly nothing by looking
# for matches other than runs, which takes most of its time; of a drawing it saves most. Without it
# the bytes also do not depend on the processor's instructions (zlib-ng).
_ENCODERS: tuple[Callable[[NDArray[np.uint8]], bytes], ...] = (
    _averaged,
    functools.partial(_by_pillow, strategy=zlib.Z_RLE),
    _by_pillow,
)


def _encoder_for(image_HWC: NDArray[np.uint8]) -> Callable[[NDArray[np.uint8]], bytes]:
    height, width, channels = image_HWC.shape
    rows = max(1, _TRIED_BYTES // (width * channels))
    top = max(0, height - rows) // 2
    part_HWC = image_HWC[top : top + rows]
    *fast, thorough = _ENCODERS
    most = _LARGER * len(thorough(part_HWC))
    return next((encode for encode in fast if len(encode(part_HWC)) <= most), thorough)


def mean_std(histogram: NDArray[np.int64]) -> tuple[float, float]:
    """Of the values 0..255 by how often each came; exact until the last division."""
    counts = [int(count) for count in histogram]
    n = sum(counts)
    total = sum(value * count for value, count in enumerate(counts))
    squares = sum(value**2 * count for value, count in enumerate(counts))
    return total / n, math.sqrt(n * squares - total**2) / n
