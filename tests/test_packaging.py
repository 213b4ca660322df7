"""What is handed out: the wheel on a machine with nothing else, the pins, the commands of make."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import vdvae

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CORE = ["torch", "numpy", "safetensors"]
# By import name: what the pipeline uses and the model must do without.
PIPELINE_ONLY = {
    "boto3",
    "dvc",
    "matplotlib",
    "mlflow",
    "pandas",
    "PIL",
    "prefect",
    "pydantic",
    "ruamel",
    "sklearn",
    "typer",
    "webdataset",
    "yaml",
}

USE_THE_MODEL = """
import torch, vdvae
config = vdvae.ModelConfig(
    image_size=4, image_channels=1, encoder="4x1,4d4,1x1", decoder="1x1,4m1,4x1", width=8,
    latent_channels=2, mixtures=2, num_levels=17,
)
model = vdvae.VDVAE(config)
x = model.sample(3, generator=torch.Generator().manual_seed(0))
assert x.dtype == torch.uint8 and x.shape == (3, 1, 4, 4), (x.dtype, x.shape)
assert model(x).neg_elbo_nats_B.isfinite().all()
vdvae.save(model, "model")
assert vdvae.load("model").config == config
"""

IMPORT_ALL_OF_THE_MODEL = """
import importlib, pkgutil, sys, vdvae
for module in pkgutil.iter_modules(vdvae.__path__):
    importlib.import_module(f"vdvae.{module.name}")
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


def run(*command: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command that inherits none of Python's settings from this environment."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=clean | {"PYTHONDONTWRITEBYTECODE": "1"} | env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def succeed(*command: str | Path, cwd: Path, **env: str) -> str:
    done = run(*command, cwd=cwd, **env)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def with_what_they_need(names: list[str]) -> dict[str, metadata.Distribution]:
    """The installed distributions of these names and, in turn, of all that they require here."""
    found: dict[str, metadata.Distribution] = {}
    wanted = list(names)
    while wanted:
        name = canonicalize_name(wanted.pop())
        if name in found:
            continue
        found[name] = metadata.distribution(name)
        requirements = [Requirement(text) for text in found[name].requires or []]
        wanted += [r.name for r in requirements if not r.marker or r.marker.evaluate({"extra": ""})]
    return found


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / name).read_text().split("\n")
    assert lines.pop() == "", "the file ends with a newline"
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+", line) for line in lines), lines
    return dict(line.split("==") for line in lines)


