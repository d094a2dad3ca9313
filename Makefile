# make demo       everything once on synthetic tissue: cut, train, infer, and where to look
# make doctor     what of this machine the scripts can use, and what lacks
# make test       the tests, without those that take long
# make test-all   all tests
# make test-faults   attacks: kills, disks, files from strangers (docs/reliability.md)
# make lint       ruff
# Each makes .venv and installs what it needs first, once; what it then does is in tasks.py.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: all demo doctor test test-all test-faults lint clean
all: .venv/installed

.venv/python: 
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 14) else \
	    "Python %d.%d found, 3.11 to 3.14 expected: make PYTHON=python3.12 ..." % v)'
	$(PYTHON) -m venv .venv
	@touch $@

.venv/installed: requirements.txt | .venv/python
	$(BIN)/pip install --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(BIN)/pip install --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	@touch $@

demo doctor: .venv/installed
	@$(BIN)/python -m tasks $@

test test-all test-faults lint: .venv/installed-dev
	@$(BIN)/python -m tasks $@

clean:
	rm -rf .venv data/demo log/*-demo results/demo
