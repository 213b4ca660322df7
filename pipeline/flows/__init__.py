"""Prefect flows, and the clone that a run with settings of its own works in."""

import os

# Read by prefect when it is imported: nothing reports home.
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")
# A run's own server has 20 seconds otherwise, which a busy machine does not keep.
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
