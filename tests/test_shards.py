"""Shards: what goes in comes out, once an epoch, in an order that can be entered anywhere."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import signal
import tarfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from s3_server import s3_server
from sklearn.datasets import load_sample_image
from tar_members import extended, member

from pipeline import storage
from pipeline.commands.space import Needs, add_unfinished
from pipeline.params import DataConfig, Places
from pipeline.shards import BlockCache, Manifest, Shard, ShardReader, Split, write_shards, writer
from pipeline.shards.duplicates import find_duplicates
from pipeline.shards.jobs import Workers, open_workers
from pipeline.sources import open_source
from pipeline.sources.decode import OddImage
from pipeline.sources.source import Item, Loaded, on_levels
from pipeline.stages import main
from pipeline.stages.shard import shard
from pipeline.storage import FileStore, S3Store, Store
from vdvae.config import UserError

CUTS = {"train": 23, "validation": 5, "test": 4}


class Made:
    """Random images: every split's first image comes first, then the second, and so on."""

    name, terms = "made", "none"

    def __init__(self, data: DataConfig, cuts: dict[str, int] = CUTS) -> None:
        self.data, self.cuts, self.notes = data, cuts, {"made": sum(cuts.values())}

    def items(self):
        counts = itertools.count()
        for number, split in itertools.product(range(max(self.cuts.values())), self.cuts):
            if number < self.cuts[split]:
                yield Item(f"made-{split}-{number}", split, next(counts))

    def load(self, places, converted):
        shape = (self.data.image_size, self.data.image_size, self.data.channels)
        for place in places:
            converted["made"] += 1
            yield Loaded(np.random.RandomState(place).randint(0, 256, shape).astype(np.uint8))


class ByPixels(Made):
    """The same images, whose splits are known only where they are loaded."""

    def items(self):
        self.splits = {item.at: item.split for item in super().items()}
        return (item._replace(split="") for item in super().items())

    def load(self, places, converted):
        places = list(places)
        for place, image in zip(places, super().load(places, converted), strict=True):
            yield image._replace(split=self.splits[place])


class Counting(FileStore):
    """A folder that remembers what was read."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.reads: list[str] = []

    def get(self, key, limit=None):
        self.reads.append(key)
        return super().get(key, limit)


def config(**changes) -> DataConfig:
    values = {"source": "digits", "image_size": 6, "channels": 3, "shard_images": 4}
    return DataConfig(**{**values, **changes})


def write(folder: Path, data: DataConfig, cuts=CUTS) -> tuple[Manifest, Counting]:
    store = Counting(folder / "store")
    return write_shards("r", data, Made(data, cuts), store, folder / "m" / "r.json"), store


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("VDVAE_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def made(tmp_path) -> tuple[Manifest, Counting]:
    return write(tmp_path, config())


def keys_in_order(reader: ShardReader, batch_size: int, seed: int, start: int, images: int):
    """Image keys of the first `images` of `batches`, found by the images' content."""
    names = {x.numpy().tobytes(): key for keys, x_BCHW in reader.scan(8) for key, x in
             zip(keys, x_BCHW, strict=True)}  # fmt: skip
    found: list[str] = []
    for x_BCHW in reader.batches(batch_size, seed, start):
        assert x_BCHW.shape[0] == batch_size
        found += [names[x.numpy().tobytes()] for x in x_BCHW]
        if len(found) >= images:
            return found[:images]


@pytest.mark.parametrize(("channels", "levels"), [(3, 256), (1, 17), (3, 32), (1, 2)])
def test_every_image_comes_back_under_its_key(tmp_path, channels, levels):
    data = config(channels=channels, num_levels=levels)
    manifest, store = write(tmp_path, data)
    assert Manifest.load(tmp_path / "m" / "r.json") == manifest
    train = []
    for split, count in CUTS.items():
        source = Made(data)
        wanted = [item for item in source.items() if item.split == split]
        images = source.load([item.at for item in wanted], Counter())
        found = [
            (key, x)
            for keys, x_BCHW in ShardReader(manifest, store, split).scan(3)
            for key, x in zip(keys, x_BCHW.numpy(), strict=True)
        ]
        assert len(found) == manifest.splits[split].images == count
        for (key, x_CHW), item, image in zip(found, wanted, images, strict=True):
            assert key == item.key
            stored_HWC = on_levels(image.image_HWC, levels)
            np.testing.assert_array_equal(x_CHW, stored_HWC.transpose(2, 0, 1))
            assert len(np.unique(x_CHW)) <= levels
        if split == "train":
            train = [x for _, x in found]
    assert manifest.mean == pytest.approx(np.mean(train), rel=1e-12)
    assert manifest.std == pytest.approx(np.std(train), rel=1e-12)


def test_the_same_images_give_the_same_bytes(tmp_path):
    def files(folder: Path) -> dict[str, bytes]:
        paths = (path for path in folder.rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): path.read_bytes() for path in paths}

    first, _ = write(tmp_path / "1", config())
    second, _ = write(tmp_path / "2", config())
    assert files(tmp_path / "1") == files(tmp_path / "2")
    assert first.digest == second.digest
    other, _ = write(tmp_path / "3", config(num_levels=32))
    assert other.digest != first.digest
    assert other.source.fingerprint == first.source.fingerprint  # the same raw images


