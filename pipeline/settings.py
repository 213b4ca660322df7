"""What the environment may set: each variable's name, default, bounds and meaning, once.

`Settings()` reads the environment as it is at the call: flows and tests change it as they go.
`vdvae settings` prints what is in effect; docs/ takes its table from there. Variables by which our
processes speak to each other stand where they are used.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address
from typing import Any

from pydantic import Field, JsonValue, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, SettingsConfigDict

from vdvae.config import UserError, shown

_PREFIX = "VDVAE_"


def _setting(
    default: Any,
    meaning: str,
    *,
    unset: str = "",
    kind: str = "",
    secret: bool = False,
    **more: Any,
) -> Any:
    """A variable: `unset` is the default in words, `kind` what a value must be, for messages."""
    words: dict[str, JsonValue] = {"unset": unset or f"{default}", "kind": kind, "secret": secret}
    return Field(default, description=meaning, json_schema_extra=words, **more)


def _port(default: int, whose: str) -> Any:
    return _setting(default, f"port of {whose}; a busy one is named at once", ge=1, le=65535)


class Settings(BaseSettings):
    """The settings of the environment; one that is empty is not set.

    Raises:
        UserError: naming the variable, its value and what would do.
    """

    model_config = SettingsConfigDict(
        env_prefix=_PREFIX, env_ignore_empty=True, extra="ignore", frozen=True
    )

    store: str = _setting(
        "",
        "where shards lie: file:///absolute/path or s3://bucket/prefix",
        unset="file://<project>/store",
    )
    runs: str = _setting(
        "runs", "folder of the states of training and sharding, and locks", unset="<project>/runs"
    )
    tracking_uri: str = _setting(
        "sqlite:///mlruns/mlflow.db",
        "MLflow's runs and registry: a database file or a server's address",
        unset="sqlite:///<project>/mlruns/mlflow.db",
        validation_alias="MLFLOW_TRACKING_URI",
    )
    cache: str = _setting(
        "cache",
        "folder of decoded shards, made again where missing; a local disk, for any number of "
        "processes",
        unset="<project>/cache",
    )
    cache_gib: float = _setting(
        50.0,
        "most GiB of it; less than a recipe's pixels: decodes again every epoch; 0: keeps nothing",
        unset="50",
        ge=0,
        le=2**20,
        allow_inf_nan=False,
    )
    read_workers: int = _setting(
        1,
        "processes a rank that decode shards which the cache lacks; 0: none but the rank itself",
        ge=0,
        le=256,
    )
    shard_workers: int | None = _setting(
        None, "processes that make shards", unset="one a core", ge=1, le=1024
    )
    dask: str = _setting(
        "",
        "tcp://HOST:8786, a Dask scheduler whose workers make shards instead",
        unset="none",
    )
    ranks: int | None = _setting(
        None,
        "processes that train or evaluate one model on this machine",
        unset="one a visible GPU that the batch parts into",
        ge=1,
        le=64,
    )
    grace_seconds: float = _setting(
        120.0,  # imagenet64's checkpoint, 2.5 GB, at 25 MB/s; an early end is not waited for
        "from SIGTERM to SIGKILL, in which a stage writes its checkpoint",
        unset="120",
        ge=0,
        le=86_400,
        allow_inf_nan=False,
    )
    tracking_seconds: float = _setting(
        10.0,
        "between two deliveries to MLflow, and between two tries",
        unset="10",
        ge=0.01,
        le=3600,
        allow_inf_nan=False,
    )
    prefect_port: int = _port(4200, "Prefect's server and pages")
    mlflow_port: int = _port(5000, "MLflow's server and pages, on 127.0.0.1")
    s3_port: int = _port(8333, "the local S3 server, on 127.0.0.1")
    host: IPv4Address | IPv6Address = _setting(
        IPv4Address("127.0.0.1"),
        "where Prefect listens; anything but loopback wants VDVAE_AUTH",
        kind="an IP address",
    )
    auth: str = _setting(
        "",
        "user:password that Prefect's API and pages ask for",
        unset="none",
        kind="of the form user:password",
        secret=True,
        pattern=r"^([^:]+:[\s\S]+)?$",
    )
    s3: bool = _setting(
        False,
        "1: services include a local S3 server, whose credentials are made in services/s3.env",
        unset="0",
        kind="0 or 1",
    )
    runs_at_once: int | None = _setting(
        None,
        "flow runs at once; others wait",
        unset="the number of GPUs, at least 1",
        ge=1,
        le=1000,
    )
    data_roots: str = _setting(
        "",
        "where a form's data may lie: folders and s3://bucket/prefix, with commas between; / is "
        "every folder, s3:// every bucket that the credentials reach",
        unset="<project>/data/raw; /,s3:// for vdvae run",
    )
    origin: str = _setting("", "what flow runs clone and give their results to", unset="<project>")
    dvc_cache: str = _setting("", "DVC's cache that flow runs share", unset="the project's")
    serve_token: str = _setting(
        "",
        "what requests to vdvae models serve must bring; 16 or more printable ASCII characters",
        unset="none",
        secret=True,
    )

    def __init__(self) -> None:
        try:
            super().__init__()
        except ValidationError as error:
            raise _refusal(error) from None


def variable(name: str) -> str:
    """The environment's name of a setting."""
    return str(Settings.model_fields[name].validation_alias or f"{_PREFIX}{name.upper()}")


def word(field: FieldInfo, key: str) -> Any:
    """What else was said of a setting: unset, kind or secret."""
    assert isinstance(field.json_schema_extra, dict)
    return field.json_schema_extra[key]


def _refusal(error: ValidationError) -> UserError:
    first = error.errors()[0]
    key = str(first["loc"][0])
    name = next(name for name in Settings.model_fields if key in (name, variable(name)))
    field = Settings.model_fields[name]
    value = "" if word(field, "secret") else f"{shown(first['input'])} "
    kind, unset = word(field, "kind") or _number(field), word(field, "unset")
    remedy = f"set it to that, or unset it{'' if unset == 'none' else f' for {unset}'}"
    return UserError(f"{variable(name)}: {value}is not {kind}; {remedy}")


def _number(field: FieldInfo) -> str:
    (least,) = (bound.ge for bound in field.metadata if hasattr(bound, "ge"))
    (most,) = (bound.le for bound in field.metadata if hasattr(bound, "le"))
    return f"{'a' if field.annotation is float else 'a whole'} number from {least} to {most}"
