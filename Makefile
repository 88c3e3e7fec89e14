# Two commands do everything: `make demo` and `make test`. Each sets the machine up first.
#
#   PYTHON=/path/to/python3.12   which Python `.venv` is made from (else the first that fits)
#   EXTRAS=dev,dali               which extras of the package `.venv` gets
#   MLR1_EXTENSION=require       stop where the compiled ops cannot be built (else: go on without)
#   WORKERS=2                    how many processes share the tests
#   SETUP=no                     install and build nothing; run by $(PYTHON), or by `python` where it
#                                is not given (a GPU node without a network: docs/performance.md)

SHELL := /bin/bash
.SHELLFLAGS := -o errexit -o nounset -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory --no-builtin-rules

PYTHON ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
EXTENSION := $(VENV)/.extension
BUILD_LOG := build/extension.log
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
export PIP_ROOT_USER_ACTION := ignore
export PYTHONUNBUFFERED := 1
MLR1_EXTENSION ?= auto
EXTRAS ?= dev
SETUP ?= yes
# With SETUP=no nothing is installed, so this folder itself is where Python finds the package.
ifeq ($(SETUP),no)
RUN := $(or $(PYTHON),python)
# The examples call `python`.
ifneq ($(findstring /,$(PYTHON)),)
export PATH := $(dir $(PYTHON)):$(PATH)
endif
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
else
RUN := python
endif

.PHONY: help
help: ## what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

.PHONY: demo
demo: setup ## train, resume, export and sample a tiny model on this machine
	@bash examples/quickstart/run.sh </dev/null

.PHONY: finetune
finetune: setup ## chats into packs, fine-tune a tiny model on them, ask it questions
	@bash examples/finetune/run.sh </dev/null

.PHONY: distill
distill: setup ## a teacher, three replicas of it, a student that learns from them while one is killed
	@bash examples/distillation/run.sh </dev/null

# A file at a time, by pytest-xdist.
WORKERS ?= 2

.PHONY: test
test: setup ## the tests; what this machine cannot run is skipped, with the reason
	@$(RUN) -m pytest -n $(WORKERS) --dist loadfile </dev/null

.PHONY: test-slow
test-slow: setup ## the tests that `make test` leaves out because they take long
	@$(RUN) -m pytest -m slow </dev/null

.PHONY: lint
lint: setup ## lint, format, types, import contracts
	@ruff check .
	@ruff format --check .
	@mypy
	@lint-imports

# SANITIZE=memcheck takes one of the tools; compute-sanitizer comes with the CUDA toolkit.
SANITIZE ?= memcheck racecheck synccheck
# Neither a hundred runs of one op, which would hardly end, nor what is no kernel of ours.
SANITIZED := not hundred and not trace and not librar and not liger

.PHONY: gpu-check
gpu-check: has-gpu compiled ## every test that needs a GPU, then compute-sanitizer over the ops
	@failed=; \
	$(RUN) -m pytest -m gpu $$(grep -rl --include='test_*.py' 'mark\.gpu' tests) </dev/null || failed=1; \
	sanitizer=$$(PATH="$$PATH:/usr/local/cuda/bin" command -v compute-sanitizer || true); \
	if [[ -z "$$sanitizer" ]]; then \
	    echo "NOT CHECKED: there is no compute-sanitizer here (it comes with the CUDA toolkit)."; \
	else for tool in $(SANITIZE); do \
	    echo "== compute-sanitizer --tool $$tool"; \
	    PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$$sanitizer" --tool "$$tool" --kernel-regex kns=mlr1 \
	        --report-api-errors no --error-exitcode 1 \
	        $(RUN) -m pytest -m gpu -k '$(SANITIZED)' tests/ops </dev/null || failed=1; done; fi; \
	[[ -z "$$failed" ]]

# The most wanted first. One that fails does not keep the others from running.
GPU_BENCHMARKS := step linear_cross_entropy linear_kl swiglu swiglu_fp8 qk_norm_rope convergence
# Flags of the benchmark of the whole step: make bench-gpu STEP="--models 950m --minutes 10"
STEP ?=

.PHONY: bench-gpu
bench-gpu: has-gpu compiled ## every benchmark of a GPU; the tables go to benchmarks/results/DEVICE/
	@failed=; step="$(STEP)"; \
	for name in $(GPU_BENCHMARKS); do \
	    echo "== $$name"; flags=; if [[ $$name == step ]]; then flags=$$step; fi; \
	    $(RUN) -m "benchmarks.bench_$$name" --save $$flags </dev/null || failed+=" $$name"; done; \
	if [[ -n "$$failed" ]]; then echo "Failed:$$failed" >&2; exit 1; fi

