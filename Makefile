# Each target makes its own .venv when there is none and installs what it needs.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help demo test lint docs bench bench-quick bench-results setup clean

help:
	@echo "make demo   train a small transformer in fp32, torch.amp and halfstep, side by side (about five minutes)"
	@echo "make test   run the tests"
	@echo "make lint   style and types"
	@echo "make docs   build the documentation into site/"
	@echo "make bench          speed at equal accuracy: every workload, halfstep beside its rivals (some hours)"
	@echo "make bench-quick    the same for two workloads (about three minutes)"
	@echo "make bench-results  the trainings that the README reports (about an hour; with CIFAR-10 some)"

.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) --upgrade "pip>=25.1"
	$(PIP) torch
	$(PIP) --editable ".[images,tensorboard]"
	touch $@

.venv/ready-%: .venv/ready
	$(PIP) --group $*
	touch $@

setup: .venv/ready

demo: .venv/ready
	$(BIN)/halfstep compare text-generation --page compare.html --json compare.json

test: .venv/ready-test
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile $(ARGS)

lint: .venv/ready-lint .venv/ready-test
	$(BIN)/ruff check src tests benchmarks tools
	$(BIN)/ruff format --check src tests benchmarks tools
	$(BIN)/mypy

docs: .venv/ready-docs
	$(BIN)/mkdocs build --strict

bench: .venv/ready
	$(BIN)/python benchmarks/speed.py $(ARGS)

bench-quick: .venv/ready
	$(BIN)/python benchmarks/speed.py --quick $(ARGS)

bench-results: .venv/ready
	$(BIN)/python benchmarks/run.py $(ARGS)

clean:
	rm -rf .venv site runs compare.html compare.json
