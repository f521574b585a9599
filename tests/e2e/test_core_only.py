"""plait without its extras: what the core can do works, and everything else says what to install, before any work."""

from __future__ import annotations

import ast
import json
import re
import shutil

import pytest
import typer
from safetensors.torch import load_file, save_file

from plait.cli.main import app
from plait.training.job import PACKAGES
from tests.core_environment import ROOT, beyond_the_core, closure, modules, project, run_with_core_alone
from tests.every import every
from tests.language_models import WORDS, label, save_model, train_adapter, write_task

EVAL, TRAIN = ["transformers", "accelerate"], ["trl", "transformers", "peft", "datasets", "accelerate"]
SWEEP = [*EVAL, "optuna", "scipy", "sklearn"]
SFT = ["--model_name_or_path", "base", "--dataset_name_or_path", "rows.jsonl", "--use_peft", "--output_dir", "run"]


def says(why: str, packages: list[str], *extras: str) -> str:
    """Return what must be reported."""
    word = "package" if len(packages) == 1 else "packages"
    return f"{why} needs the {word} {', '.join(map(repr, packages))}: python -m pip install 'plait[{','.join(extras)}]'"


#: Command lines that the core can do.
WORK = {
    "merge": "merge a b -o merged",
    "bake": "bake a b --base-id base -o baked",
    "un-bake": "un-bake baked a --weight 1 -o unbaked",
    "inspect": "inspect a b",
    "compress": "compress a --rank 2 -o small",
    "convert": "convert a --to mlx -o mlx",
    "extract": "extract base tuned --rank 2 -o extracted",
    "verify": "verify merged",
    "push": "push --help",
    "report": "report merged -o page.html",
    "methods": "methods ties",
    "recipe check": "recipe check recipe.yaml",
    "recipe schema": "recipe schema",
    "recipe migrate": "recipe migrate recipe.yaml",
    "tasks check": "tasks check tasks/sort.yaml",
}
#: Command lines and Python that need more, and what must be reported.
NEEDS = {
    "eval a b --tasks tasks/sort.yaml --base-id base": says("an evaluation", EVAL, "eval"),
    "eval a --tasks tasks/sort.yaml --base-id base": says("an evaluation", EVAL, "eval"),
    "eval a b --tasks lm_eval:piqa --base-id base": says("an evaluation", EVAL, "eval"),
    "ask hello a b --base-id base": says("plait ask", EVAL, "eval"),
    "mix a b --base-id base": says("plait mix", [*EVAL, "gradio"], "eval", "mix"),
    "tune a b --tasks tasks/sort.yaml --base-id base -o tuned-merge": says("plait tune", EVAL, "eval"),
    "sweep a b --tasks tasks/sort.yaml --base-id base -o study": says("plait sweep", SWEEP, "eval", "sweep"),
    "sweep a b --tasks tasks/sort.yaml --base-id base -o study --cluster ray": says(
        "plait sweep", [*SWEEP, "ray"], "eval", "sweep", "ray"
    ),
    "bake a b --base-id base -o model --cluster ray": says("plait bake", ["ray"], "ray"),
    "sweep --status study": says("plait sweep", ["optuna"], "sweep"),
    "calibrate a b --tasks tasks/sort.yaml --base-id base -o moments": says("plait calibrate", EVAL, "eval"),
    "merge a b --method regmean --tasks tasks/sort.yaml -o solved": says("a merge that reads texts", EVAL, "eval"),
    "verify merged --parity prompts.txt --base-id base": says("a parity check", ["peft", "transformers"], "parity"),
    "bake a b --base-id base -o other --check prompts.txt": says("a parity check", ["peft", "transformers"], "parity"),
    "report merged -o other.html --figures figures": says("a report", ["matplotlib"], "report"),
    f"sft {' '.join(SFT)}": says("plait sft", TRAIN, "train"),
    f"sft {' '.join(SFT)} --dry_run": says("plait sft", TRAIN, "train"),
    "sft --help_all": says("plait sft", TRAIN, "train"),
    "train phases.yaml -o trained": says("plait train", TRAIN, "train"),
    "train phases.yaml -o trained --dry-run": says("plait train", TRAIN, "train"),
    "train phases.yaml -o trained --cluster ray": says("plait train", [*TRAIN, "ray"], "train", "ray"),
    "tasks check tasks/sort.yaml --model base": says("a tokenizer", ["transformers"], "eval"),
    "tasks check lm_eval:piqa": says("task 'piqa': lm_eval:piqa", ["lm_eval"], "lm-eval"),
    "tasks check images/sort.yaml": says("task 'sort': decoding images", ["PIL"], "vision"),
    "tasks check sounds/sort.yaml": says("task 'sort': decoding sounds", ["soundfile"], "audio"),
    "tasks check parquet/sort.yaml": says("rows.parquet: reading parquet", ["pyarrow"], "data"),
    "tasks check hub/sort.yaml": says("task 'sort': data from the Hub", ["datasets"], "data"),
    "plait.evaluate(['a', 'b'], tasks=['tasks/sort.yaml'], base='base')": says("an evaluation", EVAL, "eval"),
    "plait.mix(['a', 'b'], base='base')": says("plait mix", [*EVAL, "gradio"], "eval", "mix"),
    "plait.tune(['a', 'b'], tasks=['tasks/sort.yaml'], base_model='base', out='tuned-merge')": says("plait tune", EVAL, "eval"),
    "plait.sweep(['a', 'b'], tasks=['tasks/sort.yaml'], base_model='base', out='study')": says(
        "plait sweep", SWEEP, "eval", "sweep"
    ),
    "plait.sweep_status('study')": says("plait sweep", ["optuna"], "sweep"),
    "plait.sft(model_name_or_path='base', dataset_name_or_path='rows.jsonl', output_dir='run')": says(
        "plait sft", TRAIN, "train"
    ),
    "plait.train('phases.yaml', out='trained')": says("plait train", TRAIN, "train"),
    "plait.verify('merged', parity='prompts.txt', base_model='base')": says(
        "a parity check", ["peft", "transformers"], "parity"
    ),
    "plait.report('merged', out='other.html', figures='figures')": says("a report", ["matplotlib"], "report"),
    "plait.check_tasks(['tasks/sort.yaml'], model='base')": says("a tokenizer", ["transformers"], "eval"),
    "plait.mixture.load(['a', 'b'], base='base')": says("a live model", ["transformers"], "eval"),
    "plait.mixture.Mixture.load('base', [])": says("a live model", ["transformers"], "eval"),
    "plait.mixture.Mixture.load('base', [], device_map='auto')": says("a live model", EVAL, "eval"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what the command lines name."""
    folder = tmp_path_factory.mktemp("core") / "work"
    save_model(folder / "base")
    shutil.copytree(folder / "base", folder / "tuned")
    weights = load_file(folder / "base" / "model.safetensors")
    save_file({n: w + 0.01 * w.abs() for n, w in weights.items()}, folder / "tuned" / "model.safetensors", {"format": "pt"})
    for name, task in {"a": "sort", "b": "rate"}.items():
        train_adapter(folder / name, task, steps=1)
    write_task(folder / "tasks", "sort")
    write_task(folder / "parquet", "sort", splits={"test": "rows.parquet"})
    (folder / "parquet" / "sort" / "rows.parquet").touch()
    seen = {"kind": "image_classification", "image": "word", "prompt": None, "delimiter": None}
    write_task(folder / "images", "sort", **seen)
    heard = {"kind": "audio_classification", "audio": "word", "prompt": None, "delimiter": None}
    write_task(folder / "sounds", "sort", **heard)
    write_task(folder / "hub", "sort", data={"hub": "org/rows"}, splits={"test": "test"})
    rows = [{"prompt": f"sort {word} :", "completion": f" {label('sort', word)}"} for word in WORDS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_task(folder / "trained_tasks", "sort", splits={"train": "test.jsonl", "test": "test.jsonl"})
    (folder / "phases.yaml").write_text("base_model: ./base\nphases: [trained_tasks/sort.yaml]\nlora: {r: 2}\n")
    (folder / "recipe.yaml").write_text("version: 1\nadapters: [{name: a, path: ./a}, {name: b, path: ./b}]\n")
    (folder / "prompts.txt").write_text("sort w1 :\n")
    return folder


@pytest.fixture(scope="module")
def outcomes(place):
    """What came of every run, all in one process."""
    lines = [*WORK.values(), *NEEDS]
    runs = [line if line.startswith("plait.") else line.split() for line in lines]
    return dict(zip(lines, run_with_core_alone(place, runs), strict=True))


@every("command", WORK)
def test_what_the_core_can_do(outcomes, command):
    found = outcomes[WORK[command]]
    assert found["code"] == 0, found["err"]


@every("line", NEEDS)
def test_what_needs_more_says_so_before_any_work(outcomes, line):
    found = outcomes[line]
    assert found["code"] == ("MissingPackageError" if line.startswith("plait.") else 2), found["err"]
    assert found["err"].removeprefix("error: ").rstrip().endswith(NEEDS[line])
    assert found["new"] == []
    assert found["out"] == ""


def test_an_extraction_says_that_names_are_the_checkpoints(outcomes):
    found = outcomes[WORK["extract"]]
    assert says("reading the model's code", ["transformers"], "eval") in " ".join(f"{found['out']} {found['err']}".split())


def test_every_command_is_called():
    """A new command belongs to WORK, or to NEEDS with what it needs; most belong to both."""

    def names(command, path):
        children = getattr(command, "commands", {})
        if not children:
            yield " ".join(path)
        for name, child in children.items():
            yield from names(child, [*path, name])

    called = {*WORK, *(line for line in NEEDS if not line.startswith("plait."))}
    for name in names(typer.main.get_command(app), []):
        assert [line for line in called if line == name or line.startswith(f"{name} ")], f"plait {name} is called nowhere here"


def test_there_is_something_to_leave_out():
    """What this test takes for the core is neither everything nor nothing."""
    left_out = beyond_the_core()
    assert {"transformers", "peft", "datasets", "accelerate", "lm_eval", "matplotlib", "pyarrow", "sklearn"} <= {*left_out}
    assert not {"torch", "numpy", "safetensors", "huggingface_hub", "pydantic", "typer", "rich", "yaml"} & {*left_out}


def asked_for() -> set[tuple[str, str]]:
    """Return (extra, module) of every call of `plait.extras` in the source that names them as they are."""
    found = set()
    texts = (file.read_text(encoding="utf-8") for file in (ROOT / "src").rglob("*.py"))
    for text in (t for t in texts if "optional(" in t or "require(" in t):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "optional":
                module, extra = node.args[:2]
                extra = "lm-eval" if getattr(extra, "id", "") == "_EXTRA" else ast.literal_eval(extra)
                found.add((extra, ast.literal_eval(module).partition(".")[0]))
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require":
                needed = node.args[1]
                if not isinstance(needed, ast.Dict):
                    continue  # another function of that name
                for key, value in zip(needed.keys, needed.values, strict=True):
                    listed = PACKAGES if getattr(value, "id", "") == "PACKAGES" else _texts(value)
                    found |= {(ast.literal_eval(key), name) for name in listed}
    return found


def _texts(node: ast.AST) -> list[str]:
    return [n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]


NAMED_OTHERWISE = {"grpc": frozenset({"grpcio"}), "IPython": frozenset({"ipython"})}


def test_an_extra_brings_what_is_said_of_it():
    pairs = asked_for()
    assert {("eval", "transformers"), ("train", "trl"), ("data", "pyarrow"), ("ray", "ray"), ("lm-eval", "lm_eval")} <= pairs
    for extra, module in pairs:
        own = project()["optional-dependencies"][extra]
        names = {re.match(r"[\w-]+", requirement)[0] for requirement in own}
        brought = closure(own) | {name.lower() for name in names}
        distributions = modules().get(module, NAMED_OTHERWISE.get(module, frozenset({module})))  # it may not be installed here
        assert distributions & brought, f"plait[{extra}] does not bring {module}"


def test_only_one_place_says_what_to_install():
    for file in (ROOT / "src" / "plait").rglob("*.py"):
        if file.name != "extras.py":
            assert "pip install 'plait[" not in file.read_text(encoding="utf-8"), f"{file}: use plait.extras"
