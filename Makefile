# Every target does its own set-up: all that is needed is make and Python 3.11 or newer.
# The environment is $(VENV); a source edit needs no new install, a change of pyproject.toml triggers one.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python -m

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test fuzz papers check lint docs install install-test install-dev clean FORCE

help: ## list the targets
	@echo "Each target installs what it needs into $(VENV) first (another Python: make TARGET PYTHON=python3.12)."
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | while IFS='|' read -r target what; do \
		printf '%-22s%s\n' "  $$target" "$$what"; done

demo: install ## the main analysis on the embedded digits: how diagonal is the Fisher?
	@OMP_WAIT_POLICY=$${OMP_WAIT_POLICY:-PASSIVE} $(RUN) curvlab.analyze fim_diagonality # or threads spin, see test

test: install-test ## the tests (seconds to minutes; those marked slow are left out)
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(RUN) pytest -n 2 --dist worksteal # OpenMP's threads spin: two processes, a thread each

fuzz: install-test ## random networks against plain loops: SECONDS=600, SEED=1000; CASE=17 runs one of them
	@OMP_NUM_THREADS=1 $(RUN) tests.fuzzing --seconds $(or $(SECONDS),60) --seed $(or $(SEED),0) $(if $(CASE),--case $(CASE))

papers: install ## the README of every paper and docs/papers, from the records in analyses/
	@$(RUN) curvlab.analyze papers --write

check: lint docs ## all but the tests: style, types, layers, documentation

lint: install-dev ## style, formatting, types, layers
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy
	$(VENV)/bin/lint-imports

docs: install-dev ## the documentation, into site/
	NO_MKDOCS_2_WARNING=1 $(RUN) mkdocs build --strict

install: $(VENV)/.installed ## the package, editable
install-test: $(VENV)/.installed-test ## the package and what the tests need
install-dev: $(VENV)/.installed-dev ## the package and every tool of development

clean: ## remove the environment, built files and caches (runs/ stays)
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is touched last, so an install that failed is done again. One that was killed may have left a package
# half written where pip takes it for whole: the mark it leaves makes the next call start from an empty environment.
define install
	@echo "Installing curvlab$(1) into $(VENV) ..."
	@touch $(VENV)/.installing
	@$(RUN) pip install --quiet --disable-pip-version-check --editable '.$(1)' || { rm -f $(VENV)/.installing; exit 1; }
	@rm -f $(VENV)/.installing
endef

$(VENV)/.installed: $(VENV)/.made-for pyproject.toml
	$(call install,)
	@touch $@

$(VENV)/.installed-test: $(VENV)/.made-for pyproject.toml
	$(call install,[test])
	@touch $(VENV)/.installed $@

$(VENV)/.installed-dev: $(VENV)/.made-for pyproject.toml
	$(call install,[dev])
	@touch $(VENV)/.installed $(VENV)/.installed-test $@

# Looked at in every call, written only when the environment is made: a checkout that was moved or copied (the
# editable install would point at the old one) or another Python gets a new environment, anything else keeps its own.
# An environment without either mark is someone else's work, and is not removed.
$(VENV)/.made-for: FORCE
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "curvlab needs Python 3.11 or newer, and '$(PYTHON)' is not (it says: $$($(PYTHON) --version 2>&1));" \
			"install one, or name it: make PYTHON=/path/to/python3.11 TARGET" >&2; exit 1; }
	@made_for="$$($(PYTHON) -c 'import sys; print("Python %d.%d" % sys.version_info[:2])') in $$(pwd -P)"; \
	if [ -e $(VENV)/.installing ] || [ "$$(cat $@ 2>/dev/null)" != "$$made_for" ] \
			|| ! $(VENV)/bin/python -c 'import pip' 2>/dev/null; then \
		$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
			echo "'$(PYTHON)' cannot make a virtual environment: its module venv is missing;" \
				"install it (Debian and Ubuntu: apt install python3-venv), or name another with PYTHON=" >&2; exit 1; }; \
		if [ -e $(VENV) ] && [ ! -e $@ ] && [ ! -e $(VENV)/.installing ]; then \
			echo "There is a $(VENV) here that make did not make: move it away, or remove it with 'make clean'" >&2; exit 1; fi; \
		echo "Making $(VENV). The first install takes minutes: torch with its CUDA packages is about 6 GB."; \
		rm -rf $(VENV) && mkdir $(VENV) && touch $(VENV)/.installing && $(PYTHON) -m venv $(VENV) \
			&& echo "$$made_for" > $@ && rm $(VENV)/.installing; \
	fi

FORCE:
