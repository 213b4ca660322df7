"""A real PostgreSQL server on this machine, for tests."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.services.definitions import free_ports

_PASSWORD = "tester-password"


@contextlib.contextmanager
def postgres_server(*databases: str) -> Iterator[list[str]]:
    """A server with these databases; yields SQLAlchemy's address of each.

    Skips the test where PostgreSQL is not installed. It refuses to run as root, which is why it
    then runs as Debian's user for it, below /tmp instead of in pytest's folders.
    """
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    folder, programs = Path(tempfile.mkdtemp(prefix="vdvae-postgres-")), found[-1].parent
    as_user: dict[str, Any] = {"cwd": folder}
    if os.geteuid() == 0:
        user = pwd.getpwnam("postgres")
        as_user |= {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        os.chown(folder, user.pw_uid, user.pw_gid)
    (folder / "password").write_text(_PASSWORD)
    (folder / "password").chmod(0o644)
    (port,), server = free_ports(1), None
    try:
        subprocess.run(
            [
                *(programs / "initdb", "-D", folder / "data", "--no-sync", "--locale=C.UTF-8"),
                *("--username=tester", "--auth=scram-sha-256"),
                f"--pwfile={folder / 'password'}",
            ],
            check=True,
            capture_output=True,
            **as_user,
        )
        with (folder / "log").open("wb") as log:
            server = subprocess.Popen(
                [
                    *(programs / "postgres", "-D", folder / "data", "-p", str(port)),
                    *("-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="),
                    *("-c", "fsync=off"),
                ],
                stdout=log,
                stderr=log,
                **as_user,
            )
        address = f"tester:{_PASSWORD}@127.0.0.1:{port}"
        _create(address, databases, folder / "log")
        yield [f"postgresql+psycopg://{address}/{name}" for name in databases]
    finally:
        if server is not None:
            server.send_signal(signal.SIGINT)  # its fast shutdown; SIGTERM waits for its clients
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(10)
            server.kill()
            server.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _create(address: str, databases: tuple[str, ...], log: Path) -> None:
    import psycopg

    deadline = time.monotonic() + 60
    while True:
        try:
            connection = psycopg.connect(f"postgresql://{address}/postgres", autocommit=True)
            break
        except psycopg.OperationalError:
            if time.monotonic() > deadline:
                pytest.fail(f"PostgreSQL did not start: {log.read_text()[-1000:]}")
            time.sleep(0.1)
    with connection:
        for name in databases:
            connection.execute(f"CREATE DATABASE {name}".encode())
