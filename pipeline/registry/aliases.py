"""Aliases that move on the record: every move is a tag of the registered model, and can be undone.

MLflow keeps no history of an alias. A move is written down, made, and confirmed. What happened is
read from the chain of records: one that was killed before it was confirmed has happened where the
next one, or the alias, is where it led; a gap is a move that was made elsewhere, in MLflow's own
page say.

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
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

from pipeline.registry.promotion import Comparison
from vdvae.config import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import RegisteredModel

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
    who: str = "unknown"  # user@machine
    when: str = "unknown"  # UTC
    state: Literal["intended", "done"] = "intended"

    def to_json(self) -> str:
        """The tag's text."""
        names = {"source": "from", "target": "to"}
        return json.dumps({names.get(key, key): value for key, value in asdict(self).items()})

    @classmethod
    def from_json(cls, text: str) -> Move | None:
        """Reads what `to_json` wrote; None: a move that earlier versions called abandoned."""
        values = json.loads(text)
        if values["state"] == "abandoned":
            return None
        values["source"], values["target"] = values.pop("from"), values.pop("to")
        found = values["comparison"]
        if found is not None:
            values["comparison"] = Comparison(**{**found, "interval": tuple(found["interval"])})
        return cls(**values)

    def __str__(self) -> str:
        text = f"{self.alias}: {self.source or 'none'} -> {self.target or 'none'}, {self.why}"
        if self.comparison:
            text += f" by {self.comparison}"
        return text


class Alias:
    """One alias of one registered model, and its history. Its lock must be held to move it."""

    def __init__(self, client: MlflowClient, model: str, alias: str) -> None:
        self._client = client
        self.model, self.alias = model, alias

    @property
    def holder(self) -> str | None:
        """The version that has the alias now."""
        return _holders(self._client.get_registered_model(self.model)).get(self.alias)

    def history(self) -> list[Move]:
        """Every move of this alias, the oldest first."""
        return [move for move in history(self._client, self.model) if move.alias == self.alias]

    def move(
        self, source: str | None, target: str, why: Why, comparison: Comparison | None = None
    ) -> bool:
        """Moves the alias from `source` to `target`.

        Returns:
            False where somebody on another machine has moved it too: decide again.
        """
        model = self._client.get_registered_model(self.model)
        if _holders(model).get(self.alias) != source:
            return False
        taken = [int(found[1]) for found in map(_TAG.fullmatch, model.tags) if found]
        move = Move(
            alias=self.alias, source=source, target=target, why=why, comparison=comparison,
            who=_who(), when=datetime.now(UTC).isoformat(timespec="seconds"),
        )  # fmt: skip
        tag = f"move.{max(taken, default=0) + 1:06d}.{uuid.uuid4().hex[:4]}"
        self._client.set_registered_model_tag(self.model, tag, move.to_json())
        self._client.set_registered_model_alias(self.model, self.alias, target)
        done = replace(move, state="done").to_json()
        self._client.set_registered_model_tag(self.model, tag, done)
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
        return self.history()[-1]

    def _before(self, holder: str | None) -> str | None:
        versions = self._client.search_model_versions(f"name = '{self.model}'")
        there = {str(version.version) for version in versions}
        holders: list[str | None] = []
        for move in self.history():
            if move.why == "rollback":
                while holders and holders[-1] != move.target:
                    holders.pop()
            else:
                holders.append(move.target)
        earlier = [version for version in holders if version in there and version != holder]
        return earlier[-1] if earlier else None


def history(client: MlflowClient, model: str) -> list[Move]:
    """Every move of a model's aliases that happened; of each alias the oldest first.

    Raises:
        UserError: somebody has edited one beyond recognition.
    """
    registered = client.get_registered_model(model)
    moves: list[Move] = []
    for tag, text in sorted(registered.tags.items()):
        if _TAG.fullmatch(tag):
            try:
                move = Move.from_json(text)
            except (ValueError, LookupError, TypeError, AttributeError):
                raise UserError(
                    f"{model}: its tag {tag} is no move of an alias any more; "
                    f"delete that tag in MLflow"
                ) from None
            moves += [] if move is None else [move]
    holders = _holders(registered)
    names = dict.fromkeys([*(move.alias for move in moves), *holders])
    return [
        move
        for name in names
        for move in _happened(name, [m for m in moves if m.alias == name], holders.get(name))
    ]


def _happened(alias: str, recorded: Sequence[Move], holder: str | None) -> list[Move]:
    """What led an alias from nobody to its holder, as far as the records tell."""
    happened: list[Move] = []
    at: str | None = None  # the holder so far

    def elsewhere(target: str | None) -> None:
        if at != target:
            found: Why = "found moved"
            happened.append(Move(alias=alias, source=at, target=target, why=found, state="done"))

    for move, then in zip(recorded, [*(m.source for m in recorded[1:]), holder], strict=True):
        elsewhere(move.source)
        at = move.source
        if move.state == "done" or then == move.target:
            happened.append(move)
            at = move.target
    elsewhere(holder)
    return happened


def _holders(registered: RegisteredModel) -> dict[str, str]:
    return {alias: str(version) for alias, version in registered.aliases.items()}


def _who() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = "unknown"
    return f"{user}@{socket.gethostname()}"
