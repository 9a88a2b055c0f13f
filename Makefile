# Works with Python >= 3.11, pip, make and git. The environment goes to .venv; `make clean` removes it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test test-rgw test-browser browser soak gpu lint lock clean

setup: $(VENV)/.ready

# uv lives inside the environment itself. Compiled here once: where bytecode isn't cached, importing torch and timm takes
# 25 s instead of 8 s, in every worker.
$(VENV)/.ready: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Raylift needs Python 3.11 or later; run make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode --requirement requirements.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	touch $@

demo: setup
	$(BIN)/python jobs/extract.py demo

# WORKERS processes (2 GB of memory each), a file each at a time, in the order of tests/conftest.py. Three on 2 cores weren't faster
# than two: 938 s without the longest file, and 890 s with it.
# Every process that tests start would compile this checkout anew without its bytecode.
WORKERS ?= 2
test: export PYTHONDONTWRITEBYTECODE :=
test: setup
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-rgw: setup
	$(BIN)/python -m pytest -m rgw

# Where there is no Chromium, the pages' browser tests are skipped by `make test`; this installs one (Debian, as root).
test-browser: setup browser
	$(BIN)/python -m pytest tests/jobs/test_show.py tests/pipelines/training/test_watch.py -k browser
	$(BIN)/python -m pytest tests/jobs/test_browse_page.py

browser:
	command -v chromium || command -v chromium-browser || command -v google-chrome || \
	    { apt-get update -qq && apt-get install -y -qq chromium; }

# For whoever has a GPU: about 8 minutes.
gpu: setup
	$(BIN)/python jobs/benchmark.py gpu

soak: setup
	$(BIN)/python -m pytest -m soak

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

# Without URLs or hashes, so that any index can serve it. The second is what of the first the cluster's image needs: Ray's
# dashboard and launcher, and no test packages.
lock: setup
	$(BIN)/uv pip compile --quiet --extra dev --python-version 3.11 --universal --no-emit-index-url --no-annotate --no-header \
	    --output-file requirements.txt pyproject.toml
	echo 'ray[default]' | $(BIN)/uv pip compile --quiet --python-version 3.11 --universal --no-emit-index-url --no-annotate \
	    --no-header --extra all --constraint requirements.txt --output-file cluster/requirements.txt pyproject.toml -

clean:
	rm -rf $(VENV) demo *.egg-info build .ruff_cache .pytest_cache .import_linter_cache .mypy_cache
