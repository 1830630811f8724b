# make help lists the targets. Each works in a fresh clone with nothing else typed.
#
# PYTHON (default python3) is used as it is if it has torch, and its torch is never replaced. Otherwise
# .venv is made here with $(TORCH). What is missing besides is installed into the one that is used.

PYTHON ?= python3
TORCH ?= torch==2.13.0
.DEFAULT_GOAL := build
MAKEFLAGS += --no-print-directory

HAS_TORCH := $(shell $(PYTHON) -c 'import importlib.util; print(importlib.util.find_spec("torch") and "yes" or "")' 2>/dev/null)
ifeq ($(HAS_TORCH),yes)
PY := $(shell $(PYTHON) -c 'import sys; print(sys.executable)')
else
PY := $(CURDIR)/.venv/bin/python
endif

# What is known to be installed, for each interpreter apart: a second call starts at once.
STAMPS := build/stamps$(PY)
export PATH := $(PATH):$(dir $(PY))# where cmake and ninja are if the system has none
CLANG_FORMAT := $(PY) -c 'import clang_format; clang_format.clang_format()'
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

LIBRARY := sink_attention_ext/_C.abi3.so
SOURCES := setup.py $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inc' -o -name '*.cu' -o -name '*.cuh')
CXX_FILES = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.inc' -o -name '*.cu' -o -name '*.cuh')
PYTHON_FILES = setup.py tools sink_attention_ext tests benchmarks examples
NVCC := $(wildcard $(addsuffix /bin/nvcc,$(CUDA_HOME) $(CUDA_PATH))) $(shell command -v nvcc || true)
KERNELS := $(if $(strip $(NVCC)),check-cuda,no-nvcc)
# What the sanitizers are to watch: every file with a test that is marked for them.
SANITIZED = $(shell grep -l 'mark\.sanitize' tests/test_*.py)

.PHONY: help build demo serve-demo test test-all test-transformers bench checklist lint format native \
        emulator sanitize sanitize-native sanitize-python check-cuda clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## */\1|/' | \
	  awk -F'|' '{ printf "  make %-18s %s\n", $$1, $$2 }'
	@echo "  PYTHON=...        the interpreter to use (now: $(PY))"

build: $(LIBRARY)  ## the extension, in place

demo: $(STAMPS)/demo build  ## train a small GPT-OSS with our op, then serve it (under 5 minutes)
	$(PY) examples/train_and_serve.py

serve-demo: $(STAMPS)/serve build  ## a real `transformers serve` on our op, asked eight things at once (under 4 minutes)
	$(PY) examples/serve_demo.py

# Several processes: the emulator runs on one core, and most other tests are too small to fill two. A file
# stays in one process, where it shares what it has built.
PROCESSES := $(shell n=$$(nproc); echo $$((n < 8 ? n : 8)))
CPU_PYTEST = $(PY) -m pytest -q tests -n $(PROCESSES) --dist loadfile -k "not emulated-sm"
EMULATED_PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest -q tests -n $(PROCESSES) -k emulated-sm

test: $(STAMPS)/test build emulator lint native $(KERNELS)  ## lint, native tests, compiled kernels, all tests that are not slow
	$(CPU_PYTEST) -m "not slow"
	$(EMULATED_PYTEST) -m "not slow"

test-all: $(STAMPS)/test build emulator lint native $(KERNELS) test-transformers  ## the slow ones too
	$(CPU_PYTEST)
	$(EMULATED_PYTEST)

# The adapters on a later transformers, in a folder of its own: the version in pyproject.toml stays the
# one of all other tests. What it depends on is there already, for that version.
LATER_TRANSFORMERS := build/transformers-5.23.0
# Not test_transformers_paged.py: from 5.23 on, continuous batching takes no names but hub kernels'.
LATER_TESTS = $(filter-out tests/test_transformers_paged.py,$(wildcard tests/test_transformers_*.py))

test-transformers: $(STAMPS)/test build $(LATER_TRANSFORMERS)  ## the adapters on transformers 5.23
	PYTHONPATH=$(CURDIR)/$(LATER_TRANSFORMERS):$(PYTHONPATH) $(PY) -m pytest -q -m "not slow" $(LATER_TESTS)