def test_any_webdataset_reader_reads_the_shards(made):
    import webdataset

    manifest, store = made
    paths = [str(store.folder / shard.key) for shard in manifest.splits["train"].shards]
    samples = list(webdataset.WebDataset(paths, shardshuffle=False).decode("rgb8"))
    assert [one["__key__"] for one in samples] == [f"made-train-{n}" for n in range(23)]
    assert samples[0]["png"].shape == (6, 6, 3)


# The manifest's images take 236 bytes each: windows of 1 shard, of 2, of all 6.
@pytest.mark.parametrize("window_bytes", [1, 2000, 10**6])
@pytest.mark.parametrize("batch_size", [1, 4, 7, 50])
def test_every_image_once_an_epoch_from_any_start(made, window_bytes, batch_size):
    manifest, store = made
    reader = ShardReader(manifest, store, "train", window_bytes)
    n = CUTS["train"]
    order = keys_in_order(reader, batch_size, seed=5, start=0, images=3 * n)
    epochs = [order[:n], order[n : 2 * n], order[2 * n :]]
    for epoch in epochs:
        assert sorted(epoch) == sorted(f"made-train-{i}" for i in range(n))
    assert epochs[0] != epochs[1] != epochs[2]
    for start in (1, 4, n - 1, n, n + 3, 2 * n + 9):
        fresh = ShardReader(manifest, store, "train", window_bytes)
        assert keys_in_order(fresh, batch_size, 5, start, 3 * n - start) == order[start:]
    assert keys_in_order(reader, batch_size, 6, 0, n) != epochs[0]


@pytest.mark.parametrize("window_bytes", [1, 2000, 10**6])
def test_ranks_share_the_batches_of_one(made, window_bytes):
    """Stopped and gone on with on other numbers of ranks, a run sees what one rank would see."""
    manifest, store = made
    batch_size, batches = 12, 10
    alone = ShardReader(manifest, store, "train", window_bytes).batches(batch_size, seed=5)
    expected = list(itertools.islice(alone, batches))
    found: list[torch.Tensor] = []
    for ranks, most in ((2, 3), (1, 1), (3, 2), (12, 1), (4, 3)):
        parts = [
            ShardReader(manifest, store, "train", window_bytes).batches(
                batch_size, 5, start=batch_size * len(found), rank=rank, ranks=ranks
            )
            for rank in range(ranks)
        ]
        rows = itertools.islice(zip(*parts, strict=True), most)
        found += [torch.cat(row) for row in rows]
    assert len(found) == batches
    assert all(one.equal(other) for one, other in zip(found, expected, strict=True))
    with pytest.raises(UserError, match=r"train.batch_size: 12 cannot be shared equally by 5"):
        next(ShardReader(manifest, store, "train").batches(12, seed=5, ranks=5))


def test_the_order_is_the_documented_one(made):
    manifest, store = made
    random = np.random.RandomState([3, 1])
    expected = []
    shard_order = random.permutation(6)
    for pair in np.split(shard_order, 3):  # windows of two shards
        keys = [f"made-train-{n}" for shard in sorted(pair) for n in range(23) if n // 4 == shard]
        expected += [keys[row] for row in random.permutation(len(keys))]
    reader = ShardReader(manifest, store, "train", window_bytes=2000)
    assert keys_in_order(reader, 5, seed=3, start=23, images=23) == expected


def test_each_shard_is_read_once_and_with_no_room_once_a_window(made, tmp_path):
    manifest, store = made
    for _ in range(2):
        reader = ShardReader(manifest, store, "train")
        for _ in itertools.islice(reader.batches(3, seed=0), 40):
            pass
        list(reader.scan(3))
    assert len(store.reads) == 6
    store.reads.clear()
    none = BlockCache(folder=tmp_path / "none", limit_bytes=0)
    list(ShardReader(manifest, store, "train", window_bytes=2000, cache=none).scan(3))
    assert len(store.reads) == 6 and not list(none.folder.glob("*-*"))


def damage_flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_flip, "sha256 mismatch"),
        (lambda path: path.write_bytes(path.read_bytes()[:-512]), "bytes instead of 10240"),
        (lambda path: path.write_bytes(path.read_bytes()[:2048]), "2048 bytes instead of 10240"),
        (lambda path: path.write_bytes(path.read_bytes() + bytes(512)), "more bytes instead of"),
        (lambda path: path.unlink(), "not found at file:///.*or set VDVAE_STORE"),
    ],
)
def test_a_changed_shard_is_refused_and_the_remedy_mends_it(tmp_path, damage, words):
    manifest, store = write(tmp_path, config())
    shard = manifest.splits["train"].shards[2]
    damage(store.folder / shard.key)
    sentence = rf"^data/manifests/r.json: shard r-train-000002.tar: .*{words}"
    for read in ("scan", "batches"):
        reader = ShardReader(manifest, store, "train", window_bytes=1)
        stream = reader.scan(4) if read == "scan" else reader.batches(4, seed=0)
        with pytest.raises(UserError, match=sentence) as caught:
            list(itertools.islice(stream, 6))
        assert "run 'dvc repro -f -s shard@r'" in str(caught.value)
    assert write(tmp_path, config())[0] == manifest  # what the stage does
    assert sum(len(keys) for keys, _ in ShardReader(manifest, store, "train").scan(4)) == 23


