"""Recipes that are not valid: every message, with its line and what to do."""

from __future__ import annotations

from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from plait.errors import RecipeError, join_words
from plait.methods import METHODS
from plait.recipes.evaluation import EvalSpec, Subset
from plait.recipes.loading import build_recipe, load_recipe
from plait.recipes.schema import AdapterEntry, Output, Recipe
from plait.recipes.validation import validate
from plait.recipes.writing import to_yaml
from tests.every import every
from tests.recipe_texts import AFTER, BEFORE, COMBINES, FULL, PAIR, TIES, TOP, problems

ENTRY = join_words([*AdapterEntry.model_fields])
METHOD_NAMES = f"{', '.join(map(repr, list(METHODS)[:-1]))} or {list(METHODS)[-1]!r}"


@every(
    ("text", "expected"),
    [
        ("SEED: 1", [f"recipe:4: SEED: 'SEED' is not known here; allowed: {TOP}. Did you mean 'seed'?"]),
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
            "method:\n  name: ties\n  subset: 8",
            [
                f"recipe:6: method.subset: 'subset' is not known here; allowed: {TIES}. "
                "Did you mean eval.subset or search.subset?"
            ],
        ),
        ("budget: 8", [f"recipe:4: budget: 'budget' is not known here; allowed: {TOP}. Did you mean search.budget?"]),
        (
            "eval: {subset: 8}",
            [
                f"recipe:4: eval.subset: subset is 8; it must be a mapping with the keys {join_words([*Subset.model_fields])}, "
                "such as subset: {max_samples: 8}."
            ],
        ),
        (
            "eval: 3",
            [
                f"recipe:4: eval: eval is 3; it must be a mapping with the keys {join_words([*EvalSpec.model_fields])}, "
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
        ("version: '1'", ["recipe:4: version: version is the text '1'; it must be the number 1. Write it without quotes: 1."]),
        ("version: true", ["recipe:4: version: version is true; it must be a number."]),
        ("version: null", ["recipe:4: version: version is null; it must be 1."]),
        (
            "method: {name: ties, sign: 1}",
            ["recipe:4: method.sign: sign is 1; it must be 'total' or 'frequency'."],
        ),
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
                f"recipe:4: output: output is 3; it must be a mapping with the keys {join_words([*Output.model_fields])}, "
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
            "tasks: x\neval: {split: dev}\ntune: {steps: -1}\nsearch: {type: gp}",
            [
                "recipe:4: tasks: tasks is 'x'; it must be a list.",
                "recipe:5: eval.split: split is 'dev'; it must be 'train', 'calibration', 'validation' or 'test'.",
                "recipe:6: tune.steps: steps is -1; it must be >= 0.",
                "recipe:7: search.type: type is 'gp'; it must be 'grid', 'bayes' or 'random'.",
            ],
        ),
    ],
)
def test_messages(text, expected):
    assert problems(f"{PAIR}{text}\n") == expected


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
            f"recipe:1: adapters.0: adapters.0 is 3; it must be a mapping with the keys {ENTRY}.",
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


class _Enumerated(BaseModel):
    mixed: Literal["auto", 1, -2] = "auto"
    numbers: Literal[1, 2] = 1
    digits: Literal["8", "16"] = "8"


@every(
    ("data", "expected"),
    [
        ({"mixed": "-2"}, "mixed is the text '-2'; it must be 'auto', 1 or -2. Write it without quotes: -2."),
        ({"mixed": "3"}, "mixed is '3'; it must be 'auto', 1 or -2."),
        ({"numbers": "2"}, "numbers is the text '2'; it must be one of the numbers 1 or 2. Write it without quotes: 2."),
        ({"digits": 16}, "digits is the number 16; it must be '8' or '16'. Write it in quotes: '16'."),
        ({"digits": None}, "digits is null; it must be '8' or '16'."),
    ],
)
def test_a_value_of_another_type_than_those_that_are_allowed(data, expected):
    found, wrong = validate(_Enumerated, data)
    assert found is None
    assert [problem.text for problem in wrong if "must be a number" not in problem.text] == [expected]
