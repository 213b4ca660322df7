"""Where the services listen, who may ask them, and how much they do at once."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from pipeline.system.process import visible_gpus
from vdvae.config import UserError, shown

POOL = "vdvae"  # Prefect's work pool, which prefect.yaml names too


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Where the services listen and who may ask; from the environment."""

    prefect_port: int = 4200
    mlflow_port: int = 5000
    s3_port: int = 8333
    s3: bool = False  # a local object store instead of files
    host: str = "127.0.0.1"  # of Prefect alone: MLflow and S3 stay on loopback
    auth: str = ""  # "user:password" that Prefect's server asks for
    runs_at_once: int = 1

    @classmethod
    def from_env(cls, environment: Mapping[str, str]) -> Settings:
        """Reads and checks VDVAE_PREFECT_PORT, VDVAE_MLFLOW_PORT, VDVAE_S3_PORT, VDVAE_S3,
        VDVAE_HOST, VDVAE_AUTH and VDVAE_RUNS_AT_ONCE.

        Raises:
            UserError: naming the variable, its value and what would do.
        """

        def integer(name: str, default: int, most: int) -> int:
            text = environment.get(name) or str(default)
            if not (text.isascii() and text.isdigit() and len(text) < 7 and 1 <= int(text) <= most):
                raise UserError(f"{name}: {shown(text)} is not a whole number from 1 to {most}")
            return int(text)

        s3 = environment.get("VDVAE_S3") or "0"
        if s3 not in ("0", "1"):
            raise UserError(f"VDVAE_S3: {shown(s3)} is not 0 or 1")
        host, auth = environment.get("VDVAE_HOST") or cls.host, environment.get("VDVAE_AUTH") or ""
        user, _, password = auth.partition(":")
        if auth and not (user and password):
            raise UserError("VDVAE_AUTH: is not of the form user:password")
        try:
            loopback = ipaddress.ip_address(host).is_loopback
        except ValueError:
            raise UserError(f"VDVAE_HOST: {shown(host)} is not an IP address") from None
        if not loopback and not auth:
            raise UserError(
                f"VDVAE_HOST: {host} can be reached from other machines and anybody there could "
                f"start runs; set VDVAE_AUTH=user:password too, or leave VDVAE_HOST unset"
            )
        try:
            origin = urlsplit(environment.get("VDVAE_ORIGIN") or "")
        except ValueError as error:  # `http://[`
            raise UserError(f"VDVAE_ORIGIN: is no address ({error}); mend or unset it") from None
        if origin.password or (origin.username and origin.scheme.startswith("http")):
            raise UserError(
                "VDVAE_ORIGIN: holds credentials, which pages and logs would show; leave them out "
                "of the URL and keep them in git's credential helper ('git help credentials')"
            )
        settings = cls(
            prefect_port=integer("VDVAE_PREFECT_PORT", cls.prefect_port, 65535),
            mlflow_port=integer("VDVAE_MLFLOW_PORT", cls.mlflow_port, 65535),
            s3_port=integer("VDVAE_S3_PORT", cls.s3_port, 65535),
            s3=s3 == "1",
            host=host,
            auth=auth,
            runs_at_once=integer("VDVAE_RUNS_AT_ONCE", _gpus(environment), 1000),
        )
        ports = [port for _, _, _, port in settings.listeners(True)]
        for port in ports:
            if ports.count(port) > 1:
                raise UserError(f"port {port} is given to two services; {_PORT_SETTINGS}")
        return settings

    def listeners(self, mlflow: bool) -> list[tuple[str, str, str, int]]:
        """Service, setting, host and port of each that is to listen."""
        found = [("Prefect", "VDVAE_PREFECT_PORT", self.host, self.prefect_port)]
        if mlflow:
            found.append(("MLflow", "VDVAE_MLFLOW_PORT", "127.0.0.1", self.mlflow_port))
        if self.s3:
            found.append(("S3", "VDVAE_S3_PORT", "127.0.0.1", self.s3_port))
        return found

    @property
    def prefect_url(self) -> str:
        """Where Prefect is reached from this machine."""
        address = ipaddress.ip_address(self.host)
        host = "127.0.0.1" if address.is_unspecified else self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.prefect_port}"


_PORT_SETTINGS = "set VDVAE_PREFECT_PORT, VDVAE_MLFLOW_PORT or VDVAE_S3_PORT to another"


def _gpus(environment: Mapping[str, str]) -> int:
    """GPUs that runs may use, at least 1: a machine without any trains one model at a time."""
    return max(1, len(visible_gpus(environment)))
