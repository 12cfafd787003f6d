# `make demo` and `make test` need nothing done before: each makes .venv first (deploy/setup.sh says how).
SHELL := /bin/bash
VENV ?= .venv
DEMO_OUTPUT ?= out/demo
PYTEST_ARGS ?=
# Processes that run tests. Those of one file stay together, because they share what is slow to make.
JOBS ?= 2
BIN := $(VENV)/bin
PARALLEL := --numprocesses $(JOBS) --dist loadfile
READY := $(VENV)/.ready
PEERS := .venv-peers/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast lint format types recipes doctor build peers clean clean-venv

help: ## Say what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "  make %-12s %s\n", $$1, $$2 }'

setup: $(READY) ## Make the environment in .venv (the other targets do it by themselves)

$(READY): pyproject.toml deploy/setup.sh
	@VENV=$(VENV) deploy/setup.sh
	@touch $@

demo: $(READY) ## Compile a real LLM to 2:4 + INT4, serve it in vLLM, compare: out/demo/report.html
	$(BIN)/sparsify demo --output $(DEMO_OUTPUT)

test: $(READY) ## Run every test, those that start vLLM too
	$(BIN)/python -m pytest $(PARALLEL) $(PYTEST_ARGS)

test-fast: $(READY) ## Run the tests that need no vLLM
	$(BIN)/python -m pytest -m "not e2e" $(PARALLEL) $(PYTEST_ARGS)

lint: $(READY) ## Check style (ruff) and types (mypy)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## Rewrite the sources in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

recipes: $(READY) ## Write recipes/schema.json again from the recipe classes
	$(BIN)/python -c 'import json; from sparsify.recipe import json_schema; print(json.dumps(json_schema(), indent=2))' > recipes/schema.json.new
	mv recipes/schema.json.new recipes/schema.json

doctor: $(READY) ## Say what is installed and what this machine can run
	$(BIN)/sparsify doctor

build: $(READY) ## Build the wheel and the source distribution into dist/
	$(BIN)/python -m build

peers: $(PEERS) ## Make .venv-peers with llm-compressor, to measure against it

$(PEERS): deploy/setup.sh
	@VENV=.venv-peers deploy/setup.sh peers
	@touch $@

clean: ## Remove what runs and tools left behind (out/, caches, dist/)
	rm -rf out dist build .pytest_cache .mypy_cache .ruff_cache
	find sparsify tests -name __pycache__ -type d -prune -exec rm -rf {} +

clean-venv: ## Remove .venv and .venv-peers
	rm -rf .venv .venv-peers
