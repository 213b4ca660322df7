"""What takes space, and what of it nobody needs any more: `vdvae du` and `vdvae gc`.

A shard is needed for as long as a manifest lists it: one of this checkout, of a folder where a
process of this machine works (a run's clone), in DVC's cache (which holds those of branches, tags
and experiments until `dvc gc` drops them), or of a registered version. A manifest that dvc.lock
names on a branch, tag or experiment while the cache lacks it keeps all shards of its recipe.
Checkouts of other machines that write to the same store are not seen.

Whatever is young stays: a writer may be at work whose manifest, by design, comes last.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import tracking
from pipeline.commands.output import print_json
from pipeline.dvc import cache_folder, cached_object
from pipeline.git import git
from pipeline.params import Places, read_params
from pipeline.registry.versions import PREFIX, Version, client_of, fetch_files
from pipeline.services.folder import FOLDER, LOGS
from pipeline.shards import STATES, BlockCache, Manifest
from pipeline.shards.cache import remove_unused
from pipeline.shards.jobs import read_record
from pipeline.storage import Store, Stored, one_line, open_store, s3_address
from pipeline.system.commands import CommandFailed
from pipeline.system.process import reap, try_lock
from pipeline.tracking.run import COPY
from pipeline.yaml_files import parse_yaml
from vdvae.config import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient

# Left to DVC, which alone knows what its objects are for, and asks before it removes them.
_DVC = "'dvc gc --workspace --all-branches --all-tags --all-experiments' frees what no tip needs"
STALE_DAYS = 30  # a training that nobody went on with for so long
_MANIFESTS = Path("data/manifests")
_SHARD = re.compile(r"shards/([A-Za-z0-9_-]{1,60})/[0-9a-f]{64}\.tar")  # as shards.py names them
_TEMPORARY = re.compile(r"(.*/)?\.[^/]+\.[a-z0-9_]{8}\.tmp")  # as vdvae/files.py names them
_STATE = re.compile(r"[A-Za-z0-9_-]+-[0-9a-f]{12}(\.finished)?")  # as stages/train.py names them
_REFUSED = "nothing is removed"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What lies in one place for one reason."""

    place: str
    what: str
    bytes: int
    why: str  # it stays, or may go
    remove: Callable[[], object] | None = None  # None: it stays


@dataclass
class Needs:
    """Which shards manifests list, and of which recipes not every manifest is at hand."""

    keys: dict[str, str] = field(default_factory=dict)  # key: who needs it
    recipes: dict[str, str] = field(default_factory=dict)  # recipe: whose manifest is away
    versions: int = 0  # registered ones that were asked

    def add(self, manifest: Manifest, who: str) -> None:
        """Keeps what a manifest lists; who needed it first is who is told."""
        for split in manifest.splits.values():
            for shard in split.shards:
                self.keys.setdefault(shard.key, who)


def du(as_json: bool = False) -> None:
    """Prints what takes space, by place and reason."""
    read_params()  # at the project's root
    places, cache = Places.from_env(), cache_folder()
    needs, problem = None, ""
    try:
        needs = find_needs(places, cache)
    except UserError as error:
        problem = str(error)
    entries = [
        *survey(places, cache, needs, older_than_hours=24),
        Entry(place=f"DVC's cache {cache}", what="objects", bytes=_size_of(cache), why=_DVC),
        _mlflow(places),
        *_services(),
    ]
    if as_json:
        kept = ("place", "what", "bytes", "why")
        rows = [
            {key: getattr(entry, key) for key in kept} | {"may_go": entry.remove is not None}
            for entry in entries
        ]
        print_json({"entries": rows, "needs_unknown": problem or None})
        return
    for place in dict.fromkeys(entry.place for entry in entries):
        here = [entry for entry in entries if entry.place == place]
        print(f"{_shown_bytes(sum(entry.bytes for entry in here)):>10}  {place}")
        for entry in here:
            print(f"{_shown_bytes(entry.bytes):>14}  {entry.what}: {entry.why}")
    may_go = sum(entry.bytes for entry in entries if entry.remove)
    print(f"{_shown_bytes(may_go):>10}  of this is needed by nothing; 'vdvae gc' lists it")
    if problem:
        print(f"           what shards are needed for is not known: {problem}")


