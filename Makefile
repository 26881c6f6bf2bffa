# Two commands do everything on a fresh machine: `make demo` and `make test`.
# PYTHON chooses the interpreter (3.11 or later); VENV where the virtual environment goes;
# JAX pins a version ("jax==0.11.2") or adds CUDA ("jax[cuda13]").
PYTHON ?= python3
VENV ?= .venv
JAX ?= jax
PYTEST_ARGS ?= -n auto --maxprocesses=4

BIN := $(VENV)/bin

.PHONY: demo test lint venv clean help

help:
	@echo "make demo   install into $(VENV) and generate text with the bundled model, weights in INT4"
	@echo "make test   install the test extra and run the tests"
	@echo "make lint   ruff and pyright"
	@echo "make clean  remove $(VENV)"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "qjax needs Python 3.11 or later; choose one with: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.installed: pyproject.toml $(BIN)/python
	$(BIN)/python -m pip install --quiet "$(JAX)" -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet "$(JAX)" -e ".[test]"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-test
	$(BIN)/python -m pip install --quiet "$(JAX)" -e ".[dev]"
	@touch $@

venv: $(VENV)/.installed

demo: $(VENV)/.installed
	$(BIN)/python scripts/serve.py --quantization int4 --kv-cache-dtype fp8_e4m3 --max-new-tokens 48 \
	  --temperature 0.7 --top-p 0.9 \
	  --prompt "The old house stood at the end of the" \
	  --prompt "She opened the letter and read it" \
	  --prompt "In the morning the captain" \
	  --prompt "There was no sound but"

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV)
