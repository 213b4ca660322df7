"""The ranks of one run: who this process is, and what all of them have found.

Started by torchrun on any number of machines, or by `pipeline.system.launch` on one.
"""

from __future__ import annotations

import datetime
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from vdvae.config import UserError, shown

T = TypeVar("T")
_PATIENCE = datetime.timedelta(minutes=30)  # with a rank that does not come, say one that reads
_MOST_RANKS = 10_000
RENDEZVOUS = "VDVAE_RENDEZVOUS"  # file:///path where the ranks of one machine meet without a port


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run; alone where nothing started it with others."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that speaks and writes."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in their order, on the first one; elsewhere none."""
        if self.size == 1:
            return [value]
        found: list[T] = [value] * self.size
        dist.gather_object(value, found if self.first else None)
        return found if self.first else []

    def shared(self, value: T) -> T:
        """The first rank's value, on every rank."""
        if self.size == 1:
            return value
        found = [value]
        dist.broadcast_object_list(found)
        return found[0]

    def wait(self) -> None:
        """Returns when every rank has come here."""
        if self.size > 1:
            dist.barrier()

    def all_agree(self, answer: bool) -> bool:
        """Whether every rank answers yes."""
        if self.size == 1:
            return answer
        votes = torch.tensor(int(answer))
        dist.all_reduce(votes, dist.ReduceOp.MIN)
        return bool(votes)

    def mean(self, figures: Tensor) -> Tensor:
        """The mean over ranks, element by element: the same bits on each."""
        if self.size > 1:
            dist.all_reduce(figures)
            figures = figures / self.size
        return figures

    def wrapped(self, model: nn.Module) -> nn.Module:
        """A module whose backward pass gives every rank the mean of all ranks' gradients."""
        if self.size == 1:
            return model
        return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)

    def check_equal(self, what: str, value: T) -> None:
        """Refuses to go on where ranks have found different things.

        Raises:
            UserError: on every rank.
        """
        found = self.shared(self.gather(value))
        if len(set(found)) > 1:
            raise UserError(
                f"ranks: {what} differs between ranks ({', '.join(map(str, found))}); the folder "
                f"of VDVAE_RUNS must be one that all machines share"
            )


ALONE = Ranks()


def own_gradients(model: nn.Module) -> AbstractContextManager[None]:
    """While it runs, a backward pass leaves each rank its own gradients, to be summed up later."""
    if isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return nullcontext()


@contextmanager
def ranks(device: torch.device) -> Iterator[Ranks]:
    """Joins the other ranks while the block runs (environment: RANK, WORLD_SIZE, ...).

    Figures and objects travel over gloo from the CPU, gradients on GPUs over NCCL.

    Args:
        device: what this run computes on; of several GPUs each rank takes its own.

    Raises:
        UserError: more ranks than GPUs on this machine, or a variable that is no such number: a
            rank that no group has would wait for it in vain.
    """
    size = _number("WORLD_SIZE", 1, _MOST_RANKS, "1")
    if size == 1:
        yield Ranks()
        return
    backend = "gloo"
    if device.type == "cuda":
        local = _number("LOCAL_RANK", 0, size - 1, "0")  # by itself on its machine, perhaps
        if local >= torch.cuda.device_count():
            raise UserError(
                f"ranks: more are started on this machine than its {torch.cuda.device_count()} "
                f"GPUs; start one a GPU"
            )
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    rank = _number("RANK", 0, size - 1)
    meeting = os.environ.get(RENDEZVOUS, "env://")
    scheme, _, path = meeting.partition("://")
    store: Store
    if scheme == "file":  # read by torch, it would end at the first '?' or '#' of the path
        store = dist.FileStore(path, size)  # type: ignore[attr-defined]
    else:
        store, _, _ = next(rendezvous(meeting, rank, size, timeout=_PATIENCE))
    store.set_timeout(_PATIENCE)  # a file does not take it over
    dist.init_process_group(
        backend, store=_fresh(store, rank, size), rank=rank, world_size=size, timeout=_PATIENCE
    )
    yield Ranks(dist.get_rank(), dist.get_world_size())
    # Not after an error: NCCL would wait here for the others, which wait for this one's end.
    dist.destroy_process_group()


def _number(name: str, least: int, most: int, default: str = "") -> int:
    text = os.environ.get(name, default)
    if not (text.isdecimal() and len(text) < 7 and least <= int(text) <= most):
        raise UserError(
            f"{name}: {shown(text)} is not a number from {least} to {most}; let torchrun set it, "
            f"or unset WORLD_SIZE to work alone"
        )
    return int(text)


def _fresh(store: Store, rank: int, size: int) -> Store:
    """A part of the store that only the ranks started together see, whatever others left in it.

    torchrun keeps one store through its restarts, with the addresses of ranks that have died, and
    no number that it hands out is both new at each restart and the same on every machine. So each
    rank draws a name: the first one's is the part's, and it lists those who have answered to it.

    Args:
        store: one that all ranks reach; earlier ranks may have used it, but have ended.

    Raises:
        RuntimeError: where a rank does not come within half an hour.
    """
    me = uuid.uuid4().hex
    deadline = time.monotonic() + _PATIENCE.total_seconds()

    def found(key: str) -> str | None:
        # Looks again and again: a `get` that waits would keep Python from heeding signals.
        return store.get(key).decode() if store.check([key]) else None

    if rank == 0:
        store.set("vdvae/first", me)
    missing = f"rank {0 if rank else 1}"
    while time.monotonic() < deadline:
        if rank == 0:
            answers = [found(f"{me}/{other}") for other in range(1, size)]
            if None not in answers:
                store.set(f"{me}/all", " ".join(map(str, answers)))
                return PrefixStore(me, store)
            missing = f"rank {1 + answers.index(None)}"
        elif first := found("vdvae/first"):  # an earlier one's, perhaps: its list lacks us
            store.set(f"{first}/{rank}", me)
            if me in (found(f"{first}/all") or "").split():
                return PrefixStore(first, store)
        time.sleep(0.05)
    raise RuntimeError(f"ranks: {missing} did not come within {_PATIENCE}")