def gc(older_than_hours: float, yes: bool) -> None:
    """Lists what nothing needs, and removes it where `yes` is given.

    Args:
        older_than_hours: what was written later than that stays.
        yes: False only lists.

    Raises:
        UserError: where it cannot be told what is needed; nothing is then removed.
    """
    read_params()  # at the project's root
    places, cache = Places.from_env(), cache_folder()
    needs = find_needs(places, cache)
    entries = survey(places, cache, needs, older_than_hours)
    going = [entry for entry in entries if entry.remove]
    for entry in going:
        print(f"{_shown_bytes(entry.bytes):>10}  {entry.place}  {entry.what}: {entry.why}")
        if yes and entry.remove:
            entry.remove()
    print(
        f"looked for manifests in this checkout, in folders where processes of this machine work, "
        f"in DVC's cache {cache} and at {needs.versions} versions that are registered in "
        f"{tracking.without_credentials(places.tracking_uri)}; checkouts of other machines are "
        f"not seen"
    )
    for recipe, where in sorted(needs.recipes.items()):
        print(
            f"all shards of {recipe} stay: they may be needed by {where}; make that readable, or "
            f"remove it"
        )
    total = _shown_bytes(sum(entry.bytes for entry in going))
    if not going:
        print("nothing can go")
    elif yes:
        print(f"freed {total}")
    else:
        print(f"{total} can go: 'vdvae gc --yes' removes it")


def find_needs(places: Places, cache: Path) -> Needs:
    """What the manifests that can be found list.

    Raises:
        UserError: a manifest is damaged, or git or MLflow cannot be asked.
    """
    needs = Needs()
    # In the direction in which shards pass on: what moves meanwhile is seen at one place or both.
    add_unfinished(needs, places)
    for path in sorted(_MANIFESTS.glob("*.json")):
        needs.add(_load(path), "this checkout")
    stored = open_store(places.store_url).list()
    recipes = {found[1] for found in (_SHARD.fullmatch(each.key) for each in stored) if found}
    add_registered(needs, places, recipes)
    for folder in _workplaces():
        for path in sorted((folder / _MANIFESTS).glob("*.json")):
            needs.add(_load(path), f"a process that works in {folder}")
    for path in _cached_manifests(cache):
        needs.add(_load(path), "a manifest in DVC's cache: a branch, tag or experiment had it")
    for recipe, md5, where in _named_by_git():
        if not cached_object(cache, md5).exists():
            needs.recipes[recipe] = f"{where}, whose manifest is not in DVC's cache ('dvc fetch')"
    return needs


def add_unfinished(needs: Needs, places: Places) -> None:
    """Adds the shards that shardings have made which have not ended."""
    for path in (places.runs / STATES).glob("*/*.json"):
        with suppress(OSError, ValueError, LookupError, TypeError):  # not kept: it is made again
            for shard in read_record(path)["shards"]:
                needs.keys.setdefault(shard["key"], "a sharding to go on with")


def survey(
    places: Places, cache: Path, needs: Needs | None, older_than_hours: float
) -> list[Entry]:
    """What lies in the store, among the training states and half-written, and what may go of it.

    Args:
        places: of this project.
        cache: DVC's.
        needs: `find_needs`; None where it is not known: then every shard stays.
        older_than_hours: what was written later than that stays.
    """
    before = time.time() - 3600 * older_than_hours
    return [
        *_shards(open_store(places.store_url), needs, before),
        *_decoded(places.cache, needs, before),
        *_states(places.runs, cache, before),
        *_left_by_flows(places),
        *_journals(places.runs),
        *_half_written(places, before),
    ]


def _load(path: Path) -> Manifest:
    try:
        return Manifest.load(path)
    except UserError as error:
        reason = str(error).rpartition("; run")[0]
        raise UserError(
            f"{reason}; which shards it needs is not known, so {_REFUSED}: mend or remove it"
        ) from None


