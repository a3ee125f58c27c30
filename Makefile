# VENV=dir, PYTHON=python3.12 and HPC_ABSA_MPI=site|package choose the environment; see docs/install.md.
VENV ?= .venv
# packed CIFAR-10 for `make bench`; `hpc-absa data cifar10 --root DIR` writes it
DATA ?= data/cifar10.h5
# test files that `make test` runs at the same time, on two cores; 0: one after the other, in one process
WORKERS ?= 3
export VENV
BIN := $(VENV)/bin
SCRIPTS := $(wildcard launch/*.sh) .ci/run

.DEFAULT_GOAL := help
.PHONY: help setup demo docs test test-browser test-mpi test-clusters soak bench check format clean distclean

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

bench: setup ## measure curvature, checkpoints and resizes (nothing else should run on the machine)
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	$(BIN)/python -m benchmarks.curvature $(DATA)
	$(BIN)/python -m benchmarks.checkpoint .
	$(BIN)/python -m benchmarks.checkpoint . --model wide_resnet101_2 --batch 2 --image 32 --rounds 3
	$(BIN)/python -m benchmarks.startup
	$(BIN)/python -m benchmarks.library

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
