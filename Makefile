# make demo and make test need nothing done before: both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Any torch from 2.11 to 2.14 works. With nvcc around, take a CUDA build, which brings the headers
# that CUDA kernels compile against; elsewhere a smaller one does.
TORCH ?= $(if $(shell command -v nvcc),torch==2.14.1,torch==2.13.0)
NATIVE := setup.py pyproject.toml $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h')
# Every package by version, but torch and what its wheel pins itself. Renewed by `make constraints`;
# CONSTRAINTS= (empty) takes what is newest within pyproject.toml's ranges.
CONSTRAINTS ?= constraints.txt
PIP_INSTALL := $(BIN)/pip install --quiet $(addprefix --constraint=,$(CONSTRAINTS))
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)
FORMATTED := $(shell find csrc tests -name '*.cpp' -o -name '*.cu' -o -name '*.h')

.PHONY: setup demo test test-newest sanitize constraints docs bench gpu lint format clean

setup: $(VENV)/.ready

$(VENV)/.torch: Makefile $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --upgrade pip setuptools wheel pybind11 ninja
	$(PIP_INSTALL) "$(TORCH)"
	touch $@

$(VENV)/.ready: $(VENV)/.torch $(NATIVE) flatkern/demo/requirements.txt
	$(PIP_INSTALL) --no-build-isolation --editable ".[demo,bench,dev]"
	$(BIN)/pip install --quiet --no-deps --require-hashes -r flatkern/demo/requirements.txt
	$(BIN)/flatkern doctor || true
	touch $@

demo: setup
	@echo "About 5 minutes on two quiet cores."
	$(BIN)/flatkern demo --out demo-results

# By file, because some files compile for all of their tests at once; in the order of tests/conftest.py.
test: setup
	@echo "About 10 minutes on two quiet cores."
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --numprocesses $(WORKERS) --maxprocesses 8 --dist loadfile \
	    --no-loadscope-reorder

# The tests with the newest release of everything, also beyond pyproject.toml's ranges: a look ahead.
test-newest:
	$(MAKE) setup VENV=.venv-newest CONSTRAINTS=
	.venv-newest/bin/pip install --quiet --upgrade $$(.venv-newest/bin/python -c "import re, tomllib; \
	    extras = tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']; \
	    names = {re.match('[\\w-]+', need)[0] for needs in extras.values() for need in needs}; \
	    print(*sorted(names - {'flatkern'}))")
	.venv-newest/bin/python -m pytest --numprocesses $(WORKERS) --maxprocesses 8 --dist loadfile \
	    --no-loadscope-reorder

# AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer over the C++ of the CPU kernels.
sanitize: setup
	$(BIN)/python -m bench.reliability.sanitize

# Renews the versions that everybody tests with; run `make test` before committing them.
constraints: setup
	$(BIN)/uv pip compile pyproject.toml --quiet --all-extras --universal --python-version 3.11 \
	    --upgrade --no-annotate --no-header --no-emit-package torch --no-emit-package triton -o constraints.txt
	sed -i -E '/^(nvidia|cuda)-/d' constraints.txt

# Warnings are errors. The site is build/site/docs/index.html.
docs: setup
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going -b html -c docs . build/site

bench: setup
	$(BIN)/python -m bench.run

gpu: setup
	$(BIN)/python -m bench.gpu

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

clean:
	rm -rf .venv .venv-newest build demo-results flatkern/*.so flatkern.egg-info
