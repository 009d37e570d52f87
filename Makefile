# One obvious way to do each thing; every target installs what it needs first.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: install demo test test-long unit lint lock bench-demo bench-quantizers bench-search bench-flips bench-ablations bench-reproduce bench-speed bench-statistics bench-judges bench-gpu bench-hostile bench-faults bench-host-faults bench-schedule bench-autoscale bench-hosts bench-transfer bench-plan audit clean

install: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps --editable .
	touch $(STAMP)

demo: install
	$(BIN)/qresafe demo

# Three at a time, a file in one process, those that start Ray first: they mostly wait for it.
test: install lint
	$(BIN)/pytest -m "not long" -n 3 --dist loadfile --no-loadscope-reorder

# What takes too long for `test`: three hosts on S3 (as root, with iproute2), kills of whole searches.
test-long: install
	$(BIN)/pytest -m long

unit: install
	$(BIN)/pytest -m "not ray and not gpu and not long"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lock: install
	$(BIN)/pip install --quiet --requirement requirements.in
	( echo "# The whole resolved set, exactly pinned: make lock renews it from requirements.in."; \
	  $(BIN)/pip freeze --exclude-editable | sed -E 's/^torch( @|==).*/torch==2.13.0/' ) > requirements.lock

bench-demo: install
	$(BIN)/python -m bench.demo

bench-quantizers: install
	$(BIN)/python -m bench.quantizers

bench-search: install
	$(BIN)/python -m bench.search

bench-flips: install
	$(BIN)/python -m bench.flips

bench-speed: install
	$(BIN)/python -m bench.speed

bench-statistics: install
	mkdir -p .bench
	$(BIN)/python -m bench.streaming > .bench/streaming.md
	$(BIN)/python -m bench.coverage --streamed .bench/streaming.md

bench-schedule: install
	$(BIN)/python -m bench.schedule

# As root, with iproute2.
bench-autoscale: install
	$(BIN)/python -m bench.autoscale

# As root, with iproute2.
bench-hosts: install
	$(BIN)/python -m bench.hosts

bench-ablations: install
	$(BIN)/python -m bench.ablations

bench-reproduce: install
	$(BIN)/python -m bench.reproduce

bench-transfer: install
	$(BIN)/python -m bench.transfer

bench-plan: install
	$(BIN)/python -m bench.plan --out docs/plan-measured.md

bench-gpu: install
	$(BIN)/python -m bench.gpu

bench-hostile: install
	$(BIN)/python -m bench.hostile

bench-faults: install
	$(BIN)/python -m bench.faults

# As root, with iproute2; with `--keep rocksdb` or `--keep redis` a head whose state is kept.
bench-host-faults: install
	$(BIN)/python -m bench.host_faults

bench-judges: install
	$(BIN)/python -m bench.judges

# Known weaknesses of what is pinned; needs the network. --strict: what cannot be looked up fails.
audit:
	test -x .audit/bin/pip-audit || ( $(PYTHON) -m venv .audit && .audit/bin/pip install --quiet pip-audit==2.10.1 )
	.audit/bin/pip-audit --strict --no-deps --disable-pip --requirement requirements.lock

clean:
	rm -rf runs .audit .bench .mypy_cache .ruff_cache .pytest_cache
