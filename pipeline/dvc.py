"""The one owner of DVC: its files, read; its commands, run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pipeline.params import no_recipe, read_params
from pipeline.system.commands import CommandFailed, output_of
from pipeline.yaml_files import read_yaml
from vdvae.config import UserError

STAGES = ("shard", "train", "evaluate", "sample", "register")
LOCK = Path("dvc.lock")
_REGISTERED = STAGES[:-1]  # the stages whose results are registered


def dvc(*words: str) -> str:
    """What a command of DVC prints.

    Raises:
        CommandFailed: it fails.
    """
    return output_of([sys.executable, "-m", "dvc", *words])


def cache_folder() -> Path:
    """The folder of DVC's cache, absolute.

    Raises:
        UserError: the current folder is no project of DVC.
    """
    try:
        return Path(dvc("cache", "dir")).resolve()
    except CommandFailed as error:
        raise UserError(
            f"{Path.cwd()}: DVC does not say where its cache is ({error}); run this at the root of "
            f"a project that git and DVC know"
        ) from None


def cached_object(cache: Path, md5: str) -> Path:
    """Where the object of that hash lies in DVC's cache, if it is there."""
    return cache / "files/md5" / md5[:2] / md5[2:]


def lock_entries(recipe: str, lock: Path = LOCK) -> dict[str, Any]:
    """What dvc.lock holds of the stages before `register`; empty where it is missing.

    Raises:
        UserError: the file is not what DVC writes.
    """
    try:
        stages = read_yaml(lock)["stages"]
        names = [f"{stage}@{recipe}" for stage in _REGISTERED]
        return {name: stages[name] for name in names if name in stages}
    except FileNotFoundError:
        return {}
    except (UserError, TypeError, LookupError):
        raise damaged(lock) from None


def damaged(lock: Path) -> UserError:
    """What to say of a dvc.lock that is not what DVC writes."""
    return UserError(f"{lock}: is damaged; restore it with 'git checkout {lock}'")


def code_of(stage: str) -> list[str]:
    """The source files and folders that a stage's results depend on, by dvc.yaml."""
    listed = read_yaml(Path("dvc.yaml"))["stages"][stage]["do"]
    return [path for path in listed["deps"] if path.startswith(("vdvae/", "pipeline/"))]


def check_recipe(recipe: str) -> None:
    """Checks that dvc.yaml has stages for a recipe.

    Raises:
        UserError: where params.yaml does not know it or does not list it as active.
    """
    params = read_params()
    if recipe not in params["recipes"]:
        raise UserError(f"params.yaml: {no_recipe(recipe, params)}")
    if recipe not in params["active"]:
        wanted = ", ".join([*params["active"], recipe])
        raise UserError(
            f"params.yaml: active: {recipe!r} is not in it; set 'active: [{wanted}]' there"
        )


def pending(recipe: str) -> dict[str, str]:
    """Why DVC would run stages of a recipe again, by stage; those that it would reuse are left out.

    Changed inputs that an earlier stage is yet to make are not foreseen.

    Raises:
        UserError: where the recipe is not active, or DVC cannot tell.
    """
    check_recipe(recipe)
    targets = [f"{stage}@{recipe}" for stage in STAGES]
    try:
        found = json.loads(dvc("status", "--json", *targets))
    except CommandFailed as error:
        raise UserError(f"dvc status {targets[0]}: {error}") from None
    reasons = {}
    for target, changes in found.items():
        words = []
        for change in changes:
            if isinstance(change, str):
                words.append(change)  # such as "changed command"
                continue
            for what in change.values():
                words += [f"{path} {how}" for path, how in _flat(what)]
        reasons[target.partition("@")[0]] = ", ".join(words)
    return {stage: reasons[stage] for stage in STAGES if stage in reasons}


def _flat(changes: dict[str, Any]) -> list[tuple[str, str]]:
    # Changed parameters are one level deeper than files: {"params.yaml": {key: how}}.
    found = []
    for path, how in changes.items():
        found += _flat(how) if isinstance(how, dict) else [(path, str(how))]
    return found
