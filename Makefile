# make serve   run the sample, with metrics
# make test    all tests on the first CPython from 3.11 to 3.13 that is found; on the others those that an interpreter matters to
# make test-all  all of them on all of these, but for systemd, supervisord, Prometheus and load: on the first only
# make soak    those under load for minutes: a hundred reloads in a row, broken code, killed processes
#              (for races: .venv/3.11/bin/python -m tests.thief .venv/3.11/bin/python -m pytest ...; tests/thief.py says what it does)
# make check   ruff, mypy and the import rule
# make bench   the table of ratios against other servers; BENCH='--save' keeps it, with plots, in tests/bench/results
.PHONY: serve test test-all soak check bench clean debian-packages
.DELETE_ON_ERROR:

# Interpreters on the path, and those of pyenv; the first of each version.
find_python = $(shell for python in python$(1) $$HOME/.pyenv/versions/$(1).*/bin/python3; do \
	$$python -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$(1)')" 2>/dev/null && echo $$python && break; done)
$(foreach version,3.11 3.12 3.13,$(eval PYTHON_$(version) := $(call find_python,$(version))))
VERSIONS := $(foreach version,3.11 3.12 3.13,$(if $(PYTHON_$(version)),$(version)))
PYTHON ?= $(PYTHON_$(firstword $(VERSIONS)))
VERSION = $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
VENV = .venv/$(VERSION)
ROOT := $(filter 0,$(shell id -u))
NEEDED := $(shell cat tests/debian-packages.txt)

ifeq ($(PYTHON),)
$(error no CPython 3.11, 3.12 or 3.13 is found; install one, or say make PYTHON=/path/to/python)
endif

serve: $(VENV)/installed
	@echo 'In a second terminal:  python3 tests/client.py 9999 hello    or    curl http://127.0.0.1:9109/metrics'
	@echo '                  or:  $(VENV)/bin/preforkctl status'
	@echo 'Ctrl-C stops it.'
	@$(VENV)/bin/preforkd serve

# What an interpreter matters to: whatever runs in molds and workers, the library, and the upgrade from one to another.
EVERYWHERE := $(addprefix tests/,clients $(patsubst %,test_%.py,adversity awaited boot copies deaths handle_request hardship hooks \
	keeper kinds last_requests library limits pooled_target scoreboard script serve stop streams threadpool upgrade \
	user_metrics valuefile))

test-all:
	@$(MAKE) --no-print-directory test EVERYWHERE=

# As many as there are cores: with more, whatever waits for a time is late. The long ones come first.
SIDE_BY_SIDE = $(MAKE) --no-print-directory --jobs=$(shell nproc) --output-sync=recurse

test: debian-packages
	@echo 'Tests on CPython $(VERSIONS), side by side; the output of each comes when it has ended.'
	@$(SIDE_BY_SIDE) $(VERSIONS:%=environment-%)
	@$(SIDE_BY_SIDE) $(if $(PYTEST),,test-around) $(VERSIONS:%=test-%)

# What takes minutes and asks more of the kernel, of systemd, supervisord and Prometheus than of Python: on the first
# interpreter only, beside the others. Where PYTEST says what to run, it is that, on all of them.
AROUND := $(addprefix tests/,systemd supervisor test_alerts.py test_load.py test_reload_load.py)

test-3.%:
	@$(MAKE) --no-print-directory --jobs=1 test-one PYTHON=$(PYTHON_3.$*) \
	PYTEST="$(or $(PYTEST),$(if $(filter-out 3.$*,$(firstword $(VERSIONS))),$(EVERYWHERE)),$(AROUND:%=--ignore=%))"

test-around:
	@$(MAKE) --no-print-directory --jobs=1 test-one PYTEST="$(AROUND)"

environment-3.%:
	@$(MAKE) --no-print-directory --jobs=1 environment PYTHON=$(PYTHON_3.$*)

.PHONY: environment test-one test-around
environment: $(VENV)/test-installed

# Compiled first: where PYTHONDONTWRITEBYTECODE is set, each of thousands of daemons would compile all of it for itself.
.PHONY: compiled
compiled: $(VENV)/test-installed
	@$(VENV)/bin/python -m compileall -q daemon workers tests

test-one: compiled
	$(VENV)/bin/python -m pytest -q $(PYTEST)

soak: compiled
	$(VENV)/bin/python -m pytest -q --soak --timeout 1800 tests/test_reload_load.py $(PYTEST)

check: $(VENV)/tools-installed
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

bench: $(VENV)/tools-installed
	$(VENV)/bin/python -m tests.bench $(BENCH)

$(VENV)/installed: pyproject.toml | venv-module
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check -e .
	@touch $@

$(VENV)/test-installed: $(VENV)/installed
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check -e '.[test]'
	@touch $@

$(VENV)/tools-installed: $(VENV)/test-installed
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check -e '.[test,check,bench]'
	@touch $@

# Debian ships the module ensurepip, which venv needs, in a package of its own.
.PHONY: venv-module
venv-module:
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || $(if $(ROOT),{ apt-get update -q && \
	apt-get install -q -y python$(VERSION)-venv; },{ echo 'needs the package python$(VERSION)-venv' >&2; exit 1; })

# Programs that tests use as clients. Without them those tests are skipped, and listed at the end.
debian-packages:
ifneq ($(ROOT),)
	@missing=$$(for package in $(NEEDED); do dpkg -s $$package >/dev/null 2>&1 || echo $$package; done); \
	if [ -n "$$missing" ] && command -v apt-get >/dev/null; then \
	apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y $$missing; fi
endif

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find daemon workers tests -name __pycache__ -prune -exec rm -rf {} +
