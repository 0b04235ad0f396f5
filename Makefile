# Two commands do everything on a fresh machine with Python >= 3.11 and make: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Before torch 2.15 a killed build of DeepSpeed's CPU extension leaves a lock on which later runs hang: keep ours apart from everybody's.
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/.cache/torch_extensions
# DeepSpeed's build calls `ninja` by name, and another version of it would build everything again.
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: demo test test-all check clean

demo: $(VENV)/.installed
	$(BIN)/python tools/demo.py

test: $(VENV)/.installed
	$(BIN)/python tools/check.py --tests

test-all: $(VENV)/.installed
	$(BIN)/python tools/check.py --tests --slow

check: $(VENV)/.installed
	$(BIN)/python tools/check.py

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "unitdist needs Python >= 3.11; found $$($(PYTHON) --version). Set PYTHON=..."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[all]'
	touch $@

clean:
	rm -rf .cache runs/demo sample_data sample_small
