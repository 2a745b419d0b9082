# Everything starts here: `make quickstart` and `make test` work on a fresh machine with Python 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin
comma := ,
NOTE = PYTHONPATH=$(CURDIR) $(BIN)/python tests/suite_table.py

.PHONY: help install install-dev hashes quickstart quickstart-dmpo results sdpo delrec p2rec dmpo docs test test-slow test-faults test-fast test-launch lint clean

help: ## what there is
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

install: .venv/.installed ## .venv with the pinned packages that a user needs

install-dev: .venv/.installed-dev ## the same with what the tests, the linters and the site need

.venv/.installed .venv/.installed-dev: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "rec-dist needs Python 3.11 or newer; set PYTHON=python3.11"'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(if $(filter %-dev,$@),dev,gguf$(comma)serve)]'
	touch $@

hashes: install ## requirements.txt: what a user needs with the SHA-256 of each file, for this machine's platform; the container installs it
	$(BIN)/python launchers/hashed_requirements.py > requirements.txt.new && mv requirements.txt.new requirements.txt

quickstart: install ## the main job on real data: 7 minutes on 2 idle cores with AMX after the installation, up to 20 without; ends with a table and a report
	$(BIN)/rec-dist run quickstart

quickstart-dmpo: install ## the same with DMPO in place of S-DPO
	$(BIN)/rec-dist run quickstart vars.method=dmpo

results: install ## SFT over 50,000 targets of MovieLens-100K beside neighbours, SASRec and ensembles with and without it: some 40 minutes on 2 cores
	$(BIN)/rec-dist run results

sdpo: install ## S-DPO and MPPO with K = 1, 7 and 19 negatives, three seeds, other losses once: two hours on 2 cores with AMX
	$(BIN)/rec-dist run sdpo $(ARGS)

delrec: install ## DELRec with 6,400 targets, teachers SASRec and random, three seeds: over two hours a seed on 2 cores with AMX; ARGS='matrix.seed=[0]' for one
	$(BIN)/rec-dist run delrec $(ARGS)

p2rec: install ## P2Rec with all users and three seeds, recommenders that start from a language model's embeddings: two hours on 2 cores with AMX
	$(BIN)/rec-dist run p2rec $(ARGS)

dmpo: install ## DMPO with 100 users, K from 1 to 5, beside recommenders of the same users, also against low-rated films: an hour on 2 cores with AMX
	$(BIN)/rec-dist run dmpo-few_shot $(ARGS)
	$(BIN)/rec-dist run dmpo-few_shot vars.negatives=low_rated $(ARGS)
	$(BIN)/rec-dist run dmpo-few_shot vars.negatives=low_rated vars.candidates=2 $(ARGS)

test: install-dev ## a test of every guarantee, in two processes: 10 to 20 minutes on 2 cores
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m '(not slow or quick) and not launch'

test-slow: install-dev ## what takes longer: more workers, stages, kills and whole pipelines; installs Debian's chromium for a page, and skips that test without it; notes in docs/reliability.md that it passed
	command -v chromedriver > /dev/null || \
		{ apt-get update && apt-get install -y --no-install-recommends chromium chromium-driver; } || \
		echo 'no browser: tests/distributed/test_serve_page.py is skipped'
	mkdir -p runs
	$(BIN)/python -m pytest -m 'slow and not quick and not faults and not launch' --junitxml=runs/test-slow.xml
	$(NOTE) test-slow runs/test-slow.xml docs/reliability.md

test-faults: install-dev ## the whole fault matrix: about 50 minutes on 2 idle cores; writes its table into docs/reliability.md
	mkdir -p runs && rm -f runs/faults.jsonl
	REC_DIST_FAULTS=$(CURDIR)/runs/faults.jsonl $(BIN)/python -m pytest -m faults --junitxml=runs/test-faults.xml; status=$$?; \
	PYTHONPATH=$(CURDIR) $(BIN)/python tests/fault_table.py runs/faults.jsonl docs/reliability.md && exit $$status
	$(NOTE) test-faults runs/test-faults.xml docs/reliability.md

test-fast: install-dev ## without workers: about 3 minutes
	$(BIN)/python -m pytest -m 'not slow and not launch' --ignore=tests/distributed

test-launch: install-dev ## on a real Ray cluster, on four Ray nodes in network namespaces and on a real SLURM, all on this machine; installs what Debian has of it (SLURM, iproute2), so it needs root
	command -v slurmctld > /dev/null && command -v ip > /dev/null || \
		{ apt-get update && apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge iproute2; }
	mkdir -p runs
	$(BIN)/python -m pytest tests/launch --junitxml=runs/test-launch.xml
	$(NOTE) test-launch runs/test-launch.xml docs/reliability.md

lint: install-dev ## style, types, layers
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports

docs: install-dev ## docs/configuration.md from the schema, docs/promises.md from the tables of promises, then all pages as a site in site/; fails on a dead link
	$(BIN)/python -m rec_dist.config.reference > docs/configuration.md.new && mv docs/configuration.md.new docs/configuration.md
	$(BIN)/python tests/promises.py > docs/promises.md.new && mv docs/promises.md.new docs/promises.md
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=$(CURDIR):$(CURDIR)/kernels $(BIN)/python -m mkdocs build --strict

clean: ## removes .venv, runs, prepared data and the site; the cache stays
	rm -rf .venv runs data site
