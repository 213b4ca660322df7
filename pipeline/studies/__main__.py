"""`python -m pipeline.studies NAME`: a study as DVC's stage `study@NAME` runs it."""

import os
import sys

from pipeline.studies.results import run_study
from pipeline.system.exits import as_a_command

if __name__ == "__main__":
    # Cells are no processes of DVC's stage: each is a flow in a clone, with a DVC of its own.
    os.environ.pop("DVC_STAGE", None)
    with as_a_command():
        run_study(sys.argv[1], mini=False, jobs=1, tell=lambda line: print(line, flush=True))
