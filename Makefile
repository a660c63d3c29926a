# Two commands do everything: `make` sets up and runs the embedded study, `make test` sets up and runs the tests.
PYTHON ?= python3
CORES ?= 2
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OFFICIAL := $(VENV)/.official

.PHONY: study test lint types schema format clean

study: $(READY)
	$(BIN)/snakemake --cores $(CORES) --quiet progress rules host
	@echo
	@cat results/embedded/tables/accuracy.md
	@echo
	@echo "report: results/embedded/report.html"

test: $(READY) $(OFFICIAL)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(CORES) --dist loadfile -q

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check -l 120 Snakefile workflow/rules

types: $(READY)
	$(BIN)/mypy

schema: $(READY)
	$(BIN)/python -m harness schema --check

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/snakefmt -l 120 Snakefile workflow/rules
	$(BIN)/python -m harness schema

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

# without their dependencies: two of them ask for bitsandbytes, which no test needs
$(OFFICIAL): tests/fidelity/packages.txt $(READY)
	$(BIN)/python -m pip install --quiet --no-deps --requirement tests/fidelity/packages.txt
	@touch $@

clean:
	rm -rf $(VENV) .snakemake .pytest_cache .mypy_cache .ruff_cache
