"""Every command on the command line and in Python: the same options, and what one refuses the other refuses."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest

import plait
from plait.cli.options import parameter_name, recipe_keys
from plait.testing import cohort
from tests.adapters_on_disk import write_adapter
from tests.command_line import exit_code
from tests.every import every
from tests.unit.test_bake_plan import MODULES, write_base

PRESENTATION = {"json", "dry_run"}  # a plan is `plait.plan` and `plait.plan_bake` in Python
RENAMED = {
    "merge": {"inputs": "source", "input_": "inputs", "push_adapter_repo": "push_to", "push_baked_repo": "push_baked_to"},
    "bake": {"inputs": "source", "push_baked_repo": "push_to", "base_model": "base"},
    "compress": {"output__rank": "rank"},
    "convert": {"base_id": "base_model"},
    "extract": {},
    "verify": {"base_id": "base_model"},
    "evaluate": {"inputs": "source", "source": "sources", "base_model": "base", "eval__split": "split",
                 "eval__batch_size": "batch_size", "eval__subset__max_samples": "subset"},
    "ask": {"prompt": "prompts", "inputs": "source", "source": "sources", "base_model": "base"},
    "mix": {"inputs": "source", "base_model": "base", "eval__split": "split", "eval__batch_size": "batch_size",
            "eval__subset__max_samples": "subset"},
    "calibrate": {"inputs": "source", "set_": "sets"},
    "tune": {"inputs": "source", "set_": "sets"},
    "sweep": {"inputs": "source", "set_": "sets"},
    "unbake": {},
    "push": {},
    "report": {},
    "inspect": {"adapters": "source", "base_id": "base_model"},
    "check_tasks": {},
    "migrate_recipe": {},
    "train": {"base_id": "base"},
}  # fmt: skip
#: Commands whose function is not that of their name.
SHELL = {"check_tasks": ("tasks", "check"), "migrate_recipe": ("recipe", "migrate")}
# what the order has and the Python function has not, and what takes its place there
ORDER_ONLY = {
    "evaluate": {
        "methods": "evaluate in a loop", "spaces": "evaluate in a loop", "require": "the numbers of the Evaluation",
        "out": "merge", "force": "merge", "card": "the order's alone",
    },
    "sweep": {"status": "sweep_status"},
}  # fmt: skip
SETS = "set_"  # `--set PATH=VALUE`: in Python a keyword, or a mapping under a recipe's key


def shell_of(command: str) -> Callable[..., None]:
    module, name = SHELL.get(command, (command, command))
    return getattr(import_module(f"plait.cli.{module}"), name)


@every("command", RENAMED)
def test_every_option_is_one_of_python(command: str) -> None:
    """A recipe's key is a setting in Python; that every key has its flag is tested in test_options.py."""
    shell = shell_of(command)
    python = inspect.signature(getattr(plait, command)).parameters
    takes_settings = any(p.kind is p.VAR_KEYWORD for p in python.values())
    keys = {name for key in recipe_keys() for name in (parameter_name(key.path), f"{parameter_name(key.path)}_alias")}
    renamed, only = RENAMED[command], ORDER_ONLY.get(command, {})
    missing = []
    for name in inspect.signature(shell).parameters:
        known = renamed.get(name, name)
        as_setting = takes_settings and (known in (*keys, SETS, "moments") or command == "extract")
        if not (name in PRESENTATION or known in python or name in only or as_setting):
            missing.append(name)
    assert not missing
    assert not set(only) & set(python), "no longer of the order alone"


def test_every_parameter_of_python_is_an_option() -> None:
    """`progress` shows; a function of moments and a mapping of phases have no text."""
    for command, renamed in RENAMED.items():
        shell = shell_of(command)
        flags = {renamed.get(name, name) for name in inspect.signature(shell).parameters}
        found = inspect.signature(getattr(plait, command)).parameters.values()
        names = {p.name for p in found if p.kind is not p.VAR_KEYWORD} - {"progress"}
        assert names <= flags, (command, names - flags)


