"""SSR (2606.10617): the same least squares with rows from the joint row space of the adapters only."""

from __future__ import annotations

import numpy as np
import pytest

from tests.adapters_on_disk import layers, write_adapter
from tests.reference.harness import assert_equal
from tests.reference.least_squares import fit, inputs, merged, moments, save

WEIGHTS = [0.7, 1.6, -0.9]
MODULES = layers(2, {"q_proj": (9, 11), "v_proj": (5, 11)})


def row_space(deltas):
    """An orthonormal basis (n, k) of all rows."""
    _, s, vh = np.linalg.svd(np.concatenate([d / np.linalg.norm(d) for d in deltas]), full_matrices=False)
    return vh[s > 1e-6 * s[0]].T


def reading(written, found, weights, ridge):
    result = {}
    for module in MODULES:
        v = row_space([w.deltas[module] for w in written.values()])
        targets = [c * w.deltas[module] @ v for c, w in zip(weights, written.values(), strict=True)]
        xs = [found[n, module] @ v for n in written]
        result[module] = fit(targets, xs, ridge * np.trace(sum(moments(x) for x in xs)) / v.shape[1]) @ v.T
    return result


def cohort(folder):
    ranks = (2, 1, 3)
    return {
        n: write_adapter(folder / n, MODULES, r=r, alpha=(4.0, 1.5, 3.0)[i], rslora=i == 1, seed=i)
        for i, (n, r) in enumerate(zip("abc", ranks, strict=True))
    }


@pytest.mark.parametrize("ridge", [1e-4, 1e-2, 0.3])
def test_it_is_the_least_squares_solution_in_the_row_space(tmp_path, ridge):
    written = cohort(tmp_path)
    found = inputs(written)
    folder = save(tmp_path / "moments", found)
    result = merged(tmp_path / "out", written, method="ssr", ridge=ridge, weights=WEIGHTS, moments=folder)
    assert_equal(result, reading(written, found, WEIGHTS, ridge), 5e-6)
    for module in MODULES:  # 6 of 11 columns: the row space is a real subspace here
        v = row_space([w.deltas[module] for w in written.values()])
        assert v.shape == (11, 6)
        assert np.abs(result[module] - result[module] @ v @ v.T).max() < 1e-5 * np.abs(result[module]).max()


def test_with_rows_that_span_everything_it_is_regmean(tmp_path):
    modules = layers(1, {"q_proj": (9, 5)})
    written = {n: write_adapter(tmp_path / n, modules, r=3, alpha=3.0, seed=s) for n, s in (("a", 0), ("b", 1))}
    folder = save(tmp_path / "moments", inputs(written))
    ssr = merged(tmp_path / "ssr", written, method="ssr", moments=folder)
    assert_equal(ssr, merged(tmp_path / "regmean", written, method="regmean", off_diagonal=1, moments=folder), 5e-6)


def test_it_loses_to_regmean_on_the_inputs_and_to_nothing_else_in_the_row_space(tmp_path):
    """The loss that both minimize: RegMean searches among more matrices; SSR beats the mean and the sum."""
    written = cohort(tmp_path)
    found = inputs(written)
    folder = save(tmp_path / "moments", found)
    results = {
        "regmean": merged(tmp_path / "r", written, method="regmean", ridge=1e-4, off_diagonal=1, moments=folder),
        "ssr": merged(tmp_path / "s", written, method="ssr", ridge=1e-4, moments=folder),
        "mean": merged(tmp_path / "m", written, method="linear", scale=1 / 3),
        "sum": merged(tmp_path / "l", written, method="linear"),
    }
    losses = {}
    for label, result in results.items():
        losses[label] = sum(np.square((result[m] - written[n].deltas[m]) @ x.T).sum() / len(x) for (n, m), x in found.items())
    assert losses["regmean"] < losses["ssr"] < losses["mean"] < losses["sum"]
