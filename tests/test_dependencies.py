"""What a stage's results depend on is in dvc.yaml, or it stands here why not."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

from pipeline.dvc import code_of

ROOT = Path(__file__).resolve().parents[1]

_MACHINERY = {
    **dict.fromkeys(
        ("pipeline/system/exits.py", "pipeline/system/launch.py", "pipeline/system/process.py"),
        "starts and ends processes",
    ),
    "pipeline/system/events.py": "tells how far a stage is",
    "pipeline/settings.py": "says where things are, and how many processes work",
    **dict.fromkeys(
        (
            "pipeline/__init__.py",
            "pipeline/shards/__init__.py",
            "pipeline/system/__init__.py",
            "vdvae/__init__.py",
        ),
        "names what is elsewhere",
    ),
    **dict.fromkeys(
        ("pipeline/stages/__init__.py", "pipeline/stages/interpreter.py"),
        "starts a stage, or refuses to",
    ),
    "pipeline/shards/cache.py": "gives back what was decoded, compared with its CRC",
    "pipeline/storage.py": "moves bytes, which are compared with the manifest's hashes",
    "pipeline/yaml_files.py": "gives the values that a file holds, or refuses it",
    "vdvae/files.py": "moves bytes to and from the disk",
}
_ON_SHARDS = {
    **_MACHINERY,
    **dict.fromkeys(
        (
            "pipeline/dvc.py",
            "pipeline/git.py",
            "pipeline/system/commands.py",
            "pipeline/tracking/__init__.py",
            "pipeline/tracking/journal.py",
            "pipeline/tracking/opening.py",
            "pipeline/tracking/run.py",
            "pipeline/tracking/store.py",
            "pipeline/tracking/study.py",
        ),
        "tells MLflow of what was found, and of where it comes from",
    ),
    **dict.fromkeys(
        (
            "pipeline/shards/duplicates.py",
            "pipeline/shards/jobs.py",
            "pipeline/shards/manifest.py",
            "pipeline/shards/writer.py",
            "pipeline/sources/",
        ),
        "makes the manifest, on which the stage depends itself",
    ),
    "pipeline/shards/workers.py": "says where images are decoded",
    "vdvae/checkpoint.py": "gives back the bits that were written, or refuses them",
}
_BAR = "shows how far a stage is"
_LOOKED_AT = "draws pictures to look at, which are no output of the stage"
_WITH_A_MODEL = {
    **_ON_SHARDS,
    "vdvae/distributed.py": "is alone here, imported beside the choice of the device",
    "vdvae/doctor.py": "judges a training",
    "vdvae/training.py": "chooses the device",
}
# What each stage imports and does not list, with the reason why no result changes with it.
CHANGES_NOTHING = {
    "shard": {
        **_MACHINERY,
        **dict.fromkeys(
            ("pipeline/shards/decode.py", "pipeline/shards/reader.py"),
            "reads back for the contact sheets what was written, checked",
        ),
        "pipeline/shards/jobs.py": "says where shards are made",
        "pipeline/system/progress.py": _BAR,
        "pipeline/shards/workers.py": "says where images are decoded",
        "pipeline/stages/shard.py": "hands the source to the writer",
        **dict.fromkeys(
            (
                "vdvae/autoregressive.py",
                "vdvae/distributions.py",
                "vdvae/layers.py",
                "vdvae/model.py",
                "vdvae/models.py",
                "vdvae/randomness.py",
                "vdvae/sampling.py",
            ),
            "is imported by the pictures of models alone",
        ),
    },
    "train": {
        **_ON_SHARDS,
        "pipeline/system/machine.py": "measures the machine",
        "pipeline/system/progress.py": _BAR,
        "pipeline/params.py": "hands over the values, which DVC compares",
        "pipeline/pictures.py": _LOOKED_AT,
        "pipeline/stages/scoring.py": "hands images to vdvae/evaluate.py",
        "pipeline/stages/train.py": "hands settings and images to vdvae/training.py",
        "vdvae/doctor.py": "judges the curves; a training that it ends has no result",
        "vdvae/sampling.py": _LOOKED_AT,
    },
    "evaluate": {
        **{key: why for key, why in _WITH_A_MODEL.items() if key != "vdvae/distributed.py"},
        "pipeline/stages/scoring.py": "hands images to vdvae/evaluate.py",
        "pipeline/system/progress.py": _BAR,
    },
    "sample": {
        **_WITH_A_MODEL,
        "pipeline/stages/sample.py": "hands settings to vdvae/sampling.py",
    },
}


@cache
def _imports(path: Path) -> frozenset[Path]:
    """The project's files that a file imports, anywhere in it but for the type checker."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names: set[str] = set()
    nodes: list[ast.AST] = [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, path
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        nodes += ast.iter_child_nodes(node)
    packages = {".".join(name.split(".")[:depth]) for name in names for depth in (1, 2, 3)}
    places = [ROOT.joinpath(*name.split(".")) for name in names | packages]
    files = {file for place in places for file in (place.with_suffix(".py"), place / "__init__.py")}
    return frozenset(file for file in files if file.is_file())


def imported(stage: str) -> set[str]:
    """Every file of the project that a stage imports, through all others."""
    found: set[Path] = set()
    new = {ROOT / f"pipeline/stages/{stage}.py"}
    while new:
        found |= new
        new = {file for path in new for file in _imports(path)} - found
    return {path.relative_to(ROOT).as_posix() for path in found}


def _covered(file: str, listed: object) -> bool:
    assert isinstance(listed, list)
    return any(file == entry or file.startswith(f"{entry.rstrip('/')}/") for entry in listed)


@pytest.mark.parametrize("stage", CHANGES_NOTHING)
def test_what_a_stage_imports_is_a_dependency_or_changes_no_result(
    stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    files, listed, rest = imported(stage), code_of(stage), [*CHANGES_NOTHING[stage]]
    assert f"pipeline/stages/{stage}.py" in files and "vdvae/config.py" in files
    unknown = {file for file in files if not _covered(file, listed) and not _covered(file, rest)}
    assert not unknown, "list it in dvc.yaml, or say in CHANGES_NOTHING why no result changes"
    for entry in (*listed, *rest):
        assert any(_covered(file, [entry]) for file in files), f"{entry}: is not imported"
    assert not [entry for entry in rest if _covered(entry, listed)]
