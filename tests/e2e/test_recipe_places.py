"""What a recipe's file names wrongly is refused with the file, the line and the key, by every command and in Python."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import plait
from plait import mixture
from plait.errors import PlaitError
from tests.adapters_on_disk import Linear, write_adapter
from tests.command_line import exit_code
from tests.language_models import LABELS, save_model, write_task

SHAPES = {"model.layers.0.self_attn.q_proj": (32, 32), "model.layers.1.mlp.up_proj": (48, 32)}
READING = ("calibrate", "tune", "eval")  # commands that read texts and load the base
ALL = ("merge", "bake", *READING)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    save_model(folder / "base")
    for seed, task in enumerate(LABELS):
        modules = {path: Linear(*shape) for path, shape in SHAPES.items()}
        write_adapter(folder / task, modules, seed=seed, base="./nobase", task_type="CAUSAL_LM")
        write_task(
            folder, task, splits={"train": {"rows": [0, 12]}, "test": {"rows": [12, 24]}}, data={"path": f"{task}/test.jsonl"}
        )
    return folder


@pytest.fixture(autouse=True)
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def recipe(**changes: object) -> Path:
    data = {
        "base_model": "./base",
        "adapters": [{"path": f"./{task}", "name": task} for task in LABELS],
        "tasks": [f"{task}.yaml" for task in LABELS],
        "method": "linear",
        **changes,
    }
    file = Path("many.yaml")
    file.write_text(yaml.safe_dump({key: value for key, value in data.items() if value is not None}, sort_keys=False))
    return file


def refused(capsys, *words: str) -> str:
    out = ("--workspace", "ws") if words[0] == "eval" else ("-o", "out")
    code = exit_code(*words, *out)
    message = capsys.readouterr().err
    assert code == 2, message
    assert not Path("out").exists()
    return " ".join(message.split())


def entry(**changes: object) -> list[dict[str, object]]:
    return [{"path": "./sort", "name": "sort", **changes}, {"path": "./rate", "name": "rate"}]


@pytest.mark.parametrize("command", ALL)
@pytest.mark.parametrize("path", ["/etc/passwd", "./nowhere", "./base", "~nosuchuser/x"])
def test_an_adapter(capsys, command, path):
    recipe(adapters=entry(path=path))
    assert "error: many.yaml:3: adapters.0.path: " in refused(capsys, command, "many.yaml")


@pytest.mark.parametrize("command", ["bake", *READING])
@pytest.mark.parametrize("base", ["./nowhere", "/etc/passwd", "a/b//c", "~nosuchuser/x"])
def test_the_base(capsys, command, base):
    recipe(base_model=base)
    assert "error: many.yaml:1: base_model: " in refused(capsys, command, "many.yaml")


@pytest.mark.parametrize("command", ["bake", *READING])
def test_a_base_that_an_adapter_names(capsys, command, place):
    recipe(base_model=None)
    message = refused(capsys, command, "many.yaml")
    assert f"error: {place / 'sort' / 'adapter_config.json'}: base_model_name_or_path: './nobase'" in message
    assert message.count("--base-id") == 1  # where else it may be


@pytest.mark.parametrize("command", READING)
def test_a_task(capsys, command):
    recipe(tasks=["sort.yaml", "nowhere.yaml"])
    assert "error: many.yaml:9: tasks.1: " in refused(capsys, command, "many.yaml")


@pytest.mark.parametrize("command", ALL)
def test_moments(capsys, command):
    recipe(method="regmean", adapters=[e | {"moments": "~nosuchuser/x.safetensors"} for e in entry()])
    assert "many.yaml:5: adapters.0.moments: moments of 'sort'" in refused(capsys, command, "many.yaml")


@pytest.mark.parametrize(("command", "key"), [("calibrate", "calibration"), ("tune", "tune")])
@pytest.mark.parametrize("file", ["nowhere.txt", "nowhere.csv", ".", "~nosuchuser/x.jsonl"])
def test_texts(capsys, command, key, file):
    recipe(**{key: {"files": {"sort": file}}})
    assert f"error: many.yaml:13: {key}.files.sort: " in refused(capsys, command, "many.yaml")


@pytest.mark.parametrize("command", ["merge", "bake", "tune", "eval"])
def test_what_the_adapters_have_not(capsys, command):
    recipe(weights={"policy": "per_layer", "layers": {"7": 1.0}})
    assert "error: many.yaml: weights.layers: '7'" in refused(capsys, command, "many.yaml")


@pytest.mark.parametrize("command", READING)
def test_tasks_that_are_missing(capsys, command):
    recipe(tasks=None)
    assert "error: many.yaml:1: tasks: there are no tasks" in refused(capsys, command, "many.yaml")


def test_numbers_that_overflow(capsys):
    recipe(adapters=entry(weight=1e38), scale=1e30)
    assert "error: many.yaml: model.layers." in refused(capsys, "merge", "many.yaml")


def test_an_older_recipe_by_its_own_keys(capsys):
    Path("many.yaml").write_text("adapters: [./sort, /etc/passwd]\nmethod: linear\n")
    assert "error: many.yaml:1: adapters.1.path: '/etc/passwd'" in refused(capsys, "merge", "many.yaml")


def test_what_a_flag_gives_is_not_the_files(capsys):
    recipe()
    message = refused(capsys, "bake", "many.yaml", "--base-id", "./nowhere")
    assert "many.yaml" not in message
    assert "nowhere" in message
    assert "many.yaml" not in refused(capsys, "eval", "many.yaml", "--tasks", "nowhere.yaml")
    assert "many.yaml" not in refused(capsys, "merge", "many.yaml", "--method", "regmean", "--moments", "nowhere")


@pytest.mark.parametrize(
    "call",
    [
        lambda file: plait.merge(file, out="out"),
        lambda file: plait.merge(plait.load_recipe(file), out="out"),
        lambda file: plait.plan(file),
        lambda file: plait.bake(file, out="out"),
        lambda file: plait.calibrate(file, out="out"),
        lambda file: plait.tune(file, out="out"),
        lambda file: plait.evaluate(file),
        lambda file: mixture.load(file),
    ],
    ids=["merge", "merge of a Recipe", "plan", "bake", "calibrate", "tune", "evaluate", "mixture"],
)
def test_in_python(call):
    file = recipe(adapters=entry(path="./nowhere"))
    with pytest.raises(PlaitError, match=r"^many\.yaml:3: adapters\.0\.path: './nowhere'"):
        call(file)


def test_a_recipe_of_a_file_equals_the_same_from_elsewhere(place):
    file = recipe()
    assert plait.load_recipe(file) == plait.load_recipe(file.read_text()).placed(place)
