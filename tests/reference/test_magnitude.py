"""Magnitude pruning, and Model Breadcrumbs (Davari & Belilovsky 2024, §3): both tails of a layer's magnitudes are dropped."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.reference.harness import adapter, adapters, assert_equal, dense, stacks
from tests.reference.test_ties import FIRST, exact, flatten, unflatten

WEIGHTS = [0.7, -1.6, 0.9]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return adapters(tmp_path_factory.mktemp("magnitude"))


def per_vector(stack, function, scope):
    """Apply a function to every task vector: whole, or module by module."""
    if scope == "model":
        flat = np.stack([function(t) for t in flatten(stack)])
        parts = [unflatten(t, stack) for t in flat]
        return {m: np.stack([p[m] for p in parts]) for m in stack}
    return {m: np.stack([function(t.ravel()).reshape(t.shape) for t in x]) for m, x in stack.items()}


def weighted(stack):
    return {m: np.tensordot(WEIGHTS, x, 1) for m, x in stack.items()}


def band(vector, dropped_top, kept):
    """Keep the `kept` largest magnitudes below the `dropped_top` largest."""
    order = np.argsort(-np.abs(vector))[dropped_top : dropped_top + kept]
    result = np.zeros_like(vector)
    result[order] = vector[order]
    return result


@pytest.mark.parametrize("scope", ["module", "model"])
@pytest.mark.parametrize(
    ("kept", "count"), [("floor", math.floor), ("ceil", math.ceil), ("inclusive", lambda x: math.floor(x) + 1)]
)
def test_magnitude_prune(tmp_path, written, scope, kept, count):
    expected = weighted(per_vector(stacks(written), lambda v: band(v, 0, count(0.37 * len(v))), scope))
    method = {"name": "magnitude_prune", "density": 0.37, "scope": scope, "kept": kept}
    assert_equal(dense(tmp_path / "out", written, WEIGHTS, method=method), expected)


def test_magnitude_prune_svd_truncates_to_the_largest_source_rank(tmp_path, written):
    pruned = weighted(per_vector(stacks(written), lambda v: band(v, 0, len(v) // 2), "module"))
    found = adapter(tmp_path / "out", written, WEIGHTS, method={"name": "magnitude_prune_svd", "density": 0.5})
    for module, x in pruned.items():
        u, s, vh = np.linalg.svd(x)
        np.testing.assert_allclose(found[module], (u[:, :2] * s[:2]) @ vh[:2], atol=1e-5 * s[0])


@pytest.mark.parametrize("scope", ["module", "model"])
@pytest.mark.parametrize(("density", "gamma"), [(0.9, 0.01), (0.5, 0.1), (0.3, 0.0), (0.6, 0.4), (0.05, 0.9)])
def test_breadcrumbs(tmp_path, written, scope, density, gamma):
    def trim(v):
        return band(v, int(gamma * len(v)), int(density * len(v)))

    expected = weighted(per_vector(stacks(written), trim, scope))
    method = {"name": "breadcrumbs", "density": density, "gamma": gamma, "scope": scope}
    assert_equal(dense(tmp_path / "out", written, WEIGHTS, method=method), expected)


def test_breadcrumbs_without_gamma_is_magnitude_pruning(tmp_path, written):
    first = dense(tmp_path / "one", written, WEIGHTS, method={"name": "breadcrumbs", "density": 0.4, "gamma": 0})
    second = dense(tmp_path / "two", written, WEIGHTS, method={"name": "magnitude_prune", "density": 0.4})
    for module, x in first.items():
        np.testing.assert_array_equal(x, second[module])


@pytest.mark.parametrize("gamma", [0, 0.001, 0.05])
def test_a_matrix_of_few_entries_does_not_vanish(tmp_path, gamma):
    """mergekit's slice is empty when gamma · entries < 1, and everything is dropped."""
    written = exact(tmp_path, "a", [[3, -2, 1, 0.5]])
    found = dense(tmp_path / "out", written, method={"name": "breadcrumbs", "density": 0.5, "gamma": gamma})[FIRST]
    np.testing.assert_array_equal(found, [[3, -2, 0, 0]])


def test_the_outlier_goes_and_its_equals_below_stay(tmp_path):
    written = exact(tmp_path, "a", [[9, -4, 4, 2, 1]])
    found = dense(tmp_path / "out", written, method={"name": "breadcrumbs", "density": 0.4, "gamma": 0.2})[FIRST]
    np.testing.assert_array_equal(found, [[0, -4, 4, 0, 0]])


def test_outliers_that_tie_are_no_outliers(tmp_path):
    """Dropping every entry of the largest magnitude would drop a matrix of ±c altogether."""
    written = exact(tmp_path, "a", [[2, -2, 2, -2, 2]])
    found = dense(tmp_path / "out", written, method={"name": "breadcrumbs", "density": 0.6, "gamma": 0.2})[FIRST]
    np.testing.assert_array_equal(found, [[2, -2, 2, -2, 2]])
