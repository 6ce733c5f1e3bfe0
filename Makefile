# `make demo` and `make test` work in a fresh clone: each makes .venv if there is none.
# On a machine with a GPU choose the torch build yourself, e.g. make demo TORCH="torch --index-url ..."
TORCH ?= torch==2.13.0
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
# A process for each core; PARALLEL= runs the tests in one, for a debugger.
PARALLEL ?= --numprocesses auto --dist worksteal

BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test test-all lint types format docs dist clean

demo: $(INSTALLED)
	$(BIN)/accelerate launch --config_file recipes/accelerate/cpu.yaml recipes/run_clm.py recipes/enwik8/demo.yaml

test: $(INSTALLED)
	$(BIN)/python -m pytest $(PARALLEL)

# Also what takes minutes: several processes that resume each other's checkpoints, runs that are killed.
test-all: $(INSTALLED)
	$(BIN)/python -m pytest $(PARALLEL) -m "slow or not slow"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

# Annotations of what the package exports, and names and arguments everywhere: [tool.mypy] in pyproject.toml.
types: $(INSTALLED)
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site, into site/: a broken link or anchor, or a page without a place in the navigation, is an error.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# What a release holds beside the wheels of cibuildwheel: the sources, and the wheel without kernels, for any machine.
dist:
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet build
	$(BIN)/python -m build -C wheel.cmake=false -C wheel.platlib=false -C wheel.py-api=py3

# torch comes first and alone: any later request for it is then met by the build chosen here.
$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet -c $(CONSTRAINTS) -e ".[dev]"
	touch $@

clean:
	rm -rf .venv runs build dist site .mypy_cache *.egg-info
