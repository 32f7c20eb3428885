# `make help` lists the targets. Everything is set up on the first call and skipped while nothing changed.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
TORCH ?=
INSTALL ?= yes
PRESET ?= small
CHAPTER ?=
DATA ?=
RUN ?=
VIEWS ?=
SEED ?=
DEVICE ?=
PARAMS ?=
PYTEST ?=
BENCH ?= end_to_end
TOLERANCE ?=
TRAIN ?=
STUDY ?=
PROFILE ?=
CORES ?= all
DRYRUN ?=
PRICE ?= 0

# glibc gives every large array back to the system at once and asks for it anew; keeping some saves a fifth of the time
# of training on a CPU. Other systems do not look at these.
export MALLOC_MMAP_THRESHOLD_ ?= 1073741824
export MALLOC_TRIM_THRESHOLD_ ?= 4294967296

ifeq ($(INSTALL),yes)
  BIN := $(VENV)/bin/python
else
  BIN := $(PYTHON)
endif
PASSED := $(if $(DATA),data=$(DATA)) $(if $(RUN),run=$(RUN)) $(if $(VIEWS),views=$(VIEWS)) \
  $(if $(SEED),seed=$(SEED)) $(if $(DEVICE),device=$(DEVICE)) $(PARAMS)

# $(call environment,extras): nothing happens when the stamp in the environment says that it is up to date.
define environment
@if [ "$(INSTALL)" = yes ]; then \
  command -v "$(PYTHON)" >/dev/null || { echo "difr3ct: no $(PYTHON) found; install Python 3.11 or newer, or name one with PYTHON=..." >&2; exit 1; }; \
  "$(PYTHON)" book/environment.py --extras $(1) --venv "$(VENV)" --torch "$(TORCH)"; fi
endef

.PHONY: help book run study report verify test test-all lint lab figures clean

help: ## list the targets
	@echo "usage: make TARGET [VARIABLE=value ...]"; echo
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo; awk -F' *## ' '/^#: /{sub(/^#: /, ""); print "  " $$0}' $(firstword $(MAKEFILE_LIST))

#: PRESET=small|tiny|paper         size: small has weights that ship, the others are trained; paper-lidc: real scans
#: CHAPTER=04                       which chapter `make run` runs
#: STUDY="seeds=[0]" PROFILE= CORES=all DRYRUN=yes   of `make study`; PRICE=2.5 per GPU hour, of `make report`
#: TOLERANCE=0.01 TRAIN=yes         of `make verify`: by how much a number may differ; train the models again too
#: DATA= RUN= VIEWS= SEED= DEVICE=  parameters of the chapters; PARAMS="name=value ..." for any other
#: PYTHON=python3.12 TORCH=2.11.0   another interpreter, another torch
#: INSTALL=no                       use PYTHON as it is: no environment is made
#: PYTEST="-k drr"                  further arguments for pytest

book: ## run the chapters (only what changed) and build build/html/index.html
	$(call environment,book$(comma)rt)
	@$(BIN) book/run_chapters.py book --preset "$(PRESET)" $(PASSED)

run: ## run one chapter with your parameters: make run CHAPTER=04 VIEWS=2view
	$(call environment,book$(comma)rt)
	@$(BIN) book/run_chapters.py run "$(CHAPTER)" --preset "$(PRESET)" $(PASSED)

study: ## run the chapters over views, cohorts, baselines and seeds (book/study.yml), here or by PROFILE=profiles/slurm
	$(call environment,book$(comma)batch$(comma)train)
	@gpus=$$(nvidia-smi -L 2>/dev/null | grep -c '^GPU'); \
	  $(BIN) -m snakemake $(if $(PROFILE),--profile "$(PROFILE)",--cores "$(CORES)" --rerun-incomplete --keep-going \
	  --resources gpu=$$gpus) $(if $(DRYRUN),--dry-run) \
	  --config preset="$(PRESET)" $(if $(PROFILE),,gpus_here=$$gpus) $(foreach word,$(STUDY),"$(word)")

report: ## what the last study did, and what it cost: make report PRESET=paper PRICE=2.5
	$(call environment,book)
	@$(BIN) book/batch_report.py "runs/study/$(PRESET)" --price "$(PRICE)"

verify: ## redraw figures and recompute numbers of a run, run a chapter again: make verify RUN=runs/tiny CHAPTER=05
	$(call environment,book)
	@$(BIN) book/verify.py --run "$(or $(RUN),runs/$(PRESET))" $(if $(CHAPTER),--chapter "$(CHAPTER)") \
	  $(if $(DATA),--data "$(DATA)") $(if $(TOLERANCE),--tolerance "$(TOLERANCE)") $(if $(TRAIN),--train)

test: ## run the tests, without the slow ones
	$(call environment,book$(comma)dev$(comma)rt)
	@DIFR3CT_TEST_RECORD=build/tests.json $(BIN) -m pytest -m "not slow" $(PYTEST)

test-all: ## run all tests, the slow ones too
	$(call environment,book$(comma)dev$(comma)rt)
	@$(BIN) -m pytest $(PYTEST)

lint: ## check the style of the code
	$(call environment,book$(comma)dev)
	@$(BIN) -m ruff check .

lab: ## open the notebooks in JupyterLab
	$(call environment,book$(comma)lab)
	@$(BIN) -m jupyter lab notebooks

figures: ## copy the measured time and memory of the last whole run into benchmarks/results
	$(call environment,book)
	@$(BIN) book/run_chapters.py figures --preset "$(PRESET)" --bench "$(BENCH)"

clean: ## remove the built book and its state; trained models (runs/) and data/ stay
	rm -rf build

comma := ,
