# Everything a user or CI runs. `make` alone prints this help.
#
# A fresh machine needs Python >= 3.11, git and make; uv is fetched into .bootstrap if it is missing, the pinned
# packages go into .venv (and, for comparisons with PyTorch, .venv-peers), and nothing else is touched.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory
# A train.py or core/ in the current folder must not stand in for ours.
export PYTHONSAFEPATH := 1

MODEL ?= gpt2
CONFIG ?= configs/shakespeare_char.py
PROMPT ?= The flax mill
INPUT ?=
TO ?= hf
OUT ?=
SUITE ?= ci
export PROMPT INPUT OUT # quoted by the shell, whatever is in them
ARGS ?=

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
UV ?= $(shell uv --version 2>/dev/null | grep -q '^uv 0\.13\.' && echo uv || echo .bootstrap/bin/uv)
# What this processor can execute, as a number.
PROCESSOR := $(shell grep -m 1 -E '^(flags|Features)' /proc/cpuinfo 2>/dev/null | cksum | cut -d ' ' -f 1)
PACKAGES := core convert train serve_batch bench
RUN := .venv/bin/python -m
# Neighbouring tests on one worker: they share fixtures and what they compile.
PYTEST := pytest -n auto --maxprocesses 4 --dist worksteal

.PHONY: help sync demo test test-slow parity cluster-test check format convert export verify train generate batch bench publish env pins clean uv

help: ## Prints this help.
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed 's/:.*## /\t/' | expand -t 14
	@echo; echo 'More flags: ARGS="--flag=value ..."; each command also has --help: .venv/bin/python -m convert --help'

sync: .venv/.synced ## Builds .venv from the pinned requirements (PYTHON=python3.12 chooses another Python).

demo: .venv/.synced ## The whole pipeline on real text in three minutes, offline: train, export, convert, generate.
	@$(RUN) bench.demo $(ARGS)

test: .venv/.synced ## The fast tests, without torch (under five minutes on two cores).
	$(RUN) $(PYTEST) -m "not slow and not parity and not gpu and not cluster" $(ARGS)

test-slow: .venv/.synced ## The tests that take long, and those of which each case has a faster one beside it.
	$(RUN) $(PYTEST) -m "slow and not parity and not gpu and not cluster" $(ARGS)

parity: .venv-peers/.synced .venv-peers/.llama ## The comparisons with torch, transformers and llama.cpp (builds .venv-peers, 5 GB).
	.venv-peers/bin/python -m $(PYTEST) -m parity $(ARGS)

cluster-test: .venv/.synced | $(UV) ## serve_batch on real clusters: Flink, Spark, Prism (takes Java, Maven and Go; fetches 1 GB into .cache once).
	UV=$(UV) $(RUN) pytest -m cluster tests/serve_batch $(ARGS)

check: .venv/.synced ## Formatting, lint, types and the floors between the modules.
	.venv/bin/ruff format --check -q .
	.venv/bin/ruff check -q .
	.venv/bin/lint-imports > .venv/lint-imports.log || { cat .venv/lint-imports.log; exit 1; }
	.venv/bin/pyright

format: .venv/.synced ## Formats the code and mends what lint can mend.
	.venv/bin/ruff format -q .
	.venv/bin/ruff check -q --fix .

convert: .venv/.synced ## Downloads and converts MODEL=gpt2|gpt2-medium|gpt2-large|gpt2-xl|distilgpt2|OWNER/NAME.
	@$(RUN) convert --model=$(MODEL) $(ARGS)

export: .venv/.synced ## Writes models/MODEL as TO=hf|gguf|nanogpt|orbax|npz|msgpack at OUT=PATH.
	@$(RUN) convert.export --model=models/$(MODEL) --to=$(TO) --out="$$OUT" $(ARGS)

verify: .venv/.synced ## Checks every hash of models/MODEL; ARGS=--against=SOURCE derives every tensor again.
	@$(RUN) convert.verify --model=models/$(MODEL) $(ARGS)

train: .venv/.synced ## Trains CONFIG=configs/....py
	@$(RUN) train --config=$(CONFIG) $(ARGS)

generate: .venv/.synced ## Continues PROMPT="..." with models/MODEL.
	@$(RUN) core.generate --model=models/$(MODEL) --prompt="$$PROMPT" $(ARGS)

batch: .venv/.synced ## Continues every prompt of INPUT=GLOB with models/MODEL into OUT=DIR.
	@$(RUN) serve_batch --model=models/$(MODEL) --input="$$INPUT" --output="$$OUT" $(ARGS)