$(LATER_TRANSFORMERS): | $(STAMPS)/torch
	rm -rf $@.part
	$(PY) -m pip install --quiet --no-deps --target $@.part transformers==$(@:build/transformers-%=%)
	rm -rf $@ && mv $@.part $@

emulator: $(STAMPS)/build  ## the CUDA kernels, compiled for the tests' emulator
	$(PY) setup.py --quiet build_emulator

bench: $(STAMPS)/bench build  ## the benchmark tables and plots
	$(PY) benchmarks/run.py

checklist: $(STAMPS)/test build  ## the nine acceptance checks of adding sinks to a model, by name
	$(PY) -m pytest -v tests/test_acceptance.py

lint: $(STAMPS)/lint  ## ruff and clang-format
	$(PY) -m ruff check $(wildcard $(PYTHON_FILES))
	$(PY) -m ruff format --check $(wildcard $(PYTHON_FILES))
	@$(CLANG_FORMAT) --dry-run -Werror $(CXX_FILES)

format: $(STAMPS)/lint  ## let both rewrite the files
	$(PY) -m ruff check --fix $(wildcard $(PYTHON_FILES))
	$(PY) -m ruff format $(wildcard $(PYTHON_FILES))
	$(CLANG_FORMAT) -i $(CXX_FILES)

native: $(STAMPS)/native  ## the C++ library without torch, and its tests
	cmake -S . -B build/native -G Ninja -DCMAKE_BUILD_TYPE=Release > build/native.log || (cat build/native.log; false)
	cmake --build build/native
	ctest --test-dir build/native --output-on-failure --no-tests=error

sanitize: sanitize-native sanitize-python  ## both test suites under AddressSanitizer and UBSan

sanitize-native: $(STAMPS)/native
	cmake -S . -B build/sanitize -G Ninja -DCMAKE_BUILD_TYPE=Release -DSINK_SANITIZE=ON
	cmake --build build/sanitize
	ctest --test-dir build/sanitize --output-on-failure --no-tests=error

# Python itself is not instrumented, so the sanitizers' runtime is loaded before it; what Python and torch
# never free is no leak of ours.
sanitize-python: $(STAMPS)/test
	SINK_SANITIZE=1 $(PY) setup.py --quiet build --build-lib build/sanitize-python
	cd build/sanitize-python && PYTHONPATH=$$PWD ASAN_OPTIONS=detect_leaks=0 \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so.6)" \
	  $(PY) -m pytest -q -m sanitize -k "not emulated-sm" $(addprefix $(CURDIR)/,$(SANITIZED))

check-cuda: $(STAMPS)/build $(STAMPS)/disassembler  ## compile each CUDA kernel for each architecture (needs nvcc, no GPU)
	$(PY) setup.py --quiet check_cuda
	$(PY) tools/cuda_resources.py

resources: $(STAMPS)/build $(STAMPS)/disassembler  ## write that table, benchmarks/results/resources.md
	$(PY) setup.py --quiet check_cuda
	$(PY) tools/cuda_resources.py --write

no-nvcc:
	@echo "check-cuda: left out, since there is no nvcc on PATH or in CUDA_HOME: no CUDA kernel was compiled"

clean:  ## all that was built; .venv stays
	rm -rf build sink_attention_ext/_C*.so compile_commands.json *.egg-info

$(LIBRARY): $(SOURCES) | $(STAMPS)/build
	$(PY) setup.py --quiet build_ext --inplace
	@touch $@

.venv/bin/python:
	$(PYTHON) -m venv .venv

$(STAMPS)/torch: $(if $(HAS_TORCH),,.venv/bin/python)
	@$(PY) -c 'import torch' 2>/dev/null || \
	  (echo "$(PYTHON) has no torch: installing $(TORCH) into .venv" && $(PY) -m pip install --quiet $(TORCH))
	@mkdir -p $(@D) && touch $@

$(STAMPS)/native: $(STAMPS)/build
	@command -v cmake > /dev/null || $(PY) tools/install_missing.py native
	@touch $@

# check-cuda does without, and says so.
$(STAMPS)/disassembler: $(STAMPS)/torch pyproject.toml
	@$(PY) tools/install_missing.py sass || echo "the packages of [sass] cannot be installed"
	@touch $@

$(STAMPS)/%: $(STAMPS)/torch pyproject.toml tools/install_missing.py
	@$(PY) tools/install_missing.py $*
	@touch $@
