# make demo | shrink | test | test-slow | test-oldest | test-litert | test-triton | check | docs | gpu-check | bench | bench-quick | bench-codecs | bench-convergence     each installs what it needs, once, into .venv
# test: almost every promise, within five minutes on two cores; test-slow: all that it leaves out; the check of a clean clone runs both
PYTHON ?= python3
VENV := .venv
CONSTRAINTS := constraints.txt
RUN := $(CURDIR)/$(VENV)/bin
INSTALLED := $(VENV)/installed
TYPES := build/types
RECORDS := runs/bench
LAB := $(RUN)/python -m commpress.launch.lab
STEPS := $(RUN)/python benchmarks/training.py
FEW := --only 'plain DDP' 'torch fp16' 'powersgd(4)' int8 int4 sign 'topk(0.01)|int4'
AUTO := $(RUN)/python benchmarks/auto.py --model deep --steps 100 --others 20
ADAM := --optimizer adamw --only 'plain DDP' 'powersgd(4)' sign 'OneBitAdamW sign' 'ZeroOneAdamW sign, every 4 steps'

# tests start many processes: without bytecode on disk each of them compiles all of our sources, and pytest all of its own
warm test test-slow test-triton: export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo shrink warm test test-slow test-oldest test-litert test-triton check docs gpu-check bench bench-quick bench-codecs bench-convergence clean

$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	@echo "== installing into $(VENV) (torch first: about a minute)"
	@$(PYTHON) -m venv $(VENV)
	@$(RUN)/pip install -q --disable-pip-version-check -c $(CONSTRAINTS) torch
	@$(RUN)/pip install -q --disable-pip-version-check -c $(CONSTRAINTS) -e '.[dev]'
	@touch $@

demo: $(INSTALLED)
	@echo "== training a small language model on 2 ranks: uncompressed, by auto, one bit"
	@$(RUN)/python -m commpress.launch.demo

# a GPT that comes out small, and the report of what that cost and brought; a quarter of an hour
shrink: $(INSTALLED)
	@$(RUN)/python benchmarks/shrink.py runs/shrink

warm: $(INSTALLED)
	@echo "== compiling the loops, once for all workers"
	@export OPENBLAS_NUM_THREADS=1 PYTHONPATH=tests/support; \
		WARM_ORDER=-1 $(RUN)/python -c "import warm" & \
		$(RUN)/python -c "import warm" && wait

test: warm
	@echo "== tests"
	@$(RUN)/python -m pytest -q -n 3 --dist worksteal

test-slow: warm
	@echo "== the tests that \`make test\` leaves out"
	@$(RUN)/python -m pytest -q -m slow -n 4 --dist worksteal

# before a release: the oldest Python and torch that pyproject.toml declares. It draws several GB, so .ci/run leaves it out
test-oldest:
	@$(MAKE) --no-print-directory test PYTHON=python3.10 VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

# LiteRT's packages do not go beside ours: an environment of its own, of 1 GB
test-litert:
	@$(PYTHON) -m venv .venv-litert
	@.venv-litert/bin/pip install -q --disable-pip-version-check torch==2.13.0 -e '.[litert]' pytest pytest-timeout
	@.venv-litert/bin/python -m pytest -q tests/model/test_export_litert.py

# the kernels for CUDA without a GPU: their bytes on Triton's interpreter, their machine code by its compiler; test-slow has them, too
test-triton: $(INSTALLED)
	@$(RUN)/python -m pytest -q -m 'slow or not slow' -n 4 --dist worksteal tests/kernels/test_triton.py tests/kernels/test_triton_table.py

check: $(INSTALLED)
	@echo "== ruff, mypy (on the installed package: hooks/ and launch/ are packages of commpress only there)"
	@$(RUN)/ruff check -q . && $(RUN)/ruff format -q --check .
	@rm -rf $(TYPES) && $(RUN)/pip install -q --disable-pip-version-check --no-deps --target $(TYPES) . 
	@cd $(TYPES) && $(RUN)/mypy -p commpress --config-file $(CURDIR)/pyproject.toml