def git(*arguments: str) -> str:
    """Ask git about the checkout, whoever owns its folder."""
    command = ["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "not a git repository" in done.stderr:
        pytest.skip("not a git checkout")
    assert not done.stderr, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources: setuptools leaves folders where it builds."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("vdvae", "pipeline", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = ("-m", "build", "--wheel", "--no-isolation", "--outdir", folder, source)
    succeed(sys.executable, *build, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def clean_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has the wheel, torch, numpy, safetensors, what these require, and no more.

    Those three are linked from this environment: installing torch again would take longer than
    all other tests of this file.
    """
    folder = tmp_path_factory.mktemp("clean")
    succeed(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python = folder / "bin" / "python"
    paths = succeed(
        python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder
    )
    packages = Path(paths.strip())
    for distribution in with_what_they_need(CORE).values():
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            if not (packages / top).exists():
                (packages / top).symlink_to(Path(str(distribution.locate_file(top))).resolve())
    install = ("-m", "pip", "--python", python, "install", "--no-index", wheel)
    succeed(sys.executable, *install, cwd=folder)
    return python


def test_wheel_holds_the_two_packages_and_asks_for_three(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (info,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        fields = email.message_from_bytes(archive.read(info))
    assert {name.partition("/")[0] for name in names} == {
        "vdvae",
        "pipeline",
        info.partition("/")[0],
    }
    sources = {
        str(path.relative_to(ROOT))
        for package in ("vdvae", "pipeline")
        for path in (ROOT / package).rglob("*.py")
    }
    assert sources | {"vdvae/py.typed", "pipeline/report/page.html"} <= names
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    required = [Requirement(text) for text in fields.get_all("Requires-Dist", [])]
    assert sorted(r.name for r in required if not r.marker) == sorted(CORE)
    assert {str(r.marker) for r in required if r.marker} == {
        'extra == "pipeline"',
        'extra == "dask"',
        'extra == "server"',
        'extra == "dev"',
    }


def test_wheel_alone_runs_the_model(clean_python: Path, tmp_path: Path) -> None:
    absent = f"""
from importlib.util import find_spec
print(*[name for name in {PIPELINE_ONLY} if find_spec(name)])
"""
    assert succeed(clean_python, "-c", absent, cwd=tmp_path).split() == []
    succeed(clean_python, "-c", USE_THE_MODEL, cwd=tmp_path)


def test_command_alone_says_which_extra_it_lacks(clean_python: Path, tmp_path: Path) -> None:
    command = clean_python.parent / "vdvae"
    assert vdvae.__version__ in succeed(command, "--version", cwd=tmp_path)
    assert "usage: vdvae" in succeed(command, "--help", cwd=tmp_path)
    succeed(clean_python, "-c", USE_THE_MODEL, cwd=tmp_path)
    assert "stochastic layers" in succeed(command, "info", "model", cwd=tmp_path)
    lacking = run(command, "run", "digits", cwd=tmp_path)
    assert lacking.returncode == 2, lacking.stderr
    assert "pip install 'vdvae[pipeline]'" in lacking.stderr
    assert "Traceback" not in lacking.stderr
    assert len(lacking.stderr.splitlines()) == 1


def test_model_imports_nothing_of_the_pipeline(tmp_path: Path) -> None:
    loaded = succeed(
        sys.executable, "-c", IMPORT_ALL_OF_THE_MODEL, cwd=tmp_path, PYTHONPATH=str(ROOT)
    )
    assert not set(loaded.split()) & (PIPELINE_ONLY | {"pipeline"})


def test_pins_satisfy_what_pyproject_asks_for() -> None:
    lock, dev = pins("lock.txt"), pins("dev.txt")
    assert not {"torch", "triton"} & {*lock, *dev}
    assert {name: dev[name] for name in {*lock} & {*dev}} == {
        name: lock[name] for name in {*lock} & {*dev}
    }
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"]
    for pinned, asked in (
        (lock, project["dependencies"] + extras["pipeline"]),
        (dev, extras["dev"] + PYPROJECT["build-system"]["requires"]),
    ):
        for requirement in map(Requirement, asked):
            if requirement.name != "torch":
                assert pinned[canonicalize_name(requirement.name)] in requirement.specifier


def test_citation_names_this_version() -> None:
    (version,) = re.findall(r"(?m)^version: (.+)$", (ROOT / "CITATION.cff").read_text())
    assert version == vdvae.__version__


def test_tracked_files_carry_no_addresses_of_registries_and_no_paths_of_this_machine() -> None:
    names = {Path(name).name for name in git("ls-files").splitlines()}
    assert not names & {"uv.lock", "poetry.lock", "Pipfile.lock", "package-lock.json"}
    assert not [name for name in names if re.fullmatch(r"pylock.*\.toml", name)]
    addresses = (
        r"index-url[ =]+['\"]?(https?|file):|find-links[ =]+['\"]?(https?:|/)"
        r"|pypi\.org|pythonhosted\.org|download\.pytorch\.org|registry\.npmjs\.org"
    )
    # The checkout's own place, as a whole path: "/home/me/vdvae", not "/home/me/vdvae-2".
    own_place = re.escape(str(ROOT)) + r"([^[:alnum:]_-]|$)"
    for pattern in (addresses, own_place):
        found = git("grep", "-nIE", "-e", pattern)
        assert not found, found


def test_make_help_lists_every_target() -> None:
    listed = succeed("make", "--no-print-directory", cwd=ROOT)
    for target in ("help", "setup", "demo", "services", "stop", "test", "check", "lock", "clean"):
        assert re.search(rf"(?m)^  {target}  +\w", listed), target


def test_make_clean_removes_caches_and_keeps_what_runs_made(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    kept = [
        tmp_path / name
        for name in (
            ".dvc/cache/files/x",
            ".venv/lib/__pycache__/x",
            "data/raw/x",
            "mlruns/mlflow.db",
            "results/digits/metrics.json",
            "runs/digits-0/state",
            "store/shards/digits/x.tar",
            "vdvae/model.py",
        )
    ]
    removed = [
        tmp_path / name
        for name in (
            ".mypy_cache/x",
            ".pytest_cache/x",
            "build/x",
            "dist/x.whl",
            "pipeline/stages/__pycache__/x.pyc",
            "vdvae.egg-info/x",
            "vdvae/__pycache__/x.pyc",
        )
    ]
    for path in kept + removed:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    succeed("make", "clean", cwd=tmp_path)
    assert [path for path in kept if not path.exists()] == []
    assert [path for path in removed if path.parent.exists()] == []


def test_a_stage_runs_under_the_projects_python_whatever_the_shell_has(tmp_path: Path) -> None:
    """`.venv/bin/dvc`, not activated, starts stages with a python of the PATH, without packages."""
    bare = tmp_path / "bare"
    venv.create(bare)
    settings = {"PYTHONPATH": str(ROOT), "PATH": f"{bare}/bin:/usr/bin:/bin"}
    stage = ["python", "-m", "pipeline.stages.interpreter"]  # with what all stages begin with
    # No environment is known: one sentence.
    done = run("/bin/sh", "-c", f"{' '.join(stage)}; exit $?", cwd=tmp_path, **settings)
    assert done.returncode == 2
    (said,) = done.stderr.splitlines()
    assert said.startswith(f"error: the shell's python, {bare}/bin/python, lacks numpy, ")
    assert "run '. .venv/bin/activate'" in said
    # That of the DVC above it, and that of the project.
    dvc = f"import subprocess; raise SystemExit(subprocess.call({stage}))"
    done = run(sys.executable, "-c", dvc, cwd=tmp_path, **settings)
    assert (done.returncode, "error:" in done.stderr) == (0, False)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    done = run(*stage, cwd=tmp_path, **settings)
    assert (done.returncode, "error:" in done.stderr) == (0, False)


def test_an_environment_that_nobody_activated_finds_its_own_python(tmp_path: Path) -> None:
    """Also where the shell has no `python` at all: what `make setup` puts into .venv."""
    assert "cp requirements/own-path.pth $(VENV)/lib/" in (ROOT / "Makefile").read_text()
    bare = tmp_path / "bare"
    venv.create(bare)
    python = bare / "bin" / "python"
    (packages,) = (bare / "lib").glob("python3.*/site-packages")
    shutil.copy(ROOT / "requirements/own-path.pth", packages)
    show = "import os; print(os.environ['PATH'])"
    for path, expected in (
        ("/usr/bin:/bin", f"{bare}/bin:/usr/bin:/bin"),
        (f"/stand-in:{bare}/bin:/bin", f"/stand-in:{bare}/bin:/bin"),
    ):
        assert succeed(python, "-c", show, cwd=tmp_path, PATH=path).strip() == expected


def test_a_downloaded_archive_becomes_a_repository_of_its_own(tmp_path: Path) -> None:
    """DVC and a run's clone need one; nobody's own is touched, and git need not know who we are."""
    tracked = git("ls-files").splitlines()
    archive = tmp_path / "vdvae-main"
    for name in tracked:
        (archive / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, archive / name)
    stranger = {"HOME": str(tmp_path), "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    repository = ("make", "--no-print-directory", "repository")
    (said,) = succeed(*repository, cwd=archive, **stranger).splitlines()
    assert said.startswith("make setup: this is no git repository, which DVC needs: it is now one")
    assert sorted(succeed("git", "ls-files", cwd=archive).splitlines()) == sorted(tracked)
    assert succeed("git", "status", "--porcelain", cwd=archive) == ""
    assert len(succeed("git", "log", "--format=%an", cwd=archive).splitlines()) == 1
    assert succeed(*repository, cwd=archive, **stranger) == ""
    # Below a repository of the user's it stays theirs.
    inner = archive / "inner"
    inner.mkdir()
    shutil.copy(ROOT / "Makefile", inner)
    assert succeed(*repository, cwd=inner, **stranger) == ""
    assert not (inner / ".git").exists()
