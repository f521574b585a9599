"""SVC (2602.05536, Algorithm 1), direction by direction on dense matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from plait.adapters.lowrank import LowRank
from plait.testing import cohort, subject_of
from tests.adapters_on_disk import Linear
from tests.reference.harness import adapter, adapters, assert_equal, stacks
from tests.reference.test_knots import official
from tests.reference.test_ties import core_space

WEIGHTS = [0.7, -1.6, 0.9]
RANKS = (1, 3, 2)
MODULES = {"q_proj": Linear(9, 7), "up_proj": Linear(8, 11)}


def calibrated(merged, deltas, alpha):
    """γᵣ = T / Σ max(α, sᵣ), with sᵣ the projection coefficient of the merged response on the adapter's."""
    u, s, vh = np.linalg.svd(merged, full_matrices=False)
    total = np.zeros_like(merged)
    for r in range(int((s > 1e-6 * s[0]).sum())):
        response = u[:, r] @ merged
        shares = []
        for delta in deltas:
            own = u[:, r] @ delta
            if np.linalg.norm(own) > 1e-9:
                shares.append(max(alpha, (response @ own) / (own @ own)))
        total += len(shares) / sum(shares) * s[r] * np.outer(u[:, r], vh[r])
    return total


def weighted(x):
    return [w * d for w, d in zip(WEIGHTS, x, strict=True)]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return adapters(tmp_path_factory.mktemp("svc"), ranks=RANKS, modules=MODULES)


@pytest.mark.parametrize("alpha", [0.1, 0.6, 1.0])
def test_the_paper(tmp_path, written, alpha):
    expected = {m: calibrated(sum(weighted(x)), weighted(x), alpha) for m, x in stacks(written).items()}
    found = adapter(tmp_path / "out", written, WEIGHTS, MODULES, method={"name": "svc", "alpha": alpha})
    assert_equal(found, expected, 2e-5)


def test_counted_twice_is_halved():
    """Two adapters that are the same: s = 2 for both, γ = 1/2. The paper's own example of over-accumulation."""
    made = cohort([(8, 6)], (2,)).copies(2, 1.0)
    (module,) = made.shapes
    found = subject_of("svc").merge(made, "core")[module]
    np.testing.assert_allclose(found, made.delta("adapter00", module), atol=1e-12)


def test_an_adapter_without_a_part_in_a_direction_is_not_counted():
    """Orthogonal column and row spaces: nothing is shared and nothing is shrunk. The ratio is round-off over round-off."""
    made = cohort([(8, 6)], (2, 3))
    turn = cohort([(8, 6)], (8,), seed=3)
    (module,) = made.shapes
    left, right = (torch.linalg.qr(x).Q for x in (turn.factors["adapter0"][module].b, turn.factors["adapter0"][module].a[:6]))
    own = {"adapter0": (left[:, :4], right[:3]), "adapter1": (left[:, 4:], right[3:])}

    def part(name, module, f):
        u, v = own[name]
        return LowRank(f.a @ v.mT @ v, u @ u.mT @ f.b)

    apart = made.map(part)
    plain = subject_of("linear").merge(apart, "core")[module]
    np.testing.assert_allclose(subject_of("svc").merge(apart, "core")[module], plain, atol=1e-12)


def test_ties_in_knots_then_svc(tmp_path, written):
    expected = {}
    for module, x in stacks(written).items():
        u, blocks = official(list(x))
        merged = u @ core_space({"x": np.stack(blocks)}, [1.0] * 3, 0.6)["x"]
        expected[module] = calibrated(merged, list(x), 0.2)
    method = {
        "name": "pipeline",
        "space": "knots",
        "pre": [{"name": "trim", "density": 0.6, "scope": "module", "kept": "inclusive"}],
        "combine": {"name": "elect", "zero_sign": "majority", "scope": "module"},
        "post": [{"name": "svc", "alpha": 0.2}],
    }
    assert_equal(adapter(tmp_path / "out", written, [1.0] * 3, MODULES, method=method), expected, 1e-4)
