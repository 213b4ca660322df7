"""`python -m pipeline.studies NAME`: a study as DVC's stage `study@NAME` runs it."""

import sys

from pipeline.studies.results import run_study
from pipeline.system.exits import as_a_command

if __name__ == "__main__":
    with as_a_command():
        run_study(sys.argv[1], mini=False, jobs=1, tell=lambda line: print(line, flush=True))
