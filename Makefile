# Two commands: `make demo` trains a Llama with Learn-Focus-Review on real text, `make test` runs the tests.
# Both set up .venv first; a second call reuses it. `make test TORCH=2.11.0` tests with another PyTorch, in a virtual
# environment of its own (several GB), with the triton that this PyTorch asks for, and a setuptools below 82, as it asks.
# The interpreter of Triton 3.6 fails on NumPy 2.4.

PYTHON ?= python3
VENV := .venv$(if $(TORCH),-torch-$(TORCH))
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CONSTRAINTS := $(if $(TORCH),$(VENV)/constraints.txt,constraints.txt)

.PHONY: demo test golden lint setup clean

demo: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" examples/demo/run.sh demo_run

# One process more than there are cores, as a third of the tests' time is waiting, and one thread in each: most models of
# the tests are too small for more. Files in the order of tests/conftest.py: by the number of their tests, those of whole runs would come last, and leave one process to itself.
test: $(STAMP)
	OMP_NUM_THREADS=1 REQUIRE_PEERS=1 $(BIN)/python -m pytest -q --dist loadfile --no-loadscope-reorder --durations 25 \
		-n $$($(PYTHON) -c 'import os; print(1 + os.cpu_count())')

# Stores in tests/golden what the present code does, and prints what changed. NEW_RUN=1: the stored run too.
golden: $(STAMP)
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m support.golden $(if $(NEW_RUN),--new-run)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror csrc/*/*.cpp csrc/*/*.h tests/csrc/fuzz/*.cpp tests/csrc/fuzz/*.h

setup: $(STAMP)

# torch comes first and pinned, so that nothing else chooses a build of it. Of megatron-core, which tests read corpora
# with, nothing that it needs is installed: its datasets need NumPy and torch.
$(STAMP): constraints.txt setup.py pyproject.toml $(wildcard csrc/*/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(if $(TORCH),sed -e 's/^torch==.*/torch==$(TORCH)/' -e 's/^numpy==.*/numpy<2.4/' -e 's/^setuptools==.*/setuptools<82/' -e '/^triton==/d' constraints.txt > $(CONSTRAINTS))
	$(BIN)/python -m pip install -q --disable-pip-version-check -c $(CONSTRAINTS) "$$(grep '^torch==' $(CONSTRAINTS))"
	$(BIN)/python -m pip install -q --disable-pip-version-check -c $(CONSTRAINTS) "setuptools>=77" wheel pybind11 ninja
	$(BIN)/python -m pip install -q --disable-pip-version-check -c $(CONSTRAINTS) --no-build-isolation -e ".[test,lint]"
	$(BIN)/python -m pip install -q --disable-pip-version-check -c $(CONSTRAINTS) --no-deps megatron-core
	touch $@

clean:
	rm -rf .venv .venv-torch-* build demo_run *.egg-info megatron_lfr/*.so
