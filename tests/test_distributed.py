"""One run on several ranks: the same losses, one decision, data and noise that go on unchanged.

Two ranks are two real processes, which meet in a file and speak over gloo.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import kills
import pytest
import torch
import torch.distributed as dist
from test_training import CPU, MODEL, settings

from vdvae.config import TrainConfig, UserError
from vdvae.distributed import SINGLE, Ranks, _fresh_store, ranks
from vdvae.model import VDVAE
from vdvae.randomness import training_noise
from vdvae.training import Stopped, share_of, start, train, update

BATCH = 8
CONFIG = settings(batch_size=BATCH, warmup_steps=20, learning_rate=3e-3)


def images(seen: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seen)
    return torch.randint(0, 256, (BATCH, 1, 4, 4), generator=generator, dtype=torch.uint8)


def losses(
    group: Ranks, steps: int, dtype: torch.dtype, bad_rank: int | None = None, **changes: Any
) -> list[float]:
    """bits/dim of each step; of a bad rank the posterior's noise is not finite in step 2."""
    config = replace(CONFIG, **changes)
    state, share = start(MODEL, config, CPU, group, dtype), share_of(config, group)
    mine = range(group.rank * share, (group.rank + 1) * share)
    found = []
    for step in range(steps):
        noise_BN = training_noise(config.seed, step, mine, MODEL.num_latents, CPU).to(dtype)
        if step == 2 and group.rank == bad_rank:
            noise_BN[:] = math.nan
        figures = update(state, config, images(step * BATCH).chunk(group.size)[group.rank],
                         noise_BN, group)  # fmt: skip
        found.append(figures["rate_bits_per_dim"] + figures["distortion_bits_per_dim"])
    skipped = group.gather(state.skipped)
    return [*found, *(skipped if bad_rank is not None else [])]


def part_of_a_run(group: Ranks, folder: Path, config: TrainConfig, until: int) -> int:
    """Trains up to a step, or to the end; returns a hash of the weights' bytes."""

    def batches(seen: int) -> Iterator[torch.Tensor]:
        while True:
            yield images(seen).chunk(group.size)[group.rank]
            seen += BATCH

    model = train(MODEL, config, batches, folder, lambda p: p.step < until, ranks=group)
    if model is None:
        return 0
    return hash(b"".join(value.numpy().tobytes() for value in model.state_dict().values()))


def stopped_by_one(group: Ranks, folder: Path, config: TrainConfig, work: str) -> None:
    """Trains until one rank is asked to stop: in a validation the second, in pictures the first."""

    def batches(seen: int) -> Iterator[torch.Tensor]:
        while True:
            yield images(seen).chunk(group.size)[group.rank]
            seen += BATCH

    def validate(model: VDVAE) -> float:
        if not group.all_true(work != "validation" or group.is_main):
            raise Stopped
        return 1.0

    def on_log(step: int, model: VDVAE) -> None:
        raise Stopped

    config = replace(config, validate_every=3)
    logged = on_log if group.is_main and work == "pictures" else None
    done = train(MODEL, config, batches, folder, lambda p: True, validate, logged, group)
    assert done is None


def main(folder: Path) -> None:
    """What each of two ranks does."""
    torch.set_num_threads(1)
    with ranks(torch.device("cpu")) as group:
        found = {
            "float64": losses(group, 200, torch.float64),
            "float32": losses(group, 10, torch.float32),
            "in parts": losses(
                group, 20, torch.float64, accumulation=2, checkpoint_activations_from=1
            ),
            "bad": losses(group, 4, torch.float32, bad_rank=1),
        }
        config = replace(CONFIG, steps=12, checkpoint_every=4)
        part_of_a_run(group, folder / "whole", config, 99)
        part_of_a_run(group, folder / "cut", config, 7)
        part_of_a_run(group, folder / "cut", config, 99)
        part_of_a_run(group, folder / "passed on", config, 7)
        for work in ("validation", "pictures"):
            stopped_by_one(group, folder / work, config, work)
            group.barrier()  # until the first has written it
            part_of_a_run(group, folder / work, config, 99)
        if group.is_main:
            (folder / "found.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks have left."""
    folder = tmp_path_factory.mktemp("ranks")
    processes = kills.begin_ranks(__file__, str(folder), size=2)
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, list[float]]:
    found: dict[str, list[float]] = json.loads((folder / "found.json").read_text())
    return found


