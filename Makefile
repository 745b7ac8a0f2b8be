# Every target sets itself up on a fresh machine: Python 3.11 or newer and make are all it needs.
#
#   make quickstart   make the phantom data, train both stages of the nano model, evaluate, write the report
#   make test         the tests
#   make lint         ruff and mypy
#
# TORCH is what pip is given to install PyTorch, before everything else. The default is the build that your package
# index serves under that version. For another one (a CUDA release, a CPU-only wheel) name it, with pip's own options
# where needed:
#
#   make quickstart TORCH="torch==2.13.0 --index-url <the index of the build you want>"

TORCH  ?= torch==2.13.0
PYTHON ?= python3
VENV   ?= .venv

BIN   := $(VENV)/bin
READY := $(VENV)/.ready
# Each is written last and atomically: where it exists, its images do.
PHANTOM := $(addprefix runs/phantom/,train.json val.json test.json)

.PHONY: setup quickstart test lint format clean
.DEFAULT_GOAL := setup

setup: $(READY)

# Runs again only when pyproject.toml changes.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "vitos needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; name another with make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,lora,dicom,nifti]'
	@touch $@

quickstart: $(READY)
	@ls $(PHANTOM) >/dev/null 2>&1 || $(BIN)/vitos data phantom runs/phantom --train 2000 --val 256 --test 600 --seed 0
	$(BIN)/vitos train recipes/quickstart.yaml --resume

# Two processes of one thread each: on a small machine more threads only take each other's cores.
test: $(READY)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Keeps runs/: what was trained is the user's.
clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
