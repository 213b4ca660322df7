"""`python -m pipeline.services`: what `vdvae services` does."""

import argparse

from pipeline.exits import as_a_command
from pipeline.services import add_arguments, run

with as_a_command():
    parser = argparse.ArgumentParser(prog="python -m pipeline.services")
    add_arguments(parser)
    run(parser.parse_args())
