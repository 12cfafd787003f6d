# `make demo` and `make test` need nothing done before: each makes .venv first (deploy/setup.sh says how).
SHELL := /bin/bash
VENV ?= .venv
DEMO_OUTPUT ?= out/demo
PYTEST_ARGS ?=
# Processes that run tests. Those of one file stay together, because they share what is slow to make.
JOBS ?= 2
# 1: the versions of deploy/lock. 0: the newest that fit, which `make clean-venv setup LOCKED=0` makes from nothing.
LOCKED ?= 1
# Of `make fuzz`: seconds for each target, and their names (without any, all of them).
FUZZ_SECONDS ?= 300
FUZZ_ARGS ?=
FUZZ_TARGETS ?=
# Of `make versus`: the model, what it is scored and calibrated on, and further options (`--help` lists them).
MODEL ?= embedded:smollm2-135m-instruct
VERSUS_ARGS ?=
# What `make check-install` tries: core, cpu or editable.
KIND ?= core
export LOCKED
BIN := $(VENV)/bin
PARALLEL := --numprocesses $(JOBS) --dist loadfile
READY := $(VENV)/.ready
PEERS := .venv-peers/.ready
FUZZ := .venv-fuzz/.ready
VERSUS := .venv-llamacpp/.ready
VERSUS_PEERS := $(PEERS) .venv-gptqmodel/.ready $(VERSUS)
OTHER_PEERS := $(patsubst %,.venv-%/.ready,gptqmodel autogptq autoawq llmcompressor013)
# All but the table that benchmarks/tune_sparse24.py writes.
CXX_SOURCES := $(filter-out %/sparse24_crossovers.h,$(wildcard $(foreach end,h cpp cu,kernels/*/*.$(end) tests/kernels/*.$(end) tests/runtime/*.$(end) tests/fuzz/kernels/*.$(end))))
SETUP := pyproject.toml deploy/setup.sh deploy/versions.sh

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast lint format types recipes doctor docs coverage build peers versus versus-peers test-peers fuzz lock manifests check-chart check-install test-floor test-newest clean clean-venv

help: ## Say what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "  make %-14s %s\n", $$1, $$2 }'

setup: $(READY) ## Make the environment in .venv (the other targets do it by themselves)

$(READY): $(SETUP) $(wildcard deploy/lock/cpu*.txt deploy/lock/cuda*.txt)
	@VENV=$(VENV) deploy/setup.sh
	@touch $@

demo: $(READY) ## Compile a real LLM to 2:4 + INT4, serve it in vLLM, compare: out/demo/report.html
	$(BIN)/sparsify demo --output $(DEMO_OUTPUT)

test: $(READY) ## Run every test, those that start vLLM too
	$(BIN)/python -m pytest $(PARALLEL) $(PYTEST_ARGS)

test-fast: $(READY) ## Run the tests that need no vLLM
	$(BIN)/python -m pytest -m "not e2e" $(PARALLEL) $(PYTEST_ARGS)

lint: $(READY) ## Check style (ruff, clang-format) and types (mypy)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

format: $(READY) ## Rewrite the sources in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

recipes: $(READY) ## Write recipes/schema.json again from the recipe classes
	$(BIN)/python -c 'import json; from sparsify.recipe import json_schema; print(json.dumps(json_schema(), indent=2))' > recipes/schema.json.new
	mv recipes/schema.json.new recipes/schema.json

docs: $(READY) ## Build the pages of docs/ into out/docs; a link or a formula that fails ends it
	DISABLE_MKDOCS_2_WARNING=true $(BIN)/python -m mkdocs build --strict --quiet

coverage: $(READY) ## Run the fast tests and say what share of the lines of sparsify/ they execute
	$(BIN)/python -m coverage run -m pytest -m "not e2e" $(PARALLEL) $(PYTEST_ARGS)
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report --skip-covered --sort=cover

doctor: $(READY) ## Say what is installed and what this machine can run
	$(BIN)/sparsify doctor

build: $(READY) ## Build the wheel and the source distribution into dist/
	$(BIN)/python -m build

peers: $(PEERS) $(OTHER_PEERS) ## Make environments of llm-compressor (two), GPTQModel, AutoGPTQ and AutoAWQ, to compare with them

versus: $(READY) ## Compress and measure a model with llm-compressor, GPTQModel, llama.cpp and ours; goes on where it was stopped
	-@[ -n "$$SPARSIFY_PEERS" ] || $(MAKE) --no-print-directory --keep-going versus-peers
	$(BIN)/python -m benchmarks.versus --publish --model $(MODEL) $(VERSUS_ARGS)

versus-peers: $(VERSUS_PEERS) ## Make the environments of `make versus`; what cannot be made is a row that says so

test-peers: $(READY) ## Run the tests that compare with those packages; `make peers` first, what is missing is skipped by name
	$(BIN)/python -m pytest -m peers -rs tests/peers tests/recipe $(PYTEST_ARGS)

fuzz: $(FUZZ) ## Feed random input to every reader and C++ kernel, FUZZ_SECONDS=300 each: out/fuzz/result.json
	.venv-fuzz/bin/python -m tests.fuzz --seconds $(FUZZ_SECONDS) $(FUZZ_ARGS) $(FUZZ_TARGETS)

$(FUZZ): $(READY) deploy/setup.sh deploy/versions.sh
	@VENV=.venv-fuzz deploy/setup.sh fuzz
	@touch $@

$(OTHER_PEERS) $(VERSUS): .venv-%/.ready: deploy/setup.sh deploy/versions.sh
	@VENV=.venv-$* deploy/setup.sh $*
	@touch $@

$(PEERS): deploy/setup.sh deploy/versions.sh deploy/lock/peers.txt
	@VENV=.venv-peers deploy/setup.sh peers
	@touch $@

lock: ## Write deploy/lock again from pyproject.toml; UPGRADE=1 takes the newest versions (needs the network)
	@deploy/lock.sh

manifests: ## Write deploy/kubernetes.yaml again from deploy/chart and check both (needs the network once)
	@deploy/check_chart.sh --write

check-chart: ## Render deploy/chart, check it by the schemas of Kubernetes and rules of security (needs the network once)
	@deploy/check_chart.sh

check-install: ## Install the wheel into a clean environment and run the commands there; KIND=core, cpu or editable
	@deploy/check_install.sh $(KIND)

test-floor: ## Run the fast tests with the lowest versions that pyproject.toml allows, in .venv-floor
	@VENV=.venv-floor deploy/setup.sh floor
	.venv-floor/bin/python -m pytest -m "not e2e" $(PARALLEL) $(PYTEST_ARGS)

test-newest: ## Run the fast tests with the newest versions that pyproject.toml allows, in .venv-newest
	@VENV=.venv-newest deploy/setup.sh newest
	.venv-newest/bin/python -m pytest -m "not e2e" $(PARALLEL) $(PYTEST_ARGS)

clean: ## Remove what runs and tools left behind (out/, caches, dist/)
	rm -rf out dist build .pytest_cache .mypy_cache .ruff_cache
	find sparsify tests -name __pycache__ -type d -prune -exec rm -rf {} +

clean-venv: ## Remove .venv and the environments beside it
	rm -rf .venv .venv-peers .venv-fuzz $(OTHER_PEERS:/.ready=) $(VERSUS:/.ready=) .venv-floor .venv-newest .venv-chart
