# make demo and make test set everything up themselves in .venv; ADAPTC_PYTHON picks another interpreter.
ADAPTC_PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install -q --disable-pip-version-check -c constraints.txt
export OMP_NUM_THREADS ?= 1

.PHONY: demo test check tree docs web corpus bench dev clean help
.DEFAULT_GOAL := help

help:  ## say what there is
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile

$(VENV)/run: pyproject.toml constraints.txt
	$(ADAPTC_PYTHON) -m venv $(VENV)
	$(PIP) -e .
	@touch $@

$(VENV)/test: $(VENV)/run
	$(PIP) -e '.[test]'
	@touch $@

$(VENV)/dev: $(VENV)/test
	$(PIP) -e '.[dev]'
	@touch $@

demo: $(VENV)/run  ## compress the bundled adapter and show the result
	@$(PY) examples/demo.py

test: $(VENV)/test  ## run the tests (no GPU, no downloads)
	$(PY) -m pytest -n 2 -m "not shared"

# mypy and the API reference find the root folders as adaptc.* only where they lie so: they read a tree of links.
tree:
	rm -rf build/types && mkdir -p build/types/adaptc
	ln -s $(CURDIR)/core/* $(foreach d,squeeze quant prune kernels formats evidence cli,$(CURDIR)/$(d)) build/types/adaptc/

check: $(VENV)/dev tree  ## lint, types, a minute of fuzzing
	$(VENV)/bin/ruff check .
	cd build/types && $(CURDIR)/$(VENV)/bin/mypy --strict --config-file $(CURDIR)/pyproject.toml adaptc
	$(PY) tests/fuzz_container.py 60

$(VENV)/docs: $(VENV)/run
	$(PIP) -e '.[docs]' ruff
	@touch $@

docs: $(VENV)/docs tree  ## build the site into build/site; broken links are errors
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

examples/web/node_modules: examples/web/package.json
	cd examples/web && npm install --no-audit --no-fund
	@touch $@

web: $(VENV)/test examples/web/node_modules  ## drive the browser example in headless Chromium (npm, chromium)
	$(PY) -m pytest tests/test_web.py tests/evidence/test_report.py -rs

corpus: $(VENV)/test  ## read every reference adapter, rebuild every oracle (needs ADAPTC_SHARED or ../shared)
	$(PY) -m pytest -n 2 -m shared -rs

$(VENV)/bench: $(VENV)/test
	$(PIP) -e '.[bench]'
	@touch $@

bench: $(VENV)/bench  ## compare speed and memory against the usual tools, in one run
	$(PY) benchmarks/compress.py

dev: $(VENV)/dev  ## set up for working on adaptc: linter, types, hooks
	$(VENV)/bin/pre-commit install

clean:  ## remove everything that make made
	rm -rf $(VENV) build *.egg-info
