# `make quickstart` and `make test` work on a fresh machine with Python >= 3.11 and make: they set up all they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PYTHONHASHSEED ?= 0

.PHONY: quickstart test lint format benchmarks clean

# A broken or interrupted install leaves no stamp, so the next call repairs it.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("moirai-sim needs Python >= 3.11") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

quickstart: $(VENV)/.installed
	$(BIN)/moirai-sim quickstart -o out/quickstart

# Tests that time real runs come last and alone, so that the others do not disturb them.
test: lint
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not measured"
	$(BIN)/python -m pytest -m measured

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmarks: $(VENV)/.installed
	$(BIN)/python benchmarks/run.py

clean:
	rm -rf $(VENV) out dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
