# `make` lists what there is. Each of `demo`, `test`, `check` and `bench` does its own set-up.
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
LABELS ?= true
HOW ?= exact
NAME ?= wire
X86_LEVEL ?= v2
IMAGES := aggregator scheduler telemetry registrar proxy-inference edge console

help:                  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

setup: .venv/dev       ## make .venv with everything the other targets need

.venv/local .venv/dev: .venv/%: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[$*]'
	@touch $@

demo: .venv/local      ## tune a model with eight devices here (LABELS=shuffled: the control; HOW=probe)
	$(BIN)/python -m deploy.demo --labels $(LABELS) --how $(HOW)

test: setup            ## all tests a newcomer's machine can run
	$(BIN)/python -m pytest

test-unit: setup       ## the tests that need no process and no broker
	$(BIN)/python -m pytest tests/unit

check: setup           ## everything static
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/codespell shared services edge_client deploy tests README.md ARCHITECTURE.md CHANGELOG.md

fmt: setup             ## format and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup           ## figures as JSON lines: NAME=wire, edge, close, fold, serve, install, recovery, away, herd, crowd, late, learn, proxy
	@$(BIN)/python -m tests.bench $(NAME)

chaos: setup           ## seeded schedules of failures; a printed seed repeats one
	@$(BIN)/python -m tests.chaos --live 30

image:                 ## build every image (X86_LEVEL=v3: for AVX2)
	for one in $(IMAGES); do docker build --file deploy/docker/Dockerfile --target $$one \
	  --build-arg X86_LEVEL=$(X86_LEVEL) --tag seedwire/$$one . || exit 1; done

lint-deploy: setup     ## images, compose files, units and chart, by every linter there is
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[deploy]'
	$(BIN)/python -m pytest tests/deploy/test_lint.py tests/deploy/test_chart.py

contract: setup        ## write deploy/contract/asyncapi.json anew
	$(BIN)/python -m shared.asyncapi > deploy/contract/asyncapi.json

clean:                 ## forget the virtual environment and everything built
	rm -rf .venv build dist

.PHONY: help setup demo test test-unit check fmt bench chaos image lint-deploy contract clean
