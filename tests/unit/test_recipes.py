"""Recipes: reading files, texts and data."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from plait.errors import RecipeError
from plait.recipes.loading import LoadedRecipe, build_recipe, load_recipe, read_recipe
from plait.recipes.overrides import parse_override
from plait.recipes.request import read_request
from tests.every import every
from tests.recipe_texts import FULL, PAIR, TOP, problems


def test_the_recipe_of_the_design_is_read_whole():
    recipe = load_recipe(FULL)

    assert recipe.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert [(a.name, a.path, a.weight) for a in recipe.adapters] == [
        ("intent", "./adapters/intent", 0.7),
        ("langid", "org/repo@main/checkpoint-2874", 1.0),
    ]
    assert (recipe.method_name, recipe.space_name, recipe.method.density) == ("ties", "delta", 0.3)
    assert recipe.weights.layers == {"3": 0.5}
    assert recipe.transforms[0].name == "layer_l2_normalize"


def test_a_file_gives_its_folder_and_its_name(tmp_path, monkeypatch):
    folder = tmp_path / "runs"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(PAIR)
    monkeypatch.chdir(tmp_path)

    assert read_recipe("runs/recipe.yaml") == LoadedRecipe(load_recipe(PAIR), folder)
    recipe, found = read_recipe(Path("runs/recipe.yaml"))
    assert (recipe, found) == (load_recipe(PAIR), folder)
    (folder / "recipe.yaml").write_text(PAIR + "sed: 1\n")
    assert problems("runs/recipe.yaml")[0].startswith("runs/recipe.yaml:4: sed: ")


def test_a_text_belongs_to_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    assert read_recipe("adapters: [./a]").folder == tmp_path


def test_only_the_recipe_of_a_file_has_a_folder(tmp_path):
    (tmp_path / "recipe.yaml").write_text(PAIR)
    recipe = load_recipe(tmp_path / "recipe.yaml")

    assert (recipe.folder, recipe.model_copy(update={"scale": 2.0}).folder) == (tmp_path, tmp_path)
    assert load_recipe(PAIR).folder is None
    assert recipe.model_dump() == load_recipe(PAIR).model_dump()


@pytest.mark.parametrize("written", ["base", "./base"])
def test_a_base_model_beside_a_recipe_file_lies_where_the_command_is_run(written, tmp_path, monkeypatch):
    for folder in ("runs", "base"):
        (tmp_path / folder).mkdir()
    (tmp_path / "runs" / "recipe.yaml").write_text(PAIR)
    monkeypatch.chdir(tmp_path)

    def base(name: str) -> str | None:
        return read_request(Path("runs/recipe.yaml"), [], {"base_model": name})[0].base_model

    assert base(written) == str(tmp_path / "base")
    assert [base(name) for name in ("org/model@main", "gpt2", "no such: name")] == ["org/model@main", "gpt2", "no such: name"]


def test_adapters_are_named_and_found_from_the_recipes_folder(tmp_path, monkeypatch):
    """Names go into random streams: they must not depend on where a command is run."""
    folder = tmp_path / "run7"
    (folder / "plain").mkdir(parents=True)
    file = folder / "recipe.yaml"
    file.write_text(f"adapters: [plain, ./final, ../other/final, {folder}/plain/final, code=plain]\n")
    expected = [
        ("plain", "./plain"),
        ("run7-final", "./final"),
        ("other-final", "../other/final"),
        ("plain-final", f"{folder}/plain/final"),
        ("code", "./plain"),
    ]

    for place in (tmp_path, folder, Path("/")):
        monkeypatch.chdir(place)
        assert [(a.name, a.path) for a in load_recipe(file).adapters] == expected


def test_two_adapters_of_one_derived_name_are_refused(tmp_path):
    (tmp_path / "r.yaml").write_text("adapters:\n  - ./x\n  - ./sub/x\n")

    assert problems(tmp_path / "r.yaml") == [
        f"{tmp_path}/r.yaml:3: adapters.1.name: adapters.0 is called 'x' too; give names (name: … or NAME=PATH)."
    ]


@every(
    ("scalar", "value"),
    [
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("1e-3", 0.001),
        ("1", 1),
        ("010", "010"),
        ("0x10", 16),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("1_000", "1_000"),
        ("~", None),
        ("", None),
        ("-.inf", float("-inf")),
        (".5", 0.5),
        ("=", "="),
        ("'1'", "1"),
        ("[1, a]", [1, "a"]),
        ("{1: 2}", {"1": 2}),
    ],
)
def test_scalars_mean_what_they_mean_in_yaml_1_2(scalar, value):
    assert parse_override(f"x={scalar}") == ("x", value)


def test_json_is_read_with_lines_and_tabs(tmp_path):
    file = tmp_path / "r.json"
    file.write_text('{\n\t"adapters": ["./a", "./b\\ud83d\\ude00"],\n\t"scale": 1e0,\n\t"sed": 1\n}\n')

    assert problems(file)[0].startswith(f"{file}:4: sed: 'sed' is not known here;")
    file.write_text(file.read_text().replace("sed", "seed"))
    assert load_recipe(file).adapters[1].path == "./b\U0001f600"
    assert load_recipe(file).scale == 1.0


def test_merge_keys_and_anchors_work():
    text = "adapters:\n  - &a {name: a, path: ./a, weight: 2}\n  - {<<: *a, name: b}\n"

    assert [(a.name, a.path, a.weight) for a in load_recipe(text).adapters] == [("a", "./a", 2.0), ("b", "./a", 2.0)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "{f}: there is nothing in it. A recipe needs at least 'adapters'."),
        ("# only a comment\n", "{f}: there is nothing in it. A recipe needs at least 'adapters'."),
        ("{}\n", "{f}: there is nothing in it. A recipe needs at least 'adapters'."),
        ("- a\n- b\n", "{f}: a recipe is a mapping (key: value), not ['a', 'b']."),
        ("ties\n", "{f}: a recipe is a mapping (key: value), not 'ties'."),
        ("a: 1\n\tb: 2\n", "{f}:2: a tab cannot indent YAML; use spaces."),
        ("a: [1\nb: 2\n", "{f}:2: this is not YAML: while parsing a flow sequence expected ',' or ']', but got ':'."),
        ("a: 1\n---\nb: 2\n", "{f}:2: this is not YAML: expected a single document in the stream but found another document."),
        ("a: !!python/name:os.system\n", "{f}:1: this is not YAML:"),
        ("a: !!int x\n", "{f}:1: this is not YAML: 'x' cannot be read as int."),
        ("a: !mine {b: 1}\n", "{f}:1: this is not YAML: the tag '!mine' is not allowed."),
        ("a: &x [*x]\n", "{f}:1: this is not YAML: aliases (*name) make it endless or huge."),
        ("a: *x\n", "{f}:1: this is not YAML: found undefined alias 'x'."),
        ("a: " + "[" * 5000, "{f}: this is nested too deeply to be a recipe."),
        ("a: \x07\n", "{f}: this is not YAML: unacceptable character #x0007"),
        ("a: {[1]: 2}\nadapters: [./a]\n", "{f}:1: a: line 1 has a key that is not text."),
    ],
)
def test_what_is_no_recipe_is_refused_with_its_line(tmp_path, content, message):
    file = tmp_path / "r.yaml"
    file.write_text(content)

    assert problems(file)[0].startswith(message.format(f=file))


def test_an_alias_bomb_is_refused():
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9))

    assert "endless or huge" in problems(bomb)[0]


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "recipe.yaml").write_text(PAIR)
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe4\n")

    assert problems(tmp_path / "recpe.yaml") == [f"{tmp_path}/recpe.yaml: there is no such file. Did you mean 'recipe.yaml'?"]
    assert problems(tmp_path) == [f"{tmp_path} is a folder; give the file. Did you mean 'recipe.yaml'?"]
    assert problems(tmp_path / "latin.yaml") == [f"{tmp_path}/latin.yaml: this is not text in UTF-8 (byte 3)."]
    assert problems("recipe.yml")[0] == "recipe.yml: there is no such file."
    for name, content in (("x.json", '{"a": 1,}'), ("y.json", "{")):
        (tmp_path / name).write_text(content)
        assert problems(tmp_path / name)[0].startswith(f"{tmp_path}/{name}:1: this is not JSON: ")


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"\xef\xbb\xbf" + PAIR.encode())

    assert len(load_recipe(tmp_path / "r.yaml").adapters) == 2


def test_data_is_checked_like_a_file_without_lines():
    with pytest.raises(RecipeError) as error:
        build_recipe({"adapters": ("./a", "./b"), "method": {"name": "ties", "density": 1.1}, "sed": 1}, source="flags")

    assert str(error.value) == (
        "flags: 2 problems\n"
        "  - flags: method.density: density is 1.1; it must be > 0 and <= 1.\n"
        f"  - flags: sed: 'sed' is not known here; allowed: {TOP}. Did you mean 'seed'?"
    )


def test_data_may_hold_tuples_and_numbers_as_keys():
    layers = {3: 0.5, "model.layers.4": {"a": 2}}
    data = {"adapters": ("./a",), "weights": {"policy": "per_layer", "layers": layers}}
    before = copy.deepcopy(data)

    assert build_recipe(data).weights.layers == {"3": 0.5, "model.layers.4": {"a": 2.0}}
    assert data == before
