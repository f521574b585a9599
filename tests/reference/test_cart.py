"""CART (Choi et al. 2024) as in core space (Panariello et al. 2025): mean + λ Σ top-ρ(ΔWₜ − mean), densely."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.adapters_on_disk import Linear
from tests.reference.harness import adapter, adapters, assert_equal, stacks

WEIGHTS = [0.7, -1.6, 0.9]
RANKS = (1, 3, 2)
MODULES = {"q_proj": Linear(9, 7), "up_proj": Linear(8, 11)}


def cart(deltas, rank, rho, factor):
    mean = sum(deltas) / len(deltas)
    kept = math.ceil(rho * rank)
    added = np.zeros_like(mean)
    for delta in deltas:
        u, s, vh = np.linalg.svd(delta - mean, full_matrices=False)
        added += (u[:, :kept] * s[:kept]) @ vh[:kept]
    return mean + factor * added


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return adapters(tmp_path_factory.mktemp("cart"), ranks=RANKS, modules=MODULES)


@pytest.mark.parametrize(("rho", "factor"), [(0.04, 0.1), (0.3, 2.0), (1.0, 0.5)])
def test_the_paper(tmp_path, written, rho, factor):
    expected = {m: cart([w * d for w, d in zip(WEIGHTS, x, strict=True)], 6, rho, factor) for m, x in stacks(written).items()}
    method = {"name": "cart", "rho": rho, "factor": factor}
    assert_equal(adapter(tmp_path / "out", written, WEIGHTS, MODULES, method=method), expected, 2e-5)


def test_in_full_rank_the_share_is_of_the_dimensions(tmp_path):
    modules = {"proj": Linear(6, 9)}
    made = adapters(tmp_path, ranks=(6, 6, 6), modules=modules)
    (x,) = stacks(made).values()
    expected = {"proj": cart([w * d for w, d in zip(WEIGHTS, x, strict=True)], 6, 0.4, 0.3)}
    found = adapter(tmp_path / "out", made, WEIGHTS, modules, method={"name": "cart", "rho": 0.4, "factor": 0.3})
    assert_equal(found, expected, 2e-5)
