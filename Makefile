# The commands of this repository. `make` alone lists them.
# A Python of 3.11 or later is all that has to be there; the rest goes into .venv.

VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := constraints.txt
# The first of these that is there; PYTHON=… names another.
PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3; do \
	command -v $$name >/dev/null 2>&1 \
	&& $$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$name && break; done)
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS)
# Tests that start processes of their own, or measure time, take turns; the others may run side by side.
PARALLEL := tests/unit tests/property
# Engines whose libraries need an environment of their own, each with files in workers/environments, and what is tried in
# it: the suites that every engine passes, and tests/engines/NAME.
OWN_ENVIRONMENTS := $(basename $(notdir $(wildcard workers/environments/*.in)))
ENGINE_TESTS := tests/contract/test_engine_contract.py tests/contract/test_encoder_contract.py \
	tests/contract/test_conversation_contract.py
SERIAL := $(filter-out tests/engines $(PARALLEL),$(filter-out tests/__pycache__,$(patsubst %/,%,$(wildcard tests/*/))))

.DEFAULT_GOAL := help
.PHONY: help demo up test test-fast test-engines test-load test-gpu check format chaos bench bench-gpu screenshots docs clean

help: ## List the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.demo ## Install and show the whole of it: batches, a search, generations, an engine that fails
	$(BIN)/muai demo

up: $(VENV)/.demo ## Run an installation on this machine until Ctrl-C
	$(BIN)/muai up

test: $(VENV)/.dev ## Run every test (RabbitMQ's are skipped where there is none, unless CI=true)
	$(BIN)/python -m pytest -q -n auto $(PARALLEL)
	$(BIN)/python -m pytest -q $(SERIAL)

test-fast: $(VENV)/.dev ## Run the tests that need no server and no model
	$(BIN)/python -m pytest -q -n auto $(PARALLEL)

test-load: $(VENV)/.dev ## Batches of 50,000 lines, rolling restarts, 1,000 readers, 10,000 generated calls; wants an idle machine
	MUAI_TEST_LOAD=long MUAI_TEST_SCHEMA_CALLS=10000 $(BIN)/python -m pytest -q -s \
		tests/integration/test_batch_load.py tests/integration/test_gateway_load.py tests/integration/test_gateway_schema.py

test-engines: $(VENV)/.dev ## Build the environments of vLLM and DeepSpeed; try every engine with real models
	$(BIN)/python workers/environments/build.py $(OWN_ENVIRONMENTS)
	set -e; for engine in $(OWN_ENVIRONMENTS); do \
		python=$$($(BIN)/python workers/environments/build.py $$engine); \
		MUAI_TEST_ENGINES=$$engine $$python -m pytest -q --timeout 300 $(ENGINE_TESTS) $$(ls -d tests/engines/$$engine 2>/dev/null); \
	done
	@if [ -d tests/engines/together ]; then set -x; $(BIN)/python -m pytest -q --timeout 300 tests/engines/together; fi

test-gpu: $(VENV)/.dev ## Run what needs an NVIDIA GPU; where there is none it says so
	@if $(BIN)/python -m muai_workers.gpus.present; then $(BIN)/python -m pytest -q -m gpu --timeout 600 tests/gpu; fi

check: $(VENV)/.dev ## Lint, check formatting, types and the layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev ## Format the code
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

chaos: $(VENV)/.dev ## Kill, stop and cut everything in turn, with 10,000 requests under way
	MUAI_TEST_CHAOS_REQUESTS=10000 $(BIN)/python -m pytest -q -m chaos --timeout 900 tests/chaos tests/integration
	$(BIN)/python -m tests.chaos.report

bench: $(VENV)/.dev ## Measure speed; every figure is a ratio taken on this machine
	$(BIN)/python -m benchmarks.run

bench-gpu: $(VENV)/.dev ## Measure an encoder on this machine's NVIDIA GPU; where there is none it says so
	@$(BIN)/python -m benchmarks.gpu

screenshots: $(VENV)/.dev ## Take the pictures of the console in docs/images anew (needs chromium and chromedriver)
	$(BIN)/python -m tests.browser.screenshots

docs: $(VENV)/.dev ## Write the generated documents anew
	$(BIN)/muai config docs --output docs/configuration.md
	$(BIN)/muai config example --output config/optimization.example.yaml
	$(BIN)/python -m muai_producers.monitoring.reference docs/monitoring.md

clean: ## Remove what was installed and cached here
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@test -n "$(PYTHON)" || { \
		echo "MuAI needs Python 3.11 or later, and none is on the PATH. Install one, or say make PYTHON=/path/to/python3.11" >&2; \
		exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) comes without venv: install it first (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# A stamp is older than what it was made from exactly when there is something to install.
$(VENV)/.demo: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	@echo "installing into $(VENV); the first time this takes a few minutes"
	$(PIP_INSTALL) -e '.[demo]'
	@touch $@

$(VENV)/.dev: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	@echo "installing into $(VENV); the first time this takes a few minutes"
	$(PIP_INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/.demo
