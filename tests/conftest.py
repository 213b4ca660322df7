"""A copy of the project to run whole roads in, and what its processes may see."""

from __future__ import annotations

import os

# Before torch is imported: threads that share two cores with servers spin, for minutes in all.
# Every process of a test inherits it: equal bits need an equal number of threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import warm
import yaml
from s3_server import S3Server, s3_server

from pipeline import storage, tracking

ROOT = Path(__file__).resolve().parents[1]
_SETTINGS = ("VDVAE_", "MLFLOW_", "PREFECT_", "AWS_", "DVC_", "GIT_", "PYTHONPATH")

_WARM = pytest.StashKey[warm.Warm]()

Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)


def _no_skip_on_ci(report: Report) -> Report:
    """With CI=true everything that a test needs is there: one that skips has failed."""
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("CI") == "true":
        *_, reason = report.longrepr
        report.outcome = "failed"
        report.longrepr = f"{reason}; CI=true allows no test to be skipped"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    return _no_skip_on_ci((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    return _no_skip_on_ci((yield))


def pytest_configure(config: pytest.Config) -> None:
    """One interpreter to fork commands from, for all of xdist's workers."""
    if not hasattr(config, "workerinput"):
        config.stash[_WARM] = warm.Warm()
        os.environ["WARM_PYTHON"] = str(config.stash[_WARM].folder)


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share what their module makes stay together in one process; the longest first."""
    for item in items:
        fixtures = item._fixtureinfo.name2fixturedefs.values()
        if any(fixture[-1].scope == "module" for fixture in fixtures):
            item.add_marker(pytest.mark.xdist_group(Path(item.fspath).stem))
    items.sort(key=lambda item: item.get_closest_marker("integration") is None)


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Decoded shards of all tests, which are named by their content, in no checkout."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("VDVAE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


class Project:
    """A clone-like copy of the checkout in a folder of its own, with narrow params."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("vdvae", "pipeline"):
            shutil.copytree(
                ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__")
            )
        (folder / ".dvc").mkdir()
        for name in ("dvc.yaml", "params.yaml", ".gitignore", ".dvcignore"):
            shutil.copy(ROOT / name, folder / name)
        for name in (".dvc/config", ".dvc/.gitignore"):
            shutil.copy(ROOT / name, folder / name)
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(_SETTINGS)},
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "SHELL": "/bin/sh",  # DVC's; a dash stays between DVC and a stage that does not exec
            "GIT_CONFIG_GLOBAL": os.devnull,
            "GIT_AUTHOR_NAME": "t",
            "GIT_AUTHOR_EMAIL": "t@localhost",
            "GIT_COMMITTER_NAME": "t",
            "GIT_COMMITTER_EMAIL": "t@localhost",
        }
        for words in (("init", "-q", "-b", "main"), ("add", "-A"), ("commit", "-qm", "start")):
            self.run("git", *words)

    def set(self, change: Callable[[dict[str, Any]], object]) -> None:
        """Edits params.yaml."""
        path = self.folder / "params.yaml"
        params = yaml.safe_load(path.read_text())
        change(params)
        path.write_text(yaml.safe_dump(params, sort_keys=False))

    def start(self, *command: str, **environment: str) -> subprocess.Popen[str]:
        """Starts a command in a process group of its own."""
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *command: str, code: int = 0, cold: bool = False, **environment: str) -> str:
        """Runs a command to its end and holds its exit code; returns what it printed.

        It is forked from an interpreter that is warm, and so are DVC's stages, unless asked for as
        users start them.
        """
        python, *words = command
        if not cold and python == sys.executable and " ".join(words).startswith(warm.OURS):
            folder = Path(os.environ["WARM_PYTHON"])
            everything = self.environment | environment
            everything["PATH"] = f"{folder}{os.pathsep}{everything['PATH']}"
            returncode, output = warm.run(folder, words, self.folder, everything, 240)
        else:
            child = self.start(*command, **environment)
            output, _ = child.communicate(timeout=240)
            returncode = child.returncode
        assert returncode == code, f"{command} ended with {returncode}:\n{output}"
        return output

    def stage(self, stage: str, recipe: str, code: int = 0, **environment: str) -> str:
        """Runs one stage without DVC."""
        words = (sys.executable, "-m", f"pipeline.stages.{stage}", recipe)
        return self.run(*words, code=code, **environment)

    def processes(self) -> dict[int, str]:
        """Processes that work below this folder, whatever started them, with their commands."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended
                if Path(os.readlink(entry / "cwd")).is_relative_to(self.folder.resolve()):
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
                    found[int(entry.name)] = os.fsdecode(command)
        return found

    def repro(self, *words: str, code: int = 0, cold: bool = False) -> str:
        """Runs `dvc repro`."""
        return self.run(sys.executable, "-m", "dvc", "repro", *words, code=code, cold=cold)


def narrow(params: dict[str, Any], steps: int = 30) -> None:
    """Makes the digits recipe one of seconds: the same code paths, fewer and narrower blocks."""
    digits = params["recipes"]["digits"]
    digits["model"] |= {
        "encoder": "8x1,8d2,4d4,1x1",
        "decoder": "1x1,4m1,8m4",
        "width": 12,
        "bottleneck": 0.5,
        "latent_channels": 2,
        "mixtures": 2,
    }
    digits["train"] |= {
        "steps": steps,
        "batch_size": 8,
        "log_every": 5,
        "validate_every": 10,
        "checkpoint_every": 10,
    }
    digits["sample"] |= {"n": 4, "reconstructions": 2}


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """The project with a digits recipe of seconds."""
    made = Project(tmp_path / "project")
    made.set(narrow)
    return made


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server with a bucket, `bucket`."""
    with s3_server(tmp_path_factory.mktemp("s3")) as running:
        yield running


@pytest.fixture
def s3_url(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[str]:
    """A prefix of the test's own on that server, whose address and keys are in the environment."""
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    storage._s3_client.cache_clear()
    yield f"s3://bucket/{request.node.name.partition('[')[0]}"
    storage._s3_client.cache_clear()


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database of MLflow to copy: its tables take seconds to create."""
    database = tmp_path_factory.mktemp("store") / "mlflow.db"
    tracking.connect(f"sqlite:///{database}")
    return database