docs: $(INSTALLED)
	@echo "== the site, into build/site"
	@$(RUN)/python docs/errors.py
	@NO_MKDOCS_2_WARNING=1 $(RUN)/mkdocs build --strict --quiet

# on a machine with a GPU, under 8 minutes once all is installed; without one it says so and ends with code 2
gpu-check: warm
	@$(RUN)/python benchmarks/gpu_check.py

bench-codecs: $(INSTALLED)
	@$(RUN)/python benchmarks/codecs.py

# as root, or the links are loopback (and it says so); under 6 minutes
bench-quick: $(INSTALLED)
	@mkdir -p $(RECORDS)
	@$(LAB) 2 1gbit -- $(STEPS) $(FEW) --rounds 3 --json $(RECORDS)/quick-1gbit.json
	@$(LAB) 2 100mbit -- $(STEPS) $(FEW) --rounds 2 --steps 2 --json $(RECORDS)/quick-100mbit.json
	@$(RUN)/python -m commpress.launch.cli report $(RECORDS)/quick.html $(RECORDS)/quick-*.json
	@for rate in 1gbit 10gbit; do $(LAB) 2 $$rate -- $(AUTO) || exit 1; done

# the tables of docs/measured.md and the step times' picture, under 40 minutes
bench: $(INSTALLED)
	@mkdir -p $(RECORDS)
	@$(RUN)/python benchmarks/codecs.py
	@$(RUN)/python benchmarks/distortion.py --picture docs/distortion.svg
	@for rate in 10gbit 1gbit; do $(LAB) 2 $$rate -- $(STEPS) --json $(RECORDS)/steps-$$rate.json || exit 1; done
	@$(LAB) 2 100mbit -- $(STEPS) --rounds 2 --steps 2 --json $(RECORDS)/steps-100mbit.json
	@$(LAB) 2 1gbit --delay 20ms -- $(STEPS) $(FEW) --rounds 3 --json $(RECORDS)/steps-1gbit-20ms.json
	@$(LAB) 2 100mbit --delay 20ms -- $(STEPS) $(FEW) --rounds 2 --steps 2 --json $(RECORDS)/steps-100mbit-20ms.json
	@$(LAB) 4 1gbit -- $(STEPS) $(FEW) --rounds 3 --json $(RECORDS)/steps-4-1gbit.json
	@$(LAB) 4 100mbit -- $(STEPS) $(FEW) --rounds 2 --steps 2 --json $(RECORDS)/steps-4-100mbit.json
	@$(LAB) 2 1gbit -- $(RUN)/python benchmarks/bandwidth.py --to 64mb --json $(RECORDS)/bandwidth-1gbit.json
	@$(RUN)/torchrun --nproc-per-node 2 benchmarks/training.py --loss 150 --json $(RECORDS)/losses.json
	@$(RUN)/python -m commpress.launch.cli explain --check $(RECORDS)/steps-*.json
	@rm -rf $(RECORDS)/train
	@$(LAB) 2 1gbit -- $(RUN)/python -m commpress.launch.train --compress int4 --layers 5 --width 528 --heads 8 \
	  --context 64 --batch 2 --steps 20 --eval-every 0 --timeline 10 --out $(RECORDS)/train
	@$(RUN)/python benchmarks/picture.py docs/step_time.svg $(RECORDS)/steps-10gbit.json $(RECORDS)/steps-1gbit.json \
	  $(RECORDS)/steps-100mbit.json
	@$(RUN)/python -m commpress.launch.cli report $(RECORDS)/report.html $(RECORDS)/steps-*.json $(RECORDS)/losses.json \
	  $(RECORDS)/train/record.json $(RECORDS)/train/timeline.json

# losses against bytes, under two hours; stopped, it goes on where it was
bench-convergence: $(INSTALLED)
	@mkdir -p $(RECORDS)
	@$(LAB) 2 10gbit -- $(RUN)/python benchmarks/convergence.py $(RECORDS)/convergence --picture docs/convergence.svg
	@for rate in 1gbit 100mbit; do \
	  $(LAB) 2 $$rate -- $(STEPS) $(ADAM) --rounds 5 --steps 4 --json $(RECORDS)/adam-$$rate.json || exit 1; done

clean:
	rm -rf $(VENV) build dist *.egg-info
