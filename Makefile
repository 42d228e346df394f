# `make demo` and `make test` need Python 3.11 or newer and nothing else.
#   TORCH=...  what to give pip for torch, e.g. TORCH="torch --index-url <a CPU or CUDA index>"
#   VENV=...   another environment, e.g. make test VENV=.venv-312 PYTHON=python3.12

VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0

# Neither the folder we stand in nor a script's belongs on sys.path: our kernels/ would hide
# Hugging Face's package of that name.
export PYTHONSAFEPATH = 1

RUN := $(VENV)/bin/python -m
PYTEST := $(RUN) pytest
LINKS := build/typecheck/accelerate_hooks

.PHONY: demo test deep check links clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed-demo
	$(RUN) accelerate_hooks demo

# Triton reads TRITON_INTERPRET when a kernel is decorated, so kernels have a process of their own.
# pytest exits with 5 where it finds no test, which is right only as long as there is no kernel.
test: $(VENV)/.installed-test
	$(PYTEST) -m "not slow and not deep and not gpu" --ignore=tests/kernels
	@if [ -d tests/kernels ]; then \
	  TRITON_INTERPRET=1 $(PYTEST) tests/kernels -m "not slow and not deep and not gpu" \
	  || [ $$? -eq 5 ]; fi

# Everything but what needs a GPU, with many more drawn inputs.
deep: $(VENV)/.installed-test
	HYPOTHESIS_PROFILE=deep $(PYTEST) -m "not gpu" --ignore=tests/kernels
	@if [ -d tests/kernels ]; then \
	  HYPOTHESIS_PROFILE=deep TRITON_INTERPRET=1 $(PYTEST) tests/kernels -m "not gpu" \
	  || [ $$? -eq 5 ]; fi

check: $(VENV)/.installed-dev links
	$(RUN) pyright --pythonpath $(VENV)/bin/python
	$(RUN) ruff check
	$(RUN) ruff format --check

# The package as one folder, as installing lays it out, for type checkers and editors.
links:
	@rm -rf $(LINKS) && mkdir -p $(LINKS)
	@ln -s $(CURDIR)/accelerate_hooks/* $(CURDIR)/kernels $(CURDIR)/patches $(CURDIR)/policies $(LINKS)/

# A stamp a set of extras. torch comes first and by itself, so that the index at hand (or TORCH)
# says which build it is; an extra would take the default one, with CUDA.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(RUN) pip install $(TORCH)
	@touch $@

$(VENV)/.installed-%: pyproject.toml | $(VENV)/.torch
	$(RUN) pip install --editable ".[$*]"
	@touch $@

clean:
	rm -rf build dist *.egg-info
