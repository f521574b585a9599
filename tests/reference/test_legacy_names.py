"""The names of the older framework, each by its documented formula, on deltas."""

from __future__ import annotations

import numpy as np
import pytest

from plait.recipes.loading import load_recipe
from tests.adapters_on_disk import Linear, layers, write_adapter
from tests.every import every
from tests.reference.harness import adapter, adapters, assert_equal, dense, recipe, stacks
from tests.reference.keyed_integers import mask


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    return adapters(tmp_path_factory.mktemp("three"), ranks=(1, 3, 2))


@pytest.fixture(scope="module")
def two(three):
    return {n: three[n] for n in "ab"}


@pytest.mark.parametrize("name", ["uniform", "uniform_delta", "task_vector"])
def test_mean(tmp_path, three, name):
    """Δ = mean of the deltas, each with its own scaling; saved as an adapter."""
    expected = {m: x.mean(0) for m, x in stacks(three).items()}
    assert_equal(adapter(tmp_path / "out", three, method=name), expected)


def test_a_missing_module_does_not_change_the_divisor_of_the_mean(tmp_path):
    """A module that one of three lacks is a zero delta: still a third of the sum."""
    first = adapters(tmp_path, 2)
    mixed = {**first, "c": write_adapter(tmp_path / "c", layers(1, {"q_proj": (9, 7)}), seed=5)}
    expected = {m: x.sum(0) / 3 for m, x in stacks(mixed).items()}
    assert_equal(adapter(tmp_path / "out", mixed, method="uniform"), expected)


@pytest.mark.parametrize("scale", [1.0, 4.2, -0.5])
def test_uniform_scalar_delta(tmp_path, three, scale):
    expected = {m: scale * x.sum(0) for m, x in stacks(three).items()}
    assert_equal(adapter(tmp_path / "out", three, method={"name": "uniform_scalar_delta", "scale": scale}), expected)


@pytest.mark.parametrize("name", ["weighted", "weighted_delta"])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_weighted(tmp_path, two, name, share):
    expected = {m: share * x[0] + (1 - share) * x[1] for m, x in stacks(two).items()}
    assert_equal(adapter(tmp_path / "out", two, method={"name": name, "lambda": share}), expected)


def test_weighted_takes_exactly_two(two, three):
    with pytest.raises(ValueError, match="takes at most 2 adapters, got 3"):
        recipe(three, method={"name": "weighted", "lambda": 0.5})
    with pytest.raises(ValueError, match="needs at least 2 adapters, got 1"):
        recipe({"a": two["a"]}, method={"name": "weighted", "lambda": 0.5})
    for bad in ({}, {"lambda": 1.5}, {"lambda": -0.1}, {"lambda": float("nan")}):
        with pytest.raises(ValueError, match="lambda"):
            recipe(two, method={"name": "weighted", **bad})


def test_the_recipes_weights_come_on_top(tmp_path, two):
    expected = {m: 0.3 * 2 * x[0] + 0.7 * -1 * x[1] for m, x in stacks(two).items()}
    assert_equal(adapter(tmp_path / "out", two, [2, -1], method={"name": "weighted", "lambda": 0.3}), expected)


LOOKUPS = {
    "nothing given: 1/N": ({}, [1, 1, 1], [1, 1, 1]),
    "normalised by default": ({"task_coefficients": [0.4, 0.4, 0.8]}, [0.25, 0.25, 0.5], [0.25, 0.25, 0.5]),
    "as they are": (
        {"task_coefficients": [0.4, 0.4, 0.8], "normalize_coefficients": False},
        [0.4, 0.4, 0.8],
        [0.4, 0.4, 0.8],
    ),
    "a layer's own": (
        {"task_coefficients": [1, 0, 0], "layer_task_coefficients": {1: [0, 1, 1]}},
        [1, 0, 0],
        [0, 0.5, 0.5],
    ),
    "a default for other layers": (
        {"task_coefficients": [1, 0, 0], "default_task_coefficients": [0, 0, 1], "layer_task_coefficients": {"1": [0, 1, 1]}},
        [0, 0, 1],
        [0, 0.5, 0.5],
    ),
    "negative": (
        {"task_coefficients": [1, -0.5, 0], "allow_negative_coefficients": True, "normalize_coefficients": False},
        [1, -0.5, 0],
        [1, -0.5, 0],
    ),
    "unbounded": (
        {"task_coefficients": [4, -5, 3], "allow_unbounded_coefficients": True},
        [2, -2.5, 1.5],
        [2, -2.5, 1.5],
    ),
}


