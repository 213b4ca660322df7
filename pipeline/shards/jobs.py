"""Runs jobs where there are processors, in order and with bounded memory, and never twice.

Where and how many at once does not change a result, so the environment says it, not params.yaml:
VDVAE_SHARD_WORKERS processes of this machine, or the Dask cluster whose scheduler is VDVAE_DASK.
"""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from pipeline.system.process import end_with_parent
from vdvae.config import UserError, shown
from vdvae.files import atomic_write_json, read_json

_AGAIN = "what is done is kept: run the same command again to go on"
_PATIENCE_S = 30.0
_MOST_RECORD_BYTES = 2**28  # a shard of a million images has some 90 MB of keys


def read_record(path: Path) -> dict[str, Any]:
    """What a job found, as it was written down.

    Raises:
        FileNotFoundError: the job has not been done.
        UserError: it is not what a job writes.
    """
    remedy = "remove it, then run the same command again: what it tells of is made anew"
    found = read_json(path, remedy, most_bytes=_MOST_RECORD_BYTES)
    if not isinstance(found, dict):
        raise UserError(f"{path}: is no record of shards; {remedy}")
    return found


class Workers:
    """Where jobs run; in this process where there is no executor."""

    def __init__(
        self,
        executor: Executor | None = None,
        at_once: int = 1,
        *,
        elsewhere: bool = False,
        while_waiting: Callable[[], None] = lambda: None,
    ) -> None:
        """Workers.

        Args:
            executor: has them.
            at_once: how many there are.
            elsewhere: whether they may be on other machines.
            while_waiting: called now and then while a result does not come.
        """
        self.elsewhere = elsewhere
        self._executor = executor
        self._while_waiting = while_waiting
        self._in_flight = 2 * at_once  # one waits behind each that runs, so that none idles

    def run(
        self,
        function: Callable[[Any], Any],
        jobs: Iterable[Any],
        kept: Path,
        still_holds: Callable[[Any], bool] = lambda result: True,
    ) -> Iterator[tuple[Any, Path]]:
        """Results in the order of the jobs, each with the file that keeps it.

        Few jobs are taken before they are needed, so `jobs` may be long and made as it goes.

        Args:
            function: its results are of JSON; it and the jobs can be pickled.
            jobs: their `repr` says what they are made of.
            kept: a folder for results, by what their jobs are made of; one that is there is taken.
            still_holds: whether a result that was kept may be taken.
        """
        waiting: deque[tuple[Future[Any], Path]] = deque()
        try:
            for job in jobs:
                path = kept / f"{hashlib.sha256(repr(job).encode()).hexdigest()}.json"
                waiting.append((self._start(function, job, path, still_holds), path))
                if len(waiting) == self._in_flight or self._executor is None:
                    yield self._end(*waiting.popleft())
            while waiting:
                yield self._end(*waiting.popleft())
        finally:
            for future, _ in waiting:
                future.cancel()

    def _start(
        self,
        function: Callable[[Any], Any],
        job: Any,
        path: Path,
        still_holds: Callable[[Any], bool],
    ) -> Future[Any]:
        done: Future[Any] = Future()
        with contextlib.suppress(FileNotFoundError):
            result = read_record(path)
            if still_holds(result):
                done.set_result(result)
                return done
            path.unlink()
        if self._executor is not None:
            with _killed_is_told():
                return self._executor.submit(function, job)
        done.set_result(function(job))
        return done

    def _end(self, future: Future[Any], path: Path) -> tuple[Any, Path]:
        while not wait([future], _PATIENCE_S).done:
            self._while_waiting()
        with _killed_is_told():
            result = future.result()
        if not path.exists():
            atomic_write_json(path, result)
        return result, path


@contextlib.contextmanager
def _killed_is_told() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool:
        raise UserError(
            f"a process that made shards was killed, perhaps for want of memory; {_AGAIN}, "
            f"perhaps with VDVAE_SHARD_WORKERS=1"
        ) from None


@contextlib.contextmanager
def open_workers() -> Iterator[Workers]:
    """The workers that the environment names.

    Raises:
        UserError: for a setting that is none, or a cluster that does not answer.
    """
    from pipeline.settings import Settings

    settings = Settings()
    if settings.dask:
        with _dask(settings.dask) as workers:
            yield workers
        return
    count = settings.shard_workers or len(os.sched_getaffinity(0))
    if count == 1:
        yield Workers()
        return
    executor = ProcessPoolExecutor(
        count,
        # Forked before there are any threads: a fresh Python would import all of it again.
        mp_context=multiprocessing.get_context("fork"),
        initializer=_begin,
        initargs=(os.getpid(),),
    )
    try:
        yield Workers(executor, count)
    finally:
        executor.shutdown(cancel_futures=True)


def _begin(parent: int) -> None:
    # What the stage does on a signal is its own; a worker goes with it, however it goes.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent(parent)


@contextlib.contextmanager
def _dask(address: str) -> Iterator[Workers]:
    try:
        from distributed import Client, KilledWorker
        from distributed.client import ClosedClientError
    except ModuleNotFoundError:
        raise UserError(
            "VDVAE_DASK: distributed is not installed; run: pip install 'vdvae[dask]', or unset it"
        ) from None
    try:
        client = Client(address, timeout=10, set_as_default=False)
    except (OSError, ValueError, TypeError, LookupError, RuntimeError) as error:  # `tls://` alone
        raise UserError(
            f"VDVAE_DASK: the scheduler at {shown(address)} cannot be reached ({error}); start it, "
            f"or set it to tcp://HOST:8786, or unset it to work on this machine"
        ) from None
    with client:
        threads = sum(client.nthreads().values())
        if not threads:
            raise UserError(
                f"VDVAE_DASK: the scheduler at {address} has no workers; start some with "
                f"'dask worker {address} --nthreads 1'"
            )
        tell = _tell_if_deserted(client, address)
        try:
            yield Workers(client.get_executor(), threads, elsewhere=True, while_waiting=tell)
        except (CancelledError, ClosedClientError):
            raise UserError(
                f"VDVAE_DASK: the scheduler at {address} was lost; start it and its workers again; "
                f"{_AGAIN}"
            ) from None
        except KilledWorker as error:
            raise UserError(
                f"VDVAE_DASK: a job was given up after its workers had died ({error}); see their "
                f"logs; {_AGAIN}"
            ) from None


def _tell_if_deserted(client: Any, address: str) -> Callable[[], None]:
    """Says, once each time, that there are no workers to wait for.

    Where the client has given the scheduler up, what it returns raises CancelledError: a client
    that closes does not always cancel what is waited for.
    """
    warned = False

    def tell() -> None:
        nonlocal warned
        if client.status in ("closing", "closed"):
            raise CancelledError
        with contextlib.suppress(Exception):  # a lost scheduler is told of by what is waited for
            deserted = not client.nthreads()
            if deserted and not warned:
                print(
                    f"VDVAE_DASK: the scheduler at {address} has no workers left; waiting for "
                    f"some: 'dask worker {address} --nthreads 1'",
                    flush=True,
                )
            warned = deserted

    return tell
