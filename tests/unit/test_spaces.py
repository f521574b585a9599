"""Coordinates and back, in every space."""

from __future__ import annotations

import itertools

import pytest
import torch

from plait.adapters.lowrank import LowRank
from plait.linalg import blocks
from plait.linalg.blocks import RowBlocks
from plait.spaces import CORE, DELTA, FACTORS, KNOTS, SPACES
from plait.testing import Cohort, cohort
from tests.every import every

SHAPES = [(9, 7), (7, 9), (1, 1), (2, 1), (1, 6)]


def frame(space, made: Cohort, names=None):
    (module,) = made.shapes
    zero = LowRank.zero(made.shapes[module], next(made.tensors()).dtype)
    names = names or list(made.factors)
    return space.frame([made.factors[n].get(module, zero) for n in names], [made.scalings[n] for n in names])


def rows(array) -> torch.Tensor:
    return array.rows(0, array.shape[0])


def matrix(x: torch.Tensor) -> RowBlocks:
    return RowBlocks(tuple(x.shape), lambda start, stop: x[start:stop], x.dtype)


def dense(merged) -> torch.Tensor:
    return merged.dense()


def deltas(made: Cohort) -> list[torch.Tensor]:
    (module,) = made.shapes
    return [made.delta(n, module) for n in made.factors]


