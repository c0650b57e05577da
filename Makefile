# Everything the project asks of a machine: Python 3.11 or newer, and make.
#   make demo    environment, install, the demo            make test    environment, install, lint, types, tests
#   make bench   the full benchmark (long)                 make clean   remove the environment and caches
#   make cuda    what a GPU is needed for, figures in cuda.json
#   make soak    kills, damage and bad command lines at full size (long)
# The first of these that is 3.11 or newer and can make environments is used; make PYTHON=... names another.
PYTHONS := python3.11 python3.12 python3.13 python3.14 python3 python
VENV := .venv
BIN := $(VENV)/bin
USABLE := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))

.PHONY: demo test lint bench cuda soak clean python venv
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

soak: $(VENV)/.installed
	$(BIN)/python tests/benchmarks/soak.py

MISSING := $(if $(PYTHON),$(PYTHON) is not,There is no) Python 3.11 or newer with venv and pip: install one \
(Debian, Ubuntu: apt install python3-venv) or name one, make PYTHON=/path/to/python3
# Sets $python for the commands behind it
FIND = for python in $(or $(PYTHON),$(PYTHONS)); do "$$python" -c "$(USABLE)" >/dev/null 2>&1 && break; python=; done; \
	if [ -z "$$python" ]; then echo "$(MISSING)" >&2; exit 1; fi
# An environment that is broken, or of a Python before 3.11, is made anew; one of any other Python stays
WHOLE = "$(BIN)/python" -c "import pip, sys; sys.exit(sys.version_info < (3, 11))" >/dev/null 2>&1
ENVIRONMENT = if ! $(WHOLE); then $(FIND); rm -rf "$(VENV)"; echo "$$python -m venv $(VENV)"; "$$python" -m venv "$(VENV)"; fi

python:
	@$(FIND); echo "$$python"

venv:
	@$(ENVIRONMENT)

ifneq ($(shell $(WHOLE) && echo whole),whole)
.PHONY: $(VENV)/.installed
endif
$(VENV)/.installed: pyproject.toml .ci/constraints.txt
	@$(ENVIRONMENT)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
