"""What reads ahead: threads that wait, and processes that decode.

Threads that decode would share Python's lock with each other and with whoever trains, and half of
the time that a small image takes is Python's: so each decoder is a process of its own. Only shards
that are not in the cache yet start any.
"""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from pipeline.shards.cache import Block, BlockCache, CachedBlock, DecodedBlock
from pipeline.shards.decode import Decoded, Decoder
from pipeline.shards.manifest import Shard
from vdvae.config import UserError

T = TypeVar("T")
_TRIES = 10
_AT_ONCE = 2  # blocks asked of a process: one whose bytes it fetches while it decodes the other


class Threads(Generic[T]):
    """Does jobs in the order they were given, and drops those that wait when it is closed.

    The threads are daemons: what they do when the program ends holds nothing up.
    """

    def __init__(self, count: int) -> None:
        self._jobs: queue.SimpleQueue[tuple[Future[T], Callable[[], T]] | None]
        self._jobs = queue.SimpleQueue()
        self._count = count
        self._started: list[threading.Thread] = []
        self._closed, self._lock = False, threading.Lock()

    def submit(self, job: Callable[[], T]) -> Future[T]:
        """What the job will have given, or raised."""
        future: Future[T] = Future()
        with self._lock:
            if self._closed:
                future.cancel()
                return future
            if len(self._started) < self._count:
                self._started.append(threading.Thread(target=self._work, daemon=True))
                self._started[-1].start()
            self._jobs.put((future, job))
        return future

    def close(self) -> None:
        """Ends each thread after its present job; who waits for another one is told so."""
        with self._lock:
            self._closed = True
            with contextlib.suppress(queue.Empty):
                while item := self._jobs.get_nowait():
                    item[0].cancel()
            for _ in self._started:
                self._jobs.put(None)

    def join(self, seconds: float) -> None:
        """Waits for each thread's end, after `close`."""
        for thread in self._started:
            thread.join(seconds)

    def _work(self) -> None:
        while (item := self._jobs.get()) is not None:
            future, job = item
            try:
                future.set_result(job())
            except BaseException as error:  # raised where the result is asked for
                future.set_exception(error)
            del item, future, job  # while it waits it holds no images


@dataclass(frozen=True, kw_only=True)
class BlockMaker:
    """Opens and makes the blocks of a recipe's shards, in this process."""

    decoder: Decoder
    cache: BlockCache

    def open(self, shard: Shard) -> CachedBlock | None:
        """The block that the cache has."""
        height, width, channels = self.decoder.shape
        return self.cache.open(self._name(shard), (shard.images, channels, height, width))

    def make(
        self, shard: Shard, keep: bool, fetch: Callable[[], bytes] | None = None
    ) -> Decoded | None:
        """Puts a block into the cache; where that has no room gives what it would hold.

        Args:
            shard: which.
            keep: False gives nothing at all where the cache has no room.
            fetch: gives the shard's bytes; None: the decoder's own `fetch`.
        """
        decode = partial(self.decoder.images, shard, fetch)
        pixels = shard.images * math.prod(self.decoder.shape)
        if self.cache.add(self._name(shard), shard.images, pixels, decode) or not keep:
            return None
        return self.decoder.decode(shard, fetch)

    def drop(self, shard: Shard) -> None:
        """Removes a damaged block from the cache."""
        self.cache.drop(self._name(shard))

    def _name(self, shard: Shard) -> str:
        # Its content, and what that was checked against.
        shape = "x".join(map(str, self.decoder.shape))
        return f"{shard.sha256}-{shape}-{self.decoder.num_levels}"


