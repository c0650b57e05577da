# Everything the project asks of a machine: Python 3.11 or newer, and make.
#   make demo    environment, install, the demo            make test    environment, install, lint, types, tests
#   make bench   the full benchmark (long)                 make clean   remove the environment and caches
#   make cuda    what a GPU is needed for, figures in cuda.json
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint bench cuda clean
demo: $(VENV)/.installed
	$(BIN)/moefication demo

test: $(VENV)/.installed lint
	$(BIN)/python -m pytest

lint: $(VENV)/.installed
	$(BIN)/ruff check moefication_cli tests artifacts/demo
	$(BIN)/ruff format --check moefication_cli tests artifacts/demo
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python tests/benchmarks/bench_targets.py

cuda: $(VENV)/.installed
	$(BIN)/python tests/benchmarks/bench_cuda.py

$(VENV)/.installed: pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
