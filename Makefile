PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: dev test lint bench package clean

dev: $(BIN)/pytest

$(BIN)/pytest:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -e ".[test,plots]" ruff

test: dev
	$(BIN)/python -m pytest

lint: dev
	$(BIN)/ruff check .

bench: dev
	$(BIN)/python -m minisb bench

package:
	PYTHON=$(PYTHON) sh tests/package.sh

clean:
	rm -rf build dist *.egg-info minisb/cpu/*.c minisb/cpu/*.so
