# make demo    the example: what it prints and draws is what the package is for   (ARGS="--quick" for a short run)
# make test    builds everything and runs the C++ tests, the Python tests and the documented examples
# make lint    ruff, clang-format, mypy
# make format  formats Python and C++
# make bench   the operations against plain torch
#
# All of it runs in .venv, made on first use and again when what it is built from changes.

TORCH ?= torch==2.13.0
PYTHON ?= python3
PYTEST_ARGS ?= -n 2 --dist worksteal
ARGS ?=

BIN := .venv/bin
CPP := $(shell find csrc tests/cpp -name '*.h' -o -name '*.hpp' -o -name '*.cpp' -o -name '*.cu')
BUILT_FROM := pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)

.PHONY: demo test lint format bench
.DELETE_ON_ERROR:

demo: .venv/built
	$(BIN)/python examples/multitask_grpo.py $(ARGS)

test: .venv/built
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B build/ctest -DGRADNORM_EXTENSION=OFF -DGRADNORM_CUDA=OFF
	$(BIN)/cmake --build build/ctest --parallel 2
	$(BIN)/ctest --test-dir build/ctest --output-on-failure
	$(BIN)/pytest $(PYTEST_ARGS) --doctest-modules --doctest-glob='README.md' tests gradnorm_ext README.md

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
