# make demo | test | test-slow | check | bench-codecs | bench-steps      each installs what it needs, once, into .venv
PYTHON ?= python3
VENV := .venv
RUN := $(CURDIR)/$(VENV)/bin
INSTALLED := $(VENV)/installed
TYPES := build/types

.PHONY: demo test test-slow check bench-codecs bench-steps clean

$(INSTALLED): pyproject.toml constraints.txt
	@echo "== installing into $(VENV) (torch first: about a minute)"
	@$(PYTHON) -m venv $(VENV)
	@$(RUN)/pip install -q --disable-pip-version-check -c constraints.txt torch
	@$(RUN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(INSTALLED)
	@echo "== training a small language model on 2 ranks: uncompressed, quantised, sparse"
	@$(RUN)/python -m commpress.launch.demo

test: $(INSTALLED)
	@echo "== tests"
	@$(RUN)/python -m pytest -q

test-slow: $(INSTALLED)
	@echo "== the tests that take minutes each"
	@$(RUN)/python -m pytest -q -m slow

check: $(INSTALLED)
	@echo "== ruff, mypy (on the installed package: hooks/ and launch/ are packages of commpress only there)"
	@$(RUN)/ruff check -q . && $(RUN)/ruff format -q --check .
	@rm -rf $(TYPES) && $(RUN)/pip install -q --disable-pip-version-check --no-deps --target $(TYPES) . 
	@cd $(TYPES) && $(RUN)/mypy -p commpress --config-file $(CURDIR)/pyproject.toml

bench-codecs: $(INSTALLED)
	@$(RUN)/python benchmarks/codecs.py

bench-steps: $(INSTALLED)
	@for rate in 10gbit 1gbit; do echo "== $$rate"; \
	  $(RUN)/python -m commpress.launch.lab 2 $$rate -- $(RUN)/python benchmarks/step_time.py || exit 1; done
	@echo "== 100mbit"
	@$(RUN)/python -m commpress.launch.lab 2 100mbit -- \
	  $(RUN)/python benchmarks/step_time.py --rounds 3 --steps 2 ddp int8 int4 sign 'topk(0.01)|int4'

clean:
	rm -rf $(VENV) build dist *.egg-info