TASK = """
name: toy
kind: classification
data: rows.jsonl
splits: {test: {split: all}}
prompt: "{text}"
target: "{label}"
labels: ["0", "1"]
"""
PHASES = """
base_model: ./nowhere
phases: [{task: task.yaml}]
"""
Refused = tuple[list[str], Callable[[], Any]]
#: what neither does: a command line, and the same call
REFUSED: dict[str, Refused] = {
    "private without a repository": (
        ["merge", "a", "b", "-o", "out", "--private"],
        lambda: plait.merge(["a", "b"], out="out", private=True),
    ),
    "a baked repository without a bake": (
        ["merge", "a", "b", "-o", "out", "--push-baked-repo", "me/x"],
        lambda: plait.merge(["a", "b"], out="out", push_baked_to="me/x"),
    ),
    "inputs without add": (
        ["merge", "a", "b", "-o", "out", "--input", "a=./a"],
        lambda: plait.merge(["a", "b"], out="out", inputs={"a": "./a"}),
    ),
    "from_merged without add": (
        ["merge", "a", "b", "-o", "out", "--from-merged"],
        lambda: plait.merge(["a", "b"], out="out", from_merged=True),
    ),
    "a plan with from_merged and without add": (
        ["merge", "a", "b", "--dry-run", "--from-merged"],
        lambda: plait.plan(["a", "b"], from_merged=True),
    ),
    "add to two": (
        ["merge", "a", "b", "-o", "out", "--add", "c"],
        lambda: plait.merge(["a", "b"], out="out", add=["c"]),
    ),
    "add to no merge": (["merge", "a", "-o", "out", "--add", "c"], lambda: plait.merge("a", out="out", add=["c"])),
    "an unknown input": (
        ["merge", "earlier", "-o", "out", "--add", "c=./a", "--input", "x=./a"],
        lambda: plait.merge("earlier", out="out", add={"c": "./a"}, inputs={"x": "./a"}),
    ),
    "a private bake without a repository": (
        ["bake", "a", "b", "-o", "out", "--private"],
        lambda: plait.bake(["a", "b"], out="out", private=True),
    ),
    "a dtype of a bake": (
        ["bake", "a", "b", "-o", "out", "--dtype", "int3"],
        lambda: plait.bake(["a", "b"], out="out", dtype="int3"),
    ),
    "a plan of a bake": (
        ["bake", "a", "b", "-o", "out", "--dry-run", "--shard-size", "much"],
        lambda: plait.plan_bake(["a", "b"], shard_size="much"),
    ),
    "a plan of a bake with no prompts": (
        ["bake", "a", "b", "-o", "out", "--dry-run", "--check", "none.txt"],
        lambda: plait.bake(["a", "b"], out="out", check="none.txt"),
    ),
    "a plan with no repository's name": (
        ["merge", "a", "b", "-o", "out", "--dry-run", "--push-adapter-repo", "a/b/c"],
        lambda: plait.merge(["a", "b"], out="out", push_to="a/b/c"),
    ),
    "a plan whose output is an input": (
        ["merge", "earlier", "b", "-o", "earlier", "--force", "--dry-run"],
        lambda: plait.merge(["earlier", "b"], out="earlier", force=True),
    ),
    "a plan of texts of a task that is not there": (
        ["merge", "a", "b", "--dry-run", "--method", "regmean", "--tasks", "none.yaml"],
        lambda: plait.merge(["a", "b"], method="regmean", tasks=["none.yaml"], out="out"),
    ),
    "a plan of texts of tasks without an adapter": (
        ["bake", "a", "b", "-o", "out", "--base-id", "base", "--dry-run", "--scale", "auto", "--tasks", "task.yaml"],
        lambda: plait.bake(["a", "b"], out="out", base="base", scale="auto", tasks=["task.yaml"]),
    ),
    "a plan of a calibration in the way": (
        ["calibrate", "a", "b", "--dry-run", "-o", "wrong.yaml", "--tasks", "task.yaml"],
        lambda: plait.calibrate(["a", "b"], out="wrong.yaml", tasks=["task.yaml"]),
    ),
    "neither rank nor energy": (["compress", "a", "-o", "out"], lambda: plait.compress("a", out="out")),
    "rank and energy": (
        ["compress", "a", "-o", "out", "--rank", "1", "--energy", "0.9"],
        lambda: plait.compress("a", out="out", rank=1, energy=0.9),
    ),
    "no share": (
        ["compress", "a", "-o", "out", "--energy", "1.5"],
        lambda: plait.compress("a", out="out", energy=1.5),
    ),
    "neither, of an extraction": (["extract", "a", "b", "-o", "out"], lambda: plait.extract("a", "b", out="out")),
    "no share, of an extraction": (
        ["extract", "a", "b", "-o", "out", "--energy", "0"],
        lambda: plait.extract("a", "b", out="out", energy=0.0),
    ),
    "a method for one adapter as it is": (
        ["eval", "a", "--method", "ties"],
        lambda: plait.evaluate("a", method="ties"),
    ),
    "sources of a merge": (
        ["eval", "a", "b", "--source", "a=./a"],
        lambda: plait.evaluate(["a", "b"], sources={"a": "./a"}),
    ),
    "a recipe with adapters, calibrated": (
        ["calibrate", "r.yaml", "a", "-o", "out"],
        lambda: plait.calibrate(["r.yaml", "a"], out="out"),
    ),
    "a recipe with adapters, tuned": (
        ["tune", "r.yaml", "a", "-o", "out"],
        lambda: plait.tune(["r.yaml", "a"], out="out"),
    ),
    "parity without prompts": (
        ["verify", "earlier", "--parity", "none.txt"],
        lambda: plait.verify("earlier", parity="none.txt"),
    ),
    "no repository's name": (["push", "earlier", "a/b/c"], lambda: plait.push("earlier", "a/b/c")),
    "what is not a result, pushed": (["push", "a", "me/x"], lambda: plait.push("a", "me/x")),
    "nothing to take out": (
        ["un-bake", "nowhere/model", "a", "-o", "out", "--weight", "0"],
        lambda: plait.unbake("nowhere/model", "./a", out="out", weight=0.0),
    ),
    "a report of nothing": (["report", "a", "-o", "page.html"], lambda: plait.report("a", out="page.html")),
    "adapters that are not there": (["inspect", "a", "./nowhere"], lambda: plait.inspect(["./a", "./nowhere"])),
    "tasks that are not there": (["tasks", "check", "none.yaml"], lambda: plait.check_tasks(["none.yaml"])),
    "no tokenizer": (
        ["tasks", "check", "task.yaml", "--model", "./nowhere"],
        lambda: plait.check_tasks(["task.yaml"], model="./nowhere"),
    ),
    "a recipe that is not valid": (["recipe", "check", "wrong.yaml"], lambda: plait.load_recipe("wrong.yaml")),
    "an old recipe that is not valid": (
        ["recipe", "migrate", "wrong.yaml", "-o", "new.yaml"],
        lambda: plait.migrate_recipe("wrong.yaml", out="new.yaml"),
    ),
    "a recipe in the way": (
        ["recipe", "migrate", "r.yaml", "-o", "wrong.yaml"],
        lambda: plait.migrate_recipe("r.yaml", out="wrong.yaml"),
    ),
    "a folder in the way": (
        ["recipe", "migrate", "r.yaml", "-o", "a", "--force"],
        lambda: plait.migrate_recipe("r.yaml", out="a", force=True),
    ),
    "a training without data": (
        ["sft", "--model_name_or_path", "./nowhere", "--output_dir", "out"],
        lambda: plait.sft(model_name_or_path="./nowhere", output_dir="out"),
    ),
    "an unknown flag of a training": (["sft", "--learning_rat", "1"], lambda: plait.sft(learning_rat=1)),
    "a cluster of another kind, planned": (
        ["train", "phases.yaml", "--dry-run", "--cluster", "slurm"],
        lambda: plait.train("phases.yaml", cluster="slurm"),
    ),
    "a dtype of the evaluation after a training, planned": (
        ["train", "phases.yaml", "--dry-run", "--load-dtype", "float13"],
        lambda: plait.train("phases.yaml", load_dtype="float13"),
    ),
    "a dtype of an evaluation": (
        ["eval", "a", "b", "--load-dtype", "float13"],
        lambda: plait.evaluate(["a", "b"], load_dtype="float13"),
    ),
    "a device of a tuning": (
        ["tune", "a", "b", "-o", "out", "--device-map", "nowhere"],
        lambda: plait.tune(["a", "b"], out="out", device_map="nowhere"),
    ),
    "a device of texts, planned": (
        ["merge", "a", "b", "--dry-run", "--scale", "auto", "--tasks", "task.yaml", "--device-map", "nowhere"],
        lambda: plait.merge(["a", "b"], out="out", scale="auto", tasks=["task.yaml"], device_map="nowhere"),
    ),
    "no phases": (["train", "none.yaml"], lambda: plait.train("none.yaml")),
    "an unknown key": (
        ["merge", "a", "b", "-o", "out", "--set", "method.densty=0.3"],
        lambda: plait.merge(["a", "b"], out="out", densty=0.3),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_both_refuse_it_with_the_same_sentence(case: str, tmp_path, monkeypatch, capsys) -> None:
    cohort([(6, 4)], [2, 2]).save(tmp_path)
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate("ab"):
        (tmp_path / f"adapter{number}").rename(name)
    (tmp_path / "r.yaml").write_text("adapters: [./a, ./b]\n")
    (tmp_path / "wrong.yaml").write_text("adapters: [./a, ./b]\nscale: much\n")
    (tmp_path / "rows.jsonl").write_text('{"text": "x", "label": 0}\n')
    (tmp_path / "task.yaml").write_text(TASK)
    (tmp_path / "phases.yaml").write_text(PHASES)
    if "earlier" in REFUSED[case][0]:
        plait.merge(["./a", "./b"], out="earlier")
    before = {p.name for p in tmp_path.iterdir()}
    words, call = REFUSED[case]
    assert exit_code(*[w if w not in ("a", "b", "c") else f"./{w}" for w in words]) == 2
    printed = " ".join(capsys.readouterr().err.split())
    with pytest.raises(plait.PlaitError) as error:
        call()
    sentence = " ".join(str(error.value).split())
    assert sentence.replace("./", "") in printed.replace("./", "")
    assert {p.name for p in tmp_path.iterdir()} == before


def test_python_refuses_what_only_it_can_ask_for(tmp_path, monkeypatch) -> None:
    """The command line has no flags for it, or bounds of its own."""
    cohort([(6, 4)], [2, 2]).save(tmp_path)
    monkeypatch.chdir(tmp_path)
    pair = ["./adapter0", "./adapter1"]
    calls = (
        lambda workers: plait.merge(pair, out="out", workers=workers),
        lambda workers: plait.plan(pair, workers=workers),
        lambda workers: plait.evaluate(pair, workers=workers),
        lambda workers: plait.tune(pair, out="out", workers=workers),
        lambda workers: plait.inspect(pair, workers=workers),
        lambda workers: plait.verify("out", workers=workers),
        lambda workers: plait.compress(pair[0], rank=1, out="out", workers=workers),
    )
    for call in calls:
        for workers in (0, -1):
            with pytest.raises(plait.RecipeError, match=rf"--workers \(workers=\) must be at least 1, got {workers}"):
                call(workers)
    with pytest.raises(plait.RecipeError, match="method, scale: a compression takes base_model, dtype, layout and a rank"):
        plait.compress(pair[0], rank=1, out="out", scale=0.5, method="ties")
    for call in (plait.evaluate, lambda source, **given: plait.bake(source, out="out", **given)):
        with pytest.raises(plait.RecipeError, match="base= is 'x' and base_model= is 'y': they mean the same; give one"):
            call(pair, base="x", base_model="y")
    assert not (tmp_path / "out").exists()


def test_an_evaluation_refuses_before_it_begins_what_its_merge_would(tmp_path, monkeypatch, capsys) -> None:
    cohort([(6, 4)], [2, 2]).save(tmp_path)
    monkeypatch.chdir(tmp_path)
    plait.merge(["./adapter0", "./adapter1"], out="earlier")
    assert exit_code("eval", "./earlier", "./adapter0", "--tasks", "none.yaml", "-o", "earlier", "--force") == 2
    assert "earlier is an input of this merge (adapter 'earlier')" in " ".join(capsys.readouterr().err.split())


def printed_plan(capsys: Any, *words: str) -> Any:
    capsys.readouterr()
    assert exit_code(*words, "--dry-run", "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_plans_are_the_same_on_the_command_line_and_in_python(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    write_base(tmp_path / "base")
    for number, name in enumerate("abc"):
        write_adapter(tmp_path / name, MODULES, base=None, seed=number)
    plait.merge(["./a", "./b"], method="ties", out="earlier")
    added = plait.plan("earlier", add={"c": "./c"}, weights=[0.5])
    assert printed_plan(capsys, "merge", "earlier", "--add", "c=./c", "--weights", "0.5") == added.model_dump(mode="json")
    assert added.adapters == ("a", "b", "c")
    baked = plait.plan_bake(["./a", "./b"], base="base", dtype="bfloat16")
    words = ["./a", "./b", "--base-id", "base"]
    assert printed_plan(capsys, "bake", *words, "--dtype", "bfloat16", "-o", "model") == baked.model_dump(mode="json")
    both = printed_plan(capsys, "merge", *words, "--bake-dir", "model")
    assert both["bake"] == plait.plan_bake(["./a", "./b"], base="base").model_dump(mode="json")


def test_a_merge_bakes_on_the_command_line_and_in_python(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_base(tmp_path / "base")
    for number, name in enumerate("ab"):
        write_adapter(tmp_path / name, MODULES, base=None, seed=number)
    assert exit_code("merge", "./a", "./b", "--base-id", "base", "-o", "out", "--bake-dir", "model") == 0
    result = plait.merge(["./a", "./b"], base_model="base", out="out2", bake_dir="model2")
    assert result.baked is not None
    for file in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        assert (tmp_path / "model" / file).read_bytes() == (result.baked.folder / file).read_bytes()


def test_paths_of_a_recipe_start_at_its_folder(tmp_path, monkeypatch) -> None:
    """Loaded from a file, then merged and planned from elsewhere, with another base named from here."""
    (tmp_path / "there").mkdir()
    write_base(tmp_path / "base")
    for number, name in enumerate("ab"):
        write_adapter(tmp_path / "there" / name, MODULES, base=None, seed=number)
    (tmp_path / "there" / "r.yaml").write_text("adapters: [./a, ./b]\n")
    monkeypatch.chdir(tmp_path)
    recipe = plait.load_recipe("there/r.yaml")
    assert plait.merge(recipe, out="one").plan.adapters == ("a", "b")
    assert plait.plan_bake(recipe, base="base") == plait.plan_bake("there/r.yaml", base="base")
    with pytest.raises(plait.RecipeError, match="a Recipe is complete; put method into it"):
        plait.merge(recipe, method="ties", out="two")


def test_a_refusal_of_a_locks_recipe_names_the_lock(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate("abc"):
        write_adapter(tmp_path / name, MODULES, base=None, seed=number)
    plait.merge(["./a", "./b"], out="earlier")
    lock = json.loads((tmp_path / "earlier/plait.lock").read_text())
    lock["recipe"]["adapters"][1]["moments"] = "x"
    (tmp_path / "earlier/plait.lock").write_text(json.dumps(lock))
    for call in (plait.plan, lambda *a, **k: plait.merge(*a, out="out", **k)):
        with pytest.raises(plait.PlanError, match=r"^earlier/plait.lock, .*: adapters\[\].moments: given for b, not for a, c"):
            call("earlier", add=["./c"])
    lock["recipe"]["adapters"][1].pop("moments")
    lock["recipe"]["scale"] = "much"
    (tmp_path / "earlier/plait.lock").write_text(json.dumps(lock))
    with pytest.raises(plait.PlaitError, match=r"^earlier/plait\.lock: .* cannot read its recipe"):
        plait.plan("earlier", add=["./c"])
