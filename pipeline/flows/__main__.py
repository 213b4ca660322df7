"""`python -m pipeline.flows RECIPE` runs a recipe's flow in the checkout."""

from __future__ import annotations

import sys

from pipeline.flows.run_recipe import main

if len(sys.argv) != 2:
    sys.exit("usage: python -m pipeline.flows RECIPE")
main(sys.argv[1])