def add_registered(needs: Needs, places: Places, recipes: Iterable[str]) -> None:
    """Adds what the registered versions of these recipes need, as their runs recorded it.

    Raises:
        UserError: MLflow cannot be asked, or a version's manifest cannot be read.
    """
    from mlflow.exceptions import MlflowException

    with client_of(places) as client:
        for recipe in sorted(recipes):
            name = f"{PREFIX}{recipe}"
            try:
                # A search alone would show no models to a user who may read none.
                client.get_registered_model(name)
            except MlflowException as error:
                if error.error_code == "PERMISSION_DENIED":
                    needs.recipes[recipe] = f"the model {name}, which you may not read in MLflow"
                elif error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                continue
            for found in client.search_model_versions(f"name = '{name}'", max_results=10_000):
                needs.versions += 1
                version = Version.of(found, {})
                if "manifest_digest" in version.tags:  # else imported: made of no shards of ours
                    needs.add(_recorded_manifest(client, version), "a registered version")


def _recorded_manifest(client: MlflowClient, version: Version) -> Manifest:
    file = f"{COPY}/{version.recipe}.json"
    try:
        with tempfile.TemporaryDirectory() as folder:
            [path] = fetch_files(client, version, [file], Path(folder))
            manifest = Manifest.load(path)
        if manifest.digest != version.tags["manifest_digest"]:
            raise UserError("is another one than the version's manifest_digest")
    except Exception as error:  # of MLflow, S3, the network or the system
        reason = one_line(" ".join(str(error).split())[:300])
        raise UserError(
            f"{version}: its {file} cannot be read ({reason}), so {_REFUSED}; restore it, or "
            f"delete the version in MLflow"
        ) from None
    return manifest


