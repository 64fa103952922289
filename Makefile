# Everything a newcomer needs. PYTHON may name any Python of 3.10 or later.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test test-long test-all bench soak clean

help:  ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit("vluna-llm needs Python 3.10 or later: make PYTHON=python3.12 ..." if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.demo: pyproject.toml | $(VENV)/.made
	$(BIN)/python -m pip install --quiet --editable '.[demo]'
	@touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/.made
	$(BIN)/python -m pip install --quiet 'tox>=4.22'
	@touch $@

$(VENV)/.bench: pyproject.toml | $(VENV)/.made
	$(BIN)/python -m pip install --quiet --editable '.[dev,bench]'
	@touch $@

demo: $(VENV)/.demo  ## the main job in half a minute: no account, no key, no network
	$(BIN)/vluna-llm demo

test: $(VENV)/.test  ## all tests in their environments: both majors of the OpenAI SDK, three lines of LiteLLM
	$(BIN)/tox run --skip-env litellm
	$(BIN)/tox run-parallel --parallel 2 --parallel-live --parallel-no-spinner -e litellm_new,litellm_old,litellm_newest

test-long: $(VENV)/.test  ## the long tests alone
	$(BIN)/tox run -e openai3 -- -m slow

test-all: test test-long  ## all tests and the long ones

bench: $(VENV)/.bench  ## the performance budget: a table and a plot in benchmarks/results
	$(BIN)/python -m benchmarks

soak: $(VENV)/.bench  ## ten minutes of kill -9 (SOAK="--minutes 30 --seed 7" for another run): one summary line
	$(BIN)/python tests/soak $(SOAK)

clean:  ## remove environments and caches
	rm -rf $(VENV) .tox .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist benchmarks/results
