# make compare   install headway here and compare normalisation techniques on a small language model; prints where the report lies
# make test      install headway here and run style checks, types and tests
# make docs      install headway here and build the documentation; prints where it lies
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt

.PHONY: install compare test lint bench docs clean

$(VENV)/.installed: pyproject.toml constraints.txt setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "headway needs Python 3.11 or newer; set PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch setuptools wheel
	$(PIP) --no-build-isolation -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --no-build-isolation -e '.[dev]'
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP) --no-build-isolation -e '.[docs]'
	touch $@

install: $(VENV)/.installed
	@$(BIN)/python -m headway.kernels.build || true

compare: install
	$(BIN)/headway compare

test: $(VENV)/.installed-dev install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright --pythonpath $(BIN)/python

bench: install
	for file in benchmarks/*.py; do $(BIN)/python $$file || exit 1; done

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "The documentation: $(CURDIR)/site/index.html (its search needs a server: python3 -m http.server -d site)"

clean:
	rm -rf $(VENV) build dist site src/*.egg-info src/headway/kernels/native
