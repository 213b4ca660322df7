"""MLflow tracking: one run accompanies a recipe through all its stages and survives any kill.

Everything here may be called again by a stage that was killed and started anew: the run is found
by a key of our own that is on disk before the run exists, parameters are logged once, and points
of curves are delivered exactly once.
"""

from pipeline.tracking.journal import BufferedRun
from pipeline.tracking.opening import EXPERIMENT, find_run, open_run, settle
from pipeline.tracking.run import Run, curve_point, flat_metrics, read_curves
from pipeline.tracking.store import (
    connect,
    is_server,
    locked,
    mlflow_errors,
    sqlite_path,
    without_credentials,
)
from pipeline.tracking.study import log_study

__all__ = [
    "EXPERIMENT",
    "BufferedRun",
    "Run",
    "connect",
    "curve_point",
    "find_run",
    "flat_metrics",
    "is_server",
    "locked",
    "log_study",
    "mlflow_errors",
    "open_run",
    "read_curves",
    "settle",
    "sqlite_path",
    "without_credentials",
]
