# Two commands do everything: `make` sets up and runs the quick study, `make test` sets up and runs the tests.
# A target's line of `make help` stands above it, behind two hashes.
PYTHON ?= python3
CORES ?= 2
# of the tests: with one more than cores all of them lose more to each other's caches than waiting ones gain
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet
READY := $(VENV)/.ready
OFFICIAL := $(VENV)/.official
# where an image sets this, each of hundreds of processes would compile the project's files again
unexport PYTHONDONTWRITEBYTECODE

# $(call run,<study>): run it, and show what came of it
define run
$(BIN)/snakemake --cores $(CORES) --quiet progress rules host --config STUDY=config/$(1).yaml
@echo
@cat results/$(1)/tables/accuracy.md
@echo
@cat results/$(1)/report.txt
@echo
@echo "report: results/$(1)/report.html"
endef

# files in their order: otherwise those with one long test come last, to one of the workers
pytest = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -q

.DEFAULT_GOAL := quick
.PHONY: help quick embedded test exhaustive lint types schema format clean

## list these targets
help:
	@awk '/^## / { text = substr($$0, 4); next } /^[a-z]+:/ && text { split($$1, name, ":"); printf "make %-10s %s\n", name[1], text } { text = "" }' $(firstword $(MAKEFILE_LIST))

## set up, run the quick study, show its accuracy and what can be claimed of it (the default)
quick: $(READY)
	$(call run,quick)

## the same with the embedded study, which is longer
embedded: $(READY)
	$(call run,embedded)

## set up and run every test but those that need a GPU
test: $(READY) $(OFFICIAL)
	$(pytest)

## the same with the further cases of tests: every method's other options, families, sizes
exhaustive: $(READY) $(OFFICIAL)
	$(pytest) --exhaustive

## check style and format of Python and Snakemake files
lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check -l 120 Snakefile workflow/rules

## check types
types: $(READY)
	$(BIN)/mypy

## check that workflow/schemas is what the models say
schema: $(READY)
	$(BIN)/python -m harness schema --check

## mend style and format, and write workflow/schemas anew
format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/snakefmt -l 120 Snakefile workflow/rules
	$(BIN)/python -m harness schema

# The pip that Python comes with takes three times as long to resolve as today's. Either would compile 18,000 files; the
# stages import 4,000, and are imported once for that. setuptools warns of every editable package beside other folders.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --constraint constraints.txt --upgrade pip
	PYTHONWARNINGS=ignore $(PIP) --no-compile --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m harness.workers.imports
	@touch $@

# without their dependencies: two of them ask for bitsandbytes, which no test needs
$(OFFICIAL): tests/fidelity/packages.txt $(READY)
	$(PIP) --no-deps --requirement tests/fidelity/packages.txt
	@touch $@

## remove the environment and every cache; results stay
clean:
	rm -rf $(VENV) .snakemake .pytest_cache .mypy_cache .ruff_cache