@pytest.mark.parametrize("case", LOOKUPS)
def test_weighted_delta_n(tmp_path, three, case):
    """Layer map → default → task coefficients → 1/N, divided by their sum unless asked otherwise."""
    params, first, second = LOOKUPS[case]
    rows = {"0": first, "1": second}
    if case.startswith("nothing"):
        rows = {k: [1 / 3] * 3 for k in rows}
    expected = {m: np.tensordot(rows[m.split(".")[2]], x, 1) for m, x in stacks(three).items()}
    assert_equal(adapter(tmp_path / "out", three, method={"name": "weighted_delta_n", **params}), expected)


@every(
    ("params", "text"),
    [
        ({"task_coefficients": [0.5, 0.5]}, "2 coefficients for 3 adapters"),
        ({"layer_task_coefficients": {"0": [1, 0, 0, 0]}}, "4 coefficients for 3 adapters"),
        ({"task_coefficients": [0.5, 0.5, 1.5]}, r"must be in \[0, 1\]"),
        ({"task_coefficients": [0.5, -0.5, 1]}, r"must be in \[0, 1\]"),
        ({"task_coefficients": [0.5, -1.5, 1], "allow_negative_coefficients": True}, r"must be in \[-1, 1\]"),
        ({"task_coefficients": [float("nan"), 1, 1], "allow_unbounded_coefficients": True}, "must be finite"),
        ({"task_coefficients": [0, 0, 0]}, "cannot be normalized"),
        ({"default_task_coefficients": [0, 0, 1]}, "it names none"),
    ],
)
def test_coefficients_that_are_refused(three, params, text):
    with pytest.raises(ValueError, match=text):
        recipe(three, method={"name": "weighted_delta_n", **params})


@pytest.mark.parametrize(("drop_rate", "scale"), [(0.9, 1.0), (0.5, 4.2), (0.0, 1.0)])
def test_dare_is_lambda_times_the_mean_of_what_is_left(tmp_path, three, drop_rate, scale):
    """λ · mean of mᵢ ⊙ Δᵢ / (1 − p); the masks are plait's own, keyed by the recipe's seed."""
    keep = 1 - drop_rate
    expected = {
        m: scale * np.mean([mask(42, n, m, d.shape, keep) * d / keep for n, d in zip(three, x, strict=True)], axis=0)
        for m, x in stacks(three).items()
    }
    method = {"name": "dare", "drop_rate": drop_rate, "lambda": scale}
    assert_equal(dense(tmp_path / "out", three, method=method, seed=42), expected)


def test_dare_takes_density_in_place_of_the_drop_rate(three):
    one, two = (recipe(three, method={"name": "dare", **more}) for more in ({"density": 0.3}, {"drop_rate": 0.7}))
    assert one == two
    assert recipe(three, method={"name": "dare", "density": 1}).method.drop_rate == 0.0
    with pytest.raises(ValueError, match="density is 1 − drop_rate, and both are given; keep one"):
        recipe(three, method={"name": "dare", "density": 0.3, "drop_rate": 0.7})
    for bad in (0, 1.5, "x"):
        with pytest.raises(ValueError, match="density"):
            recipe(three, method={"name": "dare", "density": bad})
    for name in ("dare_linear", "dare_ties"):
        with pytest.raises(ValueError, match="Write density: it is 1 − drop_rate"):
            load_recipe(f"version: 1\nadapters: [./a, ./b]\nmethod: {{name: {name}, drop_rate: 0.7}}\n")


def test_dare_defaults(three):
    found = recipe(three, method="dare").method
    assert (found.drop_rate, found.lambda_) == (0.9, 1.0)


def test_factors_average_a_and_b_with_each_ones_own_scaling(tmp_path):
    """What `uniform` once did, without the first adapter's scaling on everything: √ of weight/T · scaling on A and on B."""
    written = {
        n: write_adapter(tmp_path / n, {"proj": Linear(6, 5)}, r=2, alpha=a, seed=i)
        for i, (n, a) in enumerate([("a", 2), ("b", 9)])
    }
    from safetensors.numpy import load_file

    tensors = [load_file(w.folder / "adapter_model.safetensors") for w in written.values()]
    c = [w.scalings["proj"] / 2 for w in written.values()]
    parts = [
        sum(np.sqrt(x) * t[f"base_model.model.proj.lora_{part}.weight"] for x, t in zip(c, tensors, strict=True))
        for part in "BA"
    ]
    found = adapter(tmp_path / "out", written, method={"name": "uniform", "space": "factors"}, modules={"proj": Linear(6, 5)})
    assert_equal(found, {"proj": parts[0] @ parts[1]})
