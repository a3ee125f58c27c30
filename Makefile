# VENV=dir, PYTHON=python3.12 and HPC_ABSA_MPI=site|package choose the environment; see CONTRIBUTING.md.
VENV ?= .venv
# packed CIFAR-10 for `make bench`: hpc-absa data cifar10 --root DIR makes it
DATA ?= data/cifar10.h5
export VENV
BIN := $(VENV)/bin
SCRIPTS := $(wildcard launch/*.sh) .ci/run

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-mpi test-clusters soak bench check format clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## build the environment in .venv (the other targets do it when they need to)
	@launch/bootstrap.sh

demo: setup ## train the digits job with ABSA, from 1 rank to 4, and write a report
	$(BIN)/hpc-absa run jobs/digits.toml --run-dir runs/demo --fresh
	@ls runs/demo/report.html runs/demo/report.png

test: setup check ## the checks of `make check`, then the whole test suite
	$(BIN)/python -m pytest -m "not slow and not slurm and not namespaces" $(PYTEST_ARGS)

soak: setup ## the longer proofs that `make test` leaves out: kills, signals, damage, failing disks
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

bench: setup ## time curvature, checkpoints and resizes against their peers; wants the machine for itself
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	$(BIN)/python -m benchmarks.curvature $(DATA)
	$(BIN)/python -m benchmarks.checkpoint .
	$(BIN)/python -m benchmarks.checkpoint . --model wide_resnet101_2 --batch 2 --image 32 --rounds 3
	$(BIN)/python -m benchmarks.startup

test-mpi: setup ## only the tests that run under mpirun
	$(BIN)/python -m pytest -m "not slow" tests/mpi tests/setup/test_environment.py $(PYTEST_ARGS)

test-clusters: setup ## the tests on a four-node Slurm and on hosts of their own making, where that can be done
	$(BIN)/python -m pytest -m "(slurm or namespaces) and not slow" $(PYTEST_ARGS)

check: setup ## ruff, mypy, import-linter and shellcheck
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/shellcheck $(SCRIPTS)

format: setup ## let ruff format the code and sort the imports
	$(BIN)/ruff check --select I --fix
	$(BIN)/ruff format

clean: ## remove what tools and the demo leave behind
	rm -rf runs/demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find hpc_absa tests launch -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## also remove the environment (compiled wheels stay in ~/.cache/hpc-absa)
	rm -rf $(VENV) $(VENV).lock
