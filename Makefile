# make demo | test | lint | bench | clean
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
MODEL  ?= examples/lenet5_digits.pt2

# The CPU build of PyTorch: PyPI's own for Linux brings gigabytes of CUDA. Out of reach, PyPI's is taken.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

.PHONY: demo test lint bench clean
.DELETE_ON_ERROR:

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: constraints.txt | $(BIN)/python
	$(BIN)/pip install -q --no-deps --retries 1 -c constraints.txt --index-url $(TORCH_INDEX) torch 2>/dev/null \
	  || echo "no CPU build of PyTorch from $(TORCH_INDEX); taking PyPI's"
	touch $@

$(VENV)/.all: pyproject.toml constraints.txt $(VENV)/.torch
	$(BIN)/pip install -q -c constraints.txt -e '.[all]'
	touch $@

$(VENV)/.dev: $(VENV)/.all
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/.all
	$(BIN)/edgecnn compress $(MODEL) --int8 --data digits -o demo --force

test: $(VENV)/.dev
	$(BIN)/python -m pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/int8_latency.py
	$(BIN)/python benchmarks/compress_time.py

clean:
	rm -rf $(VENV) demo build dist
