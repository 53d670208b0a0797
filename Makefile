PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: dev test lint bench exports package clean

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

# The lessons' exports, run by the real otter-grader and nbgrader (large: not part of CI).
exports:
	$(PYTHON) -m venv $(VENV)-exports
	$(VENV)-exports/bin/pip install -q "numpy>=1.24" "matplotlib>=3.7" otter-grader "nbgrader>=0.9"
	$(VENV)-exports/bin/python -m lessons._ci.real

package:
	PYTHON=$(PYTHON) sh tests/package.sh

clean:
	rm -rf build dist *.egg-info minisb/cpu/*.c minisb/cpu/*.so
