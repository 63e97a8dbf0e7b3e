PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
OLDEST_PEFT := 0.21.0
ENGINES := vllm==0.33.0 sglang==0.5.23

.PHONY: demo test engines lint format docs clean

# The main job on the embedded fixture: a real 0.26M-parameter Llama and a LoRA trained on it.
demo: $(VENV)/ready
	$(BIN)/lorapack compress fixtures/adapter --base fixtures/stories260k \
		--data fixtures/tinyshakespeare/calibration.jsonl --eval-data fixtures/tinyshakespeare/heldout.jsonl \
		--budget 50% --learning-rate 3e-3 --out demo-out --overwrite

# All tests; those of the compact format once more with the oldest PEFT of the supported range.
test: $(VENV)/ready-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal --quiet
	PYTHONPATH=$(VENV)/peft-oldest $(BIN)/python -m pytest --quiet tests/test_compact.py

# The serving engines' own code on what `lorapack expand` writes for them; 0.4 GB to download, nothing is installed.
engines: $(VENV)/ready-dev
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
		--python-version 3.11 --dest .cache/engines $(ENGINES)
	$(BIN)/python -m pytest --quiet tests/engines

lint: $(VENV)/ready-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/ready-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/ready
	$(BIN)/python docs/generate_cli.py > docs/cli.md
	$(BIN)/python benchmarks/quality/page.py

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	touch $@

$(VENV)/ready-dev: $(VENV)/ready
	$(PIP) --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/peft-oldest peft==$(OLDEST_PEFT)
	touch $@

clean:
	rm -rf $(VENV) demo-out
