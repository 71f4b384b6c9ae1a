# `make demo` and `make test` are all that a newcomer needs; both build .venv first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
EXTRAS := train,tfds,sweep,docs,dev
WORKERS ?= $(shell $(PYTHON) -c "import os; print(os.cpu_count() or 1)")
RUNS   := runs/demo
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# 7.5 MB, without the gigabytes of CUDA that it asks for: jax_triton imports no more of it, and so
# the tests can put the kernels into programs for a GPU on a machine that has none.
CUDA_PLUGIN := jax-cuda13-plugin

.PHONY: setup demo figures check docs test test-all test-gpu dist clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python >= 3.11 is required, {sys.executable} is {sys.version.split()[0]}: make PYTHON=/path/to/python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) --no-compile --editable '.[$(EXTRAS)]' --constraint constraints.txt
	@$(if $(filter Linux,$(shell uname -s)),$(PIP) --no-deps "$(CUDA_PLUGIN)==$$($(BIN)/python -c 'import jaxlib; print(jaxlib.__version__)')")
	@touch $@

# Train a small RBF model and its dot-product twin on the embedded corpus, then write the report.
demo: setup
	$(BIN)/python -m experiments.train --config=configs/demo.py:rbf --run=$(RUNS)/rbf
	$(BIN)/python -m experiments.train --config=configs/demo.py:dot --run=$(RUNS)/dot
	$(BIN)/python -m experiments.compare --runs=$(RUNS)/rbf,$(RUNS)/dot --out=$(RUNS)/report

# Redraw the figures of docs/results.md, and its numbers, from the records that are kept.
figures: setup
	$(BIN)/python -m experiments.figures --figure=all --scale=paper --kept --out=docs/figures/results
	$(BIN)/python -m experiments.figures --figure=loss_curves,key_norms --scale=paper --kept \
		--records=docs/measurements/experiments/wikitext --out=docs/figures/wikitext
	$(BIN)/python -m experiments.figures --figure=loss_curves,key_norms --scale=paper --kept \
		--records=docs/measurements/experiments/again --out=docs/figures/again

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The site, into site/; a warning is an error. `mkdocs serve` shows it while it is written.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist=worksteal
test: check docs
	$(PYTEST)

# With the exhaustive tests, and some compiled with all optimizations: before a release.
test-all: check docs
	$(PYTEST) -m ''
	AS_USERS_COMPILE=1 $(PYTEST) tests/nn tests/inference tests/ops/test_decode.py \
		tests/ops/test_transformations.py

# Wheel and sdist into dist/, each tried in an environment that has only what it asks for.
dist: setup
	.ci/check_dist $(BIN)/python

# On a machine with an NVIDIA GPU, with whatever Python holds its JAX: make test-gpu GPU_PYTHON=python3
GPU_PYTHON ?= $(BIN)/python
# What needs no GPU is left to make test. Without autotuning XLA compiles in less time.
# GPU_PYTEST="-n 8" shares the work where pytest-xdist is ("-p no:benchmark" if pytest-benchmark is).
GPU_PYTEST ?=
test-gpu:
	@JAX_PLATFORMS=cuda,cpu $(GPU_PYTHON) -c 'import jax, sys; sys.exit(jax.default_backend() != "gpu" and "make test-gpu needs an NVIDIA GPU, and JAX sees only: " + jax.default_backend())'
	XLA_PYTHON_CLIENT_PREALLOCATE=false XLA_FLAGS="$(XLA_FLAGS) --xla_gpu_autotune_level=0" \
	JAX_PLATFORMS=cuda,cpu $(GPU_PYTHON) -m pytest tests/ops -m '' $(GPU_PYTEST) \
		--ignore-glob="tests/ops/gpu/*/interpreted" --ignore=tests/ops/gpu/triton/test_compile.py \
		--ignore=tests/ops/parallel

clean:
	rm -rf $(VENV) runs .cache site dist build