@every("shape", SHAPES)
@every("space", [DELTA, CORE, KNOTS])
@every("ranks", [(2, 2), (1, 3, 2), (4,)])
def test_what_goes_in_comes_out(space, shape, ranks) -> None:
    """Each adapter's own coordinates lift to its delta: nothing is lost, whatever the shapes and ranks."""
    made = cohort([shape], ranks)
    found = frame(space, made)
    (array,) = found.arrays
    for coordinates, expected in zip(rows(array), deltas(made), strict=True):
        assert tuple(coordinates.shape) == array.shape
        torch.testing.assert_close(dense(found.lift([matrix(coordinates)])), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("space", [DELTA, CORE, KNOTS], ids=lambda s: s.name)
def test_lifting_is_linear(space) -> None:
    """So a sum of coordinates is a sum of deltas: task arithmetic is the same in all of them."""
    made = cohort([(9, 7)], (2, 1, 3))
    found = frame(space, made)
    weights = [0.5, -2.0, 1.5]
    mixed = sum(w * x for w, x in zip(weights, rows(found.arrays[0]), strict=True))
    expected = sum(w * d for w, d in zip(weights, deltas(made), strict=True))
    torch.testing.assert_close(dense(found.lift([matrix(mixed)])), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("space", SPACES.values(), ids=lambda s: s.name)
def test_arrays_are_named_and_cut_by_rows(space) -> None:
    made = cohort([(9, 7)], (2, 2, 2))
    found = frame(space, made)
    assert tuple(a.name for a in found.arrays) == space.arrays
    for array in found.arrays:
        whole = rows(array)
        assert whole.shape == (3, *array.shape)
        assert whole.dtype == found.dtype == torch.float64
        parts = [array.rows(i, min(i + 2, array.shape[0])) for i in range(0, array.shape[0], 2)]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-14)


@pytest.mark.parametrize("space", [CORE, KNOTS], ids=lambda s: s.name)
def test_coordinates_know_neither_order_nor_gauge(space) -> None:
    """To the sign: a vote that counts a tie as plus depends on it."""
    made = cohort([(9, 7)], (2, 1, 3))
    names = list(made.factors)
    first = rows(frame(space, made).arrays[0])
    for order in itertools.permutations(names):
        again = rows(frame(space, made, list(order)).arrays[0])
        torch.testing.assert_close(again[[order.index(n) for n in names]], first, rtol=0, atol=1e-10)
    torch.testing.assert_close(rows(frame(space, made.turned()).arrays[0]), first, rtol=0, atol=1e-10)


@pytest.mark.parametrize("space", [CORE, KNOTS], ids=lambda s: s.name)
def test_bases_are_oriented(space) -> None:
    """The largest entry of every basis vector is positive."""
    found = frame(space, cohort([(9, 7)], (2, 1, 3)))
    p, q = found.arrays[0].shape
    lifted = found.lift([matrix(torch.eye(p, q, dtype=torch.float64))])
    assert isinstance(lifted, LowRank)
    for x in (lifted.b, lifted.a.mT) if space is CORE else (lifted.b,):
        largest = x.gather(0, x.abs().argmax(0, keepdim=True))
        assert (largest > 0).all()


@pytest.mark.parametrize("space", [CORE, KNOTS], ids=lambda s: s.name)
def test_negated_adapters_have_negated_coordinates(space) -> None:
    made = cohort([(9, 7)], (2, 1, 3))
    torch.testing.assert_close(
        rows(frame(space, made.scaled(-1)).arrays[0]), -rows(frame(space, made).arrays[0]), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("space", [DELTA, CORE, KNOTS], ids=lambda s: s.name)
def test_absent_and_zero_adapters_are_exactly_zero(space) -> None:
    """Round-off in their place would vote."""
    made = cohort([(9, 7)], (2, 1, 3))
    (module,) = made.shapes
    whole = rows(frame(space, made.zeroed("adapter1")).arrays[0])
    absent = rows(frame(space, made.without("adapter1", module)).arrays[0])
    assert (whole[1] == 0).all()
    assert (absent[1] == 0).all()
    torch.testing.assert_close(whole, absent, rtol=0, atol=1e-12)
    zeroed_frame = frame(space, made.zeroed(*made.factors))
    assert (rows(zeroed_frame.arrays[0]) == 0).all()
    assert (dense(zeroed_frame.lift([matrix(rows(zeroed_frame.arrays[0])[0])])) == 0).all()


def test_delta_never_holds_the_matrices(monkeypatch) -> None:
    monkeypatch.setattr(blocks, "HOLD_ELEMENTS", 0)
    array = frame(DELTA, cohort([(400, 300)], (2, 2))).arrays[0]
    assert array.rows(7, 9).shape == (2, 2, 300)


def test_factors_hold_a_and_b_unscaled_and_weigh_them_by_roots() -> None:
    """PEFT: with c = weight · scaling, sign(c) √|c| on A and √|c| on B."""
    made = cohort([(9, 7)], (2, 2, 2))
    (module,) = made.shapes
    a, b = frame(FACTORS, made).arrays
    assert (a.name, a.shape, b.name, b.shape) == ("A", (2, 7), "B", (9, 2))
    for t, name in enumerate(made.factors):
        assert torch.equal(rows(a)[t], made.factors[name][module].a)
        assert torch.equal(rows(b)[t], made.factors[name][module].b)
    weights = torch.tensor([2.0, -0.5, 0.0], dtype=torch.float64)
    s = torch.tensor(list(made.scalings.values()), dtype=torch.float64)
    torch.testing.assert_close(a.weight_transform(weights), (weights * s).sign() * (weights * s).abs().sqrt())
    torch.testing.assert_close(b.weight_transform(weights), (weights * s).abs().sqrt())
    torch.testing.assert_close(a.weight_transform(weights) * b.weight_transform(weights), weights * s)


def test_factors_of_an_absent_adapter_are_zeros() -> None:
    made = cohort([(9, 7)], (2, 2))
    (module,) = made.shapes
    a, b = frame(FACTORS, made.without("adapter0", module)).arrays
    assert (rows(a)[0] == 0).all()
    assert (rows(b)[0] == 0).all()


@pytest.mark.parametrize(
    ("ranks", "shape", "low", "common"), [((2, 3), (9, 7), 5, 3), ((4, 5), (6, 8), 6, 5), ((1,), (1, 9), 1, 1)]
)
def test_ranks_are_known_before_anything_is_read(ranks, shape, low, common) -> None:
    assert CORE.rank(ranks, shape) == KNOTS.rank(ranks, shape) == low
    assert DELTA.rank(ranks, shape) == min(shape)
    assert FACTORS.rank(ranks, shape) == common
    assert [SPACES[n].low_rank for n in ("delta", "core", "knots", "factors")] == [False, True, True, True]


@every("dtype", [torch.float32, torch.float64])
@every("space", SPACES.values())
def test_dtypes_are_kept(space, dtype) -> None:
    found = frame(space, cohort([(9, 7)], (2, 2), dtype=dtype))
    assert all(rows(a).dtype == dtype for a in found.arrays)
    assert dense(found.lift([matrix(rows(a)[0]) for a in found.arrays])).dtype == dtype
