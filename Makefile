# make serve   run the sample, with metrics
# make test    all tests, on every CPython 3.11 to 3.13 that is found; under load and systemd on the first only
# make soak    those under load for minutes: a hundred reloads in a row, broken code, killed processes
# make check   ruff, mypy and the import rule
# make bench   the table of ratios against other servers
.PHONY: serve test soak check bench clean debian-packages
.DELETE_ON_ERROR:

# Interpreters on the path, and those of pyenv; the first of each version.
PYTHONS := $(shell for version in 3.11 3.12 3.13; do \
	for python in python$$version $$HOME/.pyenv/versions/$$version.*/bin/python3; do \
	$$python -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$$version')" 2>/dev/null && echo $$python && break; \
	done; done)
PYTHON ?= $(firstword $(PYTHONS))
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

test: debian-packages
	@for python in $(PYTHONS); do \
	$(MAKE) --no-print-directory test-one PYTHON=$$python PYTEST="$(PYTEST) $$but" || exit; but="$(ON_ONE)"; done

# What takes minutes and asks more of the kernel and of systemd than of Python: on the first interpreter only.
ON_ONE := $(addprefix --ignore=tests/,systemd test_load.py test_reload_load.py)

.PHONY: test-one
test-one: $(VENV)/test-installed
	$(VENV)/bin/python -m pytest -q $(PYTEST)

soak: $(VENV)/test-installed
	$(VENV)/bin/python -m pytest -q --soak --timeout 1800 tests/test_reload_load.py $(PYTEST)

check: $(VENV)/test-installed
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

bench: $(VENV)/test-installed
	$(VENV)/bin/python -m tests.bench $(BENCH)

$(VENV)/installed: pyproject.toml | venv-module
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check -e .
	@touch $@

$(VENV)/test-installed: $(VENV)/installed
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
