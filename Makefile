# Every target sets up .venv by itself: a fresh clone needs Python >= 3.11 and make, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ABLATIONS := ablation-k-to-6 ablation-heads ablation-components ablation-lambda
BENCHMARKS := deformable_operator detector_step step_profile evaluation analyses loading scaling orchestration

# Half of the demo's epochs: EPOCHS=8 DROP=7 for all of them.
EPOCHS ?= 4
DROP ?= 3

.PHONY: help setup demo ablations test test-faults bench bench-gpu lint format clean

help:  ## Show this list.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

setup: $(READY)  ## Create .venv and install the project with its development tools.

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("codetr needs Python >= 3.11, this is " + sys.version.split()[0] + "; set PYTHON=/path/to/python3.11") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/pip install --quiet --editable . --group dev
	@touch $(READY)

demo: $(READY)  ## Train Co-DETR with K = 0, 1, 2 heads on the embedded digits and compare.
	$(BIN)/codetr run ablation-k --profile laptop

ablations: $(READY)  ## The paper's ablations on the digits with three seeds, in less than two hours on 2 cores.
	@for name in $(ABLATIONS); do \
	  $(BIN)/codetr run $$name --profile laptop --seeds 0,1,2 \
	    --set epochs=$(EPOCHS) --set 'drop_epochs=[$(DROP)]' || exit 1; \
	done

test: $(READY) lint  ## Run linters, type checker and all tests.
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --no-loadscope-reorder

test-faults: $(READY)  ## Break real trainings; each must end with the same table and weights.
	$(BIN)/pytest -m faults

bench: $(READY)  ## Measure ours beside named peers on this CPU, in less than 15 minutes.
	$(BIN)/pip install --quiet --group bench
	@for script in $(BENCHMARKS); do echo "$$script"; $(BIN)/python benchmarks/$$script.py || exit 1; done

# No .venv: a GPU machine may have nothing but torch, torchvision, timm, triton and transformers, and
# what is carried to it (benchmarks/README.md). GPU_OPTIONS="--device cpu --small ..." to try it out.
bench-gpu:  ## Check and measure on one GPU, in less than 9 minutes, with this Python or .venv.
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/gpu.py $(GPU_OPTIONS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## Format the code and fix what ruff can fix.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove .venv and caches, keep runs/.
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
