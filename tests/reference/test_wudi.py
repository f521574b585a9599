"""WUDI (Cheng et al. 2025): min Σ ‖(M − ΔWₜ) ΔWₜᵀ‖² / ‖ΔWₜ‖², here in closed form and with a ridge."""

from __future__ import annotations

import numpy as np
import pytest

from tests.adapters_on_disk import layers, write_adapter
from tests.reference.harness import assert_equal
from tests.reference.least_squares import merged
from tests.reference.test_ssr import MODULES, cohort, row_space

WEIGHTS = [0.7, 1.6, -0.9]


def loss(m, deltas):
    """The paper's objective."""
    return sum(np.square((m - d) @ d.T).sum() / np.square(d).sum() for d in deltas)


def reading(deltas, weights, ridge):
    """Least squares on all n columns, deltas' own rows for inputs; ρ is a share of the mean of the k eigenvalues above 0."""
    rho = ridge * len(deltas) / row_space(deltas).shape[1]
    n = deltas[0].shape[1]
    rows = [d / np.linalg.norm(d) for d in deltas] + [np.sqrt(rho) * np.eye(n)]
    targets = [w * d for w, d in zip(weights, deltas, strict=True)]
    wanted = [r @ t.T for r, t in zip(rows, targets, strict=False)] + [np.sqrt(rho) * np.mean(targets, axis=0).T]
    return np.linalg.lstsq(np.concatenate(rows), np.concatenate(wanted), rcond=None)[0].T


@pytest.mark.parametrize("ridge", [1e-3, 1e-1, 3.0])
def test_it_is_the_least_squares_solution(tmp_path, ridge):
    written = cohort(tmp_path)
    result = merged(tmp_path / "out", written, method="wudi", ridge=ridge, weights=WEIGHTS)
    expected = {m: reading([w.deltas[m] for w in written.values()], WEIGHTS, ridge) for m in MODULES}
    assert_equal(result, expected, 5e-6)


def test_it_is_where_gradient_descent_on_the_papers_objective_ends(tmp_path):
    """From the sum, where the paper starts too."""
    written = cohort(tmp_path)
    result = merged(tmp_path / "out", written, method="wudi", ridge=1e-5)
    for module in MODULES:
        deltas = [w.deltas[module] for w in written.values()]
        m = sum(deltas)
        gram = sum(d.T @ d / np.square(d).sum() for d in deltas)
        for _ in range(3000):
            m = m - (m @ gram - sum(d @ d.T @ d / np.square(d).sum() for d in deltas)) / np.linalg.norm(gram, 2)
        assert_equal({module: result[module]}, {module: m}, 1e-3)
        assert loss(result[module], deltas) < 1e-4 * loss(sum(deltas), deltas)


@pytest.mark.parametrize("apart", [1e-1, 1e-2, 1e-3, 0.0])
def test_adapters_of_one_initialisation_stay_of_their_size(tmp_path, apart):
    """A that all but agree: without the bound, M grows as their difference shrinks."""
    modules = layers(1, {"q_proj": (9, 11)})
    (module,) = modules
    rng = np.random.default_rng(0)
    common = rng.normal(size=(3, 11))
    written = {}
    for name in "abcd":
        values = (common + apart * rng.normal(size=(3, 11)), rng.normal(size=(9, 3)))
        modules = {module: type(modules[module])(9, 11, values=tuple(v.astype(np.float32) for v in values))}
        written[name] = write_adapter(tmp_path / name, modules, r=3, alpha=3.0)
    deltas = [w.deltas[module] for w in written.values()]
    sane = 2 * np.sqrt(4) * np.mean([np.linalg.norm(d) for d in deltas])
    if apart in (1e-2, 1e-3):
        assert np.linalg.norm(reading(deltas, [1] * 4, 1e-12)) > 3 * sane
    result = merged(tmp_path / "out", written, method="wudi", ridge=1e-9)[module]
    assert 0.01 * sane < np.linalg.norm(result) <= sane