.PHONY: bench
bench: setup ## every benchmark, on what this machine has
	@for benchmark in benchmarks/bench_*.py; do \
	    echo "== $$benchmark"; name=$${benchmark##*/}; \
	    $(RUN) -m "benchmarks.$${name%.py}" </dev/null || exit; done

.PHONY: has-gpu
has-gpu: setup ## stop where there is no GPU that torch can use
	@$(RUN) -m megatron_mlr1.doctor --need-gpu

# A check of kernels that are not there would check their definitions.
.PHONY: compiled
compiled: has-gpu ## stop where the ops have no kernels for it
	@$(RUN) -c 'import sys; import megatron_mlr1.ops.swiglu; \
	from megatron_mlr1.ops.extension import has_row; \
	sys.exit(not has_row("mlr1::swiglu", "CUDA"))' || { \
	    echo "There are no compiled ops for a GPU here, and this is about them. Build them where" >&2; \
	    echo "nvcc is: make extension, or, where nothing may be installed," >&2; \
	    echo "MLR1_EXTENSION=require $(RUN) setup.py build_ext --inplace" >&2; \
	    exit 1; }

.PHONY: setup
setup: $(if $(filter no,$(SETUP)),,$(EXTENSION)) ## .venv with pinned packages, and the compiled ops
	@:

.PHONY: extension
extension: $(INSTALLED) ## the compiled ops again, and stop if they cannot be built
	@rm -f $(EXTENSION)
	@$(MAKE) $(EXTENSION) MLR1_EXTENSION=require

# For tests/end_to_end/test_transformer_engine.py: what it imports, pinned, without what torch brings.
TE_SOURCES := build/transformer_engine
TE_PACKAGES := transformer-engine onnx onnx-ir onnxscript ml_dtypes einops nvdlfw_inspect

.PHONY: te-sources
te-sources: $(TE_SOURCES)/.installed ## Transformer Engine's Python, whose kernels the tests bring

$(TE_SOURCES)/.installed: constraints.txt | $(INSTALLED)
	@rm -rf $(TE_SOURCES)
	@python -m pip install --quiet --no-deps --constraint constraints.txt --target $(TE_SOURCES) \
	    $(TE_PACKAGES) </dev/null
	@touch $@

.PHONY: clean
clean: ## remove what setup made: .venv, build, caches (nothing that was trained)
	rm -rf $(VENV) build dist megatron_mlr1.egg-info megatron_mlr1/_C*.so
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

# The first Python that is 3.12 or newer and can make an environment. 3.12 comes first: it is what
# is tested. A name on PATH may be a launcher that fails, so each is run.
FITS := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))
define find_python
candidates=("$(PYTHON)"); \
if [[ -z "$(PYTHON)" ]]; then \
    candidates=(); \
    for version in 3.12 3.13 3.14; do \
        candidates+=("python$$version" "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/"$$version"*/bin/python); \
    done; \
    candidates+=(python3 python); \
fi; \
found=; \
for candidate in "$${candidates[@]}"; do \
    if "$$candidate" -c '$(FITS)' >/dev/null 2>&1 </dev/null; then found="$$candidate"; break; fi; \
done; \
if [[ -z "$$found" ]]; then \
    echo "No Python fits (tried: $${candidates[*]})." >&2; \
    echo "It must be 3.12 or newer, with the modules venv and ensurepip." >&2; \
    echo "Install one (Debian, Ubuntu: apt install python3.12 python3.12-venv; macOS: brew install python@3.12;" >&2; \
    echo "anywhere: pyenv install 3.12), or name it: make PYTHON=/path/to/python3.12 ..." >&2; \
    exit 1; \
fi
endef

# pip's own lines are long: what it fetches and installs is shown, all of it is in the log.
$(INSTALLED): pyproject.toml constraints.txt setup.py
	@if [[ ! -x $(BIN)/python ]]; then \
	    $(find_python); \
	    echo "Making $(VENV) with $$found ($$("$$found" --version))"; \
	    rm -rf $(VENV); "$$found" -m venv $(VENV); \
	fi
	@echo "Installing packages (a few minutes the first time; log: $(VENV)/install.log)"
	@install() { python -m pip install --constraint constraints.txt "$$@" </dev/null 2>&1 \
	        | tee -a $(VENV)/install.log | { grep -E '^ *(Downloading|Successfully)' || true; }; }; \
	rm -f $(VENV)/install.log; \
	{ install setuptools && \
	  MLR1_EXTENSION=skip install --no-build-isolation --editable '.[$(EXTRAS)]'; } || { \
	    echo "Installing failed; the end of $(VENV)/install.log:" >&2; \
	    grep -v '^WARNING: Location' $(VENV)/install.log | tail -n 20 >&2; exit 1; }
	@touch $@

$(EXTENSION): setup.py constraints.txt $(shell find csrc -type f) | $(INSTALLED)
	@rm -rf build/temp.* build/lib.*; mkdir -p build
	@echo "Building the compiled ops (several minutes where nvcc is; log: $(BUILD_LOG))"
	@rm -f megatron_mlr1/_C*.so
	@if ! MLR1_EXTENSION=$(MLR1_EXTENSION) nice python setup.py build_ext --inplace \
	        >$(BUILD_LOG) 2>&1 </dev/null; then \
	    tail -n 30 $(BUILD_LOG) >&2; exit 1; fi
	@grep '^megatron_mlr1:' $(BUILD_LOG) || true
	@ls megatron_mlr1/_C*.so >/dev/null 2>&1 || \
	    echo "No compiled ops here; why is in $(BUILD_LOG)."
	@touch $@