def _workplaces() -> set[Path]:
    """Folders with manifests where a process of this machine works, this one among them or not."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*/cwd"):
        with suppress(OSError):  # it has ended, or is another user's
            found.add(entry.readlink())
    return {folder for folder in found if (folder / _MANIFESTS).is_dir()} - {Path.cwd()}


def _cached_manifests(cache: Path) -> Iterator[Path]:
    # By their beginning: nothing in a cache has a name.
    for path in (cache / "files/md5").glob("??/*"):
        with path.open("rb") as file:
            if file.read(13) == b'{\n  "recipe":':
                yield path


def _named_by_git() -> Iterator[tuple[str, str, str]]:
    """Recipe, md5 and ref of each manifest in dvc.lock at the tip of a branch, tag, experiment."""
    seen = set()
    for ref in ["HEAD", *_asked("for-each-ref", "--format=%(refname)").split()]:
        found = _asked("ls-tree", ref, "dvc.lock").split()
        if not found or found[2] in seen:
            continue
        seen.add(found[2])
        try:
            stages = (parse_yaml(_asked("cat-file", "blob", found[2]), "dvc.lock") or {})["stages"]
            outs = [out for stage in stages.values() for out in stage.get("outs", ())]
            for path, md5 in ((Path(out["path"]), out.get("md5")) for out in outs):
                if path.parent == _MANIFESTS and md5:
                    yield path.stem, md5, ref
        except (UserError, LookupError, TypeError, AttributeError):
            raise UserError(
                f"dvc.lock at {ref}: not readable, so {_REFUSED}; mend it there, or remove {ref}"
            ) from None


def _shards(store: Store, needs: Needs | None, before: float) -> Iterator[Entry]:
    groups: dict[tuple[str, str, bool], list[Stored]] = defaultdict(list)
    for stored in store.list():
        groups[_verdict(stored, needs, before)].append(stored)
    for (what, why, goes), group in sorted(groups.items()):
        yield Entry(
            place=f"store {store.root}",
            what=f"{what}, {len(group)}",
            bytes=sum(stored.bytes for stored in group),
            why=why,
            remove=partial(_delete, store, set(group)) if goes else None,
        )


def _verdict(stored: Stored, needs: Needs | None, before: float) -> tuple[str, str, bool]:
    """What an object is, why it stays or may go, and whether it may go."""
    young = stored.modified > before
    if _TEMPORARY.fullmatch(stored.key):
        return "half-written files", "being written" if young else "left by a kill", not young
    found = _SHARD.fullmatch(stored.key)
    if not found:
        return "other objects", "not made by vdvae, which leaves them alone", False
    what = f"shards of {found[1]}"
    if needs is None:
        return what, "kept", False
    if stored.key in needs.keys:
        return what, f"needed by {needs.keys[stored.key]}", False
    if found[1] in needs.recipes:
        return what, f"perhaps needed by {needs.recipes[found[1]]}", False
    if young:
        return what, "no manifest lists them, but they are young", False
    return what, "no manifest lists them", True


def _decoded(folder: Path, needs: Needs | None, before: float) -> Iterator[Entry]:
    needed = None if needs is None else {Path(key).stem for key in needs.keys}
    groups: dict[tuple[str, str, bool], list[tuple[Path, int]]] = defaultdict(list)
    for path, size, used in BlockCache(folder=folder, limit_bytes=0).files():
        if path.suffix == ".tmp":
            verdict = ("half-written files", "left by a kill, or being written", used < before)
        elif needed is None or path.name.partition("-")[0] in needed:
            verdict = ("decoded shards", "VDVAE_CACHE_GIB bounds them", False)
        else:
            verdict = ("decoded shards", "no manifest lists them", used < before)
        groups[verdict].append((path, size))
    for (what, why, goes), group in sorted(groups.items()):
        yield Entry(
            place=f"cache {folder}",
            what=f"{what}, {len(group)}",
            bytes=sum(size for _, size in group),
            why=why,
            remove=partial(_remove_unused, [path for path, _ in group]) if goes else None,
        )


def _remove_unused(paths: Iterable[Path]) -> None:
    for path in paths:
        remove_unused(path)


def _delete(store: Store, group: set[Stored]) -> None:
    for stored in store.list():
        if stored in group:  # else somebody has put it again since
            store.delete(stored.key)


def _states(runs: Path, cache: Path, before: float) -> Iterator[Entry]:
    places = [place for place in (runs, runs / STATES) if place.is_dir()]
    folders = sorted(entry for place in places for entry in place.iterdir())
    for folder in (entry for entry in folders if _STATE.fullmatch(entry.name) and entry.is_dir()):
        written, size = _newest(folder), _size_of(folder)
        why, goes = _state(folder, cache, written, before)
        yield Entry(
            place=f"runs {runs}",
            what=f"{'sharding' if folder.parent.name == STATES else 'training'} {folder.name}",
            bytes=size,
            why=f"{why}, last written {_ago(written)}",
            remove=partial(_remove_state, folder, written) if goes else None,
        )


def _state(folder: Path, cache: Path, written: float, before: float) -> tuple[str, bool]:
    lock = _state_lock(folder)
    if lock.exists():
        file = try_lock(lock)
        if file is None:
            return "at work", False
        file.close()
    if folder.suffix == ".finished":
        return "finished, half removed", written < before
    curves = folder / "curves.csv"  # written when training has ended
    if curves.exists() and cached_object(cache, _md5_of(curves)).exists():
        return "finished, DVC has what it made", written < before
    if written < time.time() - 86400 * STALE_DAYS:
        return f"unfinished, nobody went on with it for {STALE_DAYS} days", written < before
    return "unfinished: the same command goes on with it", False


def _md5_of(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()  # DVC's names


def _state_lock(folder: Path) -> Path:
    return folder.with_suffix(".lock")


def _remove_state(folder: Path, written: float) -> None:
    lock = try_lock(_state_lock(folder))
    if lock is None:
        return  # somebody goes on with it
    with lock:
        if _newest(folder) != written:
            return  # somebody went on with it and stopped again
        # Renamed first, so that a kill leaves all of it or nothing. The lock's file stays: a
        # process that waits for it would hold a file that no other one finds.
        finished = folder.with_suffix(".finished")
        folder.rename(finished)
        shutil.rmtree(finished)


def _left_by_flows(places: Places) -> Iterator[Entry]:
    """What a killed flow or stage left, which the next one's start would clear away, too."""
    kinds: list[tuple[str, str, Callable[[], object]]] = [
        ("clones of flows", "flows", partial(reap, places.runs)),
        ("open MLflow runs", "mlflow", partial(tracking.settle, places)),
    ]
    for what, folder, clear in kinds:
        groups: dict[bool, list[Path]] = {True: [], False: []}
        for lock in (places.runs / folder).glob("*.lock"):
            file = try_lock(lock)
            groups[file is not None].append(lock)
            if file is not None:
                file.close()
        for dead, group in groups.items():
            if group:
                yield Entry(
                    place=f"runs {places.runs}",
                    what=f"{what}, {len(group)}",
                    bytes=sum(_size_of(lock.with_suffix("")) for lock in group),
                    why="left by a kill" if dead else "in use",
                    remove=clear if dead else None,
                )


