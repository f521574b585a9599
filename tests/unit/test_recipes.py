"""Recipes: reading, messages, overrides, writing."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plait.errors import RecipeError
from plait.methods import METHODS
from plait.recipes.loading import LoadedRecipe, build_recipe, load_recipe, read_recipe
from plait.recipes.overrides import apply_overrides, parse_override
from plait.recipes.paths import read_path, show_path
from plait.recipes.request import read_request
from plait.recipes.schema import Recipe
from plait.recipes.writing import json_schema, to_yaml
from plait.stages import STAGES, base
from plait.transforms import TRANSFORMS
from tests.every import every

PAIR = "adapters:\n  - {name: a, path: ./a}\n  - {name: b, path: ./b}\n"
FULL = """\
version: 1
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
adapters:
  - {name: intent,  path: ./adapters/intent,  weight: 0.7}
  - {name: langid,  path: org/repo@main/checkpoint-2874}
method: {name: ties, density: 0.3, sign: total, space: delta}
merge_mode: union
transforms: [{name: layer_l2_normalize, target_norm: 1.0}]
weights: {policy: per_layer, default: 1.0, layers: {3: 0.5}}
output: {kind: adapter, rank: auto, dtype: float32}
seed: 0
"""


def problems(text: str | Path, **kwargs) -> list[str]:
    """Return the problems that are listed for a recipe, one by one."""
    with pytest.raises(RecipeError) as error:
        load_recipe(text, **kwargs)
    head, *rest = str(error.value).split("\n  - ")
    if rest:
        assert head.endswith(f": {len(rest)} problems")
    return rest or [head]


# --- reading ---------------------------------------------------------------------------------------------------------


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


# --- messages --------------------------------------------------------------------------------------------------------

TOP = (
    "version, base_model, adapters, method, merge_mode, transforms, weights, scale, heads, output, tasks, eval, calibration, "
    "tune, seed"
)
TIES = "flavor, density, scope, kept, sign, weighted_vote, zero_sign, divisor, name, space"
METHOD_NAMES = f"{', '.join(map(repr, list(METHODS)[:-1]))} or {list(METHODS)[-1]!r}"


@every(
    ("text", "expected"),
    [
        ("sed: 1", [f"recipe:4: sed: 'sed' is not known here; allowed: {TOP}. Did you mean 'seed'?"]),
        ("zzz: 1", [f"recipe:4: zzz: 'zzz' is not known here; allowed: {TOP}."]),
        (
            "method:\n  name: ties\n  scal: 2",
            [
                f"recipe:6: method.scal: 'scal' is not known here; allowed: {TIES}. "
                "Did you mean 'scale', a key of the recipe itself?"
            ],
        ),
        (
            "eval: {subset: 8}",
            [
                "recipe:4: eval.subset: subset is 8; it must be a mapping with the keys max_samples, stratified, seed and "
                "per_task, such as subset: {max_samples: 8}."
            ],
        ),
        (
            "eval: 3",
            [
                "recipe:4: eval: eval is 3; it must be a mapping with the keys split, subset, batch_size, draws and seed, "
                "such as eval: {batch_size: 3}."
            ],
        ),
        (
            "method:\n  name: ties\n  densty: 0.3",
            [f"recipe:6: method.densty: 'densty' is not known here; allowed: {TIES}. Did you mean 'density'?"],
        ),
        (
            "method: {name: weighted, lambda_: 0.3}",
            [
                "recipe:4: method.lambda: 'lambda' is missing. Share of the first adapter.",
                "recipe:4: method.lambda_: 'lambda_' is not known here; allowed: lambda, name, space. Did you mean 'lambda'?",
            ],
        ),
        ("method: tise", [f"recipe:4: method: method is 'tise'. Did you mean 'ties'? It must be {METHOD_NAMES}."]),
        (
            "method: {name: qqq, a: 1}",
            [f"recipe:4: method.name: name is 'qqq'; it must be {METHOD_NAMES}."],
        ),
        ("method: {density: 0.3}", ["recipe:4: method.name: 'name' is missing. `plait methods` lists the methods."]),
        ("method: 3", ["recipe:4: method: method is 3; it must be a mapping."]),
        ("method: {name: ties, density: 1.1}", ["recipe:4: method.density: density is 1.1; it must be > 0 and <= 1."]),
        ("method: {name: ties, density: 0}", ["recipe:4: method.density: density is 0; it must be > 0 and <= 1."]),
        ("method: {name: ties, density: .nan}", ["recipe:4: method.density: density is nan; it must be > 0 and <= 1."]),
        ("method: {name: ties, density: true}", ["recipe:4: method.density: density is true; it must be a number."]),
        ("method: {name: ties, density: null}", ["recipe:4: method.density: density is null; it must be a number."]),
        (
            "method: {name: ties, sign: totl}",
            ["recipe:4: method.sign: sign is 'totl'; it must be 'total' or 'frequency'. Did you mean 'total'?"],
        ),
        (
            "method: {name: svd, space: factors}",
            ["recipe:4: method.space: space is 'factors'; it must be 'delta', 'core' or 'knots'."],
        ),
        (
            "method: {name: weighted_delta_n, normalize_coefficients: perhaps}",
            ["recipe:4: method.normalize_coefficients: normalize_coefficients is 'perhaps'; it must be true or false."],
        ),
        (
            "method: {name: weighted_delta_n, task_coefficients: [1]}",
            ["recipe:4: method: method 'weighted_delta_n': [1.0] has 1 coefficients for 2 adapters."],
        ),
        (
            "method: {name: della, density: 0.99}",
            ["recipe:4: method: density ± epsilon is 0.99 ± 0.07; both ends must be in (0, 1]."],
        ),
        ("seed: -1", ["recipe:4: seed: seed is -1; it must be >= 0 and < 9223372036854775808."]),
        ("seed: 1.5", ["recipe:4: seed: seed is 1.5; it must be an integer."]),
        ("scale: .inf", ["recipe:4: scale: scale is inf; it must be a finite number, or 'auto'."]),
        ("scale: yes", ["recipe:4: scale: scale is 'yes'; it must be a number, or 'auto'."]),
        ("version: 2", ["recipe:4: version: version is 2; it must be 1."]),
        ("base_model: 3", ["recipe:4: base_model: base_model is 3; it must be text."]),
        ("output: {rank: true}", ["recipe:4: output.rank: rank is true; it must be a number."]),
        ("output: {rank: [1]}", ["recipe:4: output.rank: rank is [1]; it must be an integer or text."]),
        (
            "output: {rank: 0}",
            ["recipe:4: output.rank: 0 is not a rank: give 'auto', a number from 1, or 'energy:SHARE' with a share in (0, 1]."],
        ),
        (
            "output: 3",
            [
                "recipe:4: output: output is 3; it must be a mapping with the keys kind, rank, dtype and layout, "
                "such as output: {rank: 3}."
            ],
        ),
        (
            "weights: {policy: per_layr}",
            [
                "recipe:4: weights.policy: policy is 'per_layr'; it must be 'scalar', 'per_adapter', 'per_layer', "
                "'per_module', 'schedule' or 'lines'. Did you mean 'per_layer'?"
            ],
        ),
        ("weights: {value: 2}", ["recipe:4: weights.policy: 'policy' is missing."]),
        (
            "weights:\n  policy: per_layer\n  layers:\n    3: x\n    4: {a: q}\n    5: {aa: 1}\n    6: {a: true}",
            [
                "recipe:7: weights.layers.3: layers.3 is 'x'; it must be a number or a mapping.",
                "recipe:8: weights.layers.4.a: a is 'q'; it must be a number.",
                "recipe:9: weights.layers.5.aa: 'aa' is not an adapter of this recipe; there are a, b. Did you mean 'a'?",
                "recipe:10: weights.layers.6.a: a is true; it must be a number.",
            ],
        ),
        (
            "weights: {policy: per_adapter, adapters: {c: 1}}",
            ["recipe:4: weights.adapters.c: 'c' is not an adapter of this recipe; there are a, b."],
        ),
        (
            "heads: {policy: from, adapter: c}",
            ["recipe:4: heads.adapter: 'c' is not an adapter of this recipe; there are a, b."],
        ),
        ("heads: {policy: from}", ["recipe:4: heads: 'adapter' is needed with policy 'from', and only there."]),
        (
            "transforms: [identity, layer_l2_normalise, {name: layer_l2_normalize, eps: 0, target: 1}]",
            [
                "recipe:4: transforms.1: transforms.1 is 'layer_l2_normalise'; it must be 'identity' or 'layer_l2_normalize'. "
                "Did you mean 'layer_l2_normalize'?",
                "recipe:4: transforms.2.eps: eps is 0; it must be > 0.",
                "recipe:4: transforms.2.target: 'target' is not known here; allowed: target_norm, eps, "
                "include_non_layer_keys, name. Did you mean 'target_norm'?",
            ],
        ),
        ("transforms: identity", ["recipe:4: transforms: transforms is 'identity'; it must be a list."]),
        ("seed: 1\nscale: 2\nseed: 3", ["recipe:6: seed: 'seed' is given twice, in lines 4 and 6; keep one."]),
        (
            "tasks: x\neval: {split: dev}\ntune: {steps: -1}\nsearch: {type: bayes}",
            [
                "recipe:4: tasks: tasks is 'x'; it must be a list.",
                "recipe:5: eval.split: split is 'dev'; it must be 'train', 'calibration', 'validation' or 'test'.",
                "recipe:6: tune.steps: steps is -1; it must be >= 0.",
                "recipe:7: search: this version of plait cannot search yet. Take this part out.",
            ],
        ),
    ],
)
def test_messages(text, expected):
    assert problems(f"{PAIR}{text}\n") == expected


COMBINE = (base.LinearCombine, base.GramCombine, base.EntryCombine, base.DeltaCombine)
COMBINES = [name for name, stage in STAGES.items() if issubclass(stage, COMBINE)]
BEFORE = [name for name, stage in STAGES.items() if issubclass(stage, (base.DeltaStage, base.EntryStage))]
AFTER = [name for name, stage in STAGES.items() if issubclass(stage, base.MergedStage)]


def one_of(names: list[str]) -> str:
    quoted = [repr(n) for n in names]
    return f"it must be {', '.join(quoted[:-1])} or {quoted[-1]}."


@every(
    ("text", "expected"),
    [
        (
            "  combine: {name: elect, sgn: total}",
            ["5: method.combine.sgn: 'sgn' is not known here; allowed: name, sign, weighted_vote, zero_sign, divisor, scope. "
             "Did you mean 'sign'?"],
        ),
        (
            "  pre:\n    - trm\n    - {name: trim, densty: 0.2}\n    - {name: drop, density: 3}\n  combine: sum",
            [f"6: method.pre.0: pre.0 is 'trm'; {one_of(BEFORE)} Did you mean 'trim'?",
             "7: method.pre.1.densty: 'densty' is not known here; allowed: name, density, scope, kept. Did you mean 'density'?",
             "8: method.pre.2.density: density is 3; it must be > 0 and <= 1."],
        ),
        ("  combine: elct", [f"5: method.combine: combine is 'elct'. Did you mean 'elect'? I{one_of(COMBINES)[1:]}"]),
        ("  combine: norm_match", [
            f"5: method.combine: combine is 'norm_match'; {one_of(COMBINES)} 'norm_match' is under 'post'.",
        ]),
        (
            "  combine: sum\n  post: [trim]",
            [f"6: method.post.0: post.0 is 'trim'; {one_of(AFTER)} 'trim' is under 'pre'."],
        ),
        (
            "  combine: ties",
            [f"5: method.combine: combine is 'ties'; {one_of(COMBINES)} 'ties' is a method, not a stage: `plait methods ties` "
             "prints the stages that it represents."],
        ),
        ("  combine: {factor: 2}", [f"5: method.combine.name: 'name' is missing. Allowed: {', '.join(COMBINES)}."]),
        ("  combine: sum\n  pst: [truncate]", [
            "6: method.pst: 'pst' is not known here; allowed: pre, combine, post, name, space. Did you mean 'post'?",
        ]),
        ("  pre: trim", ["5: method.pre: pre is 'trim'; it must be a list."]),
        ("  pre: [{name: trim, density: true}]", ["5: method.pre.0.density: density is true; it must be a number."]),
        ("  pre: [trim, pico]", ["4: method: method 'pipeline': stages on deltas come before stages on entries (trim)."]),
        (
            "  pre: [trim]\n  post: [norm_match]",
            ["4: method: method 'pipeline': norm_match after a merge in space 'delta', which is dense; use space 'core' or "
             "'knots'."],
        ),
        ("  combine: slerp\n  space: factors", [
            "4: method: method 'pipeline': space 'factors' has no deltas for these stages to act on; use 'core', 'knots' or "
            "'delta'.",
        ]),
    ],
)  # fmt: skip
def test_messages_about_pipelines(text, expected):
    assert problems(f"{PAIR}method:\n{text}\n") == [f"recipe:{line}" for line in expected]


def test_a_stage_in_the_place_of_a_method_is_told():
    (line,) = problems(f"{PAIR}method: trim\n")
    assert line.endswith("'trim' is a stage; spell a pipeline: method: {pre: …}.")


@pytest.mark.parametrize("text", ["pre: [trim]", "{pre: [trim], combine: sum}", "{name: pipeline, pre: [{name: trim}]}"])
def test_stages_need_no_name_before_them(text):
    recipe = load_recipe(f"{PAIR}method: {text if text[0] == '{' else '{' + text + '}'}\n")

    assert recipe == load_recipe(f"{PAIR}method: {{name: pipeline, pre: [trim], combine: sum}}\n")
    assert load_recipe(to_yaml(recipe)) == recipe


FORMS = "Allowed: [name=]PATH (a folder, as ./a, /a, ~/a) or [name=]org/repo[@revision][/subfolder] (on the Hub)."


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: 1", ["recipe:1: adapters: 'adapters' is missing. A list of `[name=]folder` or `org/repo[@revision]`."]),
        ("adapters: []", ["recipe:1: adapters: adapters is empty; give at least 1."]),
        ("adapters: ./a", ["recipe:1: adapters: adapters is './a'; it must be a list."]),
        ("adapters: [3, {name: a}]", [
            "recipe:1: adapters.0: adapters.0 is 3; it must be a mapping with the keys name, path, weight and moments.",
            "recipe:1: adapters.1.path: 'path' is missing. A folder, or `org/repo[@revision][/subfolder]`.",
        ]),
        ("adapters: [{path: ''}]", [
            "recipe:1: adapters.0.path: path is empty; give at least 1.",
        ]),
        ("adapters:\n- nowhere\n- {path: ./b, name: a b, wieght: 2}\n- {path: also}", [
            f"recipe:2: adapters.0: 'nowhere': there is no 'nowhere' in {{cwd}}, and a repository needs its owner. {FORMS}",
            "recipe:3: adapters.1.name: name is 'a b'; it must start with a letter or digit and hold only letters, digits, "
            "'.', '_' and '-'.",
            "recipe:3: adapters.1.wieght: 'wieght' is not known here; allowed: name, path, weight, moments. "
            "Did you mean 'weight'?",
            f"recipe:4: adapters.2.path: 'also': there is no 'also' in {{cwd}}, and a repository needs its owner. {FORMS}",
        ]),
        ("adapters: [./a]\nmethod: uniform", ["recipe:2: method: method 'uniform' needs at least 2 adapters, got 1."]),
        ("adapters: [./a, ./b, ./c]\nmethod: {name: weighted, lambda: 0.5}", [
            "recipe:2: method: method 'weighted' takes at most 2 adapters, got 3."
        ]),
    ],
)  # fmt: skip
def test_messages_about_adapters(text, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    assert problems(f"{text}\n") == [line.replace("{cwd}", str(tmp_path)) for line in expected]


def test_everything_wrong_is_listed_at_once_in_the_order_of_the_file():
    text = "sed: 1\nadapters: [./a, ./b]\nmethod: {name: ties, density: 2, densty: 1}\nweights: {policy: x}\nscale: q\n"

    assert [line.split(": ")[:2] for line in problems(text)] == [
        ["recipe:1", "sed"],
        ["recipe:3", "method.density"],
        ["recipe:3", "method.densty"],
        ["recipe:4", "weights.policy"],
        ["recipe:5", "scale"],
    ]


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_a_top_level_key_that_lacks_a_letter_is_refused_with_a_suggestion(data):
    key = data.draw(st.sampled_from(list(Recipe.model_fields)))
    at = data.draw(st.integers(0, len(key) - 1))
    recipe = {"adapters": ["./a", "./b"]} | {key: load_recipe(FULL).model_dump(mode="json")[key]}
    typo = key[:at] + key[at + 1 :]
    value = recipe.pop(key)
    with pytest.raises(RecipeError, match=rf"{typo}: '{typo}' is not known here; .* Did you mean '{key}'\?"):
        build_recipe({**recipe, typo: value})


@every("name", METHODS)
def test_a_misspelled_parameter_of_any_method_is_refused(name):
    spec = METHODS[name].spec
    for parameter in (f.alias or n for n, f in spec.model_fields.items()):
        typo = parameter[:-1] + "qz"
        with pytest.raises(RecipeError, match=f"method.{typo}: '{typo}' is not known here; allowed: "):
            build_recipe({"adapters": ["./a", "./b"], "method": {"name": name, typo: 1}})


# --- building from data ----------------------------------------------------------------------------------------------


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


# --- overrides -------------------------------------------------------------------------------------------------------


@every(
    ("text", "path", "value"),
    [
        ("method.density=0.3", "method.density", 0.3),
        ("method=ties", "method", "ties"),
        ("method={name: ties, density: 0.3}", "method", {"name": "ties", "density": 0.3}),
        ("transforms=[identity]", "transforms", ["identity"]),
        ("base_model=", "base_model", None),
        ("adapters.0.path=code=./x", "adapters.0.path", "code=./x"),
        ("adapters.0.path=org/repo@main", "adapters.0.path", "org/repo@main"),
        ('weights.modules."*.q_proj"=0.5', 'weights.modules."*.q_proj"', 0.5),
        ('a."x=y".b=1', 'a."x=y".b', 1),
        (" method . density =0.3", "method.density", 0.3),
    ],
)
def test_overrides_are_read(text, path, value):
    assert parse_override(text) == (path, value)


@every(
    ("text", "message"),
    [
        ("method.density", "'method.density' sets nothing: write PATH=VALUE, such as method.density=0.3."),
        ("=3", "'=3' is not a path: it has an empty key."),
        ("a..b=3", "'a..b=3' is not a path: it has an empty key."),
        ("a.=3", "'a.=3' is not a path: it has an empty key."),
        ('a."b=3', "'a.\"b=3' is not a path: the quote at character 3 is not closed."),
        ('a."b"c=3', "'a.\"b\"c=3' is not a path: after a quoted key comes '.' or '=', not 'c'."),
        ("a=[1", "a=[1:1: this is not YAML: while parsing a flow sequence expected ',' or ']', but got '<stream end>'. Put"),
        ("a=*.q", "a=*.q:1: this is not YAML: while scanning an alias expected alphabetic or numeric character"),
        ("a={b: 1, b: 2}", "a={b: 1, b: 2}: b: 'b' is given twice, in line 1; keep one."),
    ],
)
def test_overrides_that_cannot_be_read(text, message):
    with pytest.raises(RecipeError) as error:
        parse_override(text)

    assert str(error.value).startswith(message)


@every(
    ("data", "path", "value", "expected"),
    [
        ({"method": "ties"}, "method.density", 0.3, {"method": {"name": "ties", "density": 0.3}}),
        ({"method": {"name": "ties", "density": 0.3}}, "method", "linear", {"method": "linear"}),
        ({"method": None}, "method.name", "ties", {"method": {"name": "ties"}}),
        ({}, "output.rank", 16, {"output": {"rank": 16}}),
        ({}, "a.b.c", 1, {"a": {"b": {"c": 1}}}),
        ({"adapters": ["./a"]}, "adapters.0.weight", 2, {"adapters": [{"path": "./a", "weight": 2}]}),
        ({"adapters": ["x=./a", "./b"]}, "adapters.b.weight", 2, {"adapters": ["x=./a", {"path": "./b", "weight": 2}]}),
        ({"adapters": ["x=./a"]}, "adapters.x.weight", 2, {"adapters": [{"path": "x=./a", "weight": 2}]}),
        ({"adapters": [{"path": "org/q"}]}, "adapters.q.weight", 2, {"adapters": [{"path": "org/q", "weight": 2}]}),
        ({"adapters": [{"name": "7", "path": "./a"}, "./b"]}, "adapters.1", "./c",
         {"adapters": [{"name": "7", "path": "./a"}, "./c"]}),
        ({"adapters": [{"name": "v1.5", "path": "./a"}]}, 'adapters."v1.5".weight', 2,
         {"adapters": [{"name": "v1.5", "path": "./a", "weight": 2}]}),
        ({"transforms": ["identity"]}, "transforms.0.eps", 1, {"transforms": [{"name": "identity", "eps": 1}]}),
        ({"transforms": ["identity"]}, "transforms.identity.eps", 1, {"transforms": [{"name": "identity", "eps": 1}]}),
    ],
)  # fmt: skip
def test_values_are_set_by_path(data, path, value, expected):
    before = copy.deepcopy(data)

    assert apply_overrides(data, {path: value}) == expected
    assert apply_overrides(data, [(path, value)]) == expected
    assert data == before


def test_overrides_apply_in_order():
    assert apply_overrides({}, [("method", "ties"), ("method.density", 0.3)]) == {"method": {"name": "ties", "density": 0.3}}
    assert apply_overrides({}, [("method.density", 0.3), ("method", "ties")]) == {"method": "ties"}


KEYS = st.text(min_size=1, max_size=8)
TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(st.lists(KEYS, min_size=1, max_size=4))
def test_paths_are_read_back(keys):
    assert read_path(show_path(keys)) == tuple(keys)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(KEYS, TREES, max_size=3), st.lists(KEYS, min_size=1, max_size=4), TREES)
def test_what_was_set_is_there_and_the_rest_is_as_before(data, keys, value):
    path = show_path(keys)
    if _is_blocked(data, keys):
        with pytest.raises(RecipeError, match="nothing can be set inside it"):
            apply_overrides(data, {path: value})
        return
    result = apply_overrides(data, [(path, value)])
    place = result
    for key in keys:
        place = place[key]
    assert place == value
    assert apply_overrides(result, {path: value}) == result
    assert {k: v for k, v in result.items() if k != keys[0]} == {k: v for k, v in data.items() if k != keys[0]}


def _is_blocked(data, keys):
    """Return whether a value that is not a mapping is in the way; `method: TEXT` is short for a mapping."""
    for depth, key in enumerate(keys[:-1]):
        data = data.get(key)
        if data is None:
            return False
        if not isinstance(data, dict):
            return not (depth == 0 and key == "method" and isinstance(data, str))
    return False


@settings(max_examples=60, deadline=None)
@given(st.floats(0.01, 1), st.sampled_from(["a", "b", "0", "1"]), st.floats(-3, 3))
def test_overrides_of_a_recipe_round_trip(density, adapter, weight):
    texts = [f"method.density={density!r}", f"adapters.{adapter}.weight={weight!r}"]
    recipe = load_recipe(f"{PAIR}method: ties\n", overrides=[parse_override(t) for t in texts])

    assert recipe.method.density == density
    assert recipe.adapters[{"a": 0, "b": 1}.get(adapter, int(adapter) if adapter.isdecimal() else 0)].weight == weight


@every(
    ("overrides", "expected"),
    [
        ({"metod.density": 0.3}, [f"override: metod: 'metod' is not known here; allowed: {TOP}. Did you mean 'method'?"]),
        (
            {"method.densty": 0.3},
            [f"override: method.densty: 'densty' is not known here; allowed: {TIES}. Did you mean 'density'?"],
        ),
        ({"method.density": 3}, ["override: method.density: density is 3; it must be > 0 and <= 1."]),
        ({"method": "weighted"}, ["override: method.lambda: 'lambda' is missing. Share of the first adapter."]),
        (
            {"adapters.bb.weight": 2},
            ["override: adapters.bb.weight: adapters has no item 'bb'; there are a, b. Did you mean 'b'?"],
        ),
        ({"adapters.2.weight": 2}, ["override: adapters.2.weight: adapters has 2 items, counted from 0: no 2."]),
        (
            {"seed.x": 1},
            ["override: seed.x: seed is 5, not a mapping: nothing can be set inside it."],
        ),
        ({"scale.x": 1}, ["override: scale: scale is {'x': 1}; it must be a number, or 'auto'."]),
        ({"output.rank": 0.5}, ["override: output.rank: rank is 0.5; it must be an integer or text."]),
    ],
)  # fmt: skip
def test_wrong_overrides_are_told_apart_from_the_file(overrides, expected):
    assert problems(f"{PAIR}method: {{name: ties}}\nseed: 5\n", overrides=overrides) == expected


# --- writing ---------------------------------------------------------------------------------------------------------

REQUIRED = {"weighted": {"lambda": 0.3}, "weighted_delta": {"lambda": 0.25}}
VARIANTS = [
    {},
    {"method": {"name": "ties", "flavor": "mergekit", "weighted_vote": False}},
    {"method": {"name": "ties", "flavor": "peft", "zero_sign": "drop", "density": 0.2}},
    {"method": {"name": "ties", "space": "factors"}},
    {"method": {"name": "ties", "space": "factors", "flavor": "paper"}},
    {"method": {"name": "ties_svd", "scope": "model"}},
    {"method": {"name": "weighted_delta_n", "layer_task_coefficients": {3: [0.5, 0.5], "model.layers.4": [1, 0]}}},
    {"weights": {"policy": "scalar", "value": {"a": 0.5}}},
    {"weights": {"policy": "per_adapter", "adapters": {"a": 0.5}, "default": 2}},
    {"weights": {"policy": "per_layer", "layers": {3: 0.5, "model.layers.4": {"a": 1, "b": 0}}, "default": {"a": 1}}},
    {"weights": {"policy": "per_module", "modules": {"*.q_proj": 0.5, "*": {"b": 2}}}},
    {"transforms": ["identity", {"name": "layer_l2_normalize", "eps": 1e-5}]},
    {"output": {"rank": "energy:0.99", "dtype": "bfloat16", "layout": "pattern"}},
    {"heads": {"policy": "from", "adapter": "b"}, "seed": 2**63 - 1, "scale": 1e-30, "base_model": "yes"},
]


@every("change", [*VARIANTS, *({"method": {"name": name, **REQUIRED.get(name, {})}} for name in METHODS)])
def test_a_written_recipe_reads_back_equal(change):
    recipe = build_recipe({"adapters": ["a=./a", "b=org/repo@main/sub"], **change})

    assert load_recipe(to_yaml(recipe)) == recipe
    assert to_yaml(load_recipe(to_yaml(recipe))) == to_yaml(recipe)


@every("name", ["1e3", "1E-3", "1.", "7", "010", "0x1", "no", "true", "null", "2024-01-01", "1_0", "a=b"])
def test_names_that_look_like_something_else_stay_text(name):
    recipe = build_recipe({"adapters": [{"name": name.replace("=", ""), "path": f"./{name}"}], "base_model": name})

    assert load_recipe(to_yaml(recipe)) == recipe


NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,6}", fullmatch=True)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
TEXT = st.characters(exclude_categories=["Cs"], exclude_characters="\0")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(NAMES, min_size=2, max_size=4, unique=True), FINITE, st.text(TEXT, min_size=1, max_size=8), st.data())
def test_any_recipe_reads_back_equal(names, number, pattern, data):
    """Names such as `no`, `1e-3`, `0x1`, `2024-01-01` and patterns with any character survive YAML."""
    base = data.draw(st.none() | st.text(TEXT, max_size=8))
    recipe = build_recipe(
        {
            "adapters": [{"name": n, "path": f"./{n}", "weight": number} for n in names],
            "base_model": base,
            "weights": {"policy": "per_module", "modules": {pattern: {names[0]: number}}},
        }
    )

    assert load_recipe(to_yaml(recipe)) == recipe


@every("change", [{"base_model": "a\0b"}, {"weights": {"policy": "per_module", "modules": {"\ud800": {"a": 1}}}}])
def test_text_that_no_file_can_hold_is_refused(change):
    with pytest.raises(RecipeError, match="which no file can hold"):
        build_recipe({"adapters": ["a=./a", "b=./b"], **change})


def test_yaml_is_tidy_and_leaves_defaults_out():
    assert to_yaml(load_recipe(FULL)) == (
        "version: 1\n"
        "base_model: HuggingFaceTB/SmolLM2-135M-Instruct\n"
        "adapters:\n"
        "  - name: intent\n"
        "    path: ./adapters/intent\n"
        "    weight: 0.7\n"
        "  - name: langid\n"
        "    path: org/repo@main/checkpoint-2874\n"
        "method:\n"
        "  name: ties\n"
        "  density: 0.3\n"
        "transforms:\n"
        "  - layer_l2_normalize\n"
        "weights:\n"
        "  policy: per_layer\n"
        "  layers:\n"
        "    3: 0.5\n"
    )


def test_a_flavor_is_not_spelt_out():
    recipe = build_recipe({"adapters": ["./a"], "method": {"name": "ties", "flavor": "mergekit", "scope": "model"}})

    assert to_yaml(recipe).partition("method:\n")[2] == "  name: ties\n  flavor: mergekit\n  scope: model\n"


def test_plain_data_is_written_as_it_is():
    assert to_yaml({"adapters": ["./a"], "seed": 0}) == "adapters:\n  - ./a\nseed: 0\n"


def test_the_json_schema_describes_recipes_and_their_short_forms():
    schema = json_schema()
    fields = schema["properties"]

    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["title"] == "plait recipe"
    assert schema["description"]
    assert schema["additionalProperties"] is False
    assert list(fields) == list(Recipe.model_fields)
    assert {"type": "string", "enum": list(METHODS)} in fields["method"]["anyOf"]
    assert {"type": "string", "enum": list(TRANSFORMS)} in fields["transforms"]["items"]["anyOf"]
    assert {"type": "string", "minLength": 1} in fields["adapters"]["items"]["anyOf"]
    assert len(fields["method"]["anyOf"][1]["oneOf"]) == len(METHODS)
    assert schema["$defs"]["AdapterEntry"]["required"] == ["path"]
    assert schema["$defs"]["weighted_method"]["properties"]["lambda"]["maximum"] == 1
    pipeline = schema["$defs"]["pipeline_method"]
    assert {"type": "string", "enum": sorted(COMBINES)} in pipeline["properties"]["combine"]["anyOf"]
    assert {"type": "string", "enum": sorted(BEFORE)} in pipeline["properties"]["pre"]["items"]["anyOf"]
    assert {"type": "string", "enum": sorted(AFTER)} in pipeline["properties"]["post"]["items"]["anyOf"]
    assert "required" not in pipeline
    assert schema["$defs"]["Trim"]["properties"]["density"]["maximum"] == 1
    for reference in set(_references(schema)):
        assert reference.removeprefix("#/$defs/") in schema["$defs"]
    json.dumps(schema, allow_nan=False)


def _references(value):
    if isinstance(value, dict):
        yield from ([value["$ref"]] if "$ref" in value else [])
        for inner in value.values():
            yield from _references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _references(inner)
