# The two commands of a newcomer are `make lab` and `make test`; `make help` lists the rest.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
FIRST_LAB := nbs/labs/01_see_it_work.ipynb
PORT   ?= 8888
.DEFAULT_GOAL := help
.PHONY: help lab test notebooks bench docs clean

help:            ## list the commands
	@awk -F ':.*## *' '/^[a-z]+:.*##/ { printf "%-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# A stamp is younger than what it depends on only after a complete installation, so nothing is
# installed twice, and an interrupted installation starts again.
$(VENV)/.python:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "Python 3.10 or newer is needed: make PYTHON=python3.12 ..."'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@touch $@

$(VENV)/.dev: settings.ini setup.py | $(VENV)/.python
	@echo "Installing dit_sr_kit with its development tools (PyTorch is large: some minutes the first time)"
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@ $(VENV)/.lab

$(VENV)/.lab: settings.ini setup.py | $(VENV)/.python
	@echo "Installing dit_sr_kit with JupyterLab (PyTorch is large: some minutes the first time)"
	$(BIN)/python -m pip install --quiet -e '.[lab]'
	@touch $@

lab: $(VENV)/.lab   ## set up, then open JupyterLab on the first lab
	$(BIN)/jupyter lab --port=$(PORT) $(LAB_FLAGS) $(FIRST_LAB)

test: $(VENV)/.dev  ## set up, then run all tests (ARGS="-k name" for some)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n 2 --dist worksteal $(ARGS)

notebooks: $(VENV)/.dev ## export the modules, then execute every notebook in place (or NB=...)
	$(BIN)/nbdev_export
	$(BIN)/python tests/tools/notebooks.py execute $(NB)

bench: $(VENV)/.dev ## print the speed and size figures (ARGS=--notebooks: those of the notebooks too)
	$(BIN)/python -m tests.bench $(ARGS)

docs: quarto-is-there $(VENV)/.dev ## build the Quarto site into _docs
	rm -rf _proc
	$(BIN)/python tests/tools/site.py prepare
	$(BIN)/nbdev_docs
	$(BIN)/python tests/tools/site.py lint _docs

# Asked first: without Quarto, nbdev_docs would download it and install packages on its own.
.PHONY: quarto-is-there
quarto-is-there:
	@command -v quarto >/dev/null || { echo "Quarto is needed for the site: https://quarto.org/docs/get-started/"; exit 1; }

clean:           ## remove what was built, but not the environment
	rm -rf _proc _docs .quarto build dist *.egg-info .pytest_cache
