"""What the documents show is true: blocks run, commands work, recipes load, generated parts are current."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml

import plait
from plait.cli.main import command_tree
from plait.methods import METHODS
from plait.recipes.keys import recipe_keys
from plait.recipes.loading import load_recipe
from plait.testing import cohort
from tests.command_line import exit_code
from tests.every import every

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples" / "demo" / "adapters"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("tour", "installing", "tutorials/first-merge")),
]
BLOCK = re.compile(r"(?P<skip><!-- skip: [^>]+-->\n)?(?:<!-- \w+ -->\n)?```(?P<kind>\w+)\n(?P<body>.*?)```", re.DOTALL)


def blocks(kind: str) -> list[tuple[str, str]]:
    """Return (page, body) of every block of a kind that is not marked to be skipped with a reason."""
    return [
        (page.name, found["body"])
        for page in PAGES
        for found in BLOCK.finditer(page.read_text(encoding="utf-8"))
        if found["kind"] == kind and not found["skip"]
    ]


def commands() -> list[str]:
    """Return every `plait` command of the pages that needs no Hub, once."""
    lines = dict.fromkeys(line.partition("#")[0].strip() for _, body in blocks("bash") for line in body.splitlines())
    return [line for line in lines if line.startswith("plait ") and "org/" not in line]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with adapters ./a and ./b and a recipe, as the pages assume; small ones, for there are many commands."""
    cohort([(48, 32), (32, 48)] * 3, [8, 8]).save(tmp_path)
    for before, after in (("adapter0", "a"), ("adapter1", "b")):
        (tmp_path / before).rename(tmp_path / after)
    (tmp_path / "recipe.yaml").write_text("adapters: [./a, ./b]\nmethod: linear\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", commands())
def test_commands_of_the_readme(command, workplace, capsys):
    code = exit_code(*shlex.split(command)[1:])
    err = capsys.readouterr().err
    assert code == 0, err
    assert "Traceback" not in err


def test_there_are_commands_and_blocks():
    assert len(commands()) >= 8
    assert len(blocks("yaml")) >= 1
    assert len(blocks("python")) >= 1


@pytest.mark.parametrize("recipe", [body for _, body in blocks("yaml")])
def test_recipes_of_the_readme(recipe, monkeypatch):
    monkeypatch.chdir(ROOT)
    if not recipe.startswith("version:"):  # a part of one
        recipe += f"adapters: [{DEMO / 'sentiment'}, {DEMO / 'langid'}]\n"
    assert plait.plan(load_recipe(recipe)).modules


@every("path", sorted((ROOT / "examples" / "recipes").glob("*.yaml")))
def test_recipes_of_the_examples(path):
    assert plait.plan(path).modules


def test_the_example_forgets_exactly(tmp_path):
    """What `forget.yaml` leaves is sentiment minus half of langid, in every module."""
    left = plait.Adapter.open(plait.merge(ROOT / "examples" / "recipes" / "forget.yaml", out=tmp_path / "left").folder, "left")
    first, second = (plait.Adapter.open(DEMO / name, name) for name in ("sentiment", "langid"))
    assert set(left.targets) == set(first.targets) | set(second.targets)
    for path in list(left.targets)[::40]:
        kept, one, two = (a.read(path, torch.float64)[0].scaled(a.targets[path].scaling).dense() for a in (left, first, second))
        torch.testing.assert_close(kept, one - two / 2, rtol=0, atol=1e-6 * float(one.abs().max()))


# The generated parts written, and found current; then the contract: in one process, whose imports take longer than all of it.
_GENERATED_AND_TESTED = """
import runpy, sys
import pytest
words = sys.argv[1:]
for options in ([], ["--check"]):
    sys.argv = ["docs/generate.py", *options]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as left:
        assert not left.code, f"{sys.argv}: {left.code}"
files = ("tests/contract/test_methods.py", "tests/contract/test_registry.py")
sys.exit(pytest.main(["-v", "-p", "no:cacheprovider", *files, *words]))
"""