bench: .venv/.synced .venv-peers/.synced .venv-peers/.llama-native-$(PROCESSOR) ## Measures ours beside its peers; SUITE=ci|full|gpu (builds .venv-peers, 5 GB).
	@$(RUN) bench --suite=$(SUITE) $(ARGS)

publish: .venv/.synced ## Makes the last run of the benchmark the one that docs/bench and the README show.
	@$(RUN) bench.publish $(ARGS)

env: .venv/.synced ## Prints versions, devices and pins, for a bug report.
	@$(RUN) bench.env

pins: $(UV) ## Resolves the requirements anew (uv.lock) and writes the pinned files.
	$(UV) lock --upgrade
	$(UV) export -q --no-header --all-packages --no-emit-workspace --format requirements.txt -o requirements.txt
	$(UV) export -q --no-header --all-packages --group peers --no-emit-workspace --format requirements.txt -o requirements-peers.txt
	$(UV) export -q --no-header --only-group llama $(PEERS_HAVE:%=--no-emit-package %) --format requirements.txt -o requirements-llama.txt

clean: ## Removes the environments and caches; models, data and outputs stay.
	rm -rf .venv .venv-peers .bootstrap .cache .pytest_cache .ruff_cache .hypothesis

# What llama.cpp's Python package needs and is in .venv-peers anyway.
PEERS_HAVE := jinja2 markupsafe numpy typing-extensions

.venv/.synced: PINS := requirements.txt
.venv-peers/.synced: PINS := requirements-peers.txt
.venv/.synced: requirements.txt
.venv-peers/.synced: requirements-peers.txt
.venv/.synced .venv-peers/.synced: $(wildcard packages/*/pyproject.toml) | $(UV)
	@test -n "$(PYTHON)" || { echo 'error: no Python >= 3.11 found; install one or pass PYTHON=path' >&2; exit 1; }
	$(UV) venv -q --allow-existing --python "$$(command -v $(PYTHON))" $(@D)
	$(UV) pip sync -q --python $(@D) --require-hashes $(PINS)
	$(UV) pip install -q --python $(@D) --no-deps $(PACKAGES:%=-e packages/%)
	-@$(@D)/bin/python -m core.native
	@touch $@

# There are no wheels of llama.cpp: it is compiled, in three minutes on two cores, and lies in a folder of its own, where
# synchronising the environment does not remove it. Not for this very machine (GGML_NATIVE): a copy or a cache of it may
# come to another one, where AVX-512 is an illegal instruction; AVX2 is what every x86 server has. Without a compiler
# the tests of it are skipped and the rest goes on.
.venv-peers/.llama: requirements-llama.txt | .venv-peers/.synced
	@echo 'compiling llama.cpp: some minutes, once'
	@CMAKE_ARGS='-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF' $(UV) pip install -q --python $(@D) --target $(@D)/llama \
		--upgrade --no-deps --require-hashes -r $< \
		&& echo "$(CURDIR)/$(@D)/llama" > "$$($(@D)/bin/python -c 'import site; print(*site.getsitepackages())')/llama.pth" \
		&& touch $@ \
		|| echo 'note: llama.cpp could not be compiled (it takes a C++ compiler); the comparisons with it are skipped'

# For the benchmark it is compiled for this very processor, as whoever compiles it for use does, in a folder of its own
# with the processor's instructions beside it: on another one the benchmark passes it by, and make compiles anew. Not
# from uv's cache, which does not tell the two apart.
.venv-peers/.llama-native-$(PROCESSOR): requirements-llama.txt | .venv/.synced .venv-peers/.synced
	@echo 'compiling llama.cpp for this processor: some minutes, once'
	@CMAKE_ARGS='-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF' $(UV) pip install -q --no-cache --python $(@D) \
		--target $(@D)/llama-native --upgrade --no-deps --require-hashes -r $< \
		&& .venv/bin/python -c 'from bench import machine; print(machine.instructions())' > $(@D)/llama-native/processor \
		&& touch $@ \
		|| echo 'note: llama.cpp could not be compiled (it takes a C++ compiler); the benchmark says so in its rows'

.bootstrap/bin/uv:
	@test -n "$(PYTHON)" || { echo 'error: no Python >= 3.11 found; install one or pass PYTHON=path' >&2; exit 1; }
	$(PYTHON) -m venv .bootstrap
	.bootstrap/bin/python -m pip install -q --disable-pip-version-check 'uv>=0.13,<0.14'

uv: # the uv of the machine
