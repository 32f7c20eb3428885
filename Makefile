# `make help` lists the targets. Everything is set up on the first call and skipped while nothing changed.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
TORCH ?=
INSTALL ?= yes
PRESET ?= tiny
CHAPTER ?=
DATA ?=
RUN ?=
VIEWS ?=
SEED ?=
DEVICE ?=
PARAMS ?=
PYTEST ?=
BENCH ?= end_to_end

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

.PHONY: help book run test test-all lint lab figures clean

help: ## list the targets
	@echo "usage: make TARGET [VARIABLE=value ...]"; echo
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo; awk -F' *## ' '/^#: /{sub(/^#: /, ""); print "  " $$0}' $(firstword $(MAKEFILE_LIST))

#: PRESET=tiny|small|paper          size of the experiment; paper-lidc: on real scans (data_scripts/prepare_ct.py)
#: CHAPTER=04                       which chapter `make run` runs
#: DATA= RUN= VIEWS= SEED= DEVICE=  parameters of the chapters; PARAMS="name=value ..." for any other
#: PYTHON=python3.12 TORCH=2.11.0   another interpreter, another torch
#: INSTALL=no                       use PYTHON as it is: no environment is made
#: PYTEST="-k drr"                  further arguments for pytest

book: ## run the chapters (only what changed) and build build/html/index.html
	$(call environment,book)
	@$(BIN) book/run_chapters.py book --preset "$(PRESET)" $(PASSED)

run: ## run one chapter with your parameters: make run CHAPTER=04 VIEWS=2view
	$(call environment,book)
	@$(BIN) book/run_chapters.py run "$(CHAPTER)" --preset "$(PRESET)" $(PASSED)

test: ## run the tests, without the slow ones
	$(call environment,book$(comma)dev)
	@DIFR3CT_TEST_RECORD=build/tests.json $(BIN) -m pytest -m "not slow" $(PYTEST)

test-all: ## run all tests, the slow ones too
	$(call environment,book$(comma)dev)
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
