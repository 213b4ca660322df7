"""Processes end when they should: with a parent that has gone, on a signal, within their grace."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.params import load_recipe, read_params
from pipeline.stages.train import _RankTrainer
from pipeline.system.exits import CANCELLED
from pipeline.system.process import StopRequest, grace_seconds
from vdvae.config import UserError
from vdvae.distributed import SINGLE
from vdvae.models import build
from vdvae.training import Stopped

# A process whose parent has ended before it could ask to be told.
_ORPHAN = """
import os, time
from pipeline.system.process import end_with_parent
parent = os.getpid()
if {alone} and os.fork():
    os._exit(0)
while {alone} and os.getppid() == parent:
    time.sleep(0.001)
end_with_parent({told})
print("goes on")
"""


@pytest.mark.parametrize(
    ("alone", "told", "stage", "goes_on"),
    [
        (True, "parent", False, False),
        (True, "None", True, False),  # DVC tells no number
        (True, "None", False, True),  # nohup, say
        (False, "os.getppid()", True, True),
    ],
)
def test_an_orphan_ends_though_nobody_told_it(
    alone: bool, told: str, stage: bool, goes_on: bool
) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "RANK"}
    environment |= {"DVC_STAGE": "train@digits"} if stage else {}
    done = subprocess.run(
        [sys.executable, "-c", _ORPHAN.format(alone=alone, told=told)],
        env=environment,
        capture_output=True,
        text=True,
        process_group=0 if alone else None,  # as a shell does
    )
    assert done.stderr == ""
    assert done.stdout == ("goes on\n" if goes_on else "")


def test_a_stop_before_anything_has_begun_is_answered_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    handlers: dict[int, Any] = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    stop = StopRequest(begun=False)
    with pytest.raises(SystemExit) as ended:
        handlers[signal.SIGTERM](signal.SIGTERM, None)
    assert ended.value.code == CANCELLED
    stop.begun = True
    handlers[signal.SIGINT](signal.SIGINT, None)
    assert stop.asked


def test_a_stop_is_seen_between_any_two_batches_of_a_validation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    recipe = load_recipe("digits")
    recipe = replace(recipe, evaluate=replace(recipe.evaluate, batch_size=2))
    stop = StopRequest(begun=False)
    places: Any = None
    manifest: Any = None
    part = _RankTrainer(recipe, places, manifest, Path("unused"), SINGLE, stop)

    def batches() -> Iterator[tuple[list[str], torch.Tensor]]:
        for _ in range(5):
            yield ["a", "b"], torch.zeros(2, 1, 8, 8)

    assert part.goes_on()
    assert len(list(part.until_stopped(10, batches()))) == 5
    part.check_stop()
    watched = part.until_stopped(10, batches())
    next(watched)
    stop.asked = True
    with pytest.raises(Stopped):
        next(watched)
    with pytest.raises(Stopped):
        part.check_stop()
    assert not part.goes_on()


def test_the_grace_lets_every_recipes_checkpoint_be_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At 25 MB/s: weights, two moments, averages and the best ones."""
    monkeypatch.delenv("VDVAE_GRACE_SECONDS", raising=False)
    for name in read_params()["recipes"]:
        with torch.device("meta"):
            model = build(load_recipe(name).model)
        state_bytes = 5 * sum(p.numel() * p.element_size() for p in model.parameters())
        assert state_bytes / 25e6 + 15 <= grace_seconds(), name
    monkeypatch.setenv("VDVAE_GRACE_SECONDS", "2.5")
    assert grace_seconds() == 2.5
    monkeypatch.setenv("VDVAE_GRACE_SECONDS", "soon")
    with pytest.raises(UserError, match="VDVAE_GRACE_SECONDS: 'soon' is not a number from 0 to"):
        grace_seconds()
