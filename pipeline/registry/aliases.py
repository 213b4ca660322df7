"""Aliases that move on the record: every move is a tag of the registered model, and can be undone.

MLflow keeps no history of an alias. A move is written down first as intended, then made, then
called done, so a kill in between leaves no lie: the next call sees where the alias is and says
whether the move happened. Moves that were made elsewhere, in MLflow's own page say, are noticed by
the next call and written down as such.

Whoever moves an alias holds the lock of the model (`registry.locked_model`). On several machines
with one MLflow server that lock is each machine's own: the alias is read again right before and
right after it is set, which leaves a gap of one request.
"""

from __future__ import annotations

import getpass
import json
import re
import socket
import uuid
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

from pipeline.registry.promotion import Comparison
from vdvae.config import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient

# The end is random: another machine may take the same number at the same moment.
_TAG = re.compile(r"move\.(\d{6})\.[0-9a-f]{4}")

Why = Literal["first", "better", "rollback", "chosen by hand", "imported", "found moved"]


@dataclass(frozen=True, kw_only=True)
class Move:
    """One move of an alias; versions are MLflow's texts, None where nobody holds it."""

    alias: str
    source: str | None  # the version that had it
    target: str | None  # the version that gets it
    why: Why
    comparison: Comparison | None = None  # where one was made
    who: str = ""  # user@machine
    when: str = ""  # UTC
    state: Literal["intended", "done", "abandoned"] = "intended"

    def to_json(self) -> str:
        """The tag's text."""
        names = {"source": "from", "target": "to"}
        return json.dumps({names.get(key, key): value for key, value in asdict(self).items()})

    @classmethod
    def from_json(cls, text: str) -> Move:
        """Reads what `to_json` wrote."""
        values = json.loads(text)
        values["source"], values["target"] = values.pop("from"), values.pop("to")
        found = values["comparison"]
        if found is not None:
            values["comparison"] = Comparison(**{**found, "interval": tuple(found["interval"])})
        return cls(**values)

    def __str__(self) -> str:
        text = f"{self.alias}: {self.source or 'none'} -> {self.target or 'none'}, {self.why}"
        if self.comparison:
            text += f" by {self.comparison}"
        return text + (f" ({self.state})" if self.state != "done" else "")


class Alias:
    """One alias of one registered model, and its history. Its lock must be held.

    Making one settles what a killed call left open, and what was moved elsewhere.
    """

    def __init__(self, client: MlflowClient, model: str, alias: str) -> None:
        self._client = client
        self.model, self.alias = model, alias
        self._settle()

    @property
    def holder(self) -> str | None:
        """The version that has the alias now."""
        found = self._client.get_registered_model(self.model).aliases.get(self.alias)
        return None if found is None else str(found)

    def history(self) -> dict[str, Move]:
        """Every move of this alias by the name of its tag, the oldest first."""
        moves = history(self._client, self.model)
        return {tag: move for tag, move in moves.items() if move.alias == self.alias}

    def move(
        self, source: str | None, target: str, why: Why, comparison: Comparison | None = None
    ) -> bool:
        """Moves the alias from `source` to `target`.

        Returns:
            False where somebody on another machine has moved it too: decide again.
        """
        if self.holder != source:
            return False
        move = Move(
            alias=self.alias, source=source, target=target, why=why, comparison=comparison,
            who=_who(), when=_now(),
        )  # fmt: skip
        tag = self._record(move)
        self._client.set_registered_model_alias(self.model, self.alias, target)
        self._record(replace(move, state="done"), tag)
        return self.holder == target

    def rollback(self) -> Move:
        """Gives the alias back to the version that had it before; the move that was made.

        Again and again it goes further back: what was rolled back from is not returned to.

        Raises:
            UserError: there is no version to go back to.
        """
        holder = self.holder
        before = self._before(holder)
        if before is None:
            raise UserError(
                f"{self.model}@{self.alias}: no earlier version to go back to "
                f"(it is at {holder or 'none'}); see 'vdvae models show {self.model}', or choose "
                f"one with 'vdvae models promote {self.model}/VERSION'"
            )
        if not self.move(holder, before, "rollback"):
            raise UserError(
                f"{self.model}@{self.alias}: was moved by somebody else at the same moment; "
                f"look with 'vdvae models show {self.model}' before you roll back again"
            )
        return list(self.history().values())[-1]

    def _before(self, holder: str | None) -> str | None:
        there = {
            str(version.version)
            for version in self._client.search_model_versions(f"name = '{self.model}'")
        }
        holders: list[str | None] = []
        for move in self.history().values():
            if move.state == "done" and move.why == "rollback":
                while holders and holders[-1] != move.target:
                    holders.pop()
            elif move.state == "done":
                holders.append(move.target)
        earlier = [version for version in holders if version in there and version != holder]
        return earlier[-1] if earlier else None

    def _settle(self) -> None:
        moves, holder = self.history(), self.holder
        for tag, move in moves.items():
            if move.state == "intended":
                happened = holder == move.target
                move = replace(move, state="done" if happened else "abandoned")
                self._record(move, tag)
                moves[tag] = move
        done = [move.target for move in moves.values() if move.state == "done"]
        known = done[-1] if done else None
        if known != holder:
            found: Why = "found moved"
            self._record(
                Move(
                    alias=self.alias, source=known, target=holder, why=found,
                    who="unknown", when=_now(), state="done",
                )
            )  # fmt: skip

    def _record(self, move: Move, tag: str | None = None) -> str:
        if tag is None:
            taken = history(self._client, self.model)
            number = 1 + max((int(key.split(".")[1]) for key in taken), default=0)
            tag = f"move.{number:06d}.{uuid.uuid4().hex[:4]}"
        self._client.set_registered_model_tag(self.model, tag, move.to_json())
        return tag


def history(client: MlflowClient, model: str) -> dict[str, Move]:
    """Every recorded move of a model's aliases by the name of its tag, the oldest first.

    Raises:
        UserError: somebody has edited one beyond recognition.
    """
    moves = {}
    for tag, text in sorted(client.get_registered_model(model).tags.items()):
        if _TAG.fullmatch(tag):
            try:
                moves[tag] = Move.from_json(text)
            except (ValueError, LookupError, TypeError, AttributeError):
                raise UserError(
                    f"{model}: its tag {tag} is no move of an alias any more; "
                    f"delete that tag in MLflow"
                ) from None
    return moves


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _who() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = "unknown"
    return f"{user}@{socket.gethostname()}"
