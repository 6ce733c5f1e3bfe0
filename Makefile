# `make demo` and `make test` work in a fresh clone: each makes .venv if there is none.
# On a machine with a GPU choose the torch build yourself, e.g. make demo TORCH="torch --index-url ..."
TORCH ?= torch==2.13.0
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
# A process for each core; PARALLEL= runs the tests in one, for a debugger.
PARALLEL ?= --numprocesses auto --dist worksteal

BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test test-all lint format docs clean

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

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED)
	$(BIN)/pip install --quiet -c $(CONSTRAINTS) -e ".[docs]"
	$(BIN)/mkdocs build --strict

# torch comes first and alone: any later request for it is then met by the build chosen here.
$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet -c $(CONSTRAINTS) -e ".[dev]"
	touch $@

clean:
	rm -rf .venv runs build dist *.egg-info
