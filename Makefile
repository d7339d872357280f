# Each target works on a fresh machine with Python 3.11 or later, make and a C++ compiler. What it needs goes into
# an environment of its own; `make test VENV=path` uses another (torch is left alone where there is one).
# `make build PIP_FLAGS=...` hands pip further options, such as another index.
VENV ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PIP_FLAGS ?=
ARGS ?=
DOCS_VENV ?= .venv-docs

BIN := $(VENV)/bin
export PATH := $(abspath $(BIN)):$(PATH)
PIP := $(BIN)/python -m pip
TORCH := $(VENV)/.mimkernels-torch
INSTALLED := $(VENV)/.mimkernels-installed
RUNNABLE := mimkernels/_lib/.runnable
BUILT := mimkernels/_lib/.built
TESTERS := $(VENV)/.mimkernels-testers
LINTERS := $(VENV)/.mimkernels-linters
SITE_TOOLS := $(DOCS_VENV)/.mimkernels-docs
SOURCES := CMakeLists.txt $(shell find csrc tests/emulation -type f)

.DEFAULT_GOAL := help
.PHONY: help build demo test sanitize bench gpu lint format docs clean

help: ## show the targets
	@grep -E '^[a-z]+:.*## ' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 10

build: $(BUILT) $(TESTERS) ## create the environment, install, compile the kernels
	@$(BIN)/mimkernels info

demo: $(RUNNABLE) $(INSTALLED) ## pre-train a small MAE on handwritten digits and write runs/demo/report.html
	$(BIN)/mimkernels demo $(ARGS)

# A process per core, with one thread each: most tests are too small for more. With APART=1 without what `make sanitize`
# runs, too, for one after the other.
test: $(BUILT) $(TESTERS) ## run every test (ARGS="-k gather": some), the contract on every instruction set of this CPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal $(if $(APART),-k "not (test_contract.py and $(SANITIZED))") $(ARGS)

# libstdc++ as well: Python brings no exceptions of C++ for AddressSanitizer to intercept. The planted accesses of
# test_emulation.py show that it is there and at work.
# Not in fp16: its kernels are those of bf16, whose numbers are as wide, at the same addresses.
SANITIZED := cuda-emulated and oracle and not length-1025 and not -float16-
sanitize: $(BUILT) $(TESTERS) ## run the CUDA kernels on the host under AddressSanitizer
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so.6)" \
	ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto tests/test_emulation.py tests/test_contract.py tests/ops/attention/test_attention_cuda.py \
	-k "red_zones or ($(SANITIZED))" $(ARGS)

bench: $(RUNNABLE) $(INSTALLED) ## time the ops against plain PyTorch
	$(BIN)/mimkernels bench run $(ARGS)

# Not through the environment above: a machine with a GPU often has its own torch, and no way to install another.
gpu: ## on a machine with an NVIDIA GPU: all that one is needed for, 450 s (PYTHON=... with torch; ARGS=--rehearse without GPU)
	$(PYTHON) -m benchmarks gpu $(ARGS)

# The types last: mypy reads those of every library that is imported.
lint: $(LINTERS) $(TESTERS) ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc tests/emulation tests/wide_cpu/*.cpp -type f -not -name "*.md" | xargs $(BIN)/clang-format --dry-run --Werror
	$(BIN)/mypy

format: $(LINTERS) ## mend style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc tests/emulation tests/wide_cpu/*.cpp -type f -not -name "*.md" | xargs $(BIN)/clang-format -i

# In an environment of its own without torch: docstrings are read, not imported.
docs: $(SITE_TOOLS) ## build the site, build/site/index.html; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/python -m mkdocs build --strict --clean

clean: ## remove what was built here, but not the environment
	rm -rf build dist mimkernels/_lib *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -not -path "./.venv*" -prune -exec rm -rf {} +
	rm -f $(TORCH) $(INSTALLED)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first: the kernels are compiled against the one that is there, while pip installs the rest (make -j2). An
# environment that already has a torch keeps it, so the versions that belong to the known-good one are then not asked for.
$(TORCH): pyproject.toml setup.py constraints.txt | $(BIN)/python
	@$(BIN)/python -c "import torch" 2>/dev/null || $(PIP) install $(PIP_FLAGS) -c constraints.txt torch
	@have=$$($(BIN)/python -c "from importlib.metadata import version; print(version('torch'))"); \
	case "$$have" in \
	  $$(sed -n 's/^torch==//p' constraints.txt)*) cp constraints.txt $(VENV)/constraints.txt ;; \
	  *) { grep -v '^torch' constraints.txt; echo "torch==$$have"; } > $(VENV)/constraints.txt ;; \
	esac
	$(PIP) install -q $(PIP_FLAGS) -c $(VENV)/constraints.txt setuptools cmake ninja pybind11
	MIMKERNELS_BUILD=off $(PIP) install $(PIP_FLAGS) -c $(VENV)/constraints.txt --no-build-isolation --no-deps -e .
	@touch $@

# Not as mimkernels[train]: installing mimkernels takes libraries away that may be there by now.
$(INSTALLED): $(TORCH)
	@$(BIN)/python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
	print('\n'.join(project['dependencies'] + project['optional-dependencies']['train']))" > $(VENV)/train.txt
	$(PIP) install $(PIP_FLAGS) -c $(VENV)/constraints.txt -r $(VENV)/train.txt
	@touch $@

# Two builds in one folder: what this machine runs, and everything. Nothing is compiled twice, and nothing above.
$(RUNNABLE): $(TORCH) $(SOURCES)
	$(BIN)/python setup.py -q build_native --inplace --runnable
	@rm -f $(BUILT) && touch $@

$(BUILT): $(TORCH) $(SOURCES)
	$(BIN)/python setup.py -q build_native --inplace
	@touch $(RUNNABLE) $@

$(TESTERS): $(INSTALLED)
	@$(BIN)/python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
	print('\n'.join(project['optional-dependencies']['dev']))" > $(VENV)/dev.txt
	$(PIP) install $(PIP_FLAGS) -c $(VENV)/constraints.txt -r $(VENV)/dev.txt
	@touch $@

$(LINTERS): constraints.txt | $(BIN)/python
	$(PIP) install -q $(PIP_FLAGS) -c constraints.txt ruff clang-format
	@touch $@

$(SITE_TOOLS): constraints.txt
	[ -x $(DOCS_VENV)/bin/python ] || $(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install -q $(PIP_FLAGS) -c constraints.txt mkdocs-material 'mkdocstrings[python]' ruff
	@touch $@
