# Daily commands. `make demo` and `make test` are the two of the README; without make: `bash .ci/demo`, `bash .ci/test`.

VENV ?= .venv
PYTHON := $(VENV)/bin/python
export VENV

.PHONY: help install demo test check dev sim chaos faults long bench peers clean

help:  ## show this list
	@sed -n 's/^\([a-z]*\):.*##/  make \1	/p' $(MAKEFILE_LIST)

install:  ## everything into .venv
	@bash .ci/install

demo:  ## train, kill a rank, see it recover
	@bash .ci/demo

test:  ## all tests that need neither a GPU nor much time
	@bash .ci/test

dev: install  ## the linters too
	@$(PYTHON) -m pip --disable-pip-version-check --quiet install -c constraints.txt -e '.[dev]'

check: dev  ## ruff, mypy, and the tests that start no process: under a minute
	$(VENV)/bin/ruff check
	$(VENV)/bin/mypy
	$(PYTHON) -m pytest -q tests/unit tests/golden tests/property

sim: install  ## the whole fleet on a virtual clock: many seeds, loss, partitions
	$(PYTHON) -m pytest -q tests/sim

chaos: install  ## many kills at random moments; prints its seed
	$(PYTHON) -m pytest -q -s -m chaos tests

faults: install  ## everything that may happen to a checkpoint, many times; prints the fault matrix
	$(PYTHON) -m pytest -q -m "" --timeout=900 tests/chaos/test_damage.py tests/chaos/test_wire.py tests/chaos/test_resumed.py tests/chaos/test_killed.py \
		tests/chaos/test_surroundings.py tests/property/test_snapshot_bytes.py tests/process/test_storage_faults.py tests/process/test_storage.py \
		tests/process/test_s3.py tests/process/test_tenancy.py tests/process/test_replicas.py

long: install  ## further cases of what the tests show
	$(PYTHON) -m pytest -q -m long tests

bench: install  ## the numbers: a table and JSON
	$(PYTHON) -m pytest -q -s -m bench tests/bench

peers:  ## the engines of others into .venv-peers, for the benchmarks: 1 GB with torch's CPU build
	@test -x .venv-peers/bin/python || python3 -m venv .venv-peers
	@.venv-peers/bin/python -m pip --disable-pip-version-check --quiet install -c constraints.txt "torch==$$(sed -n 's/^torch==//p' constraints.txt)+cpu" numpy
	@.venv-peers/bin/python -m pip --disable-pip-version-check --quiet install --no-deps -r tests/bench/peers.txt

clean:  ## remove what the commands above made, .venv and .venv-peers excepted
	rm -rf runs bench build dist .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -not -path './.venv-peers/*' -prune -exec rm -rf {} +
