# make demo and make test need nothing done before: both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Any torch from 2.11 to 2.14 works. With nvcc around, take a CUDA build, which brings the headers
# that CUDA kernels compile against; elsewhere a smaller one does.
TORCH ?= $(if $(shell command -v nvcc),torch==2.14.1,torch==2.13.0)
NATIVE := setup.py pyproject.toml $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h')
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)
FORMATTED := $(shell find csrc tests -name '*.cpp' -o -name '*.cu' -o -name '*.h')

.PHONY: setup demo test bench gpu lint format clean

setup: $(VENV)/.ready

$(VENV)/.torch: Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip "setuptools>=77" wheel "pybind11>=3" ninja
	$(BIN)/pip install --quiet "$(TORCH)"
	touch $@

$(VENV)/.ready: $(VENV)/.torch $(NATIVE) flatkern/demo/requirements.txt
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[demo,bench,dev]"
	$(BIN)/pip install --quiet --no-deps --require-hashes -r flatkern/demo/requirements.txt
	$(BIN)/flatkern doctor
	touch $@

demo: setup
	$(BIN)/flatkern demo --out demo-results

# By file, because some files compile for all of their tests at once.
test: setup
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --maxprocesses 8 --dist loadfile

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
	rm -rf $(VENV) build demo-results flatkern/*.so flatkern.egg-info
