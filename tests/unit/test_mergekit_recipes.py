"""Recipes in mergekit's form: what they become, what is refused, and what is announced."""

from __future__ import annotations

import copy
import warnings
from fnmatch import fnmatchcase

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.errors import RecipeError
from plait.recipes.importers.base import RecipeWarning
from plait.recipes.importers.mergekit import convert_mergekit
from plait.recipes.importers.mergekit_terms import MERGEKIT_METHODS as MERGEKIT
from plait.recipes.importers.mergekit_terms import pattern
from plait.recipes.loading import build_recipe, load_recipe, migrate_file
from plait.recipes.writing import to_yaml
from tests.every import every
from tests.recipe_texts import quietly, refused

TIES = {"name": "ties", "flavor": "mergekit", "space": "delta"}


def gta(method: str, *models: dict, **top) -> dict:
    return {"merge_method": method, "models": list(models), "base_model": "org/base", **top}


def model(name: str, **parameters) -> dict:
    return {"model": name, "parameters": parameters}


A, B = model("org/base+./a", weight=1), model("org/base+org/b@v1", weight=0.5)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        pytest.param(
            gta(
                "ties", {"model": "org/base"}, model("org/base+./a", weight=1, density=0.3), model("./b", weight=1, density=0.3)
            ),
            {
                "base_model": "org/base",
                "method": {**TIES, "density": 0.3, "divisor": "weight"},
                "scale": 1.0,
                "adapters": [{"name": "a", "path": "./a", "weight": 1.0}, {"name": "b", "path": "./b", "weight": 1.0}],
            },
            id="base in the list, adapters with and without it",
        ),
        pytest.param(
            gta(
                "ties", A, B, parameters={"density": 0.3, "normalize": False, "lambda": 2, "int8_mask": True}, dtype="bfloat16"
            ),
            {
                "base_model": "org/base",
                "method": {**TIES, "density": 0.3, "divisor": "none"},
                "scale": 2,
                "adapters": [{"name": "a", "path": "./a", "weight": 1.0}, {"name": "b", "path": "org/b@v1", "weight": 0.5}],
                "output": {"dtype": "bfloat16"},
            },
            id="global parameters",
        ),
        pytest.param(
            {
                "merge_method": "linear",
                "models": [A, B, model("org/base", weight=0.5)],
                "out_dtype": "torch.float16",
                "dtype": "x",
            },
            {
                "base_model": "org/base",
                "method": {"name": "linear"},
                "output": {"dtype": "float16"},
                "adapters": [{"name": "a", "path": "./a", "weight": 0.5}, {"name": "b", "path": "org/b@v1", "weight": 0.25}],
            },
            id="linear divides by all weights, the base model's too",
        ),
        pytest.param(
            gta("task_arithmetic", model("org/base+./x/final", weight=1), model("org/base+./y/x-final", weight=2)),
            {
                "base_model": "org/base",
                "method": {"name": "task_arithmetic"},
                "scale": 1.0,
                "adapters": [
                    {"name": "x-final", "path": "./x/final", "weight": 1.0},
                    {"name": "x-final-2", "path": "./y/x-final", "weight": 2.0},
                ],
            },
            id="equal names are numbered",
        ),
        pytest.param(
            gta("dare_ties", A, B, parameters={"density": 0.5, "rescale": False, "lambda": 0.5}),
            {
                "base_model": "org/base",
                "scale": 0.25,
                "method": {
                    "name": "dare_ties",
                    "weighted_vote": True,
                    "zero_sign": "plus",
                    "space": "delta",
                    "density": 0.5,
                    "divisor": "none",
                },
                "adapters": [{"name": "a", "path": "./a", "weight": 1.0}, {"name": "b", "path": "org/b@v1", "weight": 0.5}],
            },
            id="dare without rescaling",
        ),
        pytest.param(
            gta("della", A, B),
            {
                "base_model": "org/base",
                "scale": 1.0,
                "method": {
                    "name": "della",
                    "weighted_vote": True,
                    "zero_sign": "plus",
                    "space": "delta",
                    "density": 1.0,
                    "epsilon": 0.0,
                    "divisor": "weight",
                },
                "adapters": [{"name": "a", "path": "./a", "weight": 1.0}, {"name": "b", "path": "org/b@v1", "weight": 0.5}],
            },
            id="della at density 1",
        ),
        pytest.param(
            gta("breadcrumbs", A, B, parameters={"density": 0.5, "gamma": 0.75}),
            {
                "base_model": "org/base",
                "scale": 1.0,
                "method": {"name": "breadcrumbs", "space": "delta", "density": 0.5, "gamma": 0.5},
                "adapters": [{"name": "a", "path": "./a", "weight": 1.0}, {"name": "b", "path": "org/b@v1", "weight": 0.5}],
            },
            id="breadcrumbs with too large a gamma",
        ),
        pytest.param(
            {
                "merge_method": "linear",
                "models": [
                    model(
                        "org/base+./a",
                        weight=[{"filter": "self_attn", "value": 1}, {"filter": "mlp", "value": 3}, {"value": 1}],
                    ),
                    model("org/base+./b", weight=1),
                ],
            },
            {
                "base_model": "org/base",
                "method": {"name": "linear"},
                "adapters": [{"name": "a", "path": "./a"}, {"name": "b", "path": "./b"}],
                "weights": {
                    "policy": "per_module",
                    "default": {"a": 0.5, "b": 0.5},
                    "modules": {"*self_attn*": {"a": 0.5, "b": 0.5}, "*mlp*": {"a": 0.75, "b": 0.25}},
                },
            },
            id="filters, each divided by its own sum",
        ),
        pytest.param(
            gta(
                "task_arithmetic",
                model("org/base+./a", weight=[{"filter": "q_proj.weight", "value": 1}]),
                model("org/base+./b"),
                parameters={"weight": [{"filter": "[q]*", "value": 2}, {"filter": "*", "value": 0.5}, {"value": 9}]},
            ),
            None,
            id="filters that differ",
        ),
        pytest.param(
            gta(
                "task_arithmetic",
                model("org/base+./a", weight={"filter": "q_proj.weight", "value": 1}),
                model("org/base+./b", weight=2),
                parameters={"weight": 0.5},
            ),
            {
                "base_model": "org/base",
                "method": {"name": "task_arithmetic"},
                "scale": 1.0,
                "adapters": [{"name": "a", "path": "./a"}, {"name": "b", "path": "./b"}],
                "weights": {
                    "policy": "per_module",
                    "default": {"a": 0.5, "b": 2.0},
                    "modules": {"*q_proj": {"a": 1.0, "b": 2.0}},
                },
            },
            id="a filter falls back to the recipe's weight",
        ),
    ],
)
def test_mergekit_recipes(config, expected):
    before = copy.deepcopy(config)
    converted = convert_mergekit(config)
    assert config == before
    if expected is None:
        assert [p.text for p in converted.problems] == [
            "the weights have different filters; give every model the same filters in the same order."
        ]
        return

    assert converted.problems == ()
    assert converted.data == {"version": 1, **expected}
    assert quietly(build_recipe, config) == build_recipe(converted.data) == load_recipe(to_yaml(converted.data))


