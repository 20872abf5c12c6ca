# One virtual environment, made on first use and again when what it is made from changes.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN = $(VENV)/bin

.PHONY: demo test lint format compile-report gpu clean

demo: $(VENV)/installed  ## ViT-B/16 on photographs: parity, speed, an attention map
	$(BIN)/vit-fast demo

test: $(VENV)/installed  ## every test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

compile-report: $(VENV)/installed  ## every Triton kernel, every model size, every target; REPORT=--subset for a short one
	$(BIN)/python bench/compile_report.py $(REPORT)

gpu:  ## on a machine with a CUDA GPU, with its own torch and triton: GPU tests, timings, bench/results/<device>/
	$(PYTHON) bench/gpu.py

# torch comes first: the extension is built against the headers of the one that is installed.
$(VENV)/installed: setup.py pyproject.toml $(CONSTRAINTS) $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c $(CONSTRAINTS) torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c $(CONSTRAINTS) -e '.[cli,dev]'
	touch $@

clean:
	rm -rf .venv* build dist *.egg-info demo-output .pytest_cache .ruff_cache
