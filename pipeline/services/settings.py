"""Where the services listen, who may ask them, and how much they do at once."""

from __future__ import annotations

from urllib.parse import urlsplit

from pipeline import settings
from pipeline.system.process import visible_gpus
from vdvae.config import UserError

POOL = "vdvae"  # Prefect's work pool, which prefect.yaml names too
_HERE = "127.0.0.1"  # MLflow and S3 stay on it


class Settings(settings.Settings):
    """The environment's settings, which the services can be started with.

    Raises:
        UserError: naming the variable, its value and what would do.
    """

    def __init__(self) -> None:
        super().__init__()
        if not self.host.is_loopback and not self.auth:
            raise UserError(
                f"VDVAE_HOST: {self.host} can be reached from other machines and anybody there "
                f"could start runs; set VDVAE_AUTH=user:password too, or leave VDVAE_HOST unset"
            )
        try:
            origin = urlsplit(self.origin)
        except ValueError as error:  # `http://[`
            raise UserError(f"VDVAE_ORIGIN: is no address ({error}); mend or unset it") from None
        if origin.password or (origin.username and origin.scheme.startswith("http")):
            raise UserError(
                "VDVAE_ORIGIN: holds credentials, which pages and logs would show; leave them out "
                "of the URL and keep them in git's credential helper ('git help credentials')"
            )
        ports = [port for *_, port in self.listeners(True)]
        for port in ports:
            if ports.count(port) > 1:
                raise UserError(
                    f"port {port} is given to two services; set VDVAE_PREFECT_PORT, "
                    f"VDVAE_MLFLOW_PORT or VDVAE_S3_PORT to another"
                )

    @property
    def at_once(self) -> int:
        """Flow runs at once: by default a GPU each; without any, one."""
        return self.runs_at_once or max(1, len(visible_gpus()))

    def listeners(self, mlflow: bool) -> list[tuple[str, str, str, int]]:
        """Service, setting, host and port of each that is to listen."""
        found = [("Prefect", "VDVAE_PREFECT_PORT", str(self.host), self.prefect_port)]
        if mlflow:
            found.append(("MLflow", "VDVAE_MLFLOW_PORT", _HERE, self.mlflow_port))
        if self.s3:
            found.append(("S3", "VDVAE_S3_PORT", _HERE, self.s3_port))
        return found

    @property
    def prefect_url(self) -> str:
        """Where Prefect is reached from this machine."""
        host = _HERE if self.host.is_unspecified else str(self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.prefect_port}"
