"""Overrides of a recipe, `PATH=VALUE`: read, set, refused."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.errors import RecipeError
from plait.recipes.loading import load_recipe
from plait.recipes.overrides import apply_overrides, parse_override
from plait.recipes.paths import read_path, show_path
from tests.every import every
from tests.recipe_texts import PAIR, TIES, TOP, problems


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
