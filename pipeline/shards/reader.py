"""Reads shards: every image once, in an order that is a function of (seed, epoch).

Nothing of a shard is trusted.

Shapes: B batch, N images of a window, C channels, H W pixels.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.shards.cache import Block, BlockCache, CachedBlock, DamagedBlock
from pipeline.shards.decode import Decoder
from pipeline.shards.manifest import Manifest
from pipeline.shards.workers import BlockMaker, Blocks, Threads
from pipeline.storage import Store
from vdvae.config import UserError

if TYPE_CHECKING:
    import torch

WINDOW_BYTES = 256 * 2**20  # of pixels, unless one shard has more
_KEY_BYTES = 128  # an image's key, about: the order depends on it
_SMALL_BYTES = 16 * 2**20  # a split of so few pixels is decoded in two seconds or less
_AHEAD_BATCHES, _AHEAD_BYTES = 4, 64 * 2**20  # most that are ready before they are asked for
_END_SECONDS = 2.0  # what the end of a pass waits for the copy that is being made
_OPEN_BLOCKS = 256  # files, of which a process may have 1024
_SCAN_SHARDS = 64  # of a window that is read in order: it and the next are open at once


class ShardReader:
    """The images of one split, in a random order without end or once in the manifest's order.

    Images are shuffled within a window: as many shards, themselves in random order, as hold
    `window_bytes` of pixels. Shards are decoded into a cache on disk, from which each image is read
    when its turn comes; what the cache has no room for is held in memory, for one window. So memory
    is fixed whatever the split's size.

    Raises (from `batches` and `scan`):
        UserError: where a shard is missing or is not, byte for byte and image for image, what the
            manifest says.
    """

    def __init__(
        self,
        manifest: Manifest,
        store: Store,
        split: str,
        window_bytes: int = WINDOW_BYTES,
        cache: BlockCache | None = None,
        workers: int | None = None,
    ) -> None:
        """A reader of one split; nothing is read yet.

        Args:
            manifest: of the shards.
            store: where they are.
            split: train, validation or test.
            window_bytes: the order depends on it.
            cache: None: the one at VDVAE_CACHE.
            workers: processes that decode; None: VDVAE_READ_WORKERS.
        """
        self.manifest = manifest
        self.split = split
        self.images = manifest.splits[split].images
        self._shards = manifest.splits[split].shards
        self._window_images = window_bytes // (math.prod(manifest.shape) + _KEY_BYTES)
        decoder = Decoder.of(manifest, store)
        self.maker = BlockMaker(decoder=decoder, cache=cache or BlockCache.from_env())
        if workers is None:
            from pipeline.settings import Settings

            workers = Settings().read_workers
            if self.images * math.prod(manifest.shape) < _SMALL_BYTES:
                workers = 0  # decoded before a process has started
        self.workers = workers

    def batches(
        self, batch_size: int, seed: int, start: int = 0, rank: int = 0, ranks: int = 1
    ) -> Generator[torch.Tensor]:
        """Batches x_BCHW (uint8) without end, each of `batch_size` images, across epochs' ends.

        The order is a function of (seed, epoch) and the manifest alone: every image comes once an
        epoch, and `start` images seen before give what would have followed them. Of several ranks
        each gets its own equal part of every batch, in the order of the ranks.

        Args:
            batch_size: images of all ranks together.
            seed: of the order.
            start: images that all ranks together have seen since the run began.
            rank: which part.
            ranks: how many parts.

        Raises:
            UserError: a batch has no such parts.
        """
        if batch_size % ranks:
            raise UserError(
                f"train.batch_size: {batch_size} cannot be shared equally by {ranks} processes; "
                f"make it a multiple of {ranks}, or start fewer"
            )
        part = batch_size // ranks
        runs = _every(self._shuffled(seed, start), batch_size, rank * part, (rank + 1) * part)
        with contextlib.closing(self._read(runs, part, False, rank / ranks)) as stream:
            for _, x_BCHW in stream:
                yield x_BCHW

    def scan(
        self, batch_size: int, rank: int = 0, ranks: int = 1
    ) -> Iterator[tuple[list[str], torch.Tensor]]:
        """Every image once, in the manifest's order: keys and x_BCHW; the last may be short.

        Of several ranks each reads its own: rank r the images r, r + ranks, r + 2·ranks, ...
        """

        def rows() -> Iterator[_Run]:
            before = 0
            for window in self._windows(range(len(self._shards)), most=_SCAN_SHARDS):
                count = self._count(window)
                yield window, np.arange((rank - before) % ranks, count, ranks)
                before += count

        yield from self._read(rows(), batch_size, True, rank / ranks)

    def _shuffled(self, seed: int, start: int) -> Iterator[_Run]:
        first_epoch, skip = divmod(start, self.images)
        for epoch in itertools.count(first_epoch):
            # RandomState's streams are frozen: an order holds for every version of NumPy.
            random = np.random.RandomState([seed, epoch])
            for window in self._windows(random.permutation(len(self._shards)).tolist()):
                rows = random.permutation(self._count(window))
                if skip < len(rows):
                    yield window, rows[skip:]
                skip = max(0, skip - len(rows))

    def _windows(self, order: Iterable[int], most: float = math.inf) -> Iterator[_Window]:
        # Sorted, so that a split of one window is the same window in every order.
        window: list[int] = []
        images = 0
        for number in order:
            more = self._shards[number].images
            if window and (images + more > self._window_images or len(window) >= most):
                yield tuple(sorted(window))
                window, images = [], 0
            window.append(number)
            images += more
        yield tuple(sorted(window))

    def _count(self, window: Iterable[int]) -> int:
        return sum(self._shards[number].images for number in window)

    def _read(
        self, runs: Iterable[_Run], batch_size: int, with_keys: bool, turn: float
    ) -> Generator[tuple[list[str], torch.Tensor]]:
        """Batches of the images that `runs` name; the next ones are made ready meanwhile."""
        import torch  # seconds, which processes that only decode do without

        reading = _Reading(self, with_keys, turn)
        thread: Threads[list[str]] = Threads(1)
        height, width, channels = self.manifest.shape
        batch_bytes = batch_size * math.prod(self.manifest.shape)
        ahead = max(1, min(_AHEAD_BATCHES, _AHEAD_BYTES // batch_bytes))
        ready: deque[tuple[Future[list[str]], torch.Tensor]] = deque()
        try:
            for parts in _parts(_with_following(runs, max(1, reading.ahead)), batch_size):
                # Pinned where this process uses a GPU, to which it is then copied beside its work.
                # Here, so that the thread, which may be cut off by the program's end, runs no
                # PyTorch, which would take that for a crash.
                shape = (sum(len(part.rows) for part in parts), channels, height, width)
                pin = torch.cuda.is_initialized()
                x_BCHW = torch.empty(shape, dtype=torch.uint8, pin_memory=pin)
                fill = functools.partial(reading.fill, parts, x_BCHW.numpy())
                ready.append((thread.submit(fill), x_BCHW))
                del x_BCHW, fill
                if len(ready) > ahead:
                    keys_B, x_BCHW = ready.popleft()
                    yield keys_B.result(), x_BCHW
            while ready:
                keys_B, x_BCHW = ready.popleft()
                yield keys_B.result(), x_BCHW
        finally:
            thread.close()
            reading.close()
            thread.join(_END_SECONDS)


class _Reading:
    """One pass over a split: holds the blocks of the window that is being read."""

    def __init__(self, reader: ShardReader, with_keys: bool, turn: float) -> None:
        self._shards = reader.manifest.splits[reader.split].shards
        self._with_keys, self._turn = with_keys, turn
        self._maker = reader.maker
        self._blocks = Blocks(reader.maker, reader.workers)
        self.ahead = self._blocks.ahead
        self._window: _Window = ()
        self._held: dict[int, Future[Block | None]] = {}

    def close(self) -> None:
        """Ends what is being made."""
        self._blocks.close()

    def fill(self, parts: list[_Part], x_BCHW: NDArray[np.uint8]) -> list[str]:
        """Copies the images of a batch; gives their keys, if wanted."""
        keys_B = [""] * len(x_BCHW)
        before = 0
        for part in parts:
            if part.window != self._window:
                self._enter(part.window, part.following)
            ends = np.cumsum([self._shards[number].images for number in part.window])
            shard_B = np.searchsorted(ends, part.rows, "right")
            for index in np.unique(shard_B).tolist():
                (places,) = np.nonzero(shard_B == index)
                number = part.window[index]
                rows = part.rows[places] - (ends[index] - self._shards[number].images)
                self._copy(number, rows.tolist(), (places + before).tolist(), keys_B, x_BCHW)
            before += len(part.rows)
        return keys_B

    def _enter(self, window: _Window, following: tuple[int, ...]) -> None:
        """Lets go of the window before, and has this one made and then what follows."""
        self._window = window
        if not self._maker.cache.limit_bytes or any(map(_had_no_room, self._held.values())):
            following = ()  # would be made for nothing; the next window tries again
        # Ranks that share a cache begin at different shards of the window, and share the work.
        first = int(self._turn * len(window))
        ahead = dict.fromkeys((*window[first:], *window[:first], *following)[:_OPEN_BLOCKS])
        self._held = {
            number: block
            for number, block in self._held.items()
            if number in ahead and _useful(block, number in window)
        }
        for number in ahead:
            self._start(number, number in window)

    def _start(self, number: int, keep: bool) -> None:
        if number not in self._held and self._blocks.ahead:
            self._held[number] = self._blocks.make(self._shards[number], keep)

    def _block(self, number: int) -> Block:
        block = self._held[number].result() if number in self._held else None
        if block is None:
            # Of a window of very many shards: one that was opened long ago is opened again.
            pending = sum(not held.done() for held in self._held.values())
            files = [n for n, held in self._held.items() if _is_file(held)]
            if files and pending + len(files) >= _OPEN_BLOCKS:
                del self._held[files[0]]
            self._held[number] = self._blocks.make(self._shards[number])
            block = self._held[number].result()
        assert block is not None
        return block

    def _copy(
        self,
        number: int,
        rows: list[int],
        places: list[int],
        keys_B: list[str],
        x_BCHW: NDArray[np.uint8],
    ) -> None:
        block = self._block(number)
        try:
            block.read(rows, places, x_BCHW)
        except DamagedBlock:
            self._maker.drop(self._shards[number])
            del self._held[number]
            block = self._block(number)
            try:
                block.read(rows, places, x_BCHW)
            except DamagedBlock:
                raise self._maker.cache.changed() from None
        if self._with_keys:
            keys_N = block.keys_N
            for row, place in zip(rows, places, strict=True):
                keys_B[place] = keys_N[row]


def _is_file(block: Future[Block | None]) -> bool:
    return block.done() and block.exception() is None and isinstance(block.result(), CachedBlock)


def _had_no_room(block: Future[Block | None]) -> bool:
    # One that was to be in the cache.
    return block.done() and block.exception() is None and block.result() is None


def _useful(block: Future[Block | None], in_window: bool) -> bool:
    # Not one that could not be read ahead: the store may be well again by now. Nor one in memory,
    # unless it is of the window.
    if not block.done():
        return True
    if block.exception() is not None or block.result() is None:
        return False
    return in_window or _is_file(block)


def _every(runs: Iterable[_Run], period: int, start: int, stop: int) -> Iterator[_Run]:
    """Of every `period` rows those from `start` to `stop`, wherever one run follows on another."""
    before = 0
    for window, rows in runs:
        place = (before + np.arange(len(rows))) % period
        mine = rows[(start <= place) & (place < stop)]
        if len(mine):
            yield window, mine
        before += len(rows)


def _with_following(runs: Iterable[_Run], shards: int) -> Iterator[_Part]:
    """Each run with the shards of those that follow it, at least so many where there are."""
    ahead: deque[_Run] = deque()

    def first() -> _Part:
        (window, rows), *others = ahead
        return _Part(window, rows, tuple(number for after, _ in others for number in after))

    for run in runs:
        ahead.append(run)
        while len((part := first()).following) >= shards:
            yield part
            ahead.popleft()
    while ahead:
        yield first()
        ahead.popleft()


def _parts(runs: Iterable[_Part], batch_size: int) -> Iterator[list[_Part]]:
    """Cuts runs into batches; the last one may be short."""
    parts: list[_Part] = []
    missing = batch_size
    for window, rows, following in runs:
        while len(rows):
            take, rows = np.split(rows, [missing])
            parts.append(_Part(window, take, following))
            missing -= len(take)
            if not missing:
                yield parts
                parts, missing = [], batch_size
    if parts:
        yield parts


_Window = tuple[int, ...]  # numbers of shards
_Run = tuple[_Window, NDArray[np.int64]]  # rows of a window, in the order they are to come


class _Part(NamedTuple):
    """Rows of a window that come one after the other, and the shards after them."""

    window: _Window
    rows: NDArray[np.int64]
    following: tuple[int, ...]
