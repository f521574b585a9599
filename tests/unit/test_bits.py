"""Signs counted as bits equal signs multiplied, whatever the values, widths and tiles."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.adapters.lowrank import LowRank
from plait.inspection import geometry
from plait.linalg.bits import different, packed, shared
from plait.linalg.scratch import Scratch

VALUES = np.array([0.0, -0.0, 1.0, -1.0, 2.5, -1e-3, math.nan, math.inf, -math.inf], dtype=np.float32)
WIDTHS = st.sampled_from([1, 7, 8, 63, 64, 65, 130])


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4), WIDTHS, st.integers(0, 99))
def test_counts_are_those_of_every_entry(count, width, seed) -> None:
    flags, where = np.random.default_rng(seed).random((2, count, width)) < 0.5
    differs = flags[:, None] ^ flags
    np.testing.assert_array_equal(shared(packed(flags)), (flags[:, None] & flags).sum(2))
    np.testing.assert_array_equal(different(packed(flags)), differs.sum(2))
    np.testing.assert_array_equal(different(packed(flags), packed(where)), (differs & where[:, None] & where).sum(2))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4), st.integers(1, 9), WIDTHS, st.sampled_from([40, 1 << 17]), st.integers(2, 9), st.integers(0, 99))
def test_signs_are_those_of_every_entry(count, m, n, tile, kinds, seed) -> None:
    """Zeros of both signs, NaN, which counts as zero, and infinities among the entries, or none of them."""
    draw = np.random.default_rng(seed)
    values = draw.choice(VALUES[2:6] if kinds == 2 else VALUES[:kinds], (count, n))
    parts = [LowRank(torch.from_numpy(row[None]), torch.from_numpy(draw.choice(VALUES[2:5], (m, 1)))) for row in values]
    dense = torch.stack([p.dense() for p in parts]).flatten(1)
    sign = torch.sign(dense).double()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(geometry, "TILE_ELEMENTS", tile)
        signs, magnitude, nonzero = geometry._entry_sums(parts, Scratch())
    assert torch.equal(signs, sign @ sign.mT)
    assert torch.equal(nonzero, sign.abs() @ sign.abs().mT)
    expected = dense.abs().double() @ dense.abs().double().mT
    torch.testing.assert_close(magnitude, expected, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize(("m", "n", "count"), [(1, 1, 1), (5, 300, 3), (300, 5, 3), (7, 11, 1 << 20), (1000, 1001, 2)])
def test_tiles_cover_every_entry_once_and_are_bounded(m, n, count) -> None:
    seen = np.zeros((m, n), dtype=int)
    for rows, columns in geometry._tiles(m, n, count):
        seen[rows, columns] += 1
        entries = (rows.stop - rows.start) * (columns.stop - columns.start)
        assert entries <= geometry.TILE_ELEMENTS
        assert entries == 1 or entries * count <= geometry.TILES_ELEMENTS
    assert (seen == 1).all()
