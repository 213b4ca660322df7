# Everything runs in .venv, which `make setup` builds from the pinned versions in requirements/.

# The one line to change for another build of PyTorch. On Linux the plain package is the CUDA build
# (about 3 GB); pip's own configuration (an index, a folder of wheels, constraints) is respected.
#   CPU:   make setup TORCH=torch==2.13.0+cpu   PIP_TORCH_ARGS="--index-url ADDRESS"
#   CUDA:  make setup TORCH=torch==2.13.0+cu130 PIP_TORCH_ARGS="--index-url ADDRESS"
# with the ADDRESS that PyTorch's own "Get started" page gives for that build.
TORCH ?= torch==2.13.0
PIP_TORCH_ARGS ?=

UV ?= uv==0.13.9
# Empty: the first of python3.11 and python3 that is 3.11 or newer.
PYTHON ?=
# More arguments for `dvc repro`, the services, pytest, benchmarks/gpu.py and `uv pip compile`.
REPRO_ARGS ?=
SERVICES_ARGS ?=
TEST_ARGS ?=
GPU_ARGS ?=
LOCK_ARGS ?=

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
.PHONY: help setup demo services stop test campaign gpu check lock clean

VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# Nothing here reports home.
export MLFLOW_DISABLE_TELEMETRY := true
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export DO_NOT_TRACK := 1

help: ## this list
	@echo "make TARGET, where TARGET is one of"
	sed -nE 's/^([a-z]+):[^#]*## (.*)/  \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 10
	echo
	echo "PyTorch: $(TORCH); another build, CPU or CUDA:"
	echo "  make setup TORCH=torch==2.13.0+cu130 PIP_TORCH_ARGS='--index-url ADDRESS'"

setup: repository $(VENV)/.complete ## build .venv from the pinned versions (again only when they change)

# DVC, and a run's clone, need a git repository, which a downloaded archive is not. One that is there,
# here or above, is left as it is.
.PHONY: repository
repository:
	@folder=$$PWD
	until [ -e "$$folder/.git" ] || [ -z "$$folder" ]; do folder=$${folder%/*}; done
	if [ -z "$$folder" ] && [ ! -e /.git ]; then
	  if ! command -v git > /dev/null; then echo "make setup: DVC needs git; install it" >&2; exit 2; fi
	  git init --quiet --initial-branch main
	  git add --all && git -c user.name=vdvae -c user.email=vdvae@localhost -c commit.gpgsign=false \
	    commit --quiet --no-verify --message "As downloaded" || { rm -rf .git; exit 2; }
	  echo "make setup: this is no git repository, which DVC needs: it is now one, with one commit"
	fi

# Another torch asked for by name is installed even where .venv is complete.
ifneq ($(filter command,$(origin TORCH)),)
.PHONY: $(VENV)/.complete
endif

# A set-up that was interrupted leaves .incomplete behind and is redone from nothing: packages that
# were half written then cannot be told from whole ones.
# Bytecode is compiled at once: where PYTHONDONTWRITEBYTECODE is set, every import would take 3 to 5
# times longer for ever.
$(VENV)/.complete: Makefile pyproject.toml requirements/lock.txt requirements/dev.txt
	@if [ -e $(VENV)/.incomplete ] || ! $(VENV)/bin/pip --version > /dev/null 2>&1; then
	  rm -rf $(VENV)
	  python="$(PYTHON)"
	  for candidate in python3.11 python3; do
	    if [ -z "$$python" ] && "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
	      python=$$candidate
	    fi
	  done
	  if [ -z "$$python" ]; then
	    echo "make setup: no Python 3.11 or newer on the path; name one: make setup PYTHON=/path/to/python3.11" >&2
	    exit 2
	  fi
	  mkdir $(VENV)
	  touch $(VENV)/.incomplete
	  "$$python" -m venv $(VENV)
	fi
	touch $(VENV)/.incomplete
	$(VENV)/bin/pip install --quiet $(PIP_TORCH_ARGS) "$(TORCH)"
	if $(VENV)/bin/pip install --quiet "$(UV)"; then
	  uv pip install --quiet --python $(VENV) --compile-bytecode -r requirements/lock.txt -r requirements/dev.txt
	else
	  echo "make setup: uv could not be had; pip does its work, slower" >&2
	  $(VENV)/bin/pip install --quiet -r requirements/lock.txt -r requirements/dev.txt
	fi
	$(VENV)/bin/pip install --quiet --no-deps --no-build-isolation --editable .
	cp requirements/own-path.pth $(VENV)/lib/python3.*/site-packages/
	rm $(VENV)/.incomplete
	touch $@
	echo "make setup: .venv is complete after $$SECONDS s"

demo: setup ## set up, rebuild the active recipes (digits: minutes on 2 cores), print what came out
	@dvc repro $(REPRO_ARGS)
	echo "make demo: dvc repro took $$SECONDS s"
	vdvae show digits

services: setup ## start Prefect, MLflow and a worker on 127.0.0.1 (SERVICES_ARGS=--s3: an S3 server too)
	@python -m pipeline.services start $(SERVICES_ARGS)

stop: ## cancel the active runs, which writes checkpoints, and end the services
	@$(VENV)/bin/python -m pipeline.services stop

test: setup ## the tests (TEST_ARGS="-k shards" for some of them)
	@pytest -n 2 --dist loadgroup --ignore tests/campaign $(TEST_ARGS)

campaign: setup ## many kills, hostile inputs, lost machines, browser, Postgres (CAMPAIGN=10: ten times)
	@pytest -n 2 --dist loadgroup tests/campaign $(TEST_ARGS)

# Not `setup`: it runs on a machine that has a Python with torch, numpy and safetensors, and no network.
gpu: ## check and time a CUDA device in under nine minutes; needs no set-up, a python3 with torch will do
	@python="$(PYTHON)"
	if [ -z "$$python" ] && [ -e $(VENV)/.complete ]; then python=$(VENV)/bin/python; fi
	if [ -z "$$python" ]; then python=python3 PATH="$${PATH#*:}"; fi # not that of a .venv half made
	"$$python" benchmarks/gpu.py $(GPU_ARGS)

check: setup ## format, lint, types, direction of imports
	@ruff format --check .
	ruff check .
	mypy
	MYPYPATH=benchmarks:tests mypy --follow-imports silent benchmarks/*.py
	lint-imports

# torch is left out: its build is chosen above. With it go the CUDA libraries of the plain build.
# What is pinned already stays as it is; LOCK_ARGS=--upgrade takes the newest versions that fit.
lock: setup ## recreate requirements/*.txt from pyproject.toml (LOCK_ARGS=--upgrade for newer ones)
	@compile() {
	  echo "$(TORCH)" | uv pip compile --quiet --no-header --no-annotate --no-emit-package torch $(LOCK_ARGS) pyproject.toml - "$$@" > /dev/null
	}
	compile --extra pipeline --output-file requirements/lock.txt
	compile --extra dev --constraints requirements/lock.txt --output-file requirements/dev.txt
	sed -Ei '/^(cuda-|nvidia-|triton=)/d' requirements/lock.txt requirements/dev.txt

# Never what cost time to make: store, runs, results, mlruns, data, DVC's cache and .venv stay.
clean: ## remove bytecode, tool caches and builds; never store, runs, results, mlruns, data, .dvc, .venv
	@rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find vdvae pipeline tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
