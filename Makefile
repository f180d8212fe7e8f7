# make demo | make test | make lint | make types | make bench-quick
# PYTHON picks the interpreter (3.11 or 3.12); PIP_ARGS is handed to pip (a mirror, a folder of wheels).

PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
QUICK_JSON := .whence/bench
PEERS := .peers

.PHONY: help setup setup-dev demo test lint types format bench-quick peers constraints clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v in ((3, 11), (3, 12)) else f"Whence needs Python 3.11 or 3.12, $(PYTHON) is {v[0]}.{v[1]}. Try: make PYTHON=python3.11 $(MAKECMDGOALS)")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.server: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install $(PIP_ARGS) --disable-pip-version-check -q -c constraints.txt -e '.[server,cpu]'
	@touch $@

$(VENV)/.dev: $(VENV)/.server
	$(BIN)/pip install $(PIP_ARGS) --disable-pip-version-check -q -c constraints.txt -e '.[server,cpu,dev]'
	@touch $@

setup: $(VENV)/.server  ## a virtual environment with everything the service needs
setup-dev: $(VENV)/.dev  ## the same, with tests, linter and type checker

demo: $(VENV)/.server  ## a poisoned model, its data indexed, the planted examples named
	$(BIN)/python -m examples.demo

test: $(VENV)/.dev  ## every test, on real Redis, Ray and FAISS; files run side by side
	$(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder --durations 20

lint: $(VENV)/.dev  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev  ## pyright
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.dev  ## let ruff rewrite
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-quick: $(VENV)/.dev  ## every benchmark at smoke size
	$(BIN)/python -m benchmarks.build --quick --no-served --json $(QUICK_JSON)/build.json
	$(BIN)/python -m benchmarks.query --quick --json $(QUICK_JSON)/query.json
	$(BIN)/python -m benchmarks.quality --quick --organism persona --folder $(QUICK_JSON)/quality --json $(QUICK_JSON)/quality.json

peers: $(PEERS)/bergson/.done $(PEERS)/kronfluence/.done $(PEERS)/saelens/.done  ## bergson, kronfluence and SAELens, each in its own environment, to measure against

# Their dependencies bring CUDA builds of torchvision and torchaudio, which break `import transformers`; neither needs them.
$(PEERS)/%/.done: benchmarks/peers/%.txt
	test -x $(PEERS)/$*/bin/python || $(PYTHON) -m venv $(PEERS)/$*
	$(PEERS)/$*/bin/pip install $(PIP_ARGS) --disable-pip-version-check -q -r $<
	$(PEERS)/$*/bin/pip uninstall --disable-pip-version-check -q -y torchvision torchaudio
	@touch $@

constraints: $(VENV)/.dev  ## pin what is installed now
	@(head -1 constraints.txt; $(BIN)/pip freeze --exclude-editable | sed 's/+cpu//') > constraints.tmp && mv constraints.tmp constraints.txt

clean:  ## remove the virtual environments and all data
	rm -rf $(VENV) $(PEERS) .whence
