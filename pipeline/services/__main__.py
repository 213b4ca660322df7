"""`python -m pipeline.services`: what `vdvae services` does."""

import argparse

from pipeline.services import run
from pipeline.system.exits import as_a_command

with as_a_command():
    parser = argparse.ArgumentParser(prog="python -m pipeline.services")
    parser.add_argument("action", choices=("start", "stop", "status", "supervise"))
    for service in ("prefect", "mlflow", "s3"):
        parser.add_argument(f"--{service}-port")
    parser.add_argument("--s3", action="store_true", help="with a local S3 server for the store")
    run(**vars(parser.parse_args()))
