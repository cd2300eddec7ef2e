# Two commands: `make demo` trains a Llama with Learn-Focus-Review on real text, `make test` runs the tests.
# Both set up .venv first; a second call reuses it.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test lint setup clean

demo: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" examples/demo/run.sh demo_run

# A process for each core, one thread in each: most models of the tests are too small for more. Files in the order of
# tests/conftest.py: by the number of their tests, those of whole runs would come last, and leave one process to itself.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror csrc/*.cpp csrc/*.h tests/csrc/fuzz/*.cpp tests/csrc/fuzz/*.h

setup: $(STAMP)

# torch comes first and pinned, so that nothing else chooses a build of it.
$(STAMP): constraints.txt setup.py pyproject.toml $(wildcard csrc/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt setuptools wheel pybind11
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[test,lint]"
	touch $@

clean:
	rm -rf .venv build demo_run *.egg-info megatron_lfr/*.so
