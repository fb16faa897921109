# Two commands: `make run` (the course, executed) and `make test` (all that CI runs).
# Both first make .venv and install the tested versions; `make help` lists the rest.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
SCALE ?= tiny
RUN_DIR ?= runs/$(SCALE)
NB ?=
JOBS ?= 2
BIN := .venv/bin
STAMP := .venv/.installed
COURSE := $(BIN)/python -m univg_nb run --scale $(SCALE) --run-dir "$(RUN_DIR)"
# `make figures` takes any run folders, and those of studies: RUN="runs/a runs/b"
RUN ?=
OUT ?= $(or $(firstword $(RUN)),$(RUN_DIR))/paper
WIDTH ?= column
RECORDS := notebooks/reference_runs

# glibc keeps freed memory: torch on a CPU is much faster with it (see launch/runner.py).
export MALLOC_MMAP_THRESHOLD_ := 4294967296
export MALLOC_TRIM_THRESHOLD_ := 8589934592
export MALLOC_TOP_PAD_ := 268435456

.DEFAULT_GOAL := help
# Options of `make small` and `make full`, as --set of the scale.
GPUS ?= $(if $(filter full full_%,$(MAKECMDGOALS) $(SCALE)),8,1)
NODES ?= 1
ADAPTER ?=
VLLM ?=
PORT ?= $(if $(filter-out 1,$(NODES)),29500,0)
LAUNCH := --set launch.processes=$(GPUS) --set launch.nodes=$(NODES) \
    --set launch.port=$(PORT) \
    $(if $(ADAPTER),--set sft.adapter=$(ADAPTER)) \
    $(if $(filter lora qlora,$(ADAPTER)),--set launch.strategy=ddp \
        --set sft.lora.r=64 --set sft.lora.lora_alpha=128 \
        --set sft.learning_rate=1e-4 --set grpo.learning_rate=1e-5) \
    $(if $(VLLM),--set grpo.use_vllm=true --set grpo.vllm_mode=$(VLLM))
DATA ?= data
BOOK ?= runs/book

.PHONY: help install run test lab figures figures-check small full plan data base stage1
.PHONY: small_qwen3_vl full_qwen3_vl full_qwen2_5_vl
.PHONY: bench book record clean study

help: ## this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | \
	    awk -F ':.*## ' '{printf "  make %-13s %s\n", $$1, $$2}'
	@echo "small, full, plan: GPUS=8  NODES=1  ADAPTER=lora|qlora|none  VLLM=colocate|server"
	@echo '    ARGS="--set sft.learning_rate=2e-6"'
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
	    -e '.[course,dev]'
	@touch $@

run: $(STAMP) ## execute the notebooks into RUN_DIR; finished stages are reused
	@$(COURSE) $(if $(filter-out 0,$(FRESH)),--fresh) $(NB)

test: $(STAMP) ## lint, types, unit tests, every notebook at SCALE=smoke (what CI runs)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false \
	    $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder \
	    --durations 12

lab: $(STAMP) ## JupyterLab on the notebooks; ARGS="--no-browser --port 8890"
	$(BIN)/jupyter lab notebooks $(ARGS)

book: $(STAMP) ## the notebooks as one HTML site in BOOK=runs/book
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt \
	    -e '.[book]'
	@$(BIN)/python docs/make_book.py "$(BOOK)"

figures: $(STAMP) ## every table and figure of RUN for a paper, to OUT (WIDTH=page)
	@$(BIN)/python -m univg_nb figures $(or $(RUN),"$(RUN_DIR)" $(RECORDS)) \
		--out "$(OUT)" --width $(WIDTH)

figures-check: $(STAMP) ## fails if a file in OUT, README or a notebook is stale
	@$(BIN)/python -m univg_nb figures --check "$(OUT)"

study: $(STAMP) ## the trainings over seeds behind the claims; ARGS=rates, plan or status
	@$(BIN)/python -m univg_nb study $(or $(ARGS),run)

NEWER := small_qwen3_vl full_qwen3_vl full_qwen2_5_vl
small full $(NEWER): $(STAMP)
	@$(BIN)/python -m univg_nb run --scale $@ --run-dir runs/$@ $(LAUNCH) $(ARGS) \
	    $(if $(filter-out 0,$(FRESH)),--fresh) $(NB)

small: ## Qwen2-VL-2B, QLoRA, one 24 GB GPU; never run by the authors
full: ## Qwen2-VL-7B, the paper's recipe on GPUS=8; never run by the authors
small_qwen3_vl: ## small on Qwen3-VL-4B; full_qwen3_vl, full_qwen2_5_vl: full on those

plan: $(STAMP) ## what SCALE needs on GPUS x GPU=H100-80G; ARGS="--price 2 --mfu 0.3"
	@$(BIN)/python -m univg_nb plan $(SCALE) --gpus $(GPUS) \
	    $(if $(GPU),--gpu $(GPU)) $(LAUNCH) $(ARGS)

data: $(STAMP) ## download the released data and weights (SCALE=small or full) to DATA
	@$(BIN)/python -m univg_nb download $(SCALE) --to "$(DATA)" $(if $(YES),--yes)

base: $(STAMP) ## train the shipped tiny model again, from nothing
	$(BIN)/python -m univg_nb.base_model.training --out runs/base
	$(BIN)/python -m univg_nb.base_model.evaluate runs/base/model

stage1: $(STAMP) ## train the shipped model of stage 1 again, from the shipped base
	$(BIN)/python -m univg_nb.base_model.stage1 --out runs/stage1
	$(BIN)/python -m univg_nb.base_model.evaluate runs/stage1/mixture/shipped \
	    --style univg --groups 100

bench: $(STAMP) ## measurements (tests/bench), printed
	$(BIN)/python -m pytest -m bench -s tests

record: $(STAMP) ## copy the outputs of RUN_DIR into notebooks/
	@$(BIN)/python -m univg_nb run --record "$(RUN_DIR)" $(NB)

clean: ## remove caches and runs/smoke, runs/tiny (not .venv, not other runs)
	rm -rf runs/smoke runs/tiny .pytest_cache .ruff_cache .mypy_cache .hypothesis build
	find univg_nb tests notebooks -name __pycache__ -prune -exec rm -rf {} +