@every(
    ("config", "expected"),
    [
        (
            gta("slerp", A, B),
            [
                f"merge_method: mergekit's 'slerp' has no counterpart here; these have one: {', '.join(MERGEKIT)}. "
                "mergekit's 'slerp': it turns full models; 'nuslerp' with a base_model, and plait's 'slerp', "
                "turn what the adapters changed."
            ],
        ),
        (
            gta("nearswap", A, B),
            [f"merge_method: mergekit's 'nearswap' has no counterpart here; these have one: {', '.join(MERGEKIT)}."],
        ),
        (
            {"merge_method": "multislerp", "models": [A, B]},
            [
                "merge_method: 'multislerp' needs a base_model: without one mergekit turns full models, and plait merges what "
                "adapters changed."
            ],
        ),
        (
            gta("nuslerp", A, B, model("org/base+./c", weight=1)),
            ["models: it goes from one adapter to another: give two, each with one weight."],
        ),
        (
            gta("nuslerp", A, B, parameters={"nuslerp_row_wise": True}),
            ["parameters.nuslerp_row_wise: nuslerp_row_wise is true: plait turns each module as one vector."],
        ),
        (
            gta("model_stock", A, B, parameters={"filter_wise": True}),
            ["parameters.filter_wise: filter_wise is true: plait takes one angle per module, not one per row."],
        ),
        (
            gta("sce", A, B, parameters={"select_topk": 2}),
            ["parameters.select_topk: density is 2; it must be > 0 and <= 1."],
        ),
        (
            gta("ram", A, B, parameters={"epsilon": -1}),
            ["parameters.epsilon: above is -1; it must be >= 0."],
        ),
        (
            gta("sce", A, B, parameters={"lamda": 2}),
            [
                "parameters.lamda: 'lamda' is not known here; allowed: weight, density, epsilon, gamma, lambda, normalize, "
                "rescale, int8_mask, select_topk, eps. Did you mean 'lambda'?"
            ],
        ),
        (
            gta("tise", A, B),
            [
                f"merge_method: mergekit's 'tise' has no counterpart here; these have one: {', '.join(MERGEKIT)}. "
                "Did you mean 'ties'?"
            ],
        ),
        (
            {"merge_method": "ties", "slices": [{"sources": []}]},
            ["slices: plait does not cut models into slices; it merges complete adapters: list them under 'models'."],
        ),
        ({"merge_method": "ties", "models": 3}, ["models: models is 3; it must be a list of models."]),
        (
            gta("ties", A, "x", foo=1),
            [
                "foo: 'foo' is not known here; allowed: merge_method, models, base_model, parameters, dtype, out_dtype, "
                "tokenizer_source, tokenizer, chat_template, name.",
                "models.1: it must be a mapping with the text 'model', such as {model: BASE+LORA}.",
            ],
        ),
        (
            gta("ties", A, {"model": "./b", "paramters": {}}),
            [
                "models.1.paramters: 'paramters' is not known here; allowed: model, parameters. Did you mean 'parameters'?",
                "models.1: it has no weight, and mergekit needs one: parameters: {weight: 1.0}.",
            ],
        ),
        (
            gta("ties", A, model("org/base+./b", weight=1, densty=0.5)),
            [
                "models.1.parameters.densty: 'densty' is not known here; allowed: weight, density, epsilon, gamma, "
                "lambda, normalize, "
                "rescale, int8_mask. Did you mean 'density'?"
            ],
        ),
        (
            gta(
                "ties",
                model("org/base+./a", weight=1, density=0.3),
                model("./b", weight=1, density=0.5),
                model("./c", weight=1),
            ),
            [
                "models.1.parameters.density: density differs between the models (0.3, 0.5 and 1.0), and plait has "
                "one density for "
                "all: make them equal."
            ],
        ),
        (
            gta("ties", A, B, parameters={"density": [{"filter": "mlp", "value": 0.5}, {"value": 0.1}]}),
            ["parameters.density: density must be one number: plait has no density by filter."],
        ),
        (
            gta("ties", model("./a", weight=[0, 0.5, 1]), B),
            [
                "models.0.parameters.weight: weight is a gradient over the layers, [0, 0.5, 1], which plait does not "
                "read: write a "
                "plait recipe with weights: {policy: per_layer, layers: {…}}."
            ],
        ),
        (
            gta("ties", model("./a", weight=[{"filter": "mlp", "value": [0, 1]}, {"value": 1}]), B),
            [
                "models.0.parameters.weight: weight is a gradient over the layers, [{'filter': 'mlp', 'value': [0, "
                "1]}, {'value': 1}], "
                "which plait does not read: write a plait recipe with weights: {policy: per_layer, layers: {…}}."
            ],
        ),
        (
            gta("ties", model("./a", weight=[{"filter": "mlp", "value": 1}]), B),
            [
                "models.0.parameters.weight: no weight holds where no filter matches; add a last entry without a "
                "filter, {value: …}."
            ],
        ),
        (gta("ties", model("./a", weight="x"), B), ["models.0.parameters.weight: weight is 'x'; it must be a number."]),
        (gta("ties", A, B, parameters={"density": 1.5}), ["parameters.density: density is 1.5; it must be > 0 and <= 1."]),
        (
            gta("della", A, B, parameters={"density": 0.9}),
            ["method: density ± epsilon is 0.9 ± 0.15; both ends must be in (0, 1]."],
        ),
        (gta("ties", A, B, parameters={"lambda": "x"}), ["parameters.lambda: scale is 'x'; it must be a number, or 'auto'."]),
        (gta("ties", A, B, parameters={"normalize": 1}), ["parameters.normalize: normalize is 1; it must be true or false."]),
        (
            gta("ties", A, B, parameters={"rescale": True}),
            ["parameters.rescale: plait's 'ties' does not rescale what it keeps; leave it out."],
        ),
        (
            gta("della", A, B, parameters={"rescale": False}),
            ["parameters.rescale: plait's 'della' always rescales what it keeps; leave it out."],
        ),
        (gta("ties", A, B, parameters=3), ["parameters: parameters is 3; it must be a mapping."]),
        (gta("ties", A, B, dtype="int8"), ["dtype: dtype is 'int8'; it must be 'float32', 'bfloat16' or 'float16'."]),
        (
            gta("ties", A, model("org/other+./b", weight=1)),
            ["models: the adapters are of 2 base models, 'org/base' and 'org/other'; plait needs one."],
        ),
        (
            gta("ties", A, model("org/base+./b+./c", weight=1)),
            ["models.1.model: 'org/base+./b+./c' holds '+' twice; write BASE+LORA."],
        ),
        (
            gta("ties", model("org/base", weight=1)),
            ["models: there is no adapter among them; write BASE+LORA, or the adapter alone."],
        ),
        (
            {**gta("ties", A, B), "base_model": "org/base+./c"},
            ["base_model: base_model is 'org/base+./c'; it must be one model, without an adapter."],
        ),
        (
            {"merge_method": "linear", "models": [model("./a", weight=1), model("./b", weight=-1)]},
            ["models: the weights sum to 0 and cannot be normalized."],
        ),
        ({"merge_method": "linear", "models": [model("./a/../../../x y/@", weight=1), model("nowhere", weight=1)]}, None),
    ],
)
def test_what_mergekit_has_and_plait_has_not(config, expected):
    found = refused(config)
    if expected is None:
        assert len(found) == 1
        assert found[0].startswith("recipe: models.1.model: 'nowhere': there is no 'nowhere' in ")
    else:
        assert found == [f"recipe: {line}" for line in expected]