def tar_of(*files: tuple[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


def png(mode: str = "RGB", size: int = 6, value: int = 0, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.new(mode, (size, size), value).save(out, kind)
    return out.getvalue()


TWO, END = member("a.png", png()) + member("b.png", png()), bytes(1024)
HOSTILE = {
    "gzip": gzip.compress(TWO + END),
    "xz": lzma.compress(TWO + END),
    "link": TWO + member("c.png", kind=tarfile.SYMTYPE, linkname="/etc/passwd") + END,
    "hard link": TWO + member("c.png", kind=tarfile.LNKTYPE, linkname="a.png") + END,
    "device": TWO + member("c.png", kind=tarfile.CHRTYPE) + END,
    "folder": member("c", kind=tarfile.DIRTYPE) + TWO + END,
    "name that leads up": member("a.png", png()) + member("../x.png", png()) + END,
    "name with a folder": member("a.png", png()) + member("x/b.png", png()) + END,
    "sparse": member("a.png", png())
    + extended({"GNU.sparse.map": "0,9"})
    + member("b.png", png())
    + END,
    "extended header": member("a.png", png())
    + extended({"comment": "123456"})
    + member("b.png", png())
    + END,
    "size of -512": member("a.png", png()) + member("b.png", size=-512) + TWO + END,
    "size beyond the end": member("a.png", png()) + member("b.png", size=2**40) + END,
    "no end": TWO,
}


def forged(manifest: Manifest, store: Store, data: bytes) -> Manifest:
    """The manifest with a test split of one shard of two images, which holds these bytes."""
    sha256 = hashlib.sha256(data).hexdigest()
    key = f"shards/r/{sha256}.tar"
    store.put(key, data)
    shard = Shard(name="r-test-000000.tar", key=key, bytes=len(data), sha256=sha256, images=2)
    splits = {**manifest.splits, "test": Split(images=2, shards=(shard,))}
    return manifest.model_copy(update={"splits": splits})


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_a_shard_holds_images_and_nothing_else(made, data):
    manifest, store = made
    assert len(next(ShardReader(forged(manifest, store, TWO + END), store, "test").scan(4))[0]) == 2
    with pytest.raises(
        UserError, match=r"r-test-000000.tar: cannot be read \(.+\); run 'dvc repro"
    ):
        list(ShardReader(forged(manifest, store, data), store, "test").scan(4))


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([("a.png", png())], "1 images instead of 2"),
        ([("a.png", png()), ("a.png", png())], "cannot be read"),
        ([("a.png", png()), ("b.jpg", png())], "cannot be read"),
        ([("a.png", png()), ("b.png", png(size=7))], "an image is RGB 7x7"),
        ([("a.png", png()), ("b.png", png(mode="L"))], "an image is L 6x6"),
        ([("a.png", png()), ("b.png", png(kind="BMP"))], "cannot be read"),
        ([("a.png", png()), ("b.png", png(value=100))], "not on 2 levels"),
        ([("a.png", png()), ("b.png", png()[:45])], "cannot be read"),
    ],
)
def test_a_shard_whose_hash_is_right_and_whose_content_is_not(tmp_path, files, words):
    """A manifest can be made to fit anything; what is in the shard is checked all the same."""
    manifest, store = write(tmp_path, config(num_levels=2))
    with pytest.raises(UserError, match=rf"shard r-test-000000.tar: .*{words}"):
        list(ShardReader(forged(manifest, store, tar_of(*files)), store, "test").scan(4))


def change(path: str, value):
    def apply(document):
        *outer, last = path.split("/")
        place = document
        for part in outer:
            place = place[int(part) if part.isdigit() else part]
        if value is None:
            del place[last]
        else:
            place[last] = value

    return apply


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("recipe", "../r"),
        ("recipe", "other"),
        ("shape", [6, 6]),
        ("shape", [6, 6, 0]),
        ("shape", [6, 10**9, 3]),
        ("num_levels", 257),
        ("num_levels", True),
        ("mean", "1"),
        ("std", 1e400),
        ("source", None),
        ("source/fingerprint", "x"),
        ("extra", 1),
        ("splits/test", None),
        ("splits/train/images", 22),
        ("splits/train/shards/1/images", 3),
        ("splits/train/shards/1/images", 10**12),
        ("shape", [4096, 4096, 3]),  # with as many images a shard as before
        ("splits/train/shards/1/bytes", -1),
        ("splits/train/shards/1/bytes", 0),
        ("splits/train/shards/1/bytes", 10**9),
        ("splits/train/shards/1/name", "r-train-000000.tar"),
        ("splits/train/shards/1/key", "../../etc/passwd"),
        ("splits/train/shards/1/sha256", "0" * 63),
        ("splits/train/shards/1/sha256", "0" * 64),
    ],
)
def test_a_changed_manifest_is_refused(tmp_path, path, value):
    write(tmp_path, config())
    file = tmp_path / "m" / "r.json"
    document = json.loads(file.read_text())
    change(path, value)(document)
    file.write_text(json.dumps(document))
    with pytest.raises(UserError, match=r"r.json: is damaged \(.*; run 'dvc repro -f -s shard@r'"):
        Manifest.load(file)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, "\udcff", '{"a": NaN}'])
