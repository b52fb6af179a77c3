# make demo | test | docs | versions | chaos | check | style | benchmark | gpu  see docs/install.md
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CONSTRAINTS ?= constraints.txt
# Most of their time is Triton's compiler's.
GPU_TESTS_AT_ONCE ?= $(shell $(PYTHON) -c 'import xdist' 2>/dev/null && printf %s '-n auto --maxprocesses 14 --dist worksteal')
# The slowest first. GPU machines come with a torch of their own, and not always with what training needs.
GPU_TESTS = tests/kernels tests/test_modeling_poolformer.py \
  $(shell $(PYTHON) -c 'import datasets, sklearn' 2>/dev/null && printf %s 'tests/training/test_fused_training.py \
    tests/training/test_device_pipeline.py tests/training/test_resampling.py \
    tests/test_prediction_pixels.py tests/export/test_devices.py') \
  tests/benchmark tests/test_image_processing_poolformer.py tests/foundation/test_graphs.py

.PHONY: demo demo-dense test docs versions constraints chaos check style cards benchmark gpu release clean help
.DEFAULT_GOAL := help

help:
	@echo "make demo    install, then train a PoolFormer on handwritten digits and use it (no network once installed)"
	@echo "make demo-dense  install, then train a segmenter and two detectors on Tux Paint's stamps"
	@echo "make test    install, then run the tests"
	@echo "make docs    install, then build the documentation as a site into outputs/site; Python 3.11 or later"
	@echo "make versions  the tests in environments of their own: the floors, each minor release of torch, the newest of"
	@echo "             everything, into docs/versions.md (an hour, gigabytes to download)"
	@echo "make constraints  write constraints.txt, what demo and test install, from what is installed now"
	@echo "make chaos   install, then break things on purpose: kill -9, bad lines, full disks, damaged bytes (an hour)"
	@echo "make check   formatting and lint, changes nothing"
	@echo "make style   formatting and lint, mends what it can"
	@echo "make cards   write the model cards of all published checkpoints into outputs/cards"
	@echo "make benchmark  time the model against every peer on this CPU, in ten minutes, into benchmarks/cpu.*"
	@echo "make gpu     on a machine with a GPU: its tests, then the benchmark, in eight minutes, into benchmarks/gpu.*;"
	@echo "             uses PYTHON as it is, installs nothing"
	@echo "make release  build the packages, check them, install them into an empty environment and test them there; into"
	@echo "             dist; uploads nothing"
	@echo "make clean   remove build results and outputs/demo; .venv stays"
	@echo "PYTHON=python3.12 picks the interpreter, VENV=/elsewhere the environment, CONSTRAINTS= the newest"
	@echo "of everything"

# Neither the demo nor the tests may depend on the network.
demo demo-dense test docs chaos cards benchmark gpu: export HF_HUB_OFFLINE = 1

demo: $(VENV)/.installed-demo
	$(BIN)/python scripts/demo.py

demo-dense: $(VENV)/.installed-demo-dense
	$(BIN)/python scripts/demo_dense.py

# Files side by side, one thread each: more threads would wait for each other.
test: export OMP_NUM_THREADS = 1
# Each process imports the tests: compiled once, they take a third of the time.
test: export PYTHONDONTWRITEBYTECODE =
test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

docs: $(VENV)/.installed-docs
	$(BIN)/python scripts/make_site.py

# Installs nothing here; each environment is its own.
versions: | $(BIN)/python
	$(BIN)/python scripts/versions.py

constraints: $(VENV)/.installed-dev
	$(BIN)/python scripts/install.py --freeze > constraints.new
	@mv constraints.new constraints.txt
	@touch $(VENV)/.installed-*

chaos: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow -rA tests/chaos tests/test_fuzzing.py

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check --no-cache .
	$(BIN)/ruff check --no-cache .

style: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

cards: $(VENV)/.installed-demo
	$(BIN)/python scripts/make_cards.py

benchmark: $(VENV)/.installed-dev
	$(BIN)/python scripts/benchmark.py all --device cpu --output benchmarks/cpu

# Installs nothing. What has not begun after 100 s is not begun; a test that hangs is interrupted after 140, and then
# the names of those that failed are in the lines about each test.
gpu: export PYTHONPATH = src
gpu:
	@mkdir -p outputs
	@status=0; \
	timeout -k 10 -s INT 140 $(PYTHON) -m pytest -v -m gpu -rfEs --most-seconds 100 $(GPU_TESTS_AT_ONCE) \
	  -o faulthandler_timeout=60 --junitxml=outputs/gpu-tests.xml $(GPU_TESTS) > outputs/gpu-tests.txt 2>&1 || status=1; \
	tail -n 3 outputs/gpu-tests.txt; \
	timeout -k 10 -s INT 320 $(PYTHON) scripts/benchmark.py all --device cuda --seconds 5 --budget 300 \
	  --output benchmarks/gpu || status=1; \
	grep -oE '(FAILED|ERROR) +tests/[^ ]+' outputs/gpu-tests.txt | sort -u; \
	grep -E '^SKIPPED .* no time left|[0-9]+ (passed|failed)' outputs/gpu-tests.txt; \
	exit $$status

release: $(VENV)/.installed-dev
	$(BIN)/python scripts/release.py

clean:
	rm -rf build dist outputs/demo outputs/demo-data outputs/demo-dense outputs/demo-dense-data outputs/site* \
	  outputs/zensical.toml outputs/.cache src/*.egg-info .pytest_cache .ruff_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "error: $(PYTHON) is missing or older than 3.10; try make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
	  || { rm -rf $(VENV); echo "error: $(PYTHON) -m venv failed; on Debian: apt install python3-venv" >&2; exit 1; }

# The stamps are newer than pyproject.toml when nothing has to be installed.
$(VENV)/.installed-demo: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(BIN)/python scripts/install.py demo $(CONSTRAINTS)
	@touch $@

$(VENV)/.installed-demo-dense: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(BIN)/python scripts/install.py demo-dense $(CONSTRAINTS)
	@touch $@

$(VENV)/.installed-docs: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(BIN)/python scripts/install.py docs $(CONSTRAINTS)
	@touch $@

# dev contains the demos and the documentation, so one install answers for all.
$(VENV)/.installed-dev: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(BIN)/python scripts/install.py dev $(CONSTRAINTS)
	@touch $(VENV)/.installed-demo $(VENV)/.installed-demo-dense $(VENV)/.installed-docs $@
