# Two commands: `make reproduce` and `make test`. Both set up .venv from requirements.lock first (once).
PROFILE ?= cpu
FROM_SCRATCH ?=
PYTHON ?= python3
# of the tests, one core each
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 8 ? n : 8)))
BIN := .venv/bin
STAMP := .venv/.finished

.PHONY: help setup reproduce update test reference performance lock

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP)  ## make .venv with the locked versions

$(STAMP): requirements.lock settings.ini setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

reproduce: setup  ## regenerate every figure and table; PROFILE=smoke|cpu|gpu, FROM_SCRATCH=1 retrains the base checkpoints
	$(BIN)/lvlm-research reproduce --profile $(PROFILE) $(if $(filter 1,$(FROM_SCRATCH)),--from-scratch)

update: setup  ## rerun only what changed
	$(BIN)/lvlm-research update --profile $(PROFILE)

test: setup  ## everything CI runs: notebooks top to bottom, then the tests
	OMP_NUM_THREADS=1 LVLM_THREADS=1 $(BIN)/nbdev_test --n_workers $(WORKERS)
	OMP_NUM_THREADS=1 LVLM_THREADS=1 $(BIN)/python -m pytest tests --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

reference: setup  ## make the finished run of PROFILE the committed reference, with the outputs of the notebooks and the table of the README
	$(BIN)/lvlm-research reference --profile $(PROFILE)
	$(BIN)/nbdev_clean

performance: setup  ## measure what the README says about speed (hours), and put it there and into the notebooks; TEXTS and PICTURES: COCO's captions, a folder of photographs
	@test -f "$(TEXTS)" -a -d "$(PICTURES)" || { echo "make performance: give TEXTS=captions_val2017.json (COCO's) and PICTURES=folder of photographs, which must be there; made scenes would be measured in their place, and not be published"; exit 2; }
	@git diff --quiet HEAD || { echo "make performance: commit your changes first; what is measured is named by its revision"; exit 2; }
	rm -rf results/speed
	for name in train_step levers contrastive encode photographs recall scaling reproduce; do \
		mkdir -p results/speed/notebooks && $(BIN)/papermill --cwd nbs/performance nbs/performance/$$name.ipynb results/speed/notebooks/$$name.ipynb -p profile cpu -p results $(CURDIR)/results/speed \
			$$(case $$name in encode) echo -p texts $(abspath $(TEXTS)) ;; esac; case $$name in encode|photographs) echo -p pictures $(abspath $(PICTURES)) ;; esac) || exit 1; \
	done
	$(BIN)/python -c 'from lvlm_research.speed import publish_performance; publish_performance("results/speed", "results/speed/notebooks")'
	$(BIN)/nbdev_clean

lock: setup  ## resolve settings.ini anew into requirements.lock (torch stays as pinned there)
	$(BIN)/python tests/make_lock.py
