# Each target sets up what it needs (.venv, torch, the build) and then runs. Nothing has to be prepared but Python 3.11 or newer, a C++20
# compiler, make and pip. A second run finds the stamps and goes straight to work.
PYTHON ?= python3
TORCH ?= torch==2.13.*
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
# Warnings are errors in .ci/run; elsewhere a newer compiler's new warning must not stop anybody.
WERROR ?= OFF
# Processes that run tests; each holds up to 2 GB.
WORKERS ?= 2
# Threads that wait for others must not hold a core: here they are more than the cores.
SHARED_CORES := OMP_WAIT_POLICY=PASSIVE
# Of `torchquant demo`; .ci/run passes --quick: its networks are trained in full by whoever wants the tables.
DEMO_OPTIONS ?=
VENV := .venv
BIN := $(VENV)/bin
# torch is named in every pip command, so that no dependency can ever pull in another one.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
BUILD := $(BIN)/python setup.py --quiet build_ext --inplace
# Read by setup.py. The same options in every build, so that no target compiles again what another one has compiled.
export MAX_JOBS := $(JOBS)
export TORCHQUANT_CMAKE_ARGS := -DTORCHQUANT_WERROR=$(WERROR)

.NOTPARALLEL:
.PHONY: help demo test lint bench cuda-check sanitize build clean
help:
	@echo "make demo        quantize three real networks, print the tables, write demo-out/report.html (under 8 minutes on 2 cores)"
	@echo "make test        Python and C++ tests, and the notebooks on small data"
	@echo "make lint        ruff, mypy, clang-format"
	@echo "make bench       operators against peers and hardware floors (benchmarks/README.md)"
	@echo "make cuda-check  compile every CUDA file for sm_80 and sm_90, no GPU needed"
	@echo "make sanitize    C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make build       the operator library and the Python extension, in place"

demo: $(VENV)/demo.stamp build
	$(BIN)/torchquant demo $(DEMO_OPTIONS)

test: $(VENV)/test.stamp gtest
	TORCHQUANT_CMAKE_ARGS="$$TORCHQUANT_CMAKE_ARGS -DTORCHQUANT_TESTS=ON" $(BUILD)
	TORCHQUANT_QUICK=1 $(SHARED_CORES) $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --nbmake examples tests

lint: $(VENV)/lint.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files '*.h' '*.cuh' '*.cpp' '*.cu' | xargs $(BIN)/clang-format --dry-run -Werror

bench: $(VENV)/bench.stamp build
	$(BIN)/python -m benchmarks --write benchmarks/README.md

cuda-check: $(VENV)/torch.stamp
	.ci/cuda-check $(BIN)/python

build: $(VENV)/package.stamp
	$(BUILD)

clean:
	rm -rf build dist *.egg-info torchquant/_build.py torchquant/*.so demo-out

# With leak and one-definition checks on: libtorch needs no suppressions.
sanitize: $(VENV)/torch.stamp gtest
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B build/sanitize -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo \
	  -DCMAKE_PREFIX_PATH="$$($(BIN)/python -c 'import torch; print(torch.utils.cmake_prefix_path)')" \
	  -DTORCHQUANT_TESTS=ON -DTORCHQUANT_SANITIZE=ON
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build build/sanitize -j $(JOBS)
	cd build/sanitize && PATH="$(CURDIR)/$(BIN):$$PATH" $(SHARED_CORES) \
	  ASAN_OPTIONS=detect_leaks=1:detect_odr_violation=2:detect_stack_use_after_return=1 UBSAN_OPTIONS=print_stacktrace=1 \
	  ctest -j $(WORKERS) --output-on-failure --no-tests=error

# The C++ tests use the system's GoogleTest. Without it they are left out, and pytest says so in a skip.
.PHONY: gtest
gtest:
	@echo '#include <gtest/gtest.h>' | $${CXX:-c++} -E -x c++ - >/dev/null 2>&1 || \
	  { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get -qq update && apt-get -qq install -y libgtest-dev; } || \
	  echo "GoogleTest not found: the C++ tests will be skipped. Install it with: sudo apt-get install libgtest-dev"

$(VENV)/torch.stamp:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "torchquant needs Python 3.10 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) setuptools wheel cmake ninja numpy
	touch $@

# --no-build-isolation: the build must see the torch that the package will run with.
$(VENV)/package.stamp: $(VENV)/torch.stamp pyproject.toml setup.py
	$(PIP) --no-build-isolation --editable .
	touch $@

$(VENV)/demo.stamp: $(VENV)/torch.stamp pyproject.toml setup.py
	$(PIP) --no-build-isolation --editable ".[demo]"
	touch $@ $(VENV)/package.stamp

# The peers that are packages. They belong to the benchmarks alone.
$(VENV)/bench.stamp: $(VENV)/torch.stamp pyproject.toml setup.py
	$(PIP) --no-build-isolation --editable ".[bench]"
	touch $@ $(VENV)/package.stamp $(VENV)/demo.stamp

$(VENV)/test.stamp: $(VENV)/torch.stamp pyproject.toml setup.py
	$(PIP) --no-build-isolation --editable ".[test]"
	touch $@ $(VENV)/package.stamp $(VENV)/demo.stamp

# The tools, and what mypy has to see the types of.
$(VENV)/lint.stamp: $(VENV)/torch.stamp pyproject.toml
	$(PIP) ruff mypy clang-format pre-commit safetensors tqdm
	touch $@
