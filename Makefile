PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help setup demo test check style clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(INSTALLED) ## create .venv with the pinned dependencies and the package

# torch goes first: pip then settles on the build that suits this machine before anything else asks for torch.
$(INSTALLED): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "the pinned versions need Python 3.11 or newer: make setup PYTHON=python3.11")'
	@echo "setup 1/4: virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@echo "setup 2/4: torch (the large download)"
	@$(PIP) install "$$(grep '^torch==' requirements.txt)"
	@echo "setup 3/4: the other pinned dependencies"
	@$(PIP) install -r requirements.txt
	@echo "setup 4/4: attnpress itself, editable"
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

demo: setup ## compress a real BERT: the main job, into runs/demo
	$(BIN)/attnpress compress recipes/demo.yaml --output runs/demo

test: setup ## run every test
	$(BIN)/python -m pytest

check: setup ## format, lint, strict types, house rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --quiet tests/test_house_rules.py tests/test_project_files.py

style: setup ## format the code and mend what the linter can
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

clean: ## remove caches and build leftovers; keeps .venv and runs
	rm -rf build dist src/*.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find src tests -type d -name __pycache__ -prune -exec rm -rf {} +