RELATIVE = "relative paths start at the recipe's folder; mergekit starts at the working directory."
KEYED = "each adapter's mask comes from (seed, adapter, module); mergekit draws all masks from one generator, and rescales"
X, Y = model("/x", weight=1), model("/y", weight=1)


@every(
    ("config", "notes"),
    [
        (gta("ties", X, Y), []),
        (gta("ties", X, model("./y", weight=1)), [RELATIVE]),
        (gta("dare_linear", X, Y), [f"{KEYED} survivors to the tensor's L1 norm, where plait divides them by density."]),
        (gta("della", X, Y), [f"{KEYED} survivors to the tensor's L1 norm, where plait divides each by its probability."]),
        (
            gta("breadcrumbs", X, Y),
            ["where gamma times a matrix's entries is below 1, mergekit drops all of them and plait none of the top."],
        ),
        (
            gta("dare_ties", X, Y, parameters={"density": 0.5, "rescale": False}),
            [
                "rescale: false is expressed by a scale that is multiplied by density.",
                f"{KEYED} survivors to the tensor's L1 norm, where plait divides them by density.",
            ],
        ),
        (
            gta("ties", X, Y, parameters={"int8_mask": True, "epsilon": 0.1}, tokenizer_source="base", chat_template="auto"),
            [
                "int8_mask only saves memory in mergekit and is left out.",
                "epsilon does nothing in mergekit's 'ties' and is left out.",
                "tokenizer_source and chat_template: left out, for a merge of adapters keeps the base model's tokenizer.",
            ],
        ),
        (
            gta("linear", X, Y, parameters={"lambda": 2, "density": 0.5, "normalize": False}),
            [
                "normalize is false and the weights sum to 2: mergekit multiplies the base model by that too, plait "
                "leaves it as it is.",
                "density does nothing in mergekit's 'linear' and is left out.",
                "lambda does nothing in mergekit's 'linear' and is left out.",
            ],
        ),
        (
            gta("task_arithmetic", X, model("/y", weight=[{"filter": "mlp.", "value": 1}, {"value": 2}])),
            ["the filter 'mlp.' is read as the pattern '*mlp.*' over module paths."],
        ),
    ],
)
def test_a_note_says_where_numbers_differ(config, notes):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        build_recipe(config)

    assert [str(w.message) for w in caught] == notes
    assert {w.category for w in caught} <= {RecipeWarning}
    assert {w.filename for w in caught} <= {__file__}


