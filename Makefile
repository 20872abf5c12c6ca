# One virtual environment, made on first use and again when what it is made from changes.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
EXTRAS ?= cli,dev
BIN = $(VENV)/bin

.PHONY: demo test bench results emulate sanitize lint format compile-report cuda-report gpu sanitize-gpu clean

demo: $(VENV)/installed  ## a trained model reads digits; ViT-B/16 on photographs: parity, speed, an attention map
	$(BIN)/vit-fast demo

test: $(VENV)/installed  ## every test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal

emulate: $(VENV)/installed  ## the CUDA kernels' code, run on the CPU by an emulation
	$(BIN)/python tests/build_variant.py emulated

sanitize: $(VENV)/installed  ## the extension's tests under AddressSanitizer and UndefinedBehaviorSanitizer
	$(BIN)/python tests/build_variant.py sanitize

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

compile-report: $(VENV)/installed  ## every Triton kernel, every model size, every target; REPORT=--subset for a short one
	$(BIN)/python bench/compile_report.py $(REPORT)

cuda-report: $(VENV)/installed  ## compile the CUDA object, with no GPU; what its kernels take on every architecture
	VIT_FAST_EXT=cuda $(BIN)/python setup.py -q build_ext --inplace
	$(BIN)/python bench/cuda_resources.py

# The other runtimes are there to be compared with; without them, or without a network, all else is measured.
bench: $(VENV)/installed  ## what is faster than what on this CPU, under 6 minutes; the last lines are the table
	-$(BIN)/python -m pip install -q --disable-pip-version-check -c $(CONSTRAINTS) openvino onnx onnxruntime
	mkdir -p bench-output
	$(BIN)/vit-fast bench --device cpu --minutes 4 --contenders '$(BENCHED)' --json bench-output/bench.json --html bench-output/bench.html

BENCHED = reference,plain,freeze,original inductor-frozen*,openvino,onnxruntime,timm,transformers,torchvision,torch,cpp

results: $(VENV)/installed  ## README's results, their plots and the choices that ship, from bench/results
	$(BIN)/python bench/results.py

# The machine's own Python, torch and triton. An extension that does not build is reported, and all else is measured.
gpu:  ## on a machine with a CUDA GPU: builds the extension, GPU tests, timings, bench/results/<device>/
	-$(PYTHON) setup.py -q build_ext --inplace
	$(PYTHON) bench/gpu.py

sanitize-gpu:  ## there: the extension's CUDA kernels under compute-sanitizer, memcheck and racecheck
	VIT_FAST_EXT=cuda $(PYTHON) setup.py -q build_ext --inplace
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 $(PYTHON) -m pytest -q tests/test_extension_cuda.py
	compute-sanitizer --tool racecheck --error-exitcode 1 $(PYTHON) -m pytest -q tests/test_extension_cuda.py -k "layer_norm or mlp"

# torch comes first: the extension is built against the headers of the one that is installed.
$(VENV)/installed: setup.py pyproject.toml $(CONSTRAINTS) $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c $(CONSTRAINTS) torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c $(CONSTRAINTS) -e '.[$(EXTRAS)]'
	touch $@

clean:
	rm -rf .venv* build dist *.egg-info vit_fast/*.so demo-output bench-output .pytest_cache .ruff_cache
