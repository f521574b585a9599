"""Core space (Panariello et al. 2025, §3): ΔWₜ = U Cₜ Vᵀ, Cₜ = (Uᵀ Bₜ)(Aₜ V), U and V the bases of all B and all A."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from plait.linalg.blocks import RowBlocks
from plait.spaces import CORE
from plait.testing import cohort
from tests.every import every
from tests.reference.harness import adapter, adapters, assert_equal, stacks
from tests.reference.test_ties import peft

WEIGHTS = [0.7, 1.6, 0.9]


def balanced(delta):
    """B √-balanced by the delta's own SVD: U √S and √S Vᵀ."""
    u, s, vh = np.linalg.svd(delta, full_matrices=False)
    kept = s > 1e-9 * s[0]
    root = np.sqrt(s[kept])
    return u[:, kept] * root, root[:, None] * vh[kept]


def literal(deltas):
    """Return U, the cores and V: left singular vectors of [B₁ … B_T], right ones of [A₁; …; A_T], from balanced factors."""
    factors = [balanced(d) for d in deltas]
    u, s, _ = np.linalg.svd(np.concatenate([b for b, _ in factors], axis=1), full_matrices=False)
    u = u[:, s > 1e-6 * s[0]]
    _, s, vh = np.linalg.svd(np.concatenate([a for _, a in factors]), full_matrices=False)
    v = vh[s > 1e-6 * s[0]].T
    return u, [(u.T @ b) @ (a @ v) for b, a in factors], v


def frame(made, module, names=None):
    names = names or list(made.factors)
    return CORE.frame([made.factors[n][module] for n in names], [made.scalings[n] for n in names])


@every("ranks", [(2, 2), (1, 3, 2), (5, 1), (4, 4, 4, 4), (1,)])
@every("shape", [(12, 9), (9, 12), (3, 2)])
def test_nothing_is_lost_whatever_the_ranks(ranks, shape):
    made = cohort([shape], ranks)
    (module,) = made.shapes
    found = frame(made, module)
    array = found.arrays[0]
    cores = array.rows(0, array.shape[0])
    for t, name in enumerate(made.factors):
        lifted = found.lift([_held(cores[t])])
        np.testing.assert_allclose(lifted.dense().numpy(), made.delta(name, module).numpy(), atol=1e-12)
        assert lifted.rank <= min(sum(ranks), *shape)


def test_cores_are_those_of_the_balanced_factors_up_to_signs_of_the_bases():
    made = cohort([(12, 9)], (1, 3, 2))
    (module,) = made.shapes
    _, cores, _ = literal([made.delta(n, module).numpy() for n in made.factors])
    array = frame(made, module).arrays[0]
    found = array.rows(0, array.shape[0]).numpy()
    np.testing.assert_allclose(np.abs(found), np.abs(np.stack(cores)), atol=1e-11)


@pytest.mark.parametrize("density", [0.4, 1.0])
def test_ties_in_core(tmp_path, density):
    written = adapters(tmp_path, ranks=(1, 2, 2))
    expected = {}
    for module, deltas in stacks(written).items():
        u, cores, v = literal(list(deltas))
        expected[module] = u @ peft({"x": np.stack(cores)}, WEIGHTS, density)["x"] @ v.T
    method = {"name": "ties", "flavor": "peft", "space": "core", "density": density}
    assert_equal(adapter(tmp_path / "out", written, WEIGHTS, method=method), expected, 2e-5)


def test_the_coordinates_do_not_depend_on_order_or_gauge():
    """To the sign: bases are oriented, so that even rules which know plus from minus agree."""
    made = cohort([(12, 9)], (2, 3, 1))
    (module,) = made.shapes
    array = frame(made, module).arrays[0]
    first = array.rows(0, array.shape[0])
    for names in itertools.permutations(made.factors):
        again = frame(made, module, list(names)).arrays[0].rows(0, array.shape[0])
        for t, name in enumerate(names):
            np.testing.assert_allclose(again[t], first[list(made.factors).index(name)], atol=1e-10)
    turned = frame(made.turned(), module).arrays[0].rows(0, array.shape[0])
    np.testing.assert_allclose(turned, first, atol=1e-10)


def test_one_a_shared_by_all_takes_one_basis():
    made = cohort([(12, 9)], (3, 3, 3), shared_a=True)
    (module,) = made.shapes
    assert frame(made, module).arrays[0].shape == (9, 3)


def _held(x):
    return RowBlocks(tuple(x.shape), lambda start, stop: x[start:stop], x.dtype)
