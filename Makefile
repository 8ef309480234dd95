# make run   sets up and runs the demo        make test  sets up and runs every test
# make setup builds .venv (Python 3.11 or newer); both of the above do it when needed
PYTHON ?= python3
BIN := .venv/bin
# A range would take the newest torch build with its CUDA packages, several GB: name the release.
TORCH ?= torch==2.13.0

.PHONY: run test setup lint audit
run: setup
	$(BIN)/whalepod demo

test: setup lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal

lint: setup
	$(BIN)/python -m pip check
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/lint-imports --no-cache && $(BIN)/pyright

# Known vulnerabilities of what is installed, by the advisories that pip-audit fetches from PyPI: needs the network,
# so no part of `make test`. --strict: a package that could not be asked about is a failure, not a pass.
audit: setup
	$(PYTHON) -m venv .venv/audit && .venv/audit/bin/python -m pip install -q --disable-pip-version-check 'pip-audit>=2.9'
	$(BIN)/python -m pip freeze --exclude-editable | grep == | sed 's/+[a-z0-9.]*$$//' > .venv/audit/installed.txt
	.venv/audit/bin/pip-audit --strict --no-deps --disable-pip --progress-spinner off -r .venv/audit/installed.txt

setup: .venv/ready
.venv/ready: pyproject.toml Makefile
	$(PYTHON) -c 'import sys; sys.exit("whalepod needs Python 3.11 or newer") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]'
	touch $@