def test_two_ranks_have_the_losses_of_one(found: dict[str, list[float]]) -> None:
    alone = losses(SINGLE, 200, torch.float64)
    assert found["float64"] == pytest.approx(alone, rel=1e-8)
    assert alone[-1] < alone[0] - 0.5  # it did learn
    assert found["float32"] == pytest.approx(losses(SINGLE, 10, torch.float32), rel=1e-5)


def test_a_batch_in_parts_is_the_same_batch(found: dict[str, list[float]]) -> None:
    alone = losses(SINGLE, 20, torch.float64)
    assert found["in parts"] == pytest.approx(alone, rel=1e-8)
    assert losses(SINGLE, 20, torch.float64, accumulation=4) == pytest.approx(alone, rel=1e-8)


def test_what_one_rank_cannot_use_all_skip(found: dict[str, list[float]]) -> None:
    *finite, skipped_here, skipped_there = found["bad"]
    assert [math.isfinite(loss) for loss in finite] == [True, True, False, True]
    assert (skipped_here, skipped_there) == (1, 1)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from vdvae.checkpoint import read_newest_state

    newest = read_newest_state(folder)
    assert newest is not None
    assert newest[1]["step"] == 12
    return {name: value for name, value in newest[0].items() if name.startswith("ema/")}


def test_two_ranks_go_on_bit_for_bit(folder: Path) -> None:
    whole, cut = weights(folder / "whole"), weights(folder / "cut")
    assert all(torch.equal(value, cut[name]) for name, value in whole.items())


@pytest.mark.parametrize("work", ["validation", "pictures"])
def test_where_one_rank_is_asked_to_stop_all_do_and_go_on(folder: Path, work: str) -> None:
    whole, cut = weights(folder / "whole"), weights(folder / work)
    assert all(torch.equal(value, cut[name]) for name, value in whole.items())


def test_one_rank_goes_on_where_two_stopped(folder: Path) -> None:
    config = replace(CONFIG, steps=12, checkpoint_every=4)
    part_of_a_run(SINGLE, folder / "passed on", config, 99)
    whole, passed_on = weights(folder / "whole"), weights(folder / "passed on")
    for name, value in whole.items():
        torch.testing.assert_close(passed_on[name], value, rtol=1e-5, atol=1e-6)


def test_a_batch_that_does_not_part_evenly_is_refused() -> None:
    assert share_of(replace(CONFIG, accumulation=4), Ranks(0, 2)) == 4
    with pytest.raises(UserError, match=r"8 cannot be divided by 3 ranks x .* 1 = 3; choose a mul"):
        share_of(CONFIG, Ranks(0, 3))
    with pytest.raises(UserError, match=r"2 ranks x train.accumulation 8 = 16"):
        share_of(replace(CONFIG, accumulation=8), Ranks(0, 2))


def test_noise_is_of_the_image_and_not_of_the_rank() -> None:
    whole = training_noise(CONFIG.seed, 5, range(8), 6, CPU)
    assert torch.equal(whole[4:], training_noise(CONFIG.seed, 5, range(4, 8), 6, CPU))
    assert not torch.equal(whole, training_noise(CONFIG.seed, 6, range(8), 6, CPU))
    assert len({tuple(row) for row in whole.tolist()}) == 8


def test_ranks_that_start_again_do_not_meet_those_before_them() -> None:
    """torchrun keeps its store: whoever comes first finds the answers of ranks that have died."""
    store = dist.HashStore()

    def meet(rank: int, start: int, late: int) -> str:
        if rank == late:
            time.sleep(0.1)  # the others look at what is there
        part = _fresh_store(store, rank, 3)
        part.set(f"address/{rank}", f"{start}/{rank}")
        return " ".join(part.get(f"address/{other}").decode() for other in range(3))

    with ThreadPoolExecutor(3) as pool:
        for start, late in enumerate((0, 2, 0, 1)):
            found = pool.map(meet, range(3), [start] * 3, [late] * 3, timeout=30)
            assert set(found) == {f"{start}/0 {start}/1 {start}/2"}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
