# Everything happens in .venv; nothing needs root or a variable of the environment.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
export PIP_DISABLE_PIP_VERSION_CHECK := 1
unexport PYTHONDONTWRITEBYTECODE

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help setup demo test test-faults chaos test-browser test-proxy test-azure test-gpu test-ray format lock clean

help: ## list these targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 22

setup: $(READY) ## create .venv with the locked packages and fedflow itself

# Redone only when the lock or the project's metadata changes. One line a package shows the progress.
# The locked pip first: it takes half the time of the one that comes with Python 3.11. Modules compile when first used.
$(READY): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$$(grep '^pip==' requirements.lock)"
	$(BIN)/pip install --no-compile -r requirements.lock | sed -unE 's/^Collecting ([^ ]+).*/  \1/p; s/^(Installing collected packages).*/\1/p'
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

demo: setup ## train on handwritten digits at four sites on this machine
	$(BIN)/fedflow run examples/digits/recipe.yaml --env poc

test: setup ## style, types, then every test that needs no browser and no nginx
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not browser and not proxy and not faults and not azure and not ray and not gpu"

test-faults: setup ## kills, outages and real seconds, on a real Prefect server
	$(BIN)/pytest -m faults

chaos: setup ## the fault matrix on real servers, an hour; ARGS='--case "cancel-*"' or ARGS='--minutes 30' at random
	$(BIN)/python -m benchmarks.chaos $(ARGS)

test-ray: setup ## simulations on Ray
	$(BIN)/pytest -m ray

test-gpu: ## simulations on a CUDA device, with the torch that finds it: BIN=... of an environment with one
	$(BIN)/pytest -m gpu

test-azure: setup ## the store over Azure's emulator; needs npm
	$(BIN)/pytest -m azure

test-browser: setup ## the tests that drive a real Chromium
	$(BIN)/pytest -m browser

test-proxy: setup ## a federation behind a real nginx; needs nginx and openssl
	$(BIN)/pytest -m proxy

format: setup ## put the code into the project's style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

lock: setup ## pin what pyproject.toml asks for; ARGS=--upgrade moves the pins too
	$(BIN)/uv pip compile pyproject.toml --extra all --universal --python-version 3.11 --no-annotate --quiet \
	  --custom-compile-command "make lock" --output-file requirements.lock $(ARGS)

clean: ## remove .venv, caches and build results
	rm -rf $(VENV) dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
