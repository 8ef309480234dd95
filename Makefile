# make run   sets up and runs the demo        make test  sets up and runs every test
# make setup builds .venv (Python 3.11 or newer); both of the above do it when needed
PYTHON ?= python3
BIN := .venv/bin
# A range would take the newest torch build with its CUDA packages, several GB: name the release.
TORCH ?= torch==2.13.0

.PHONY: run test setup lint
run: setup
	$(BIN)/whalepod demo

test: setup lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/lint-imports --no-cache && $(BIN)/pyright

setup: .venv/ready
.venv/ready: pyproject.toml Makefile
	$(PYTHON) -c 'import sys; sys.exit("whalepod needs Python 3.11 or newer") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]'
	touch $@
