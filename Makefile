# make demo   everything once on built-in tissue: cut, train, infer, and where to look
# make test   all tests
# make lint   ruff
# Each makes .venv and installs what it needs first, once.

PYTHON ?= python3
BIN := .venv/bin
DEMO_CODE := $(wildcard tissue/*.py learning/*.py) model.py utils.py

.PHONY: all demo test lint clean
all: .venv/installed

.venv/python: 
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 12) else \
	    f"Python {v[0]}.{v[1]} found, 3.10 to 3.12 expected: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	@touch $@

.venv/installed: requirements.txt | .venv/python
	$(BIN)/pip install --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(BIN)/pip install --disable-pip-version-check -r requirements-dev.txt
	@touch $@

# The demo writes below data/demo, log/*-demo and results/demo alone.
data/demo/.drawn: tissue/synthetic.py | .venv/installed
	$(BIN)/python -m tissue.synthetic --root data/demo
	@touch $@

data/demo/patches.json: data/demo/.drawn preprocess.py
	$(BIN)/python preprocess.py --root data/demo --patch_stride 40
	@touch $@

results/demo/report.html: data/demo/patches.json train.py inference.py $(DEMO_CODE)
	$(BIN)/python train.py --root data/demo --dimensions 16 --epoch 4 --name demo
	$(BIN)/python inference.py --root data/demo --ckpt "$$(ls -d log/*-demo | tail -n 1)" \
	    --image_folder results/demo

demo: results/demo/report.html
	@echo
	@echo "Look at:"
	@echo "  data/demo/patches_preview.png      what the network learns from"
	@echo "  results/demo/report.html           masks and counts, in a browser"
	@echo "  results/demo/counts.csv            the same numbers for a spreadsheet"
	@echo "  .venv/bin/tensorboard --logdir=.   the curves of the training"

test: .venv/installed-dev
	$(BIN)/python -m pytest -q

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv data/demo log/*-demo results/demo
