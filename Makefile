# make demo: train and compare the losses on digits. make test: the tests. Both set up .venv first.
VENV ?= .venv
PY = $(VENV)/bin/python
export VENV
# Container images often set it. Without byte code, every process compiles again what it imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup setup-cls demo test test-slow lint types docs benchmark gpu audit outdated
setup: $(VENV)/.installed
setup-cls: $(VENV)/.installed-cls

$(VENV)/.installed: setup.py constraints.txt tools/setup_env.sh
	tools/setup_env.sh

# Classification needs no compiled ops.
CLS = cls
demo: CLS = demo
$(VENV)/.installed-cls: setup.py constraints.txt tools/setup_env.sh
	tools/setup_env.sh $(CLS)

# Sets up detection itself, once the classifiers' results are there.
demo: setup-cls
	$(PY) tools/demo.py

# One torch thread for each worker: with more, two cores are slower. Fixtures of a file are built once. Files run in
# their order: pytest-xdist would leave the longest ones for the end.
test: setup
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto --dist loadfile --no-loadscope-reorder -m "not slow"

test-slow: setup
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -m slow

lint: setup
	$(PY) -m ruff check .

types: setup
	$(PY) -m mypy

# Writes site/index.html from docs/, README.md and the docstrings. A broken link or reference is an error.
docs: setup
	$(PY) -m sphinx -W --keep-going -c docs . site

# Takes half an hour on 2 cores. MMASL_FULL adds annotations of Open Images' full size.
benchmark: setup
	MMASL_FULL=1 $(PY) benchmarks/speed/run.py

# On a machine with a GPU: is the kernel right, and as fast as promised? DATA: folder of photographs to train on.
gpu: setup
	$(PY) benchmarks/gpu.py --minutes 10 --out work_dirs/gpu $(if $(DATA),--data $(DATA))

# Asks PyPI for known vulnerabilities of the pinned versions. --strict: a version without an answer is an error.
audit:
	$${PYTHON:-python3} -m venv build/audit
	build/audit/bin/pip install -q pip-audit
	build/audit/bin/pip-audit --strict --no-deps --disable-pip -r constraints.txt

# Newer releases of the pinned versions; constraints.in says what holds the others back.
outdated: setup
	$(PY) -m pip list --outdated