def test_a_manifest_that_is_none(tmp_path, text):
    file = tmp_path / "r.json"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=r"r.json: is damaged"):
        Manifest.load(file)
    file.unlink()
    with pytest.raises(UserError, match=r"r.json: not found; run 'dvc repro -f -s shard@r'"):
        Manifest.load(file)


def test_an_empty_split_is_refused_and_writes_nothing(tmp_path):
    cuts = {"train": 3, "validation": 1, "test": 0}
    with pytest.raises(UserError, match=r"too few images .*train 3, validation 1, test 0"):
        write(tmp_path, config(), cuts)
    assert not list(tmp_path.rglob("*"))


def test_a_recipe_name_that_cannot_be_a_file_name(tmp_path):
    data = config()
    store: Store = FileStore(tmp_path / "store")
    with pytest.raises(UserError, match=r"recipes: the name '../r' is not made of letters"):
        write_shards("../r", data, Made(data), store, tmp_path / "r.json")


def test_shards_hold_bounded_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "SHARD_BYTES", 2 * 6 * 6 * 3)
    manifest, _ = write(tmp_path, config(shard_images=1000))
    assert {shard.images for shard in manifest.splits["train"].shards} == {2, 1}


def test_the_stage_says_what_it_did_and_what_it_could_not_do(tmp_path, monkeypatch, capsys):
    params = Path(__file__).parents[1] / "params.yaml"
    (tmp_path / "params.yaml").write_bytes(params.read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VDVAE_STORE", f"file://{tmp_path}/store")
    shard("digits")
    assert "train 1257  validation 180  test 360  shards 4" in capsys.readouterr().out
    assert Manifest.load(Path("data/manifests/digits.json")).splits["test"].images == 360
    monkeypatch.setenv("VDVAE_STORE", f"file://{tmp_path}/params.yaml")
    monkeypatch.setattr("sys.argv", ["shard", "digits"])
    with pytest.raises(SystemExit) as exit:
        main(shard)
    assert exit.value.code == 2
    sentence = capsys.readouterr().err
    assert sentence.startswith("error: store file://") and sentence.count("\n") == 1


class Deadly(Made):
    """Kills whoever loads its thirtieth image."""

    def load(self, places, converted):
        places = list(places)
        if 30 in places:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().load(places, converted)


class Same(Made):
    """Every seventh image is of one grey, all of them dark."""

    def load(self, places, converted):
        places = list(places)
        for place, image in zip(places, super().load(places, converted), strict=True):
            yield image if place % 7 else Loaded(np.full_like(image.image_HWC, place // 7))


# many workers, stopped and gone on with


class Puts(FileStore):
    """A folder that writes down every put, in whatever process; slow, so that kills can hit it."""

    def put(self, key, data):
        time.sleep(0.02)
        super().put(key, data)
        with (self.folder.parent / "puts").open("a") as file:
            file.write(f"{key}\n")

    def puts(self) -> list[str]:
        path = self.folder.parent / "puts"
        return path.read_text().split() if path.exists() else []


LONG = {"train": 41, "validation": 9, "test": 10}
SOURCES = {Made: 17, ByPixels: 30}  # shards of so many images, four at once


def write_with(
    folder: Path, count: str, monkeypatch, data=None, source=Made, **options
) -> Manifest:
    """What the stage does, with so many workers."""
    data = data or config()
    monkeypatch.setenv("VDVAE_SHARD_WORKERS", count)
    store = Puts(folder / "store")
    with open_workers() as workers:
        return write_shards("r", data, source(data, LONG), store, folder / "m" / "r.json",
                            workers=workers, runs=folder / "runs", **options)  # fmt: skip


@pytest.mark.parametrize("source", SOURCES)
def test_any_number_of_workers_gives_the_same_bytes(tmp_path, monkeypatch, source):
    for count in ("1", "2", "3"):
        manifest = write_with(tmp_path / count, count, monkeypatch, source=source)
    reader = ShardReader(manifest, FileStore(tmp_path / "3" / "store"), "validation")
    assert [key for keys, _ in reader.scan(4) for key in keys] == [
        f"made-validation-{number}" for number in range(9)
    ]
    written = [(tmp_path / count / "m" / "r.json").read_bytes() for count in "123"]
    assert written[0] == written[1] == written[2]
    assert [len(set(Puts(tmp_path / count / "store").puts())) for count in "123"] == [
        SOURCES[source]
    ] * 3
    assert not list((tmp_path / "2" / "runs").rglob("*.json"))  # done: nothing is kept


# files that are no images


REASONS = {
    ".heic is not read": 1,
    "another size": 1,
    "damaged": 1,
    "incomplete": 1,
    "no image, or damaged": 1,
}


def odd_folder(folder: Path) -> DataConfig:
    """60 images, and five files that are odd in five ways."""
    folder.mkdir()
    for seed in range(60):
        pixels = np.random.RandomState(seed).randint(0, 256, (8, 8, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{seed:03}.png")
    whole = (folder / "000.png").read_bytes()
    (folder / "010-cut.png").write_bytes(whole[:-40])
    (folder / "020-text.png").write_bytes(b"text")
    (folder / "030-phone.heic").write_bytes(b"")
    Image.new("RGB", (9, 8)).save(folder / "040-wide.png")
    noise = Image.fromarray(np.random.RandomState(99).randint(0, 256, (8, 8, 3)).astype(np.uint8))
    noise.save(folder / "050-short.jpg", progressive=True, quality=100)
    jpeg = (folder / "050-short.jpg").read_bytes()
    scan = jpeg.rindex(b"\xff\xda")
    (folder / "050-short.jpg").write_bytes(jpeg[: (scan + len(jpeg)) // 2] + b"\xff\xd9")
    return DataConfig(source="folder", path=str(folder), image_size=8, shard_images=7,
                      validation=0.2, test=0.2)  # fmt: skip


def write_folder(where: Path, data: DataConfig, monkeypatch, count: str = "1") -> Manifest:
    monkeypatch.setenv("VDVAE_SHARD_WORKERS", count)
    with open_workers() as workers:
        return write_shards("r", data, open_source("r", data), FileStore(where / "store"),
                            where / "r.json", workers=workers, runs=where / "runs")  # fmt: skip


def test_odd_files_are_named_together_and_may_be_left_out(tmp_path, monkeypatch):
    data = odd_folder(tmp_path / "images")
    skip = dataclasses.replace(data, unreadable="skip")
    named = ["010-cut.png", "020-text.png", "030-phone.heic", "040-wide.png", "050-short.jpg"]
    for count in ("1", "2"):
        where = tmp_path / count
        with pytest.raises(UserError) as caught:
            write_folder(where, data, monkeypatch, count)
        *sentences, remedy = caught.value.sentences
        path = where / "runs" / "shards" / "r-unreadable.txt"
        assert remedy.startswith(f"all 5 are in {path}; mend them or take them out, or leave them")
        assert remedy.endswith("params.yaml: recipes.r.data.unreadable: skip")
        assert path.read_text().splitlines() == sentences
        assert [Path(sentence.partition(": ")[0]).name for sentence in sentences] == named
        assert not (where / "r.json").exists()
        manifest = write_folder(where, skip, monkeypatch, count)
        assert manifest.source.notes == {"left out": REASONS}
        assert manifest.left_out.startswith("5 (.heic is not read 1, another size 1, ")
        assert len(path.read_text().splitlines()) == 5
    manifests = [(tmp_path / count / "r.json").read_bytes() for count in "12"]
    assert manifests[0] == manifests[1]
    for name in named:
        (tmp_path / "images" / name).unlink()
    alone = write_folder(tmp_path / "2", data, monkeypatch)
    assert alone.source.notes == {}
    stores = FileStore(tmp_path / "2" / "store")
    for split in CUTS:  # the same images, though in other shards: odd files had a place in theirs
        one, other = (
            [(keys, x.numpy().tobytes()) for keys, x in ShardReader(m, stores, split).scan(1)]
            for m in (alone, manifest)
        )
        assert one == other
    assert not path.exists()  # nothing is wrong any more


class Holed(Made):
    """Some images are found to be odd only where shards are made."""

    def load(self, places, converted):
        places = list(places)
        for place, image in zip(places, super().load(places, converted), strict=True):
            odd = place % 4 == 1 or place < 12
            yield OddImage(f"made-{place}: is odd", "odd") if odd else image


def test_odd_images_leave_smaller_shards_and_empty_ones_away(tmp_path, monkeypatch):
    data = config(unreadable="skip", shard_images=4)
    manifests = []
    for count in ("1", "3"):
        monkeypatch.setenv("VDVAE_SHARD_WORKERS", count)
        with open_workers() as workers:
            manifests.append(
                write_shards("r", data, Holed(data, LONG), FileStore(tmp_path / "store"),
                             tmp_path / f"{count}.json", workers=workers)
            )  # fmt: skip
    assert manifests[0] == manifests[1] == Manifest.load(tmp_path / "3.json")
    images = sum(split.images for split in manifests[0].splits.values())
    left_out = sum(place % 4 == 1 or place < 12 for place in range(60))
    assert images == 60 - left_out
    assert manifests[0].left_out == f"{left_out} (odd {left_out})"
    reader = ShardReader(manifests[0], FileStore(tmp_path / "store"), "train")
    assert sum(len(keys) for keys, _ in reader.scan(8)) == manifests[0].splits["train"].images
    with pytest.raises(UserError, match=f"made-0: is odd; .*and {left_out - 20} more; mend them"):
        write_shards(
            "r", config(), Holed(config(), LONG), FileStore(tmp_path / "s"), tmp_path / "r"
        )
    all_of_one = {"train": 41, "validation": 1, "test": 10}
    with pytest.raises(
        UserError, match=r"too few images for three splits \(train \d+, validation 0"
    ):
        write_shards("r", data, Holed(data, all_of_one), FileStore(tmp_path / "s"), tmp_path / "r")


def test_the_stage_names_odd_files_one_a_line_and_counts_what_it_left_out(
    tmp_path, monkeypatch, capsys
):
    odd_folder(tmp_path / "images")
    params = yaml.safe_load((Path(__file__).parents[1] / "params.yaml").read_text())
    recipe = params["recipes"]["digits"]
    recipe["data"] |= {"source": "folder", "path": "images", "validation": 0.2, "test": 0.2}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["shard", "digits"])
    for name in ("VDVAE_STORE", "VDVAE_RUNS"):
        monkeypatch.delenv(name, raising=False)
    Path("params.yaml").write_text(yaml.safe_dump(params))
    with pytest.raises(SystemExit) as exit:
        main(shard)
    assert exit.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 6 and all(line.startswith("error: ") for line in lines)
    assert lines[-1].startswith(f"error: all 5 are in {tmp_path}/runs/shards/digits-unreadable.txt")
    recipe["data"]["unreadable"] = "skip"
    Path("params.yaml").write_text(yaml.safe_dump(params))
    main(shard)
    last = capsys.readouterr().out.splitlines()[-1]
    assert "  left out 5 (.heic is not read 1, another size 1, damaged 1, incomplete 1, " in last


def descendants(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        return []
    return [int(child) for child in children]


def runs(pid: int) -> bool:
    """Whether a process has not ended; one that nobody has waited for, as in a container, has."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


@pytest.mark.parametrize(("count", "source"), [("1", Made), ("2", Made), ("2", ByPixels)])
def test_killed_at_any_moment_it_goes_on_where_it_was(tmp_path, monkeypatch, count, source):
    whole = write_with(tmp_path / "whole", "1", monkeypatch, source=source)
    random = np.random.RandomState(int(count))
    folder = tmp_path / "killed"
    kills = 0
    while True:
        child = os.fork()
        if child == 0:
            try:
                write_with(folder, count, monkeypatch, source=source)
            finally:
                os._exit(0)
        before = len(Puts(folder / "store").puts())
        while len(Puts(folder / "store").puts()) == before:
            time.sleep(0.005)
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                break
        time.sleep(random.uniform(0, 0.1))
        workers = descendants(child)
        os.kill(child, signal.SIGKILL)
        killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        deadline = time.monotonic() + 10
        while any(runs(pid) for pid in workers):  # none outlives its parent
            assert time.monotonic() < deadline, "a worker was left behind"
            time.sleep(0.01)
        kills += killed
        # One that is killed after its last word has finished; started again, it would begin anew.
        if not killed or (folder / "m" / "r.json").exists() or kills > 50:
            break
    assert 2 <= kills <= 50
    assert Manifest.load(folder / "m" / "r.json") == whole
    puts = Puts(folder / "store").puts()
    assert len(set(puts)) == SOURCES[source]
    # A kill costs what was at work, not what was done.
    in_flight = {"1": 1, "2": 4}[count] * (3 if source is ByPixels else 1)
    assert len(puts) <= SOURCES[source] + kills * in_flight


@pytest.mark.parametrize("source", SOURCES)
def test_what_was_kept_is_taken_only_where_it_still_holds(tmp_path, monkeypatch, source):
    folder = tmp_path / "r"
    made = functools.partial(write_with, folder, source=source, monkeypatch=monkeypatch)

    def stop(images: int) -> None:
        if images > 40:
            raise KeyboardInterrupt

    def begin_and_stop() -> list[str]:
        with pytest.raises(KeyboardInterrupt):
            made("1", on_progress=stop)
        return Puts(folder / "store").puts()

    done = begin_and_stop()
    (folder / "store" / done[4]).unlink()
    whole = made("1")
    again = Puts(folder / "store").puts()[len(done) :]
    assert again.count(done[4]) == 1
    beside = 2 if source is ByPixels else 0  # those of the same images are made again, too
    assert len(done + again) == SOURCES[source] + 1 + beside
    begin_and_stop()
    other = made("1", data=config(num_levels=32))  # has a state of its own
    assert other.source.fingerprint == whole.source.fingerprint
    assert other.splits != whole.splits
    assert made("2") == whole


@pytest.mark.parametrize("source", SOURCES)
def test_the_shards_of_a_sharding_to_go_on_with_are_needed(tmp_path, monkeypatch, source):
    def stop(images: int) -> None:
        if images > 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_with(tmp_path, "1", monkeypatch, source=source, on_progress=stop)
    needs = Needs()
    add_unfinished(needs, Places(store_url="", runs=tmp_path / "runs", tracking_uri=""))
    assert {*needs.keys} == {*Puts(tmp_path / "store").puts()}
    assert {*needs.keys.values()} == {"a sharding to go on with"}


def test_a_shard_that_was_damaged_meanwhile_is_made_again(tmp_path, monkeypatch):
    folder = tmp_path / "r"
    whole = write_with(folder, "1", monkeypatch)

    def stop(manifest: Manifest) -> None:
        raise KeyboardInterrupt

    def read_back(manifest: Manifest) -> None:
        list(ShardReader(manifest, FileStore(folder / "store"), "train").scan(4))

    with pytest.raises(KeyboardInterrupt):
        write_with(folder, "1", monkeypatch, before_manifest=stop)
    shards = [folder / "store" / shard.key for shard in whole.splits["train"].shards[:2]]
    shards[0].write_bytes(b"cut")  # seen by its size
    damage_flip(shards[1])  # seen when it is read
    with pytest.raises(
        UserError, match=r"train-000001.tar: sha256 .* run 'dvc repro -f -s shard@r"
    ):
        write_with(folder, "1", monkeypatch, before_manifest=read_back)
    assert write_with(folder, "1", monkeypatch, before_manifest=read_back) == whole


class Elsewhere(FileStore):
    """A folder of the same name, on another machine."""

    def put(self, key, data):
        pass


def test_workers_with_another_store_are_named(tmp_path):
    with (
        ThreadPoolExecutor(1) as executor,
        pytest.raises(UserError, match=r"^store file://.*/store: has no shards/r/.* VDVAE_STORE"),
    ):
        write_shards("r", config(), Made(config()), Elsewhere(tmp_path / "store"),
                     tmp_path / "r.json", workers=Workers(executor, elsewhere=True))  # fmt: skip
    assert not (tmp_path / "r.json").exists()


def test_a_worker_that_is_killed_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("VDVAE_SHARD_WORKERS", "2")
    source = Deadly(config(), LONG)
    store = FileStore(tmp_path / "store")
    with (
        open_workers() as workers,
        pytest.raises(UserError, match=r"was killed, perhaps .* run the same command again"),
    ):
        write_shards("r", config(), source, store, tmp_path / "r.json", workers=workers)


def test_two_writers_of_one_recipe_wait_for_each_other(tmp_path, monkeypatch):
    children = []
    for _ in range(2):
        child = os.fork()
        if child == 0:
            try:
                write_with(tmp_path, "2", monkeypatch)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    manifest = Manifest.load(tmp_path / "m" / "r.json")
    assert manifest == write_with(tmp_path / "alone", "1", monkeypatch)
    assert sum(len(keys) for keys, _ in ShardReader(manifest, Counting(tmp_path / "store"), "train")
               .scan(4)) == LONG["train"]  # fmt: skip


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", "²", "9999"])
def test_a_number_of_workers_that_is_none(monkeypatch, text):
    monkeypatch.setenv("VDVAE_SHARD_WORKERS", text)
    with pytest.raises(UserError, match=r"^VDVAE_SHARD_WORKERS: .* from 1 to 1024"), open_workers():
        pass


# duplicates


def test_duplicates_are_counted_within_and_across_splits():
    picture = {
        "train": "abcabcz",
        "validation": "dda",
        "test": "bey",
    }
    hashes = {
        split: b"".join(hashlib.md5(name.encode()).digest() for name in names)
        for split, names in picture.items()
    }
    found = find_duplicates(hashes, lambda split, row: f"{split}-{row}")
    assert found.within == {"train": 3, "validation": 1, "test": 0}
    assert found.across == {
        "train and validation": 1,
        "train and test": 1,
        "validation and test": 0,
    }
    assert found.examples == (
        ("train-0", "validation-2"),
        ("train-1", "test-0"),
        ("train-0", "train-3"),
        ("train-1", "train-4"),
        ("train-2", "train-5"),
        ("validation-0", "validation-1"),
    )


def test_duplicates_are_those_of_stored_pixels_and_are_in_the_manifest(tmp_path):
    store = FileStore(tmp_path / "store")
    found = []
    for levels in (256, 2):
        data = config(num_levels=levels)
        manifest = write_shards("r", data, Same(data, LONG), store, tmp_path / "r.json")
        assert Manifest.load(tmp_path / "r.json") == manifest
        found.append(manifest.duplicates)
    assert not any(found[0].within.values()) and not found[0].examples
    items = list(Same(config(), LONG).items())
    splits = {item.split for item in items if item.at % 7 == 0}
    same = len(range(0, len(items), 7))
    assert sum(found[1].within.values()) == same - len(splits)
    assert sum(found[1].across.values()) == len(splits) * (len(splits) - 1) // 2
    keys = {item.key: item.at for item in items}
    assert len(found[1].examples) == same - 1
    assert all(keys[one] % 7 == keys[other] % 7 == 0 for one, other in found[1].examples)


class LoggedS3(S3Store):
    """A bucket that writes down every put."""

    log: Path

    def put(self, key, data):
        super().put(key, data)
        with self.log.open("a") as file:
            file.write(f"{key}\n")


def test_an_s3_server_that_is_killed_in_between_costs_nothing(tmp_path, monkeypatch):
    # It stays away for longer than all tries together, which need not last half a minute here.
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0)
    source = Made(config(), LONG)
    monkeypatch.setenv("VDVAE_SHARD_WORKERS", "1")
    whole = write_with(tmp_path / "whole", "1", monkeypatch)
    store = LoggedS3("bucket", "r")
    store.log = tmp_path / "puts"
    (tmp_path / "s3").mkdir()

    def write_on(kill_at: int | None) -> Manifest:
        def on_progress(images: int) -> None:
            if kill_at is not None and images > kill_at:
                running.close()  # kill -9

        with contextlib.ExitStack() as running, open_workers() as workers:
            for name, value in (
                running.enter_context(s3_server(tmp_path / "s3")).environment().items()
            ):
                monkeypatch.setenv(name, value)
            storage._s3_client.cache_clear()
            return write_shards("r", config(), source, store, tmp_path / "r.json", on_progress,
                                workers=workers, runs=tmp_path / "runs")  # fmt: skip

    for kill_at in (10, 35):
        with pytest.raises(UserError, match=r"^store s3://bucket/r: cannot (write|read) "):
            write_on(kill_at)
        assert not (tmp_path / "r.json").exists()
    assert write_on(None) == whole
    puts = store.log.read_text().split()
    assert len(set(puts)) == 17
    assert len(puts) <= 17 + 2
    storage._s3_client.cache_clear()


# PNG files that go into the shards as they are


def test_only_well_compressed_plain_pngs_are_handed_through(tmp_path, monkeypatch):
    random = np.random.RandomState(0)
    pixels = random.randint(0, 9, (40, 8, 8, 3)).cumsum(1).cumsum(2).astype(np.uint8)
    pictures = [Image.fromarray(image) for image in pixels]
    folder = tmp_path / "images"
    folder.mkdir()
    notes = PngInfo()
    notes.add_text("Author", "somebody", zip=True)
    notes.add(b"pHYs", bytes(9))
    for number, picture in enumerate(pictures):
        picture.save(folder / f"{number:02}.png")
    plain = {(folder / f"{number:02}.png").read_bytes() for number in range(len(pictures))}
    pictures[0].save(folder / "00.png", pnginfo=notes)
    pictures[1].save(folder / "01.png", compress_level=1)
    pictures[2].convert("RGBA").save(folder / "02.png")
    pictures[3].save(folder / "03.png", exif=b"Exif\0\0II*\0" + bytes(8))
    pictures[4].save(folder / "04.bmp")
    (folder / "04.png").unlink()
    data = DataConfig(source="folder", path=str(folder), image_size=8, validation=0.2, test=0.2)
    manifest = write_folder(tmp_path, data, monkeypatch)
    store = FileStore(tmp_path / "store")
    stored, found = {}, {}
    for split, shards in manifest.splits.items():
        for one in shards.shards:
            with tarfile.open(fileobj=io.BytesIO(store.get(one.key))) as tar:
                stored |= {m.name[:2]: tar.extractfile(m).read() for m in tar.getmembers()}
        for keys, x_BCHW in ShardReader(manifest, store, split).scan(9):
            found |= {key[:2]: x for key, x in zip(keys, x_BCHW.numpy(), strict=True)}
    anew = {name for name, png in stored.items() if png not in plain}
    assert len(stored) == len(found) == 40 and anew == {"01", "02", "03", "04"}
    for number, image_HWC in enumerate(pixels):
        np.testing.assert_array_equal(found[f"{number:02}"], image_HWC.transpose(2, 0, 1))
    assert not any(b"tEXt" in png or b"zTXt" in png or b"pHYs" in png for png in stored.values())
    coarse = write_folder(tmp_path, dataclasses.replace(data, num_levels=32), monkeypatch)
    [x_BCHW] = [x for _, x in ShardReader(coarse, store, "test").scan(40)]
    assert len(np.unique(x_BCHW)) <= 32


def test_a_photograph_is_encoded_the_fastest_way_and_others_as_small_as_before(tmp_path):
    tile = np.random.RandomState(0).randint(0, 256, (16, 16, 3)).astype(np.uint8)
    drawing = np.tile(tile, (4, 4, 1))
    photograph = load_sample_image("china.jpg")[100:164, 200:264]
    coarse = on_levels(photograph, 32)  # the averages of its pixels are between its levels

    images = {"photograph": photograph, "coarse": coarse, "drawing": drawing}
    for order in itertools.permutations(images):  # in one shard, whichever comes first
        shard = writer._ShardWriter()
        for name in order:
            shard.add(name, Loaded(images[name]), 256)
        found = shard.store("r", "train", FileStore(tmp_path))
        with tarfile.open(tmp_path / found["key"]) as tar:
            stored = {name: tar.extractfile(f"{name}.png").read() for name in images}
        for (name, image_HWC), encode in zip(images.items(), writer._ENCODERS, strict=True):
            assert stored[name] == encode(image_HWC)
            assert len(encode(image_HWC)) <= 1.06 * len(writer._by_pillow(image_HWC))
        assert len(stored["drawing"]) < drawing.size / 4


def test_an_encoder_is_chosen_by_the_middle_of_a_large_image():
    tile = np.random.RandomState(0).randint(0, 256, (16, 16, 3)).astype(np.uint8)
    image_HWC = np.tile(tile, (16, 16, 1))
    image_HWC[64:192] = load_sample_image("flower.jpg")[100:228, 200:456]
    assert writer._encoder_for(image_HWC) is writer._averaged
    assert writer._encoder_for(np.roll(image_HWC, 128, axis=0)) is writer._by_pillow


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 3, 3), (2, 9, 1), (64, 64, 3)])
def test_every_encoder_gives_the_pixels_back(shape):
    image_HWC = np.random.RandomState(0).randint(0, 256, shape).astype(np.uint8)
    for encode in writer._ENCODERS:
        with Image.open(io.BytesIO(encode(image_HWC))) as picture:
            assert picture.mode == {1: "L", 3: "RGB"}[shape[2]]
            np.testing.assert_array_equal(np.asarray(picture).reshape(shape), image_HWC)


def test_a_folder_of_odd_files_alone_names_them(tmp_path, monkeypatch):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.heic").write_bytes(b"")
    data = DataConfig(source="folder", path=str(folder), image_size=8)
    with pytest.raises(UserError, match=r"a\.heic: \.heic images are not read"):
        write_folder(tmp_path, data, monkeypatch)


def test_once_a_run_is_refused_it_stores_no_more(tmp_path, monkeypatch):
    data = odd_folder(tmp_path / "images")
    with pytest.raises(UserError):
        write_folder(tmp_path, data, monkeypatch)
    assert not [*(tmp_path / "store").rglob("*.tar")]  # the .heic was known from the beginning
