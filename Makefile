# Each target is a name for commands that the README spells out.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo test slow lint bench clean

install: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[cpu,dev]'
	touch $@

data/toy: | .venv/installed
	$(BIN)/python data_tools/make_toy.py data/toy --n 10000

demo: install data/toy
	$(BIN)/python bench.py configs/toy/demo.py

test: install
	$(BIN)/python -m pytest

slow: install data/toy
	$(BIN)/python -m pytest -m slow

lint: install
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: install data/toy
	$(BIN)/python bench.py configs/toy/results.py --seeds 0 1 2

clean:
	rm -rf data/toy runs
