"""KnOTS (Stoica et al. 2025, §4): [ΔW₁ … ΔW_T] = U Σ [V₁ᵀ … V_Tᵀ] by a dense SVD; adapter t is merged as Σ Vₜᵀ."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from plait.spaces import KNOTS
from plait.testing import cohort
from tests.reference.harness import adapter, adapters, assert_equal, stacks
from tests.reference.test_ties import peft

WEIGHTS = [0.7, 1.6, 0.9]


def official(deltas):
    """Return U and the T coordinate blocks Σ Vₜᵀ from the SVD of the m × T·n concatenation."""
    u, s, vh = np.linalg.svd(np.concatenate(deltas, axis=1), full_matrices=False)
    kept = s > 1e-9 * s[0]
    return u[:, kept], np.split(s[kept, None] * vh[kept], len(deltas), axis=1)


def frame(adapters_in_memory, module):
    names = list(adapters_in_memory.factors)
    factors = [adapters_in_memory.factors[n][module] for n in names]
    return KNOTS.frame(factors, [adapters_in_memory.scalings[n] for n in names])


@pytest.mark.parametrize("ranks", [(2, 2), (1, 3, 2), (4, 4, 4, 4), (1,)])
def test_coordinates_are_those_of_the_dense_svd_up_to_sign(ranks):
    made = cohort([(12, 9)], ranks)
    (module,) = made.shapes
    deltas = [made.delta(n, module).numpy() for n in made.factors]
    u, blocks = official(deltas)
    found = frame(made, module).arrays[0]
    coordinates = found.rows(0, found.shape[0]).numpy()
    assert found.shape == (u.shape[1], 9)
    for t, block in enumerate(blocks):
        np.testing.assert_allclose(np.abs(coordinates[t]), np.abs(block), atol=1e-11)
    signs = np.sign((coordinates * np.stack(blocks)).sum((0, 2)))
    np.testing.assert_allclose(coordinates, signs[:, None] * np.stack(blocks), atol=1e-11)


@pytest.mark.parametrize("shared_a", [False, True])
def test_nothing_is_lost(shared_a):
    """U Σ Vₜᵀ is ΔWₜ again, for cohorts of one A too."""
    made = cohort([(12, 9)], (3, 3, 3), shared_a=shared_a)
    (module,) = made.shapes
    found = frame(made, module)
    array = found.arrays[0]
    for t, name in enumerate(made.factors):
        lifted = found.lift([_held(array.rows(0, array.shape[0])[t])]).dense()
        np.testing.assert_allclose(lifted.numpy(), made.delta(name, module).numpy(), atol=1e-12)


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_ties_in_knots(tmp_path, density):
    """KnOTS-TIES: any flavor on the blocks, U times the result."""
    written = adapters(tmp_path, ranks=(1, 3, 2))
    expected = {}
    for module, deltas in stacks(written).items():
        u, blocks = official(list(deltas))
        merged = peft({"x": np.stack(blocks)}, WEIGHTS, density)["x"]
        expected[module] = u @ merged
    method = {"name": "ties", "flavor": "peft", "space": "knots", "density": density}
    assert_equal(adapter(tmp_path / "out", written, WEIGHTS, method=method), expected, 2e-5)


def test_a_small_adapter_is_not_cut_off(tmp_path):
    """The authors' cut-off is an absolute 1e-5; ours is relative, so tiny adapters merge as large ones do."""
    made = cohort([(12, 9)], (2, 2)).scaled(1e-9)
    (module,) = made.shapes
    assert frame(made, module).arrays[0].shape[0] == 4


def test_an_all_zero_adapter_is_exactly_zero_and_has_no_vote():
    """Noise of 1e-17 in place of zeros would be counted by TIES as a vote."""
    made = cohort([(12, 9)], (2, 3, 1)).zeroed("adapter1")
    (module,) = made.shapes
    array = frame(made, module).arrays[0]
    assert (array.rows(0, array.shape[0])[1] == 0).all()


def _held(x: torch.Tensor):
    from plait.linalg.blocks import RowBlocks

    return RowBlocks(tuple(x.shape), lambda start, stop: x[start:stop], x.dtype)
