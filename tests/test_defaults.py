"""What recipes take from `defaults` in params.yaml: DVC sees through it, and so does `-S`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, Project

pytestmark = pytest.mark.integration


@pytest.fixture
def whole(tmp_path: Path) -> Project:
    """A project with params.yaml and dvc.lock as they are committed."""
    project = Project(tmp_path / "project")
    shutil.copy(ROOT / "dvc.lock", project.folder)
    project.run("git", "add", "-A")
    project.run("git", "commit", "-qm", "lock")
    return project


def edit(project: Project, old: str, new: str) -> None:
    path = project.folder / "params.yaml"
    before, found, after = path.read_text().partition(old)  # the first: in `defaults`
    assert found
    path.write_text(before + new + after)


def changed_sections(project: Project) -> set[str]:
    """The sections of params.yaml for which DVC would run a stage of digits again."""
    stages = [f"{stage}@digits" for stage in ("shard", "train", "evaluate", "sample", "register")]
    status = json.loads(project.run("dvc", "status", "--json", *stages))
    entries = [entry for changes in status.values() for entry in changes if isinstance(entry, dict)]
    deps = [entry.get("changed deps", {}) for entry in entries]
    return {key for found in deps for key in found.get("params.yaml", {})}


def test_a_changed_default_reruns_what_depends_on_it_and_nothing_else(whole: Project) -> None:
    assert changed_sections(whole) == set()
    edit(whole, "    weight_decay: 0.01\n", "    weight_decay: 0.02\n")  # digits has its own
    edit(whole, "    test: 0.1\n", "    test: 0.2\n")
    assert changed_sections(whole) == set()
    edit(whole, "    beta1: 0.9\n", "    beta1: 0.8\n")
    assert changed_sections(whole) == {"recipes.digits.train"}
    edit(whole, "    temperature: 1\n", "    temperature: 0.7\n")
    assert changed_sections(whole) == {"recipes.digits.train", "recipes.digits.sample"}


def test_a_setting_of_one_recipe_changes_that_recipe_alone(whole: Project) -> None:
    settings = ("recipes.digits.train.seed=1", "recipes.digits.sample.n=4")
    words = [word for setting in settings for word in ("-S", setting)]
    whole.run("dvc", "exp", "run", "--queue", *words)
    before = yaml.safe_load((whole.folder / "params.yaml").read_text())
    queued: dict[str, Any] = yaml.safe_load(
        whole.run("git", "show", "refs/exps/celery/stash:params.yaml")
    )
    for recipe, sections in before["recipes"].items():
        for section, values in sections.items():
            own = {"train": {"seed": 1}, "sample": {"n": 4}}.get(section, {})
            expected = {**values, **(own if recipe == "digits" else {})}
            assert queued["recipes"][recipe][section] == expected
    assert queued["defaults"] == before["defaults"]
