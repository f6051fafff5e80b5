# Every target prepares what it needs (scripts/setup.sh) and can be the first command after a clone.

SHELL := /bin/bash
PYTHON := .venv/bin/python
LOCK := .venv/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-header --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock"

.DEFAULT_GOAL := help
.PHONY: help demo demo-cluster test check bench soak fuzz lock clean

help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: root ## Start everything on this machine, run four scenarios and an application of many customers, and leave nothing behind
	@scripts/setup.sh
	@$(PYTHON) examples/demo.py $(ARGS)

demo-cluster: root ## Three tenants behind three walls in a Kubernetes cluster (KUBECONFIG and BLASTDOOR_KUBE_IMAGE, else the lab), and one in a cluster of its own
	@scripts/setup.sh
	@$(PYTHON) examples/demo_cluster.py $(ARGS)

test: root ## Run every test, three files at a time, in real sandboxes; ARGS="-k words" chooses some
	@scripts/setup.sh
	@$(if $(ARGS),,$(PYTHON) -m tests.cluster.engine build || echo "make test: tests on a cluster are skipped, and in CI fail")
	@$(PYTHON) -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(ARGS) || $(PYTHON) -m tests.again $$?

check: ## Formatting, lint, types, import contracts, .env.example
	@scripts/setup.sh --development
	@scripts/check.sh

bench: root ## Measure, print, and write bench.json; ARGS="upload limits" measures these sections only
	@scripts/setup.sh
	@$(PYTHON) -m tests.bench $(ARGS)

soak: root ## Kill, stop and flush everything at random under 1,000 runs, with real times; writes soak.json; ARGS="--runs N --seed N"
	@scripts/setup.sh
	@$(PYTHON) -m tests.faults $(ARGS)

fuzz: ## Throw 200,000 mutated archives at the extractor; ARGS="--runs N" for another number
	@scripts/setup.sh --development
	@$(PYTHON) -m tests.fuzz $(or $(ARGS),--runs 200000)

lock: ## Write the lock files again from pyproject.toml; ARGS=--upgrade takes newer versions
	@scripts/setup.sh --development
	@$(LOCK) $(ARGS) --output-file requirements.lock pyproject.toml
	@$(LOCK) $(ARGS) --constraints requirements.lock --group dev --output-file requirements-dev.lock pyproject.toml
	@git --no-pager diff --stat -- requirements.lock requirements-dev.lock

clean: ## Remove what these targets made in this checkout, the virtual environment included
	@rm -rf .venv .cache .hypothesis build dist bench.json soak.json soak-history.jsonl workers/boundaries/*/init
	@find service workers tests examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

.PHONY: root
root:
	@[ "$$(id -u)" = 0 ] || { echo "make $(MAKECMDGOALS): sandboxes need root (namespaces, cgroups, mounts); run  sudo make $(MAKECMDGOALS)" >&2; \
		echo "Without root:  make check  and, after it,  .venv/bin/python -m pytest tests/unit" >&2; exit 1; }
