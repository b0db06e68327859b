# make demo: prepare the digits, train and compare the losses.   make test: the tests.   Both set up .venv first.
VENV ?= .venv
PY = $(VENV)/bin/python
export VENV

.PHONY: setup demo test test-slow lint docs benchmark audit
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

lint: setup
	$(PY) -m ruff check .
	$(PY) -m mypy

# site/index.html, from docs/, README.md and the docstrings; a broken link or reference fails.
docs: setup
	$(PY) -m sphinx -W --keep-going -c docs . site

# Half an hour on 2 cores; MMASL_FULL: annotations of Open Images' full size too, which docs/scale.md shows.
benchmark: setup
	MMASL_FULL=1 $(PY) benchmarks/speed/run.py

# Known vulnerabilities of the pinned versions, by PyPI's word. --strict: what cannot be looked up has not passed.
audit:
	$${PYTHON:-python3} -m venv build/audit
	build/audit/bin/pip install -q pip-audit
	build/audit/bin/pip-audit --strict --no-deps --disable-pip -r constraints.txt
