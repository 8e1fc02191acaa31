# What a person runs. Each target does its own set-up; nothing but make, git and python3 is needed.

PYTHON ?= python3
RUN := .venv/bin/python
# Where the demo puts its checkpoints: a local folder; `s3`, a server started for it; or any URL.
STORE ?=
# On how many hosts the demo runs; 2: network namespaces, of which one is lost.
NODES ?= 1
DEMO := $(if $(filter 2,$(NODES)),examples/demo_nodes.py,examples/demo.py)
# How many tests run at once: one more than processors, as a third of the time goes by in waiting.
WORKERS ?= 3
# In the order of tests/conftest.py, which begins with what takes long.
SHARED := --dist loadscope --no-loadscope-reorder
# A warning is an error. The theme's own notice about its successor is none of ours.
SITE := NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

# The tests and the demos start hundreds of processes: modules are compiled once, not in each of them.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test soak test-matrix coverage bench-storage bench-saving bench-loading bench-doors bench-trainers bench-scale docs check venv clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile

demo: venv ## train, kill a worker, resume at other world sizes, print the proof (STORE=s3, NODES=2)
	@case "$(STORE)" in \
	  "") $(RUN) $(DEMO) ;; \
	  s3) $(PYTHON) tools/install_services.py && $(RUN) -m tests.services \
	      sh -c '$(RUN) $(DEMO) --store "$$DIST_CKPT_TEST_S3_URL"' ;; \
	  *) $(RUN) $(DEMO) --store "$(STORE)" ;; \
	esac

# The services are installed while the environment is built: neither waits for the other.
test: ## run all tests, on a real S3 server and network file system where that can be had
	@$(PYTHON) tools/install_services.py & services=$$!; \
	  $(MAKE) --no-print-directory venv && wait $$services
	@$(RUN) -m pytest -q --durations=10 -n $(WORKERS) $(SHARED) --ignore=tests/integrations tests
# Apart, as whoever collects them imports all of these frameworks.
	@$(RUN) -m pytest -q -n 2 $(SHARED) tests/integrations

soak: venv ## run the tests that take too long for every run
	@$(RUN) -m pytest -q -m soak --timeout=3600 -o faulthandler_timeout=3600 tests

# Each pair has an environment of its own, which its Python builds: nothing of .venv is needed.
test-matrix: ## run a part of the tests with other versions of Python and torch (ARGS="3.12-2.8.0")
	@$(PYTHON) tools/test_matrix.py --workers $(WORKERS) $(ARGS)

coverage: venv ## run all tests, or those of ARGS, and say which modules they do not reach
	@$(RUN) tools/coverage_report.py -n $(WORKERS) $(SHARED) $(or $(ARGS),tests)

bench-storage: venv ## measure local disk and S3 against their limits and peers
	@$(RUN) -m benchmarks.storage $(ARGS)

bench-saving: venv ## measure saves against memory, the disk, and other libraries
	@$(RUN) tools/install_peers.py
	@$(RUN) -m benchmarks.saving $(ARGS)

bench-loading: venv ## measure loads against the disk, S3, and other libraries
	@$(RUN) tools/install_peers.py
	@$(RUN) -m benchmarks.loading $(ARGS)

bench-doors: venv ## measure copies and exports against plain copies of the same bytes
	@$(RUN) -m benchmarks.doors $(ARGS)

bench-trainers: venv ## measure the checkpoints of trainers against ours in their place
	@$(RUN) -m benchmarks.trainers $(ARGS)

bench-scale: venv ## measure rounds, plans and indexes of up to 16,384 ranks into docs/performance.md
	@$(RUN) -m benchmarks.scale

docs: venv ## build the site, guides and reference, into build/site
	@$(SITE)

check: venv ## lint, format, types, layers, the site
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy
	@.venv/bin/lint-imports --no-logo
	@$(SITE)

venv: ## build .venv with every pinned version, if it is not current
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "dist_ckpt needs Python 3.11 or newer; '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Name another one like this: make PYTHON=python3.12 test" >&2; exit 1; }
	@$(PYTHON) tools/build_venv.py

clean: ## remove everything that the other targets made, .venv included
	@rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	@rm -rf build demo-output *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