def test_mergekit_needs_more_than_its_method_to_be_recognized():
    with pytest.raises(RecipeError, match=r"merge_method: 'merge_method' is not known here; .* Did you mean 'merge_mode'"):
        build_recipe({"adapters": ["./a"], "merge_method": "ties"})


def test_a_mergekit_file_is_migrated(tmp_path):
    (tmp_path / "maths").mkdir()
    file = tmp_path / "kit.yml"
    file.write_text("merge_method: ties\nmodels:\n- model: b/b+maths\n  parameters:\n    weight: 1\n    density: 2\n")
    with pytest.raises(RecipeError, match=r"kit.yml:6: models.0.parameters.density: density is 2; it must be > 0 and <= 1"):
        load_recipe(file)
    file.write_text(file.read_text().replace("density: 2", "density: 0.5"))
    text, notes = migrate_file(file)

    assert notes == [RELATIVE]
    assert text == (
        "version: 1\nbase_model: b/b\nadapters:\n  - name: maths\n    path: ./maths\n    weight: 1.0\nmethod:\n  name: ties\n"
        "  flavor: mergekit\n  space: delta\n  density: 0.5\n  divisor: weight\nscale: 1.0\n"
    )
    (tmp_path / "new.yaml").write_text(text)
    assert load_recipe(tmp_path / "new.yaml") == quietly(load_recipe, file)


MODULES = ["model.layers.3.self_attn.q_proj", "model.layers.13.mlp.up_proj", "model.embed_tokens", "h.0.attn.c_attn", "a[b]*"]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_filter_and_its_pattern_pick_the_same_modules(data):
    name = f"{data.draw(st.sampled_from(MODULES))}.weight"
    start = data.draw(st.integers(0, len(name) - 1))
    part = name[start : data.draw(st.integers(start + 1, len(name)))]
    if part.endswith((".", ".w", ".we", ".wei", ".weig", ".weigh")) and part not in ".weight":
        return  # these cut the name's end; a note says how they are read
    assert [m for m in MODULES if fnmatchcase(m, pattern(part))] == [m for m in MODULES if part in f"{m}.weight"]
