# Starts from a bare checkout: all it needs is Python 3.11 and a package index.
#   make demo PYTHON=python3.12 VENV=/somewhere/else

PYTHON ?= python3.11
VENV ?= .venv
WORKERS ?= 2 # of tests: each needs a core and 4 GiB

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint types install-dev clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-12s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/.runtime ## the whole pipeline on a 135M model, into runs/demo
	$(VENV)/bin/python -m refine_af.launch.pipeline --config=smollm2_135m --workdir=runs/demo

test: $(VENV)/.test ## all tests but the slow ones
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow"

test-slow: $(VENV)/.test ## the slow tests
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile -m slow

lint: $(VENV)/.dev ## style and formatting
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/.dev ## build the wheel, import it, check its types
	PATH="$(abspath $(VENV))/bin:$$PATH" .ci/types

install-dev: $(VENV)/.dev ## an environment with everything that the checks need

clean: ## remove caches and build products; runs and the environment stay
	rm -rf build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find refine_af models launch configs seeds tests -name __pycache__ -prune -exec rm -rf {} +

# One stamp for each set of dependencies, older than pyproject.toml when it has to be installed
# again. A larger set brings the smaller ones along.
$(VENV)/.test: extras := [test]
$(VENV)/.test: brings := $(VENV)/.runtime
$(VENV)/.dev: extras := [test,dev]
$(VENV)/.dev: brings := $(VENV)/.runtime $(VENV)/.test
$(VENV)/.runtime $(VENV)/.test $(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install -e ".$(extras)"
	touch $(brings) $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
