"""slerp, multislerp, the Karcher mean, MetaGPT, Model Stock and norm matching, on whole matrices in float64."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest

from plait.notices import PlaitWarning
from tests.adapters_on_disk import Experts, Linear
from tests.reference.harness import adapter, adapters, assert_equal, run, stacks
from tests.reference.test_ties import FIRST, exact, flatten, unflatten

WEIGHTS = [0.7, 1.6, 0.9]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return adapters(tmp_path_factory.mktemp("geometric"), ranks=(2, 3, 1))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return adapters(tmp_path_factory.mktemp("pair"), 2, ranks=(2, 3))


def each(stack, function, scope="module"):
    """Apply a function of vectors (T, D) to each module, or to all modules end to end."""
    if scope == "model":
        return unflatten(function(flatten(stack)), stack)
    return {m: function(x.reshape(len(x), -1)).reshape(x.shape[1:]) for m, x in stack.items()}


def angle(a, b):
    return np.arccos(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def slerp(t, norm="raw"):
    def between(x):
        theta, lengths = angle(*x), np.linalg.norm(x, axis=1)
        if norm == "raw":
            return (np.sin((1 - t) * theta) * x[0] + np.sin(t * theta) * x[1]) / np.sin(theta)
        units = x / lengths[:, None]
        direction = (np.sin((1 - t) * theta) * units[0] + np.sin(t * theta) * units[1]) / np.sin(theta)
        return ((1 - t) * lengths[0] + t * lengths[1]) * direction

    return between


@pytest.mark.parametrize("scope", ["module", "model"])
@pytest.mark.parametrize("norm", ["raw", "interpolate"])
@pytest.mark.parametrize("t", [0, 0.3, 0.5, 1])
def test_slerp(tmp_path, pair, t, norm, scope):
    stack = {m: np.array([0.7, -1.6])[:, None, None] * x for m, x in stacks(pair).items()}
    method = {"name": "slerp", "t": t, "norm": norm, "scope": scope}
    assert_equal(adapter(tmp_path / "out", pair, [0.7, -1.6], method=method), each(stack, slerp(t, norm), scope))


def test_slerp_is_exact_at_the_sum_of_the_ranks(tmp_path, pair):
    result = run(tmp_path / "out", pair, method={"name": "slerp", "t": 0.3})
    assert (result.record.result, result.record.rank) == ("exact", 5)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([[3.0, 4.0]], [[6.0, 8.0]], [[3.75, 5.0]]),  # parallel: straight
        ([[3.0, 4.0]], [[-3.0, -4.0]], [[1.5, 2.0]]),  # antipodal: no arc is the shortest
        ([[3.0, 4.0]], [[0.0, 0.0]], [[2.25, 3.0]]),  # zero has no direction
        ([[0.0, 0.0]], [[0.0, 0.0]], [[0.0, 0.0]]),
    ],
)
def test_slerp_where_there_is_no_one_arc(tmp_path, first, second, expected):
    written = exact(tmp_path, "a", first) | exact(tmp_path, "b", second)
    modules = {FIRST: Linear(1, 2)}
    found = adapter(tmp_path / "out", written, modules=modules, method={"name": "slerp", "t": 0.25})
    np.testing.assert_allclose(found[FIRST], expected, atol=1e-6)


def test_slerp_keeps_the_norm_on_the_way(tmp_path):
    written = exact(tmp_path, "a", [[3.0, 0.0]]) | exact(tmp_path, "b", [[0.0, 3.0]])
    found = adapter(tmp_path / "out", written, modules={FIRST: Linear(1, 2)}, method="slerp")[FIRST]
    np.testing.assert_allclose(found, [[3 / 2**0.5, 3 / 2**0.5]], rtol=1e-6)


def test_slerp_takes_two(tmp_path, written):
    with pytest.raises(ValueError, match="method 'slerp' takes at most 2 adapters, got 3"):
        run(tmp_path / "out", written, method="slerp")


def on_the_sphere(x, weights):
    """Return shares, norms, directions, and the direction of the mean of directions."""
    share = np.array(weights) / np.sum(weights)
    lengths = np.linalg.norm(x, axis=1)
    units = x / lengths[:, None]
    mean = share @ units
    return share, lengths, units, mean / np.linalg.norm(mean)


def multislerp(weights):
    """As mergekit describes it: to the tangent space at the mean, interpolate there, and back by the exponential map."""

    def merged(x):
        share, lengths, units, mean = on_the_sphere(x, weights)
        tangent = share @ (units - np.outer(units @ mean, mean))
        turn = np.linalg.norm(tangent) + 1e-8
        return (mean * np.cos(turn) + tangent * (np.sin(turn) / turn)) * (share @ lengths)

    return merged


@pytest.mark.parametrize("scope", ["module", "model"])
def test_multislerp(tmp_path, written, scope):
    method = {"name": "multislerp", "scope": scope}
    assert_equal(adapter(tmp_path / "out", written, WEIGHTS, method=method), each(stacks(written), multislerp(WEIGHTS), scope))


def test_multislerp_without_normalizing(tmp_path, written):
    once = adapter(tmp_path / "once", written, WEIGHTS, method="multislerp")
    found = adapter(tmp_path / "raw", written, WEIGHTS, method={"name": "multislerp", "normalize": False})
    assert_equal(found, {m: sum(WEIGHTS) * x for m, x in once.items()})


def karcher(weights):
    """Newton-free: plain gradient descent on Σ w angle², small steps, many of them."""

    def merged(x):
        share, lengths, units, mean = on_the_sphere(x, weights)
        for _ in range(2000):
            step = np.zeros_like(mean)
            for w, u in zip(share, units, strict=True):
                theta = np.arccos(np.clip(u @ mean, -1, 1))
                step += 0.5 * w * theta / np.sin(theta) * (u - (u @ mean) * mean)
            mean = mean + step
            mean /= np.linalg.norm(mean)
        return (share @ lengths) * mean

    return merged


@pytest.mark.parametrize("scope", ["module", "model"])
def test_karcher(tmp_path, written, scope):
    method = {"name": "karcher", "scope": scope}
    found = adapter(tmp_path / "out", written, WEIGHTS, method=method)
    assert_equal(found, each(stacks(written), karcher(WEIGHTS), scope), 5e-6)


def test_the_karcher_mean_of_two_is_the_arc_between_them(tmp_path, pair):
    found = adapter(tmp_path / "karcher", pair, [0.7, 0.3], method="karcher")
    arc = each(stacks(pair), slerp(0.3, "interpolate"))
    assert_equal(found, arc)


def test_the_karcher_mean_is_no_normed_mean(written):
    x = flatten(stacks(written))
    assert np.abs(karcher(WEIGHTS)(x) - multislerp(WEIGHTS)(x)).max() > 1e-3 * np.abs(x).max()


@pytest.mark.parametrize("name", ["multislerp", "karcher"])
def test_what_has_no_direction(tmp_path, name):
    """Antipodal deltas give the weighted mean; a zero delta counts with its norm and no direction; a negative weight turns."""
    cases = {
        "antipodal": ([[3.0, 4.0]], [[-3.0, -4.0]], [1, 1], [[0.0, 0.0]]),
        "zero": ([[3.0, 4.0]], [[0.0, 0.0]], [1, 1], [[1.5, 2.0]]),
        "all zero": ([[0.0, 0.0]], [[0.0, 0.0]], [1, 1], [[0.0, 0.0]]),
        "turned": ([[3.0, 4.0]], [[-3.0, -4.0]], [1, -1], [[3.0, 4.0]]),
        "weightless": ([[3.0, 4.0]], [[5.0, 1.0]], [0, 0], [[0.0, 0.0]]),
    }
    for case, (first, second, weights, expected) in cases.items():
        written = exact(tmp_path / case, "a", first) | exact(tmp_path / case, "b", second)
        noted = nullcontext() if any(weights) else pytest.warns(PlaitWarning, match="every weight is 0")
        with noted:
            found = adapter(tmp_path / case / "out", written, weights, {FIRST: Linear(1, 2)}, method=name)[FIRST]
        np.testing.assert_allclose(found, expected, atol=1e-6, err_msg=case)


@pytest.mark.parametrize("scope", ["model", "module"])
def test_metagpt(tmp_path, written, scope):
    def merged(x):
        energy = (x**2).sum(1)
        return (np.array(WEIGHTS) * energy / energy.sum()) @ x

    method = {"name": "metagpt", "scope": scope}
    assert_equal(adapter(tmp_path / "out", written, WEIGHTS, method=method), each(stacks(written), merged, scope))


def test_experts_are_one_module(tmp_path):
    modules = {"layers.0.experts.down_proj": Experts(3, 5, 4)}
    written = adapters(tmp_path, modules=modules)
    found = adapter(tmp_path / "out", written, WEIGHTS, modules, method="multislerp")
    assert_equal(found, each(stacks(written), multislerp(WEIGHTS)))


@pytest.mark.parametrize("scope", ["module", "model"])
def test_model_stock(tmp_path, written, scope):
    def merged(x):
        pairs = [(0, 1), (0, 2), (1, 2)]
        cosine = np.mean([np.cos(angle(x[i], x[j])) for i, j in pairs])
        return 3 * cosine / (1 + 2 * cosine) * x.mean(0)

    stack = {m: np.array(WEIGHTS)[:, None, None] * x for m, x in stacks(written).items()}
    method = {"name": "model_stock", "scope": scope}
    assert_equal(adapter(tmp_path / "out", written, WEIGHTS, method=method), each(stack, merged, scope))


@pytest.mark.parametrize(("to", "rule"), [("mean", np.mean), ("median", np.median), ("max", np.max)])
def test_norm_match(tmp_path, written, to, rule):
    def merged(x):
        total = x.sum(0)
        return rule(np.linalg.norm(x, axis=1)) * total / np.linalg.norm(total)

    stack = {m: np.array(WEIGHTS)[:, None, None] * x for m, x in stacks(written).items()}
    found = adapter(tmp_path / "out", written, WEIGHTS, method={"name": "norm_match", "to": to})
    assert_equal(found, each(stack, merged))


def test_coefficients_of_the_whole_model_after_entries_were_changed(tmp_path, written):
    """Lengths and angles are those of the deltas; the sum is of what is left of them."""
    method = {"pre": [{"name": "trim", "density": 1}], "combine": "metagpt", "space": "core"}
    found = adapter(tmp_path / "out", written, WEIGHTS, method=method)
    assert_equal(found, adapter(tmp_path / "plain", written, WEIGHTS, method="metagpt"))
