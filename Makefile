# make demo | test | lint | bench | clean
PYTHON ?= python3
VENV   ?= .venv
BENCH  ?= .venv-bench
BIN    := $(VENV)/bin
MODEL  ?= examples/lenet5_digits.pt2

.PHONY: demo test lint bench clean
.DELETE_ON_ERROR:

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.all: pyproject.toml constraints.txt | $(BIN)/python
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

# The peers' packages stay out of the environment that edgecnn is developed in.
$(BENCH)/.peers: pyproject.toml constraints.txt benchmarks/requirements.txt
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/pip install -q -c constraints.txt -e '.[all]' -r benchmarks/requirements.txt
	$(BENCH)/bin/pip install -q --no-deps torchvision==0.29.2
	touch $@

bench: $(BENCH)/.peers
	$(BENCH)/bin/python benchmarks/int8_latency.py
	$(BENCH)/bin/python benchmarks/compress_time.py

clean:
	rm -rf $(VENV) $(BENCH) demo build dist