def test_a_method_is_one_file_and_one_import_line(tmp_path):
    """In a copy of the project, with the file and the line of CONTRIBUTING.md alone: the contract holds, the docs generate."""
    for folder in ("src", "docs", "tests/contract"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("README.md", "pyproject.toml", "constraints.txt", "tests/__init__.py", "tests/every.py"):
        shutil.copy(ROOT / file, tmp_path / file)
    (body,) = [body for page, body in blocks("python") if page == "CONTRIBUTING.md"]
    methods = tmp_path / "src" / "plait" / "methods"
    (methods / "median.py").write_text(body, encoding="utf-8")
    (line,) = re.findall(r"`(from plait\.methods import .*)`", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    first, rest = (methods / "__init__.py").read_text(encoding="utf-8").split("from plait.methods.base import", 1)
    (methods / "__init__.py").write_text(f"{first}{line}\nfrom plait.methods.base import{rest}", encoding="utf-8")

    chosen = "median or registered or stage or lost or bounds"
    program = [sys.executable, "-c", _GENERATED_AND_TESTED, "-k", chosen]
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "src")}
    done = subprocess.run(program, capture_output=True, text=True, cwd=tmp_path, env=env, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "#### `median`" in (tmp_path / "docs" / "methods" / "elementwise.md").read_text(encoding="utf-8")
    assert "| [`median`](elementwise.md#median)" in (tmp_path / "docs" / "methods" / "README.md").read_text(encoding="utf-8")
    for space in METHODS["ties"].spaces:
        assert f"test_contract[median-{space}] PASSED" in done.stdout


def script(name: str):
    """Return a script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def generator():
    return script("generate")


@cache
def reference():
    return script("reference")


def test_every_command_option_and_public_name_is_on_the_site():
    pages = reference().pages()
    commands = re.findall(r"^## plait (.+)$", pages["reference/cli.md"], re.MULTILINE)
    assert {"merge", "un-bake", "recipe check", "tasks check"} <= {*commands}
    assert {words.split()[0] for words in commands} == {*command_tree().commands}
    sections = dict(zip(commands, re.split(r"^## plait .+$", pages["reference/cli.md"], flags=re.MULTILINE)[1:], strict=True))
    for name, command in command_tree().commands.items():
        options = {option for p in command.params if p.param_type_name == "option" and not p.hidden for option in p.opts}
        assert not [option for option in options if f"`{option}`" not in sections.get(name, "")], name
    names = re.findall(r"^### plait\.(\w+)$", pages["reference/api.md"], re.MULTILINE)
    assert sorted([*names, "__version__"]) == sorted(plait.__all__)
    assert "#### plait.Session.merge" in pages["reference/api.md"]
    assert all(f"`{key['path']}`" in pages["reference/recipe.md"] for key in recipe_keys())


def test_every_page_is_in_the_navigation_once():
    def places(part):
        if isinstance(part, str):
            return [part]
        return [place for inner in (part.values() if isinstance(part, dict) else part) for place in places(inner)]

    pages = places(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    pages.remove("DECISIONS")
    written = {file.relative_to(ROOT / "docs").as_posix() for file in (ROOT / "docs").rglob("*.md")}
    shown = {page for page in written if not page.startswith("decisions/")} | {*reference().pages()}
    assert sorted(pages) == sorted(shown)


def test_links_of_pages_on_the_site_lead_to_pages_of_it():
    place = reference().with_links
    markdown = "[a](../examples/demo/README.md#x) [b](tuning.md) [c](../src/plait) [d](https://h) [e](methods) [f](nowhere.md)"
    assert place(markdown, "docs/results.md", "results.md") == (
        "[a](demo.md#x) [b](tuning.md) c [d](https://h) [e](methods/README.md) f"
    )
    assert place("[a](docs/design.md)", "CONTRIBUTING.md", "contributing.md") == "[a](design.md)"


def test_the_readme_is_short_and_its_numbers_are_those_of_the_pages_it_names():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    rows = [line.strip("|").split("|") for line in text.partition("## Why believe it")[2].splitlines() if line.startswith("| ")]
    seen = 0
    for claim, found, where in rows[1:]:
        pages = [ROOT / target for target in re.findall(r"\]\((docs/[^)#]+)", where)]
        there = "\n".join(page.read_text(encoding="utf-8") for page in pages)
        for number in re.findall(r"(?<![\w.])\d*\.?\d+(?: (?:s|MB|GB)\b)?", found):
            assert number in there or number in there.replace("0.", "."), f"{claim}: {number} is not in {pages}"
            seen += 1
        for file in re.findall(r"`(tests/[\w/.]+)`|python ([\w/]+\.py)", where):
            assert (ROOT / "".join(file)).exists(), file
    assert seen >= 20


def test_generated_parts_are_current():
    generate = generator()
    for page in generate.FILES:
        assert page.read_text(encoding="utf-8") == generate.generated(page), f"{page.name}: run `make docs`"


def test_every_method_is_on_one_page():
    generate = generator()
    described = [
        name for page in generate.PAGES for name in generate.methods_of(generate.page(page).read_text(encoding="utf-8"))
    ]
    assert sorted(described) == sorted(METHODS)


def test_files_that_the_design_names_are_there():
    named = {name for name in re.findall(r"`([\w/*.-]+\.py)`", (ROOT / "docs" / "design.md").read_text(encoding="utf-8"))}
    source = ROOT / "src" / "plait"
    assert len(named) > 50
    assert not [name for name in named if not any(ROOT.glob(name)) and not any(source.rglob(name))]


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, as the site and forges make them."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


def test_links_lead_somewhere():
    made = {ROOT / "docs" / place: text for place, text in reference().pages().items()}
    for page in [*PAGES, *sorted((ROOT / "docs").rglob("*.md")), ROOT / "examples" / "demo" / "README.md"]:
        links = re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)]+))?\)", page.read_text(encoding="utf-8"))
        for target, anchor in links:
            found = (page.parent / target).resolve() if target else page
            assert found.exists() or found in made, f"{page.name}: {target}"
            if anchor and anchor not in ("only-light", "only-dark"):
                text = made.get(found) or (found / "README.md" if found.is_dir() else found).read_text(encoding="utf-8")
                assert anchor in anchors(text), f"{page.name}: {target}#{anchor}"


def test_the_changelog_has_this_version():
    """The newest heading below what is not released yet."""
    top = re.search(r"^## \[(?!Unreleased)(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert top is not None
    assert top[1] == plait.__version__


def test_design_names_tests_that_exist():
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    for path in re.findall(r"`((?:tests|bench|src)/[\w/.]*)`", text):
        assert (ROOT / path).exists(), path
