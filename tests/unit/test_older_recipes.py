"""What recipes of the older framework ask of evaluation, which files are taken for its own, and whom the warnings reach."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import warnings
from contextlib import suppress
from pathlib import Path

import pytest

import plait
from plait.cli.main import main
from plait.errors import RecipeError
from plait.evaluation.request import evaluated_recipe
from plait.recipes.importers.migration import convert_old, migrate
from plait.recipes.loading import build_recipe, load_recipe, migrate_file
from tests.adapters_on_disk import layers, write_adapter
from tests.every import every

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
HEAD = {"adapters": ["./asr", "./intent"], "method": "uniform_delta", "merge_mode": "common"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "asr.yaml").touch()
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "intent.yml").touch()
    return tmp_path


# --- evaluation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"split": "validation"}, {"eval": {"split": "validation"}}),
        ({"split": "train", "eval": {"draws": 100}}, {"eval": {"draws": 100, "split": "train"}}),
        (
            {"eval_subset": {"enabled": True, "max_samples": 20, "stratified": False, "seed": 5}},
            {"eval": {"subset": {"max_samples": 20, "stratified": False, "seed": 5}}},
        ),
        ({"eval_subset": {"enabled": False, "max_samples": 20}}, {}),
        ({"eval_subset": {"seed": 1}}, {}),
        (
            {
                "eval_subset": {
                    "max_samples": 9,
                    "per_task": {"asr": {"max_samples": 3}, "st": 4, "kws": {"enabled": False}},
                }
            },
            {"eval": {"subset": {"max_samples": 9, "per_task": {"asr": 3, "st": 4, "kws": None}}}},
        ),
        (
            {"eval_subset": {"per_task": {"asr": {"max_samples": 3}}}, "split": "validation"},
            {"eval": {"split": "validation", "subset": {"per_task": {"asr": 3}}}},
        ),
        ({"eval_tasks": ["asr", "intent"]}, {"tasks": ["asr.yaml", "tasks/intent.yml"]}),
        ({"eval_tasks": ["./a/b.yaml", "lm_eval:arc_easy"]}, {"tasks": ["./a/b.yaml", "lm_eval:arc_easy"]}),
    ],
)
def test_wishes_for_evaluation_have_a_place(folder, old, new):
    found, notes = migrate({**HEAD, **old})

    assert {key: found.get(key) for key in ("eval", "tasks") if key in found} == new
    assert not [note for note in notes if "changes nothing" in note]
    recipe = build_recipe({**HEAD, **old})
    assert recipe == build_recipe(found)
    assert recipe.eval.model_dump(exclude_unset=True) == new.get("eval", {})


@every(
    ("subset", "left"),
    [
        ({"shuffle": False}, "shuffle: false"),
        ({"label_column": "label"}, "label_column: label"),
        ({"stratify_by": "label"}, "stratify_by: label"),
        ({"tag": "mine"}, "tag: mine"),
        ({"seed": 1, "per_task": {"asr": {"seed": 2, "stratified": False}}}, "per_task.asr.seed: 2 (eval.subset has one seed"),
        ({"per_task": {"asr": {"max_samples": 3, "eval_tag": "x"}}}, "per_task.asr.eval_tag: x"),
    ],
)
def test_what_a_subset_does_not_have_is_said(subset, left):
    (note,) = (n for n in migrate({**HEAD, "eval_subset": {"max_samples": 9, **subset}})[1] if "eval_subset" in n)
    assert f"Not carried over: {left}" in note


def test_shuffled_samples_need_no_remark():
    _, notes = migrate({**HEAD, "eval_subset": {"max_samples": 9, "shuffle": True, "stratified": True, "seed": 0}})
    assert not [note for note in notes if "Not carried over" in note]


@every(
    ("old", "problem"),
    [
        ({"split": "tset"}, "split: split is 'tset'; it must be"),
        ({"eval_subset": 20}, "eval_subset: eval_subset is 20; it must be a mapping"),
        ({"eval_subset": {"max_sample": 20}}, "eval_subset.max_sample: 'max_sample' is not known here"),
        ({"eval_subset": {"max_samples": 0}}, "eval_subset.max_samples: max_samples is 0"),
        (
            {"eval_subset": {"enabled": "no", "max_samples": 1}},
            "eval_subset.enabled: enabled is 'no'; it must be true or false",
        ),
        ({"eval_subset": {"per_task": [1]}}, "eval_subset.per_task: per_task is [1]; it must map tasks to numbers"),
        ({"eval_subset": {"per_task": {"asr": {"max": 3}}}}, "eval_subset.per_task.asr.max: 'max' is not known here"),
        ({"eval_subset": {"per_task": {"asr": {"max_samples": -3}}}}, "eval_subset.per_task.asr.max_samples: "),
        ({"eval_tasks": {"asr": 1}}, "it must be a list of tasks"),
        ({"eval_tasks": ["asr"], "tasks": ["a.yaml"]}, "eval_tasks: eval_tasks and tasks mean the same; keep tasks"),
        ({"split": "test", "eval": {"split": "test"}}, "split: split and eval.split mean the same; keep eval.split"),
    ],
)
def test_what_is_wrong_is_named_where_it_was_written(old, problem):
    with pytest.raises(RecipeError) as error:
        build_recipe({**HEAD, **old})
    assert problem in str(error.value)


def test_a_task_without_a_file_stops_migration_and_not_a_merge(folder, capsys):
    file = folder / "old.yaml"
    file.write_text("adapters: [./asr, ./intent]\nmethod: uniform_delta\neval_tasks: [asr, kws]\n")

    assert load_recipe(file).tasks == ("asr.yaml", "kws.yaml")
    with pytest.raises(RecipeError, match=r"old.yaml:3: eval_tasks.1: task 'kws' has no file: .*tasks/kws.yaml.*--tasks"):
        migrate_file(file)
    (folder / "tasks" / "kws.yaml").touch()
    assert "tasks:\n  - asr.yaml\n  - tasks/kws.yaml\n" in migrate_file(file)[0]
    with pytest.raises(SystemExit):
        main(["recipe", "migrate", str(file), "-o", str(folder / "new.yaml")])
    assert "new.yaml" in capsys.readouterr().out
    assert load_recipe(folder / "new.yaml") == load_recipe(file)


def test_a_recipe_that_selects_on_validation_is_not_evaluated_on_test():
    recipe = build_recipe({**HEAD, "split": "validation", "eval_subset": {"max_samples": 20}})
    found = evaluated_recipe(recipe, ["x.yaml"], {"split": None, "subset": None, "batch_size": None}).eval
    assert (found.split, found.subset.max_samples) == ("validation", 20)


def test_a_number_given_beside_a_recipe_is_that_of_every_task():
    recipe = build_recipe({**HEAD, "eval": {"subset": {"max_samples": 9, "seed": 3, "per_task": {"asr": 5}}}})
    found = evaluated_recipe(recipe, [], {"subset": 4}).eval.subset
    assert (found.max_samples, found.per_task, found.seed) == (4, {}, 3)


SEARCH = {"type": "grid", "grid": {"lambda": [0.1, 0.5]}}
TRANSFORM = [{"name": "layer_l2_normalize", "params": {"target_norm": 1.0}}]


@every(
    ("old", "remark"),
    [
        ({"search": SEARCH, "transforms": TRANSFORM}, "its sweeps left `transforms` out; every candidate has them"),
        ({"search": SEARCH, "method_params": {"lambda": 0.3}}, "every candidate of 'weighted' had that one; each has its own"),
        ({"search": SEARCH, "lambda_policy": {"type": "scalar", "value": 0.3}}, "every candidate of 'weighted' had that one"),
        ({"search": SEARCH}, None),
        ({"search": SEARCH, "transforms": ["identity", {"name": "ties_scaffold", "params": {}}]}, None),
        ({"search": SEARCH, "method_params": {"lambda": 0.3}, "method": "weighted_delta"}, None),
        ({"transforms": TRANSFORM, "method_params": {"lambda": 0.3}}, None),
    ],
)
def test_what_a_sweep_left_out_without_a_word_is_said(old, remark):
    notes = migrate({**HEAD, "method": "weighted", **old})[1]
    assert [note for note in notes if "the scores of this search differ" in note and (remark or "") in note] != [] or not remark
    assert remark or not [note for note in notes if "the scores of this search differ" in note]


BETWEEN = {"type": "bayes", "space": {"lambda": {"min": 0.0, "max": 1.0}}}
LEARNED = {"type": "supermerge", "params": {"variant": "task_wise"}}
KNOWN = [{"params": {"lambda": 0.2}, "score": 0.1}]


@every(
    ("old", "shown"),
    [
        ({"search": {**BETWEEN, "early_stop": {"enabled": False, "patience": 3}}}, "early_stop (it was not enabled)"),
        ({"search": {**BETWEEN, "grid": {"lambda": [1]}}}, "grid (it had no effect with type bayes)"),
        ({"search": {**BETWEEN, "known_points": KNOWN}}, "the scores of known_points"),
        ({"search": {**BETWEEN, "xi": 0.1}}, "xi (the improvement is expected"),
        ({"search": {**BETWEEN, "inject_zero_baseline": True}}, "inject_zero_baseline (it had an effect on"),
        ({"search": {**SEARCH, "budget": 1}}, "budget (it had no effect with type grid)"),
        ({"search": {**SEARCH, "early_stop": {"enabled": True}}}, "early_stop (it had no effect with type grid)"),
        ({"search": {**SEARCH, "known_points": KNOWN}}, "known_points (it had no effect with type grid)"),
        ({"search": {**SEARCH, "space": BETWEEN["space"]}}, "space (it had no effect with type grid)"),
        (
            {"search": {"type": "bayes", "space": {"lambda": {"type": "float", "min": 0, "max": 1, "values": [2]}}}},
            "values of lambda (no effect with type float)",
        ),
        (
            {"search": {"type": "bayes", "space": {"lambda": {"type": "cat", "min": 0, "max": 1, "values": [2]}}}},
            "min and max of lambda (no effect with type cat)",
        ),
        ({"search": BETWEEN, "save_merged": True}, "write `search: {save_merged: true}`"),
        ({"search": BETWEEN, "post_sweep_eval": {"enabled": True}}, "`search: {save_merged: true}`. The best of a search"),
        ({"search": BETWEEN, "output_dir": "a/b"}, "the command line says where to write: -o a/b"),
        (
            {"search": BETWEEN, "method": "weighted_delta_n", "optimizer": LEARNED},
            "its optimizer learned anew for every candidate",
        ),
    ],
)
def test_nothing_of_a_search_is_left_out_without_a_word(old, shown):
    found, notes = migrate({**HEAD, "method": "weighted_delta", "split": "validation", **old})
    assert len([note for note in notes if shown in note]) == 1
    assert found["search"].keys() <= {"type", "space", "grid", "save_merged", "points", "split"}


# --- which files are old, and what differs ---------------------------------------------------------------------------


@every(
    ("data", "old"),
    [
        ({"adapters": ["asr", "intent"], "method": "uniform"}, True),
        ({"adapters": ["asr", "./intent"], "method": "ties", "merge_mode": "strict"}, True),
        ({"version": 1, "adapters": ["asr", "intent"], "method": "ties"}, False),
        ({"adapters": ["./asr", "./intent"], "method": "ties"}, False),
        ({"adapters": ["asr", "intent"], "method": "della"}, False),
        ({"adapters": ["asr", "intent"], "method": "ties", "output": {"rank": 8}}, False),
        ({"adapters": ["asr", "intent"], "method": {"name": "ties", "density": 0.3}}, False),
        ({"adapters": ["asr", {"path": "intent"}], "method": "ties"}, False),
        ({"adapters": ["asr", "intent"]}, False),
    ],
)
def test_bare_words_without_a_version_are_of_the_older_framework(data, old):
    converted = convert_old(data)
    assert bool(converted.notes) == old
    if old:
        assert converted.data["merge_mode"] == data.get("merge_mode", "common")
    if old and data["method"] == "ties":
        assert converted.data["method"]["kept"] == "ceil"


@every(
    ("old", "printed"),
    [
        ({"method": "uniform", "split": "test"}, "`method: uniform` differ"),
        ({"method": "weighted", "method_params": {"lambda": 0.5}}, "`method: weighted` differ"),
        ({"method": "weighted", "lambda": 0.5}, "`method: weighted` differ"),
        ({"method": "weighted", "lambda_policy": {"type": "scalar", "value": 0.5}}, "`method: weighted` differ"),
        (
            {"method": "weighted", "lambda_policy": {"type": "per_layer", "default": 0.5}},
            "`method: weighted` differ",
        ),
        (
            {"method": "weighted_delta", "lambda_policy": {"type": "per_layer", "default": 0.5}},
            "no effect on 'weighted_delta'",
        ),
        ({"method": "weighted_delta", "lambda_policy": {"type": "scalar", "value": 0.5}}, "no effect on 'weighted_delta'"),
        ({"method": "uniform_delta", "transforms": [{"name": "layer_l2_normalize", "params": {}}]}, "they acted on A and B"),
        ({"method": "dare", "params": {"drop_rate": 0.5}}, "numbers of `method: dare` differ"),
    ],
)
def test_migration_says_where_numbers_differ(old, printed):
    _, notes = migrate({"adapters": ["./a", "./b"], **old})
    assert len([note for note in notes if printed in note]) == 1


def test_nothing_differs_without_a_reason():
    for method, more in (("uniform_delta", {}), ("weighted_delta", {"lambda": 0.5}), ("task_vector", {})):
        _, notes = migrate({"adapters": ["./a", "./b"], "method": method, "split": "test", **more})
        assert not [note for note in notes if "differ" in note or "no effect" in note]


def test_migrating_a_file_in_no_old_form_still_says_where_numbers_differ(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("adapters: [./a, ./b]\nmethod: uniform\n")
    text, (note,) = migrate_file(file)
    assert text == file.read_text()
    assert "`method: uniform` differ" in note


# --- whom warnings reach ---------------------------------------------------------------------------------------------

CALLS = (
    "plait.load_recipe(recipe)",
    "plait.plan(recipe)",
    "plait.merge(recipe, out=out)",
    "plait.bake(recipe, base=base, out=out)",
)


@pytest.fixture(scope="module")
def old_recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("old")
    for seed, name in enumerate(("asr", "intent")):
        write_adapter(folder / name, layers(1, {"q_proj": (6, 5)}), seed=seed)
    file = folder / "old.yaml"
    file.write_text("adapters: [asr, intent]\nmethod: uniform_delta\nsplit: validation\n")
    return file


@pytest.mark.parametrize("call", CALLS)
def test_a_warning_is_of_the_line_that_asked(old_recipe, tmp_path, call):
    script = tmp_path / "script.py"
    script.write_text(f"import plait\ndef run(recipe, base, out):\n    return {call}\n")
    spec = importlib.util.spec_from_file_location("script", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with suppress(plait.PlaitError):  # there is no base and no task: recipes are read first
            module.run(old_recipe, tmp_path, tmp_path / "out")
    found = [w for w in caught if issubclass(w.category, DeprecationWarning) and "old form" in str(w.message)]
    assert found
    assert {(w.filename, w.lineno) for w in found} == {(str(script), 3)}


def test_pythons_own_filter_shows_it(old_recipe, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"import plait\nplait.plan({str(old_recipe)!r})\n")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert "script.py:2: DeprecationWarning: `split: validation` is an old form" in done.stderr


def test_the_command_line_shows_each_note_once(old_recipe, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    with pytest.raises(SystemExit):
        main(["eval", str(old_recipe), "--methods", "linear,uniform_delta", "--tasks", str(Path("nowhere.yaml"))])
    assert capsys.readouterr().err.count("note: `split: validation` is an old form") == 1
