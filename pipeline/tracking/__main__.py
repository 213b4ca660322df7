"""`python -m pipeline.tracking` delivers what waits for MLflow.

Before a server starts it also makes database and experiment where they lack, so that the server
keeps artifacts where runs without one keep them.
"""

from __future__ import annotations

import sys

from pipeline.params import Places
from pipeline.tracking import settle
from vdvae.config import UserError

try:
    for sentence in settle(Places.from_env()):
        print(sentence)
except UserError as failure:
    sys.exit(f"error: {failure}")
