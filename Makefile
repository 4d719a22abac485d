# One door for commands: what CI runs is what you run. Needs Python 3.11 and make, nothing else.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= $(firstword $(shell for p in python3.11 python3.12 python3; do command -v $$p; done))
VENV ?= .venv
BIN := $(VENV)/bin
comma := ,
empty :=
space := $(empty) $(empty)
STAMP := $(VENV)/.installed
# Most of the tests' time is waiting for real clocks, and each worker takes up to 3 GB. Files stay whole: their tests share servers
WORKERS ?= 2
LOCK := $(if $(filter no,$(CUDA)),$(VENV)/)requirements.lock
PARTS := contract predictors transformers training monitoring rollouts local

.PHONY: help install demo kills test test-cluster check bench bench-serving overload soak bench-training bench-rollouts generate lock lock-images image-sizes clean

help:                    ## list the verbs
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1\t/' | expand -t 24

install: $(STAMP)        ## make .venv from pinned hashes: 8 GB. CUDA=no leaves out 4 of them (Linux on x86-64, with gcc)

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' \
	  || { echo "Hafnium needs Python 3.11 or 3.12; say make install PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
ifeq ($(CUDA),no)
	awk '/^[a-z]/ { skip = /^(cuda-|nvidia-|triton==)/ } !skip' requirements.lock >$(VENV)/requirements.lock
endif
	@# --no-deps: the lock is complete, and pip's resolver would ask for hashes of extras that the lock has no line for
	$(BIN)/python -m pip install --quiet --require-hashes --no-deps -r $(LOCK)
ifeq ($(CUDA),no)
	$(BIN)/python images/without_cuda.py "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
endif
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

demo: $(STAMP)           ## the whole story on this machine; ARGS="--fault crash" and more: .venv/bin/hafnium demo --help
	$(BIN)/hafnium demo $(ARGS)

test: $(STAMP)           ## all tests, with coverage; WORKERS=0 for one after the other
	rm -f .coverage .coverage.*
	$(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --cov --cov-report= --cov-fail-under=0 $(ARGS)
	@# files that no test imported count too, with no line covered; pytest has left its own data in .coverage: hence --append
	$(BIN)/coverage run --source=$(subst $(space),$(comma),$(strip $(PARTS))) -m hafnium_local --help >/dev/null
	$(BIN)/coverage combine --quiet --append
	$(BIN)/coverage report

CLUSTER := ../shared/cluster
IMAGES := predictors:predictor transformers:transformer training:training monitoring:monitoring rollouts:rollout
test-cluster: $(STAMP)   ## tests against the Kubernetes of KUBECONFIG; without one, against ../shared/cluster, with images built there
	@set -e; if [ -z "$$KUBECONFIG" ] && [ -x $(CLUSTER)/up ]; then env=$$($(CLUSTER)/up --extras --knative --kuberay); eval "$$env"; \
	  for image in $(IMAGES); do name=$${image#*:}; \
	    $(CLUSTER)/image localhost/hafnium-$$name:test . $${image%:*}/Dockerfile --build-arg REVISION=$$(git rev-parse HEAD) >&2; \
	    export HAFNIUM_$${name^^}_IMAGE=localhost/hafnium-$$name:test; done; fi; \
	$(BIN)/pytest -m cluster tests/cluster $(ARGS)

check: $(STAMP)          ## lint, types, layers, generated files
	$(BIN)/ruff check --no-cache $(PARTS) tests benchmarks images
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python -m hafnium_local.generated --check

generate: $(STAMP)       ## rewrite what is generated from the code
	$(BIN)/python -m hafnium_local.generated

kills: $(STAMP)          ## the demo, with each of its processes killed once (six to eight minutes)
	$(BIN)/python benchmarks/kills.py $(ARGS)

bench: bench-serving bench-training bench-rollouts  ## all figures, into build/bench

bench-serving: $(STAMP)  ## servers against their peers (twelve minutes); needs wrk and redis-server, ARGS="--rounds 1"
	$(BIN)/python benchmarks/serving $(ARGS)

overload: $(STAMP)       ## the chain at twice its capacity (a minute); needs redis-server, ARGS="--rounds 1"
	$(BIN)/python benchmarks/serving/overload.py $(ARGS)

soak: $(STAMP)           ## ten minutes of mixed load: does anything grow? ARGS="--minutes 3"
	$(BIN)/python benchmarks/serving/soak.py $(ARGS)

bench-training: $(STAMP) ## how good models are; HAFNIUM_ULB=creditcard.csv for the real data too
	$(BIN)/python benchmarks/training.py

bench-rollouts: $(STAMP) ## how often rollouts decide wrongly, beside the rules of others (25 minutes); ARGS="--rollouts 100 --climbs 10 --bad 10"
	$(BIN)/python benchmarks/rollouts $(ARGS)

image-sizes: $(STAMP)    ## what the packages of each image weigh, against those of KServe's own Python servers
	$(BIN)/python images/sizes.py

COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --no-annotate
COMPILE_IMAGE = $(COMPILE) pyproject.toml -c requirements.lock
lock: $(STAMP)           ## resolve the dependencies anew: everything, and from that what each image holds
	$(COMPILE) pyproject.toml --extra dev -o requirements.lock
	$(MAKE) --no-print-directory lock-images
	printf '%s\n' 'hatchling>=1.27' 'cyclonedx-bom>=7' | $(COMPILE) - -c requirements.lock -o requirements.build.lock

lock-images: $(STAMP)    ## what each image holds, as far as possible in the versions of requirements.lock
	@# not-needed.txt: what its packages require and never import
	$(COMPILE_IMAGE) --extra predictor --extra telemetry --excludes predictors/not-needed.txt -o predictors/requirements.lock
	$(COMPILE_IMAGE) --extra transformer --extra telemetry --excludes transformers/not-needed.txt -o transformers/requirements.lock
	$(COMPILE_IMAGE) --extra training --extra ray-cluster --extra mlflow-server --excludes training/not-needed.txt -o training/requirements.lock
	$(COMPILE_IMAGE) --extra monitoring --excludes monitoring/not-needed.txt -o monitoring/requirements.lock
	$(COMPILE_IMAGE) --extra rollout --excludes rollouts/not-needed.txt -o rollouts/requirements.lock

clean:                   ## remove what was built; the environment stays
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis .hafnium .coverage .coverage.* *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
