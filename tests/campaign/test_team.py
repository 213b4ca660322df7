"""The services as a team has them: a password, an address for others, a remote repository."""

from __future__ import annotations

import base64
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from services_project import Services

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

PASSWORD = "correct-horse-battery"


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Services, str]]:
    """The services as a team has them: reached from elsewhere, with a password, of a remote.

    And what their start has printed.
    """
    services = Services(tmp_path_factory.mktemp("team") / "project")
    bare = services.folder.with_name("bare.git")
    services.run("git", "clone", "-q", "--bare", str(services.folder), str(bare))
    services.run("git", "remote", "add", "origin", str(bare))
    services.environment |= {
        "VDVAE_HOST": "0.0.0.0",
        "VDVAE_AUTH": f"engineer:{PASSWORD}",
        "VDVAE_ORIGIN": str(bare),
    }
    services.auth = f"engineer:{PASSWORD}"
    yield services, services.services("start")
    services.services("stop")
    assert services.marked() == []


def bytes_of(path: Path) -> bytes:
    """Of a file; of a run's clone that is being removed, what there still is."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def test_a_password_is_asked_for_and_written_nowhere(team: tuple[Services, str]) -> None:
    services, shown = team
    for auth in ("", f"engineer:{PASSWORD}x"):
        services.auth = auth
        assert services.api("/deployments/filter", {})[0] == 401
    services.auth = f"engineer:{PASSWORD}"

    status, run = services.begin("digits", preset="smoke", seed=13, steps=4)
    assert status in (200, 201), run
    services.wait(run["id"], {"RUNNING"})
    commands = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in services.marked()]
    assert len(commands) > 4
    state = services.wait(run["id"], {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"})
    assert state == "COMPLETED", services.logs(run["id"])

    # While a run lives, Prefect keeps its environment in a file that we alone may read.
    while list(services.folder.glob("services/tmp/prefect-workspace-*")):
        time.sleep(0.2)
    shown += services.services("status") + services.logs(run["id"]) + repr(commands)
    places = [services.folder / name for name in ("services", "mlruns", "runs", ".git", ".dvc")]
    written = [path for place in places for path in place.rglob("*") if path.is_file()]
    assert any(path.parent.name == "logs" for path in written)
    for secret in (PASSWORD, base64.b64encode(services.auth.encode()).decode()):
        assert secret not in shown
        assert [path for path in written if secret.encode() in bytes_of(path)] == []


def test_a_run_of_a_remote_arrives_there_and_is_pulled(team: tuple[Services, str]) -> None:
    services, _ = team
    dvc = (sys.executable, "-m", "dvc", "exp")
    (name,) = services.run(*dvc, "list", "--name-only", "origin").split()
    assert name.startswith("digits-smoke-seed13-")
    assert name not in services.run(*dvc, "list", "--name-only")
    services.run(*dvc, "pull", "origin", name)
    services.run(*dvc, "apply", name)
    assert (services.folder / "results/digits/samples.png").exists()
