"""The ranks of one run, and what they exchange.

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
_TIMEOUT = datetime.timedelta(minutes=30)  # of every exchange: a rank may be reading data
_MOST_RANKS = 10_000
RENDEZVOUS = "VDVAE_RENDEZVOUS"  # file:///path where the ranks of one machine meet without a port


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run; by default it is the only one."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone prints and writes files."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """On rank 0 the values of all ranks, in their order; an empty list on the others."""
        if self.size == 1:
            return [value]
        values: list[T] = [value] * self.size
        dist.gather_object(value, values if self.is_main else None)
        return values if self.is_main else []

    def broadcast(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def barrier(self) -> None:
        """Returns when every rank has called it."""
        if self.size > 1:
            dist.barrier()

    def all_true(self, value: bool) -> bool:
        """Whether the value is true on every rank."""
        if self.size == 1:
            return value
        least = torch.tensor(int(value))
        dist.all_reduce(least, dist.ReduceOp.MIN)
        return bool(least)

    def all_reduce_mean(self, values: Tensor) -> Tensor:
        """The mean over ranks, element by element: the same bits on each."""
        if self.size > 1:
            dist.all_reduce(values)
            values = values / self.size
        return values

    def wrap_ddp(self, model: nn.Module) -> nn.Module:
        """A module whose backward pass gives every rank the mean of all ranks' gradients.

        On a single rank it is the model itself.
        """
        if self.size == 1:
            return model
        return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)

    def check_equal(self, what: str, value: T) -> None:
        """Checks that a value is the same on every rank.

        Raises:
            UserError: it is not; on every rank.
        """
        values = self.broadcast(self.gather(value))
        if len(set(values)) > 1:
            raise UserError(
                f"ranks: {what} differs between ranks ({', '.join(map(str, values))}); the folder "
                f"of VDVAE_RUNS must be one that all machines share"
            )


SINGLE = Ranks()


def no_sync(model: nn.Module) -> AbstractContextManager[None]:
    """Keeps gradients of a `wrap_ddp` module local while the block runs: they are accumulated, and
    averaged over ranks by the next backward pass outside of it."""
    if isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return nullcontext()


@contextmanager
def ranks(device: torch.device) -> Iterator[Ranks]:
    """Joins the other ranks while the block runs (environment: RANK, WORLD_SIZE, ...).

    Objects and tensors on the CPU are exchanged over gloo, gradients on GPUs over NCCL.

    Args:
        device: that this run computes on; of several GPUs each rank takes its own.

    Yields:
        This process among them.

    Raises:
        UserError: there are more ranks than GPUs on this machine, or a variable is not a number
            within bounds: a rank outside the group would wait until the timeout.
    """
    size = _number("WORLD_SIZE", 1, _MOST_RANKS, "1")
    if size == 1:
        yield Ranks()
        return
    backend = "gloo"
    if device.type == "cuda":
        local = _number("LOCAL_RANK", 0, size - 1, "0")  # not set: the only rank of its machine
        if local >= torch.cuda.device_count():
            raise UserError(
                f"ranks: more are started on this machine than its {torch.cuda.device_count()} "
                f"GPUs; start one per GPU"
            )
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    rank = _number("RANK", 0, size - 1)
    url = os.environ.get(RENDEZVOUS, "env://")
    scheme, _, path = url.partition("://")
    store: Store
    if scheme == "file":  # read by torch, it would end at the first '?' or '#' of the path
        store = dist.FileStore(path, size)  # type: ignore[attr-defined]
    else:
        store, _, _ = next(rendezvous(url, rank, size, timeout=_TIMEOUT))
    store.set_timeout(_TIMEOUT)  # a FileStore has its own otherwise
    dist.init_process_group(
        backend,
        store=_fresh_store(store, rank, size),
        rank=rank,
        world_size=size,
        timeout=_TIMEOUT,
    )
    yield Ranks(dist.get_rank(), dist.get_world_size())
    # Not after an error: NCCL would wait here for the others, which wait for this one to end.
    dist.destroy_process_group()


def _number(name: str, least: int, most: int, default: str = "") -> int:
    text = os.environ.get(name, default)
    if not (text.isdecimal() and len(text) < 7 and least <= int(text) <= most):
        raise UserError(
            f"{name}: {shown(text)} is not a number from {least} to {most}; let torchrun set it, "
            f"or unset WORLD_SIZE to work alone"
        )
    return int(text)


def _fresh_store(store: Store, rank: int, size: int) -> Store:
    """A namespace of the store for the ranks of this start, whatever earlier ones left in it.

    torchrun keeps one store through its restarts, with the addresses of ranks that have died, and
    no number that it hands out is both new at each restart and the same on every machine. So each
    rank draws an id: rank 0's id is the namespace, and it lists the ranks that have answered to it.

    Args:
        store: one that all ranks reach; earlier ranks may have used it, but have ended.
        rank: of this process.
        size: number of ranks.

    Raises:
        RuntimeError: a rank does not answer within the timeout.
    """
    own_id = uuid.uuid4().hex
    deadline = time.monotonic() + _TIMEOUT.total_seconds()

    def read(key: str) -> str | None:
        # Polled: in a `get` that waits, Python would not handle signals.
        return store.get(key).decode() if store.check([key]) else None

    if rank == 0:
        store.set("vdvae/first", own_id)
    missing = f"rank {0 if rank else 1}"
    while time.monotonic() < deadline:
        if rank == 0:
            answers = [read(f"{own_id}/{other}") for other in range(1, size)]
            if None not in answers:
                store.set(f"{own_id}/all", " ".join(map(str, answers)))
                return PrefixStore(own_id, store)
            missing = f"rank {1 + answers.index(None)}"
        elif namespace := read("vdvae/first"):  # of an earlier start, its list does not have us
            store.set(f"{namespace}/{rank}", own_id)
            if own_id in (read(f"{namespace}/all") or "").split():
                return PrefixStore(namespace, store)
        time.sleep(0.05)
    raise RuntimeError(f"ranks: {missing} did not answer within {_TIMEOUT}")
