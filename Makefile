# make demo | test | check | style         see README.md, "The two commands"
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test check style clean help
.DEFAULT_GOAL := help

help:
	@echo "make demo    install, then train a PoolFormer on handwritten digits and use it (no network once installed)"
	@echo "make test    install, then run the tests"
	@echo "make check   formatting and lint, changes nothing"
	@echo "make style   formatting and lint, mends what it can"
	@echo "make clean   remove build results and outputs/demo; .venv stays"
	@echo "PYTHON=python3.12 picks the interpreter, VENV=/elsewhere the environment"

# Neither the demo nor the tests may depend on the network.
demo test: export HF_HUB_OFFLINE = 1

demo: $(VENV)/.installed-demo
	$(BIN)/python scripts/demo.py

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check --no-cache .
	$(BIN)/ruff check --no-cache .

style: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf build dist outputs/demo outputs/demo-data src/*.egg-info .pytest_cache .ruff_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "error: $(PYTHON) is missing or older than 3.10; try make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
	  || { rm -rf $(VENV); echo "error: $(PYTHON) -m venv failed; on Debian: apt install python3-venv" >&2; exit 1; }

# The stamps are newer than pyproject.toml when nothing has to be installed.
$(VENV)/.installed-demo: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[demo]'
	@touch $@

# dev contains demo, so one install answers for both.
$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $(VENV)/.installed-demo $@
