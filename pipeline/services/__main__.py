"""`python -m pipeline.services`: what `vdvae services` does."""

import argparse

from pipeline.services import add_arguments, run
from pipeline.system.exits import as_a_command

with as_a_command():
    parser = argparse.ArgumentParser(prog="python -m pipeline.services")
    add_arguments(parser)
    run(parser.parse_args())
