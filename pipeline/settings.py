"""What the environment may set: each variable's name, default, bounds and meaning, once.

`Settings()` reads the environment as it is at the call: flows and tests change it as they go.
`vdvae settings` prints what is in effect; docs/settings.md takes its table from there, so meanings
may hold Markdown's backticks. Variables by which our processes speak to each other stand where they
are used.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address
from typing import Any, Literal

from pydantic import Field, JsonValue, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, SettingsConfigDict

from vdvae.config import UserError, shown

_PREFIX = "VDVAE_"


def _setting(
    default: Any, unset: str, meaning: str, kind: str = "", secret: bool = False, **more: Any
) -> Any:
    """A variable: `unset` is the default in words, `kind` what a value must be, for messages."""
    words: dict[str, JsonValue] = {"unset": unset, "kind": kind, "secret": secret}
    return Field(default, description=meaning, json_schema_extra=words, **more)


def _number(default: float | None, least: float, most: float, meaning: str, unset: str = "") -> Any:
    return _setting(default, unset or f"{default:g}", meaning, ge=least, le=most)


class Settings(BaseSettings):
    """The settings of the environment; one that is empty is not set.

    Raises:
        UserError: naming the variable, its value and what would do.
    """

    model_config = SettingsConfigDict(
        env_prefix=_PREFIX, env_ignore_empty=True, extra="ignore", frozen=True, allow_inf_nan=False
    )

    store: str = _setting(
        "",
        "file://<project>/store",
        "where shards are stored: `file:///absolute/path` or `s3://bucket/prefix`",
    )
    runs: str = _setting(
        "runs",
        "<project>/runs",
        "checkpoints and progress of training and sharding, and their locks",
    )
    cache: str = _setting(
        "cache",
        "<project>/cache",
        "decoded shards, rebuilt where missing; a local disk, shared by any number of processes",
    )
    tracking_uri: str = _setting(
        "sqlite:///mlruns/mlflow.db",
        "sqlite:///<project>/mlruns/mlflow.db",
        "MLflow's runs and registry: a database file, or the address of a server",
        validation_alias="MLFLOW_TRACKING_URI",
    )
    cache_gib: float = _number(
        50.0,
        0,
        2**20,
        "GiB that the cache may have; less than a recipe's pixels: decodes again "
        "every epoch; 0: no cache",
    )
    read_workers: int = _number(
        1, 0, 256, "processes per rank that decode shards missing from the cache; 0: none"
    )
    shard_workers: int | None = _number(None, 1, 1024, "processes that make shards", "one per core")
    dask: str = _setting(
        "", "none", "`tcp://HOST:8786`: a Dask scheduler whose workers make the shards instead"
    )
    ranks: int | None = _number(
        None,
        1,
        64,
        "processes that train and evaluate one model, on a CPU too",
        "one per visible GPU that the batch parts into",
    )
    grace_seconds: float = _number(  # 120 write imagenet64's 2.5 GB at 25 MB/s
        120.0, 0, 86_400, "seconds from SIGTERM to SIGKILL, for writing a checkpoint"
    )
    tracking_seconds: float = _number(
        10.0, 0.01, 3600, "seconds between two deliveries to MLflow, and between two attempts"
    )
    serve_token: str = _setting(
        "",
        "none",
        "bearer token that `vdvae models serve` asks for, 16 or more printable ASCII characters; "
        "required for any host but loopback",
        secret=True,
    )
    prefect_port: int = _number(
        4200, 1, 65535, "port of Prefect; a port in use is reported before anything starts"
    )
    mlflow_port: int = _number(5000, 1, 65535, "port of MLflow")
    s3_port: int = _number(8333, 1, 65535, "port of the local S3 server")
    host: IPv4Address | IPv6Address = _setting(
        IPv4Address("127.0.0.1"),
        "127.0.0.1",
        "address that Prefect listens on; anything but loopback requires `VDVAE_AUTH`",
        kind="an IP address",
    )
    auth: str = _setting(
        "",
        "none",
        "`user:password` that Prefect's API and pages ask for",
        kind="of the form user:password",
        secret=True,
        pattern=r"^([^:]+:[\s\S]+)?$",
    )
    s3: bool = _setting(
        False,
        "0",
        "1: a local S3 server; its credentials are created in `services/s3.env` (mode 0600)",
        kind="0 or 1",
    )
    runs_at_once: int | None = _number(
        None, 1, 1000, "flow runs at the same time; the others wait", "number of GPUs, at least 1"
    )
    data_roots: str = _setting(
        "",
        "<project>/data/raw",
        "below which a form's `data` must be: folders and `s3://bucket/prefix`, separated by "
        "commas; `/` is every folder, `s3://` every bucket that the credentials reach, and both "
        "the default of `vdvae run`",
    )
    origin: str = _setting("", "the project", "git repository that flow runs clone and push to")
    dvc_cache: str = _setting("", "the project's DVC cache", "DVC cache that flow runs share")

    def __init__(self) -> None:
        try:
            super().__init__()
        except ValidationError as error:
            raise _refusal(error) from None


def variable(name: str) -> str:
    """The environment's name of a setting."""
    return str(Settings.model_fields[name].validation_alias or f"{_PREFIX}{name.upper()}")


def word(field: FieldInfo, key: Literal["unset", "kind", "secret"]) -> Any:
    """What else was said of a setting."""
    assert isinstance(field.json_schema_extra, dict)
    return field.json_schema_extra[key]


def _refusal(error: ValidationError) -> UserError:
    first = error.errors()[0]
    key = str(first["loc"][0])
    name = next(name for name in Settings.model_fields if key in (name, variable(name)))
    field = Settings.model_fields[name]
    value = "" if word(field, "secret") else f"{shown(first['input'])} "
    kind, unset = word(field, "kind") or _bounds(field), word(field, "unset")
    remedy = f"set it to that, or unset it{'' if unset == 'none' else f' for {unset}'}"
    return UserError(f"{variable(name)}: {value}is not {kind}; {remedy}")


def _bounds(field: FieldInfo) -> str:
    (least,) = (bound.ge for bound in field.metadata if hasattr(bound, "ge"))
    (most,) = (bound.le for bound in field.metadata if hasattr(bound, "le"))
    return f"{'a' if field.annotation is float else 'a whole'} number from {least} to {most}"
