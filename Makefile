# Two commands: `make run` (the course, executed) and `make test` (all that CI runs).
# Both first make .venv and install the tested versions; `make help` lists the rest.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
SCALE ?= tiny
RUN_DIR ?= runs/$(SCALE)
NB ?=
JOBS ?= 2
BIN := .venv/bin
STAMP := .venv/.installed
RUN := $(BIN)/python -m univg_nb.run_notebooks --scale $(SCALE) --run-dir $(RUN_DIR)

# glibc keeps freed memory: torch on a CPU is much faster with it (see run_notebooks.py).
export MALLOC_MMAP_THRESHOLD_ := 4294967296
export MALLOC_TRIM_THRESHOLD_ := 8589934592
export MALLOC_TOP_PAD_ := 268435456

.DEFAULT_GOAL := help
.PHONY: help install run test lab figures base bench record clean

help: ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | \
	    awk -F ':.*## ' '{printf "  make %-9s %s\n", $$1, $$2}'
	@echo "variables: SCALE=tiny  RUN_DIR=runs/SCALE  NB='03 05'  FRESH=1  PYTHON=python3.12"

install: $(STAMP) ## .venv with the tested versions (the other targets do it when needed)

# torch goes first, by itself: then nothing later can pull in another build of it.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no python3 found; set PYTHON=/path/to/python"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "$(PYTHON) is older than Python 3.11; set PYTHON=python3.11"; exit 1; }
	@test -x $(BIN)/python || "$(PYTHON)" -m venv .venv
	@echo "installing into .venv (once; some minutes)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt \
	    $$(grep -E '^(torch|torchvision)==' constraints.txt)
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt \
	    -e '.[dev]'
	@touch $@

run: $(STAMP) ## execute notebooks 00 to 09 into RUN_DIR; finished stages are reused
	@$(RUN) $(if $(filter-out 0,$(FRESH)),--fresh) $(NB)

test: $(STAMP) ## lint, unit tests, every notebook at SCALE=smoke (what CI runs)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false \
	    $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --durations 12

lab: $(STAMP) ## JupyterLab on the notebooks
	$(BIN)/jupyter lab notebooks

figures: $(STAMP) ## redraw every table and figure from the artefacts of RUN_DIR
	@$(RUN) --fresh 09

base: $(STAMP) ## train the shipped tiny model again, from nothing
	$(BIN)/python -m univg_nb.pretrain --out runs/base
	$(BIN)/python -m univg_nb.pretrain_evaluate runs/base/model

bench: $(STAMP) ## measurements (tests/bench), printed
	$(BIN)/python -m pytest -m bench -s tests

record: $(STAMP) ## copy the outputs of RUN_DIR into notebooks/ and README.md
	@$(BIN)/python -m univg_nb.run_notebooks --record $(RUN_DIR) $(NB)

clean: ## remove caches and runs/smoke, runs/tiny (not .venv, not other runs)
	rm -rf runs/smoke runs/tiny .pytest_cache .ruff_cache .hypothesis build
	find univg_nb tests notebooks -name __pycache__ -prune -exec rm -rf {} +
