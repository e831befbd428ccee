# `make help` lists what there is. Every target makes .venv by itself when it is missing or out of date.
PYTHON ?= python3
BIN := .venv/bin
# DVC starts the stages as `python -m pipeline.STAGE`: that python must be this one.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help repro test coverage eval ui doctor bench lint clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

.venv/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, found %d.%d: make PYTHON=python3.12" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

repro: .venv/.ready ## from images to a trained model, its samples and its score
	$(BIN)/dvc repro

# One thread each: workers with threads of their own would wait for each other's.
test: .venv/.ready ## run the tests
	OMP_NUM_THREADS=1 PIPELINE_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal

coverage: .venv/.ready ## every branch of the mathematics is taken by a test
	COVERAGE_FILE=.venv/.coverage $(BIN)/python -m pytest -q -n 2 tests/core ddpm_core \
		--cov=ddpm_core --cov-branch --cov-report=term-missing:skip-covered --cov-fail-under=100

# What a sweep may be asked for; only from the command line, since an N in the environment is about something else.
ASKED = $(foreach name,CKPT EMA SAMPLER STEPS SPACING ETA GUIDANCE N SEED NAME,\
	$(if $(filter command,$(firstword $(origin $(name)))),'$(name)=$(subst ','\'',$($(name)))'))
eval: .venv/.ready ## score the newest model; with CKPT= N= STEPS= SAMPLER= GUIDANCE= ... all combinations (docs/evaluate.md)
ifeq ($(strip $(ASKED)),)
	$(BIN)/dvc repro evaluate
	$(BIN)/dvc metrics show
else
	$(BIN)/python -m pipeline.sweep $(strip $(ASKED)) $(if $(AGAIN),--again)
endif

ui: .venv/.ready ## browse the runs on http://127.0.0.1:5000
	@echo "http://127.0.0.1:5000/#/experiments/1/runs?workflowType=machine_learning   (Ctrl-C ends it)"
	MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(BIN)/mlflow ui --host 127.0.0.1 --port 5000 \
		--workers 1 --backend-store-uri sqlite:///mlflow.db

doctor: .venv/.ready ## what this machine has, and what would fail
	$(BIN)/python -m pipeline.doctor

bench: .venv/.ready ## speed against named peers, into bench/results and docs/benchmarks.md
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,bench]'
	$(BIN)/python -m bench

lint: .venv/.ready ## style and types
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

clean: ## remove the environment
	rm -rf .venv
