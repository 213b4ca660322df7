"""MLflow's store: its address, a client that has been answered, and its errors as sentences."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
import sqlite3
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.system.exits import ServerUnavailable, innermost
from vdvae.config import UserError, shown
from vdvae.files import open_lock, target_of

# Read by mlflow when it is imported.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # a stage says one line

if TYPE_CHECKING:
    from mlflow import MlflowClient


def without_credentials(url: str) -> str:
    """The URL without user name, password and query, fit for tags and messages."""
    return re.sub(r"(?<=//)[^/]*@", "", url).partition("?")[0]


def is_server(tracking_uri: str) -> bool:
    """Whether it names an MLflow server; urlsplit would raise for `http://[`."""
    return tracking_uri.startswith(("http://", "https://"))


def sqlite_path(tracking_uri: str) -> Path | None:
    """The database file of a sqlite tracking URI, absolute, links followed; None for any other URI.

    Raises:
        UserError: it names no file: the database would end with the process.
    """
    if not tracking_uri.startswith("sqlite"):
        return None
    scheme, _, path = tracking_uri.partition(":///")
    path = path.partition("?")[0]
    if scheme != "sqlite" or path in ("", ":memory:"):
        raise UserError(
            f"MLFLOW_TRACKING_URI: {shown(tracking_uri)} names no file, so that what is told to it "
            f"would be lost; write sqlite:///PATH, or unset it"
        )
    return Path(os.path.realpath(path))


@contextmanager
def mlflow_errors(tracking_uri: str) -> Iterator[None]:
    """Turns what MLflow raises into a UserError of one sentence that names the URI."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise _refusal(tracking_uri, error)(
            f"MLflow at {without_credentials(tracking_uri)} fails ({text[0][:300]}); "
            f"mend it, or set MLFLOW_TRACKING_URI to another"
        ) from error


def _refusal(tracking_uri: str, error: Exception) -> type[UserError]:
    """ServerUnavailable, unless it is a server that has said what is wrong, or none is asked."""
    from mlflow.exceptions import MlflowException

    refused = isinstance(error, MlflowException) and error.get_http_status_code() < 500
    return ServerUnavailable if is_server(tracking_uri) and not refused else UserError


def connect(tracking_uri: str) -> MlflowClient:
    """A client of the tracking store and registry, which has answered once.

    Raises:
        UserError: within about ten seconds where nobody answers or the database is not writable.
    """
    import mlflow  # sets up its logger, which would fill a page at the first use

    for name in (mlflow.__name__, "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    database = sqlite_path(tracking_uri)
    if database is not None:
        _prepare(database)
    try:
        return _client(tracking_uri)
    except Exception as error:  # requests, SQLAlchemy, sqlite and MLflow raise their own
        raise _refusal(tracking_uri, error)(
            f"MLflow at {without_credentials(tracking_uri)} does not answer "
            f"({innermost(error)}); start it or unset MLFLOW_TRACKING_URI"
        ) from error


def _client(tracking_uri: str) -> MlflowClient:
    from mlflow import MlflowClient

    with _quick_and_quiet():
        client = MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)
        client.search_experiments(max_results=1)
    return client


def _prepare(database: Path) -> None:
    """Creates the database, or checks that it can be written."""
    try:
        database = target_of(database)
        with locked(database.with_name(f"{database.name}.lock")):
            if database.exists() and database.stat().st_size:
                # SQLAlchemy would retry for over a minute what sqlite says at once.
                with closing(sqlite3.connect(database, timeout=8)) as connection:
                    connection.execute("BEGIN IMMEDIATE")
            else:
                # MLflow builds its tables in steps that a kill or a second process leaves
                # broken for good, so they are built beside and appear whole.
                beside = database.with_name(f".{database.name}.new")
                shutil.rmtree(beside, ignore_errors=True)
                beside.mkdir()
                _client(f"sqlite:///{beside / database.name}")
                (beside / database.name).replace(database)
                beside.rmdir()
    except UserError:
        raise
    except Exception as error:  # of the system, sqlite or SQLAlchemy
        raise UserError(
            f"{database}: MLflow's database cannot be written ({innermost(error)}); "
            f"mend it, or set MLFLOW_TRACKING_URI to another"
        ) from error


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock among processes while the block runs; the system frees that of a dead one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_lock(path) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _quick_and_quiet() -> Iterator[None]:
    # By default MLflow tries again for minutes: right in mid-training, wrong at the start.
    own = {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
        # As a URI: MLflow writes it into a statement of SQL, where a path may hold an apostrophe.
        "_MLFLOW_SERVER_ARTIFACT_ROOT": Path("mlruns").absolute().as_uri(),
    }
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # alembic and SQLAlchemy, of MLflow's own migrations
            yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