def _journals(runs: Path) -> Iterator[Entry]:
    if size := _size_of(runs / "mlflow"):
        why = "'python -m pipeline.tracking' delivers what ended runs left"
        yield Entry(place=f"runs {runs}", what="journals for MLflow", bytes=size, why=why)


def _half_written(places: Places, before: float) -> Iterator[Entry]:
    for folder in (Path("results"), _MANIFESTS, places.runs):
        left = [
            path
            for path in _files(folder)
            if _TEMPORARY.fullmatch(path.name) and path.lstat().st_mtime < before
        ]
        if left:
            yield Entry(
                place=f"{'runs ' if folder == places.runs else ''}{folder}",
                what=f"half-written files, {len(left)}",
                bytes=sum(path.lstat().st_size for path in left),
                why="left by a kill",
                remove=partial(_unlink, left),
            )


def _unlink(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _mlflow(places: Places) -> Entry:
    place = f"MLflow {tracking.without_credentials(places.tracking_uri)}"
    why = "'mlflow gc' frees what deleted runs had"
    database = tracking.sqlite_path(places.tracking_uri)
    if database:
        size = _size_of(database.parent)
        return Entry(place=place, what=f"database and artifacts {database.parent}", bytes=size,
                     why=why)  # fmt: skip
    try:
        with tracking.mlflow_errors(places.tracking_uri):
            client = tracking.connect(places.tracking_uri)
            experiment = client.get_experiment_by_name(tracking.EXPERIMENT)
        root = experiment.artifact_location if experiment else "none yet"
        in_store = s3_address(root) or Path(root.removeprefix("file://")).is_dir()
        size = sum(stored.bytes for stored in open_store(root).list()) if in_store else 0
    except UserError as error:
        return Entry(place=place, what="artifacts", bytes=0, why=f"not counted: {error}")
    return Entry(place=place, what=f"artifacts {root}", bytes=size,
                 why=why if in_store else "not counted: the server keeps them")  # fmt: skip


def _services() -> Iterator[Entry]:
    logs = _size_of(LOGS)
    if FOLDER.is_dir():
        yield Entry(place=f"{FOLDER}", what="logs", bytes=logs, why="kept small by the services")
        rest = _size_of(FOLDER) - logs
        yield Entry(place=f"{FOLDER}", what="databases and running clones", bytes=rest, why="kept")


def _files(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):
        yield from (Path(parent, name) for name in names)


def _size_of(folder: Path) -> int:
    total = 0
    for path in _files(folder):
        with suppress(FileNotFoundError):  # removed in the meantime
            total += path.lstat().st_size
    return total


def _newest(folder: Path) -> float:
    times = [folder.stat().st_mtime]
    for path in _files(folder):
        with suppress(FileNotFoundError):
            times.append(path.lstat().st_mtime)
    return max(times)


def _asked(*words: str) -> str:
    try:
        return git(*words)
    except (OSError, CommandFailed) as error:
        raise UserError(
            f"git cannot be asked what is needed ({error}); run this at the root of a project that "
            f"git and DVC know"
        ) from None


def _ago(moment: float) -> str:
    hours = (time.time() - moment) / 3600
    return f"{hours:.0f} hours ago" if hours < 48 else f"{hours / 24:.0f} days ago"


def _shown_bytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB" if count < 2**30 else f"{count / 2**30:,.1f} GiB"
