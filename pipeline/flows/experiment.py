"""A run in a clone of its own: what it shares with its origin, and how its results get there.

The origin's working tree is never touched. What the clone found out arrives as a DVC experiment,
which `dvc exp show` lists there and `dvc exp apply` takes over.
"""

from __future__ import annotations

import functools
import os
import tempfile
import time
from collections.abc import Sequence, Set
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from configobj import ConfigObj

from pipeline.dvc import cache_folder, cached_object, dvc
from pipeline.git import CHANGES, git
from pipeline.params import Places
from pipeline.settings import Settings, variable
from pipeline.system.commands import CommandFailed
from pipeline.yaml_files import parse_yaml
from vdvae.config import UserError
from vdvae.files import atomic_write, parse_json

_RAW = Path("data/raw")
_PUSH_ATTEMPTS = 3


def clone(origin: Path, folder: Path) -> None:
    """Clones the commit that is checked out in `origin`; uncommitted changes stay behind.

    Raises:
        UserError: where `origin` is no git repository with a commit.
    """
    try:
        git("clone", "--quiet", str(origin), str(folder))
    except CommandFailed as error:
        raise UserError(
            f"{origin}: cannot be cloned ({error}); a run with settings of its own works in a "
            f"clone: commit the project with git"
        ) from None


def origin_of_clone() -> Path | None:
    """The checkout that the current folder is a clone of.

    None where the origin is on another machine, or a bare repository on this one: there is then
    nothing but git to share.

    Raises:
        UserError: where the current folder is no clone, or the person's own checkout.
    """
    try:
        url = git("remote", "get-url", "origin")
    except (OSError, CommandFailed):
        raise UserError(
            f"{Path.cwd()}: is no clone with a remote 'origin'; a flow run works in a clone that "
            f"its deployment pulls: deploy with 'prefect deploy --all'"
        ) from None
    parts = urlsplit(url)
    local = unquote(parts.path) if parts.scheme == "file" else url
    origin = Path(local).resolve() if local.startswith("/") and Path(local).is_dir() else None
    if origin == Path.cwd().resolve() or Settings().origin == str(Path.cwd()):
        raise UserError(
            f"{Path.cwd()}: is the origin itself, which no run may edit; deploy with "
            f"'prefect deploy --all', whose pull step makes a clone"
        )
    bare = origin and git("-C", str(origin), "rev-parse", "--is-bare-repository") == "true"
    return None if bare else origin


def share_places(origin: Path | None) -> None:
    """Sets the places that are not set to those of the origin, for us and for every child.

    Raises:
        UserError: where they are not set and there is no checkout on this machine.
    """
    settings = Settings()
    if origin is None:
        for name in ("store", "runs", "tracking_uri", "dvc_cache"):
            if name not in settings.model_fields_set:
                raise UserError(
                    f"{variable(name)}: is not set, and the origin is no checkout on this machine, "
                    f"whose own would do; set it to a place that outlives this run's clone"
                )
        return
    here = Path.cwd()
    os.chdir(origin)  # relative settings and defaults are the origin's
    try:
        places = Places.from_env()
        os.environ |= {
            "VDVAE_STORE": places.store_url,
            "VDVAE_RUNS": str(places.runs),
            "MLFLOW_TRACKING_URI": places.tracking_uri,
            "VDVAE_CACHE": str(places.cache),
            "VDVAE_DVC_CACHE": settings.dvc_cache or str(cache_folder()),
            "VDVAE_DATA_ROOTS": settings.data_roots or str(origin / _RAW),
        }
    finally:
        os.chdir(here)


def prepare(origin: Path | None) -> None:
    """Makes the current folder, a fresh clone, share DVC's cache and raw data with its origin."""
    # `dvc cache dir --local` would write it as ASCII, and end where the path is not.
    config = ConfigObj({"cache": {"dir": Settings().dvc_cache}}, encoding="utf-8")
    with Path(".dvc/config.local").open("wb") as file:
        config.write(file)
    if not _configured("user.email"):
        git("config", "user.name", "vdvae")
        git("config", "user.email", "vdvae@localhost")
    if origin is not None and (origin / _RAW).is_dir():
        _RAW.mkdir(parents=True, exist_ok=True)
        for entry in (origin / _RAW).iterdir():
            if not (_RAW / entry.name).exists():
                (_RAW / entry.name).symlink_to(entry)


def commit() -> str:
    """The commit that the current folder is at, with its subject."""
    return git("log", "-1", "--format=%h %s")


def head() -> str:
    """The full hash of the commit that the current folder is at.

    Raises:
        UserError: where there is none.
    """
    try:
        return git("rev-parse", "--verify", "HEAD")
    except CommandFailed:
        raise UserError(f"{Path.cwd()}: has no commit; commit the project with git") from None


def find(name: str) -> str | None:
    """The commit of the newest experiment of that name, whatever it is based on."""
    found = git(
        "for-each-ref", "--sort=-committerdate", "--format=%(objectname)", f"refs/exps/*/*/{name}"
    )
    return found.split()[0] if found else None


