# make demo | test | check | style | benchmark | gpu         see README.md, "The two commands"
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test check style benchmark gpu clean help
.DEFAULT_GOAL := help

help:
	@echo "make demo    install, then train a PoolFormer on handwritten digits and use it (no network once installed)"
	@echo "make test    install, then run the tests"
	@echo "make check   formatting and lint, changes nothing"
	@echo "make style   formatting and lint, mends what it can"
	@echo "make benchmark  time the model against transformers' own on this CPU, into benchmarks/cpu.json"
	@echo "make gpu     on a machine with a GPU: its tests, then the benchmark; uses PYTHON as it is, installs nothing"
	@echo "make clean   remove build results and outputs/demo; .venv stays"
	@echo "PYTHON=python3.12 picks the interpreter, VENV=/elsewhere the environment"

# Neither the demo nor the tests may depend on the network.
demo test benchmark gpu: export HF_HUB_OFFLINE = 1

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

benchmark: $(VENV)/.installed-dev
	$(BIN)/python scripts/benchmark.py --compile --json benchmarks/cpu.json

# GPU machines come with a torch of their own; only rooms that need neither datasets nor evaluate are tested here.
gpu: export PYTHONPATH = src
gpu:
	$(PYTHON) -m pytest -q -m gpu tests/test_modeling_poolformer.py tests/test_image_processing_poolformer.py tests/kernels
	$(PYTHON) scripts/benchmark.py --compile --dtype bfloat16 --batch_size 256 --json benchmarks/gpu.json

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
