# VENV=dir, PYTHON=python3.12 and HPC_ABSA_MPI=site|package choose the environment; see docs/install.md.
VENV ?= .venv
# the environment of `make bench`, and which benchmarks it runs (all by default)
BENCH_VENV ?= .venv-bench
BENCH ?=
# test files that `make test` runs at the same time, on two cores; 0: one after the other, in one process
WORKERS ?= 3
export VENV
BIN := $(VENV)/bin
SCRIPTS := $(wildcard launch/*.sh) .ci/run

.DEFAULT_GOAL := help
.PHONY: help setup demo docs test test-browser test-mpi test-clusters soak bench bench-quick bench-setup check format clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## build the environment in .venv (the other targets do this if needed)
	@launch/bootstrap.sh

demo: setup ## train the digits job with ABSA, from 1 rank to 4, and write a report
	$(BIN)/hpc-absa run jobs/digits.toml --run-dir runs/demo --fresh
	@ls runs/demo/report.html runs/demo/report.png

docs: setup ## build the documentation site into site/; warnings are errors
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

test: setup check ## run the checks of `make check`, then the test suite
	$(BIN)/python -m pytest -m "not slow and not slurm and not gridengine and not namespaces" \
	  -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

soak: setup ## run the long tests with injected faults: kills, signals, damage, failing disks
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

bench bench-quick: export PYTHONPATH := $(CURDIR)

bench: bench-setup ## run all benchmarks, for hours; nothing else should run on the machine
	$(BENCH_VENV)/bin/python -m benchmarks $(BENCH)

bench-quick: bench-setup ## run a reduced version of all benchmarks, in ten minutes
	$(BENCH_VENV)/bin/python -m benchmarks --quick $(BENCH)

bench-setup: ## build .venv-bench, with the peers of the benchmarks
	@VENV=$(BENCH_VENV) launch/bootstrap.sh
	$(BENCH_VENV)/bin/python -m pip install --quiet --editable '.[bench]'

test-mpi: setup ## run only the tests that use mpirun
	$(BIN)/python -m pytest -m "not slow" tests/mpi tests/setup/test_environment.py $(PYTEST_ARGS)

test-clusters: setup ## run the tests on a four-node Slurm, a Grid Engine, and hosts in network namespaces
	$(BIN)/python -m pytest -m "(slurm or gridengine or namespaces) and not slow" $(PYTEST_ARGS)

test-browser: setup ## run the tests of the pages in Chromium, which must be installed
	$(BIN)/python -m pip install --quiet --editable '.[browser]'
	$(BIN)/python -m pytest -m browser $(PYTEST_ARGS)

check: setup ## run ruff, mypy, import-linter and shellcheck
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/shellcheck $(SCRIPTS)

format: setup ## format the code and sort the imports with ruff
	$(BIN)/ruff check --select I --fix
	$(BIN)/ruff format

clean: ## remove caches, build files and runs/demo
	rm -rf runs/demo site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find hpc_absa tests launch -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## also remove the environment (compiled wheels stay in ~/.cache/hpc-absa)
	rm -rf $(VENV) $(VENV).lock
