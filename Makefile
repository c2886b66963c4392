# make demo    the example: what it prints and draws is what the package is for   (ARGS="--quick" for a short run)
# make test    builds everything and runs the C++ tests, the Python tests and the documented examples
# make lint    ruff, clang-format, mypy
# make format  formats Python and C++
# make bench   the operations against plain torch
# make oldest  builds with the oldest torch and Triton that pyproject.toml promises, and tests the core (downloads gigabytes)
#
# All of it runs in .venv, made on first use and again when what it is built from changes.

TORCH ?= torch==2.13.0
PYTHON ?= python3
PYTEST_ARGS ?= -n 2 --dist worksteal
ARGS ?=

BIN := .venv/bin
CPP := $(shell find csrc tests/cpp -name '*.h' -o -name '*.hpp' -o -name '*.cpp' -o -name '*.cu')
BUILT_FROM := pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)

.PHONY: demo test lint format bench oldest
.DELETE_ON_ERROR:

demo: .venv/built
	$(BIN)/python examples/multitask_grpo.py $(ARGS)

test: .venv/built
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B build/ctest -DGRADNORM_EXTENSION=OFF -DGRADNORM_CUDA=OFF
	$(BIN)/cmake --build build/ctest --parallel 2
	$(BIN)/ctest --test-dir build/ctest --output-on-failure
	$(BIN)/pytest $(PYTEST_ARGS) --doctest-modules --doctest-glob='*.md' tests gradnorm_ext README.md docs/start.md

lint: .venv/built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/mypy

format: .venv/built
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

bench: .venv/built
	$(BIN)/python bench/run.py $(or $(ARGS),ops)

# An environment of its own: torch is what the index has by that version, on Linux a build for CUDA.
OLDEST := build/oldest
OLDEST_TORCH := $(shell sed -n 's/^dependencies = .*"torch>=\([0-9.]*\)".*/\1/p' pyproject.toml)
OLDEST_TRITON := $(shell sed -n 's/^triton = .*"triton>=\([0-9.]*\)".*/\1/p' pyproject.toml)
CORE := meter blocks layers layouts optimizer ops dtypes triton_compiled

oldest:
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet 'torch==$(OLDEST_TORCH).*' 'triton==$(OLDEST_TRITON).*' \
	    'setuptools>=77' wheel ninja 'cmake>=3.22' 'pybind11>=2.13' numpy pytest hypothesis transformers peft
	$(OLDEST)/bin/pip install --quiet --no-deps 'nvidia-cutlass>=4.2'
	PATH="$(abspath $(OLDEST))/bin:$$PATH" $(OLDEST)/bin/pip install --quiet --no-build-isolation --no-deps .
	$(OLDEST)/bin/python -P -m gradnorm_ext
	$(OLDEST)/bin/python -P -m pytest -q -p no:cacheprovider $(CORE:%=tests/test_%.py)

# Torch comes first and alone: the native code is built against it (--no-build-isolation).
.venv/torch: Makefile
	$(PYTHON) -m venv .venv
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/pip install --quiet '$(TORCH)'
	$(BIN)/pip install --quiet 'setuptools>=77' wheel ninja 'cmake>=3.22' 'pybind11>=2.13' numpy
	$(BIN)/pip install --quiet --no-deps 'nvidia-cutlass>=4.2'  # headers for one kernel, which without nvcc is tested only
	touch $@

.venv/built: .venv/torch $(BUILT_FROM)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip install --quiet --no-build-isolation -e '.[test,dev]'
	touch $@
