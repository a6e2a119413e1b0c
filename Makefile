# Every target does its own set-up first: it needs Python 3.11 or later and make, nothing else.

PYTHON ?= python3
VENV ?= .venv
# One exact version, installed before the rest: the CPU wheel where one is offered, and no second download.
TORCH ?= torch==2.13.0
BENCHMARKS ?= train_step

# Modules are compiled after all is installed, by all cores; those that are for other versions of Python fail.
PIP_FLAGS := --quiet --disable-pip-version-check --no-compile

BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help demo test test-faults test-integrations lint format docs bench bench-billion clean

help:
	@echo "make demo    synthetic patients: preprocess, train on CPU, evaluate, report (a few minutes)"
	@echo "make test    all tests"
	@echo "make test-faults  the whole fault suite, with its counts into benchmarks/results/faults.json (an hour),"
	@echo "             and the properties of the pipeline with all their examples"
	@echo "make test-integrations  the loader in torchdata, Lightning and accelerate, runs in TensorBoard, W&B and MLflow"
	@echo "make lint    ruff, mypy, the directions of imports, the Dockerfile"
	@echo "make docs    the documentation as a site, in site/"
	@echo "make format  ruff, rewriting files"
	@echo "make bench   figures of docs/figures.md, measured again into benchmarks/results"
	@echo "make bench-billion  a billion events through preprocess.py, killed five times (two hours, 65 GB of disk)"
	@echo "make clean   remove .venv, demo and caches"

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_FLAGS) "$(TORCH)"
	$(BIN)/python -m pip install $(PIP_FLAGS) --editable ".[dev]"
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	@touch $@

demo: $(READY)
	rm -rf demo
	$(BIN)/python preprocess.py synthetic --format synthetic --num_patients 1200 --output demo/data
	$(BIN)/python train.py --data_dir demo/data --output_dir demo/run --preset small --max_epochs 4 --distill 0

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --quiet --numprocesses auto --dist worksteal

test-faults: $(READY)
	FAULTS=full OMP_NUM_THREADS=1 $(BIN)/python -m pytest --quiet --numprocesses auto --dist worksteal tests/faults tests/pipeline

test-integrations: $(READY)
	$(BIN)/python -m pip install $(PIP_FLAGS) "$(TORCH)" --editable ".[integrations]"
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.integrations --output benchmarks/results/integrations.json

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.docs: $(READY)
	$(BIN)/python -m pip install $(PIP_FLAGS) --editable ".[docs]"
	@touch $@

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict --quiet

bench: $(READY)
	@set -e; for name in $(BENCHMARKS); do \
		echo "== $$name"; $(BIN)/python -m benchmarks.$$name --output benchmarks/results/$$name.json; \
	done

bench-billion: $(READY)
	$(BIN)/python -m benchmarks.billion --output benchmarks/results/billion.json

clean:
	rm -rf .venv demo build site seqsetvae.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .coverage
	find pipeline model training tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