def fetch_from_origin(names: Set[str]) -> None:
    """Brings the experiments of these names from the origin, whatever they are based on.

    Raises:
        CommandFailed: git cannot.
    """
    listed = git("ls-remote", "origin", "refs/exps/*/*/*").split()[1::2]
    wanted = [ref for ref in listed if ref.rpartition("/")[2] in names]
    if wanted:
        git("fetch", "--quiet", "origin", *(f"{ref}:{ref}" for ref in wanted))


def push_to_origin(names: Set[str]) -> None:
    """Brings the experiments of these names that are here to the origin.

    Raises:
        CommandFailed: git cannot.
    """
    listed = git("for-each-ref", "--format=%(refname)", "refs/exps/*/*/*").split()
    wanted = [ref for ref in listed if ref.rpartition("/")[2] in names]
    if wanted:
        git("push", "--quiet", "origin", *(f"{ref}:{ref}" for ref in wanted))


def read(revision: str, path: str) -> str:
    """A file that git keeps, as it is in an experiment.

    Raises:
        UserError: where the experiment has no such file.
    """
    try:
        return git("show", f"{revision}:./{path}")
    except CommandFailed:
        raise UserError(
            f"experiment {revision[:7]}: has no {path}; remove it with 'dvc exp remove "
            f"{revision[:7]}', then run the same command again"
        ) from None


def read_json(revision: str, path: str) -> Any:
    """A JSON file that git keeps, as it is in an experiment.

    Raises:
        UserError: where the experiment has no such file, or it is damaged.
    """
    remedy = f"remove the experiment of {revision}, then run the same command again"
    return parse_json(read(revision, path), f"{path} of {revision}", remedy)


def cached(revision: str, path: str, cache: Path) -> Path:
    """A file that DVC keeps, as it is in an experiment, where it lies in DVC's cache.

    What the cache lacks is asked of DVC's remote, where there is one.

    Args:
        revision: the experiment's commit.
        path: an output of a stage.
        cache: `dvc.cache_folder()`.

    Raises:
        UserError: neither has it, or it is no output there.
    """
    md5 = _outputs(revision).get(path, "")
    file = cached_object(cache, md5)
    if md5 and not file.is_file():
        with suppress(CommandFailed), tempfile.TemporaryDirectory() as folder:
            dvc("get", ".", path, "--rev", revision, "-o", f"{folder}/file")
            file.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(file, Path(folder, "file").read_bytes())
    if not md5 or not file.is_file():
        raise UserError(
            f"experiment {revision[:7]}: {path} is not in DVC's cache, nor in a remote; "
            f"bring it there from where it was made ('dvc push'), or remove it with "
            f"'dvc exp remove {revision[:7]}', then run the same command again"
        )
    return file


@functools.cache  # a commit stays what it is
def _outputs(revision: str) -> dict[str, str]:
    """The md5 of each output of an experiment's stages, by its path."""
    stages = parse_yaml(read(revision, "dvc.lock"), f"dvc.lock of {revision[:7]}")["stages"]
    outs = [out for stage in stages.values() for out in stage.get("outs", ())]
    return {out["path"]: str(out["md5"]) for out in outs if "md5" in out}


def uncommitted(origin: Path) -> list[str]:
    """Tracked files of the origin that differ from its commit, which no clone sees.

    The shared cache makes up for dvc.lock, which does not count.
    """
    status = git("-C", str(origin), *CHANGES)
    return [line.split(maxsplit=1)[1] for line in status.splitlines()]


def publish(name: str, recipe: str, stages: Sequence[str], note: str) -> None:
    """Saves the current folder's parameters and results as an experiment, and pushes it.

    Args:
        name: of the experiment; new, since DVC skips one that exists in silence.
        recipe: whose stages were run.
        stages: that were run; without them DVC asks for the outputs of all recipes.
        note: kept as the experiment's message.

    Raises:
        UserError: with DVC's last line, where it does not arrive in the origin.
    """
    targets = [f"{stage}@{recipe}" for stage in stages]
    message = ["-m", f"{name}: {note}"] if note else []
    # Outputs that DVC does not cache belong to git, which does not know them yet.
    plain = [f"results/{recipe}/{file}" for file in ("metrics.json", "conditions.json")]
    extra = [word for path in plain if Path(path).exists() for word in ("-I", path)]
    try:
        dvc("exp", "save", "-n", name, *message, *extra, *targets)
        for attempt in range(1, _PUSH_ATTEMPTS + 1):
            try:
                said = dvc("exp", "push", "--no-cache", "origin", name)
                break
            except CommandFailed:
                if attempt == _PUSH_ATTEMPTS:
                    raise
                time.sleep(5 * attempt)
    except CommandFailed as error:
        raise UserError(
            f"experiment {name}: DVC cannot save and push it ({error}); "
            f"the results are in the store and MLflow: start the same run again"
        ) from None
    if "Pushed" not in said:
        raise UserError(f"experiment {name}: did not arrive in the origin ({said.strip()})")


def _configured(key: str) -> bool:
    try:
        return bool(git("config", key))
    except CommandFailed:
        return False