class Blocks:
    """Makes blocks in up to `workers` processes, or at once and here where `workers` is 0."""

    def __init__(self, maker: BlockMaker, workers: int) -> None:
        self._maker, self._workers = maker, workers
        self.ahead = _AT_ONCE * workers  # how many are made while others are waited for
        self._threads: Threads[Block | None] = Threads(self.ahead)
        self._processes: list[_Process] = []
        self._closed, self._lock = False, threading.Lock()

    def make(self, shard: Shard, keep: bool = True) -> Future[Block | None]:
        """A shard's block, from the cache or made for it.

        Args:
            shard: which.
            keep: holds it in memory where the cache has no room for it; else there is none.
        """
        if self.ahead:
            return self._threads.submit(partial(self._made, shard, keep))
        future: Future[Block | None] = Future()
        future.set_result(self._found_or(shard, self._maker.make, keep))
        return future

    def close(self) -> None:
        """Ends threads and processes at once."""
        self._threads.close()
        with self._lock:
            self._closed = True
            for process in self._processes:
                process.kill()

    def _made(self, shard: Shard, keep: bool) -> Block | None:
        return self._found_or(shard, self._made_by_a_process, keep)

    def _found_or(
        self, shard: Shard, make: Callable[[Shard, bool], Decoded | None], keep: bool
    ) -> Block | None:
        # More than once where another process has removed the block to make room.
        for _ in range(_TRIES):
            block = self._maker.open(shard)
            if block is not None:
                return block
            decoded = make(shard, keep)
            if decoded or not keep:
                return DecodedBlock(decoded) if decoded else self._maker.open(shard)
        raise self._maker.cache.changed()

    def _made_by_a_process(self, shard: Shard, keep: bool) -> Decoded | None:
        with self._lock:
            if self._closed:
                raise CancelledError
            self._processes = [process for process in self._processes if process.lives()]
            if len(self._processes) < self._workers:
                self._processes.append(_Process(self._maker))
            process = min(self._processes, key=lambda process: process.asked)
            answer = process.ask(shard, keep)
        return process.wait(shard, answer)


class _Process:
    """A process that makes blocks in the order in which they are asked for.

    While it decodes one, the bytes of the next one are fetched. It ends with this process, or when
    it is killed.
    """

    def __init__(self, maker: BlockMaker) -> None:
        root = str(Path(__file__).parents[2])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._child = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        self._maker: BlockMaker | None = maker  # to be sent before the first shard
        self._answers: deque[Future[Any]] = deque()
        self._answering = threading.Lock()

    @property
    def asked(self) -> int:
        """How many blocks it has been asked for and has not made yet."""
        return len(self._answers)

    def ask(self, shard: Shard, keep: bool) -> Future[Any]:
        """Asks for what `BlockMaker.make` gives or raises there; one thread at a time may ask."""
        answer: Future[Any] = Future()
        self._answers.append(answer)
        with contextlib.suppress(OSError):  # it is dead, which who waits is told
            if self._maker is not None:
                self._send(self._maker)
                self._maker = None
            self._send((shard, keep))
        return answer

    def wait(self, shard: Shard, answer: Future[Any]) -> Decoded | None:
        """What was asked for, or raises that."""
        assert self._child.stdout is not None
        try:
            while not answer.done():
                with self._answering:
                    if not answer.done():  # whoever was before may have read it
                        self._answers[0].set_result(pickle.load(self._child.stdout))
                        self._answers.popleft()
        except (EOFError, OSError, pickle.UnpicklingError):
            code = self._child.wait()
            raise UserError(
                f"shard {shard.name}: the process that decodes it ended with {code}; run the "
                f"same command again, with VDVAE_READ_WORKERS=0 to decode without another process"
            ) from None
        except BaseException:
            self.kill()  # the rest of its answer would be taken for the next one
            raise
        result = answer.result()
        if isinstance(result, Exception):
            raise result
        decoded: Decoded | None = result
        return decoded

    def lives(self) -> bool:
        """Whether it can be asked again."""
        return self._child.poll() is None

    def kill(self) -> None:
        """Ends it at once; a shard that it was at is not in the cache."""
        self._child.kill()
        self._child.wait()

    def _send(self, what: Any) -> None:
        assert self._child.stdin is not None
        pickle.dump(what, self._child.stdin)
        self._child.stdin.flush()


def serve() -> None:
    """Makes blocks as asked on standard input until that ends."""
    # A signal to the whole group is for the trainer, which stops after a checkpoint; until then
    # it needs its images.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    maker: BlockMaker = pickle.load(sys.stdin.buffer)
    asked: queue.SimpleQueue[tuple[Shard, bool, Future[bytes]]] = queue.SimpleQueue()

    def listen() -> None:
        fetching: Threads[bytes] = Threads(1)
        try:
            while True:
                shard, keep = pickle.load(sys.stdin.buffer)
                asked.put((shard, keep, fetching.submit(partial(maker.decoder.fetch, shard))))
        except EOFError:
            os._exit(0)  # whoever asked is gone, and so is the use of what is being done
        except Exception:
            traceback.print_exc()
            os._exit(1)

    threading.Thread(target=listen, daemon=True).start()
    while True:
        shard, keep, fetched = asked.get()
        try:
            answer: Decoded | Exception | None = maker.make(shard, keep, fetched.result)
        except Exception as error:
            answer = error
        pickle.dump(answer, answers)
        answers.flush()
        del fetched, answer  # while it waits it holds no images
