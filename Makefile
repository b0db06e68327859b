# make demo: prepare the digits, train and compare the losses.   make test: the tests.   Both set up .venv first.
VENV ?= .venv
PY = $(VENV)/bin/python
export VENV

.PHONY: setup demo test test-slow benchmark
setup: $(VENV)/.installed

$(VENV)/.installed: setup.py constraints.txt tools/setup_env.sh
	tools/setup_env.sh

demo: setup
	$(PY) tools/demo.py

# One torch thread a worker: two busy cores are slower with more.
test: setup
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto -m "not slow"

test-slow: setup
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -m slow

# Half an hour on 2 cores; MMASL_FULL: annotations of Open Images' full size too, which docs/scale.md shows.
benchmark: setup
	MMASL_FULL=1 $(PY) tools/benchmark.py
