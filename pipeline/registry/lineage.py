"""Where a version comes from: what `register` writes down, and the check of the real bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.dvc import LOCK, lock_entries
from pipeline.shards import Manifest
from pipeline.storage import ObjectMissing, Store
from vdvae.config import UserError, shown
from vdvae.files import sha256_of

SUMS = "SHA256SUMS"  # in a version's folder, as `sha256sum -c` reads it
_ADDED_BY_MLFLOW = "registered_model_meta"  # when it fetches a version by its name


def write_sums(folder: Path) -> str:
    """Lists the sha256 of every file below a folder in SUMS; returns the list's own."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{sha256_of(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")
    return sha256_of(folder / SUMS)


def check_files(folder: Path, sums_sha256: str) -> Iterator[str]:
    """Every difference between the files of a version and those that were registered."""
    sums = folder / SUMS
    if not sums.is_file():
        yield f"{SUMS}: is missing"
        return
    if sha256_of(sums) != sums_sha256:
        yield f"{SUMS}: has changed"
        return  # what it lists means nothing now
    text = sums.read_text(encoding="utf-8", errors="replace")
    listed = {name: sha256 for sha256, _, name in (row.partition("  ") for row in text.split("\n"))}
    del listed[""]  # after the last line
    for name, sha256 in listed.items():
        path = folder / name
        if not path.is_file():
            yield f"{name}: is missing"
        elif sha256_of(path) != sha256:
            yield f"{name}: has changed"
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in (*listed, SUMS, _ADDED_BY_MLFLOW):
            yield f"{name}: was not registered"


def check_lock(recorded: dict[str, Any], recipe: str) -> Iterator[str]:
    """Every difference between dvc.lock here and the entries that were recorded."""
    if not LOCK.exists():
        yield f"{LOCK}: is missing"
        return
    try:
        here = lock_entries(recipe)
    except UserError as error:
        yield str(error)
        return
    for stage, entry in recorded.items():
        if stage not in here:
            yield f"{LOCK}: {stage} is missing"
            continue
        ours, theirs = _flat(here[stage]), _flat(entry)
        for key in sorted(ours.keys() | theirs.keys()):
            if ours.get(key) != theirs.get(key):
                yield (
                    f"{LOCK}: {stage}: {key} is {shown(ours.get(key))}, "
                    f"recorded was {shown(theirs.get(key))}"
                )


def check_shards(manifest: Manifest, store: Store) -> Iterator[str]:
    """Every shard of a manifest whose bytes in the store are missing or others."""
    for split in manifest.splits.values():
        for shard in split.shards:
            try:
                data = store.get(shard.key, limit=shard.bytes + 1)
            except ObjectMissing:
                yield f"shard {shard.name}: is not in the store, at {store.url(shard.key)}"
                continue
            if hashlib.sha256(data).hexdigest() != shard.sha256:
                yield f"shard {shard.name}: its bytes in the store have changed"


def _flat(value: Any, where: str = "") -> dict[str, Any]:
    """Nested values as `outs results/digits/model md5`; items of lists go by their path."""
    if isinstance(value, dict):
        items = {str(key): item for key, item in value.items() if key != "path"}
    elif isinstance(value, list):
        items = {
            str(item["path"]) if isinstance(item, dict) and "path" in item else str(index): item
            for index, item in enumerate(value)
        }
    else:
        return {where: value}
    return {
        name: found
        for key, item in items.items()
        for name, found in _flat(item, f"{where} {key}".strip()).items()
    }
