"""Tensor in, tensor out: counts, thresholds, ranks in rows, elections, bases, row blocks."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.linalg import blocks
from plait.linalg.blocks import RowBlocks, block_ranges
from plait.linalg.elect import agreement, elect_sign, merge_agreeing
from plait.linalg.factored import frobenius_inner, left_basis, orient, orthonormal_rows, orthonormal_rows_of_each
from plait.linalg.finite import all_finite
from plait.linalg.keyed import Key
from plait.linalg.scratch import Scratch
from plait.linalg.sparsify import drop_above, keep_at_least, kept_count, row_ranks
from tests.every import every


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_one_entry_that_is_not_finite_is_seen_anywhere(dtype) -> None:
    largest = torch.finfo(dtype).max
    assert all_finite(torch.empty(0, dtype=dtype))
    assert all_finite(torch.full((100,), largest, dtype=dtype))  # whose sum is infinite
    for value in (math.nan, math.inf, -math.inf):
        for place in (0, 1, 17, 63, 64, 98, 99):
            x = normal(100).to(dtype)
            x[place] = value
            assert not all_finite(x), (value, place)


def test_scratch_memory_is_the_same_for_a_name_and_a_thread() -> None:
    scratch = Scratch()
    first = scratch.take("a", torch.float32, 3, 4).fill_(1)
    assert scratch.take("a", torch.bfloat16, 2).data_ptr() == first.data_ptr()
    assert scratch.take("b", torch.float32, 12).data_ptr() != first.data_ptr()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: scratch.take("a", torch.float32, 3).data_ptr()).result() != first.data_ptr()
    assert scratch.take("a", torch.float32, 100).shape == (100,)


@every(
    ("entries", "density", "floor", "ceil", "inclusive"),
    [
        (10, 0.3, 3, 3, 4),  # 0.3 · 10 is 3.0000000000000004 in binary
        (10, 0.35, 3, 4, 4),
        (100, 0.9, 90, 90, 91),
        (7, 0.2, 1, 2, 2),
        (5, 0.1, 1, 1, 1),
        (1000, 0.0001, 1, 1, 1),
        (1, 0.5, 1, 1, 1),
        (1, 1.0, 1, 1, 1),
        (8, 1.0, 8, 8, 8),
        (3, 0.99, 2, 3, 3),
    ],
)
def test_kept_count(entries, density, floor, ceil, inclusive) -> None:
    assert kept_count(entries, density, "floor") == floor
    assert kept_count(entries, density, "ceil") == ceil
    assert kept_count(entries, density, "inclusive") == inclusive


@settings(deadline=None)
@given(st.integers(1, 10**9), st.floats(1e-6, 1.0))
def test_kept_count_is_between_1_and_all(entries, density) -> None:
    floor, ceil, inclusive = (kept_count(entries, density, rule) for rule in ("floor", "ceil", "inclusive"))
    assert 1 <= floor <= ceil <= entries
    assert floor <= inclusive <= min(entries, floor + 1)
    assert abs(floor - density * entries) <= 1 + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keep_at_least_keeps_what_equals_the_threshold(dtype) -> None:
    tiny = torch.finfo(dtype).smallest_normal
    eps = torch.finfo(dtype).eps
    x = torch.tensor(
        [[[3.0, -3.0, 3.0 * (1 - eps), 3.0 * (1 + eps), 0.0, -7.0]], [[tiny / 4, -tiny / 4, tiny / 8, 0.0, 1.0, -0.0]]],
        dtype=dtype,
    )
    found = keep_at_least(x, torch.tensor([3.0, tiny / 4], dtype=dtype))
    expected = x.clone()
    expected[0, 0, [2, 4]] = 0
    expected[1, 0, [2, 3, 5]] = 0
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keep_at_least_at_the_ends(dtype) -> None:
    """Threshold 0 keeps everything, infinity nothing; a threshold is its own row's."""
    x = normal(3, 4, 5, dtype=dtype)
    found = keep_at_least(x, torch.tensor([0.0, math.inf, 0.5], dtype=dtype))
    assert torch.equal(found[0], x[0])
    assert (found[1] == 0).all()
    assert torch.equal(found[2], torch.where(x[2].abs() >= 0.5, x[2], 0))
    assert torch.equal(x, normal(3, 4, 5, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_drop_above_keeps_what_equals_the_limit(dtype) -> None:
    x = torch.tensor([[[3.0, -3.0, 3.0 * (1 + torch.finfo(dtype).eps), -7.0, 0.1]], [[5.0, -9.0, 0.0, 1.0, 2.0]]], dtype=dtype)
    found = drop_above(x, torch.tensor([3.0, math.inf], dtype=dtype))
    assert torch.equal(found[0], torch.tensor([[3.0, -3.0, 0.0, 0.0, 0.1]], dtype=dtype))
    assert torch.equal(found[1], x[1])


@every("dtype", [torch.float32, torch.float64])
@every("columns", [2, 63, 64, 65, 1000])
def test_row_ranks_count_the_smaller_and_those_to_the_left(dtype, columns) -> None:
    x = (normal(5, columns) * 8).round().to(dtype) / 8
    x[0, 0] = torch.finfo(dtype).max
    size = x.abs()
    before = (size[:, None, :] < size[:, :, None]) | (
        (size[:, None, :] == size[:, :, None]) & torch.ones(columns, columns).tril(-1).bool()
    )
    assert torch.equal(row_ranks(x), before.sum(-1))


def test_row_ranks() -> None:
    x = torch.tensor([[0.5, -2.0, 1.0, -0.1], [3.0, -3.0, 3.0, 0.0]])
    assert row_ranks(x).tolist() == [[1, 3, 2, 0], [1, 2, 3, 0]]
    assert row_ranks(torch.ones(2, 1)).tolist() == [[0], [0]]


VOTES = torch.tensor([[[5.0, -1.0, 2.0, 0.0, 1.0]], [[-2.0, -1.0, -2.0, 0.0, 0.0]], [[-2.0, 3.0, 0.0, 0.0, 0.0]]])


def test_elect_sign() -> None:
    assert elect_sign(VOTES, "total").tolist() == [[1, 1, 0, 0, 1]]
    assert elect_sign(VOTES, "frequency").tolist() == [[-1, -1, 0, 0, 1]]


def test_agreement() -> None:
    agrees = agreement(VOTES, elect_sign(VOTES, "total"))
    assert agrees[:, 0].int().tolist() == [[1, 0, 0, 0, 1], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0]]
    assert agreement(VOTES, torch.ones(1, 5))[:, 0, 3].int().tolist() == [0, 0, 0]


def test_agreement_of_the_smallest_numbers() -> None:
    tiny = torch.tensor([[[1e-45]], [[-1e-45]]], dtype=torch.float32)
    assert agreement(tiny, torch.tensor([[-1.0]]))[:, 0, 0].tolist() == [False, True]


@pytest.mark.parametrize(("divisor", "expected"), [("count", [[4.0, 0.0]]), ("weight", [[8 / 3, 0.0]]), ("none", [[8.0, 0.0]])])
def test_merge_agreeing(divisor, expected) -> None:
    x = torch.tensor([[[4.0, 1.0]], [[2.0, 1.0]], [[9.0, 1.0]]], dtype=torch.float64)
    agrees = torch.tensor([[[True, False]], [[True, False]], [[False, False]]])
    weights = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    found = merge_agreeing(x, agrees.to(x.dtype), torch.ones_like(x[0]), weights, divisor)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert torch.equal(x[0], torch.tensor([[4.0, 1.0]], dtype=torch.float64))


def test_weights_that_cancel_do_not_divide() -> None:
    x = torch.ones(3, 1, 1)
    found = merge_agreeing(x, x, x[0], torch.tensor([0.1, 0.2, -0.3], dtype=torch.float64), "weight")
    assert abs(found.item()) < 1e-6
    small = merge_agreeing(x, torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1), x[0], torch.tensor([1e-9, 1.0, 1.0]), "weight")
    assert small.item() == pytest.approx(1.0)


def test_inner_is_that_of_the_dense_matrices() -> None:
    b1, a1, b2, a2 = normal(6, 2), normal(2, 5, seed=1), normal(6, 3, seed=2), normal(3, 5, seed=3)
    assert frobenius_inner(b1, a1, b2, a2) == pytest.approx(float(((b1 @ a1) * (b2 @ a2)).sum()))
    assert frobenius_inner(b1[:, :0], a1[:0], b2, a2) == 0


@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (5, 1), (1, 5)])
def test_left_basis_spans_the_columns(shape) -> None:
    x = normal(*shape)
    q = left_basis(x)
    torch.testing.assert_close(q.mT @ q, torch.eye(q.shape[1], dtype=torch.float64))
    torch.testing.assert_close(q @ (q.mT @ x), x)
    assert q.shape[1] == min(shape)


def test_left_basis_drops_what_is_round_off() -> None:
    x = normal(9, 4)
    assert left_basis(torch.cat([x, x @ normal(4, 4, seed=1)], dim=1)).shape == (9, 4)
    assert left_basis(x * torch.tensor([1, 1, 1e-5, 1e-8], dtype=torch.float64)).shape == (9, 3)
    assert left_basis(torch.zeros(9, 4)).shape == (9, 1)
    assert left_basis(torch.zeros(9, 0)).shape == (9, 0)


def test_left_basis_does_not_know_the_order_of_the_columns() -> None:
    x = normal(9, 4)
    first, second = left_basis(x), left_basis(x[:, [2, 0, 3, 1]])
    torch.testing.assert_close(first * orient(first), second * orient(second))


def test_orient() -> None:
    u = torch.tensor([[1.0, -5.0, 0.0], [-3.0, 2.0, 0.0]])
    assert orient(u).tolist() == [-1.0, -1.0, 1.0]
    assert orient(u[:, :0]).shape == (0,)


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 200))
def test_block_ranges_cover_every_row_once(m, n, elements) -> None:
    before = blocks.MATRIX_BLOCK_ELEMENTS
    blocks.MATRIX_BLOCK_ELEMENTS = elements
    try:
        ranges = list(block_ranges(m, n))
    finally:
        blocks.MATRIX_BLOCK_ELEMENTS = before
    assert [i for start, stop in ranges for i in range(start, stop)] == list(range(m))
    assert all((stop - start) * n <= max(n, elements) for start, stop in ranges)


@pytest.mark.parametrize("dependent", [0.0, 1e-4, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orthonormal_rows_are_orthogonal_to_others_whatever_they_add(dependent, dtype) -> None:
    others = torch.linalg.qr(normal(60, 5)).Q.mT.to(dtype)
    own, mixed = normal(4, 60, seed=1).to(dtype), normal(4, 5, seed=2).to(dtype) @ others
    y = mixed * dependent * 1e4 + own * (dependent < 1)
    found = orthonormal_rows(y, others)
    joined = torch.cat([others, found]).double()
    assert (joined @ joined.mT - torch.eye(9)).abs().max() < 100 * torch.finfo(dtype).eps
    assert (y - y @ joined.to(dtype).mT @ joined.to(dtype)).norm() < 1e-5 * y.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("others", [0, 5])
def test_orthonormal_rows_of_each_are_those_of_one(dtype, others) -> None:
    """Of random rows, rows that add little or nothing to the others, dependent ones, and none at all."""
    old = torch.stack([torch.linalg.qr(normal(60, 5, seed=i)).Q.mT[:others] for i in range(5)]).to(dtype)
    y = torch.stack([normal(4, 60, seed=10 + i) for i in range(5)]).to(dtype)
    y[1] = y[1] * 1e-5 + (normal(4, others).to(dtype) @ old[1] if others else 1)
    y[2, 3] = y[2, 2] * 2
    y[3] = normal(4, others).to(dtype) @ old[3] if others else 0
    y[4] = 0
    out = torch.empty_like(y)
    orthonormal_rows_of_each(y, old, out=out)
    for mine, known, rows in zip(out, old, y, strict=True):
        joined = torch.cat([known, mine]).double()
        assert (joined @ joined.mT - torch.eye(others + 4)).abs().max() < 100 * torch.finfo(dtype).eps
        assert (rows - rows @ joined.to(dtype).mT @ joined.to(dtype)).norm() <= 1e-4 * rows.norm()


@pytest.mark.parametrize(("hold", "kept"), [(0, 0), (24, 2), (1 << 20, 4)])
def test_row_blocks_are_the_matrix(monkeypatch, hold, kept) -> None:
    """What is kept are whole blocks, of which there are four."""
    monkeypatch.setattr(blocks, "MATRIX_BLOCK_ELEMENTS", 12)
    monkeypatch.setattr(blocks, "HOLD_ELEMENTS", hold)
    x, calls = normal(7, 5), []

    def rows(start: int, stop: int) -> torch.Tensor:
        calls.append((start, stop))
        return x[start:stop]

    matrix = RowBlocks((7, 5), rows, torch.float64)
    assert torch.equal(matrix.dense(), x)
    torch.testing.assert_close(matrix.rows_on_right(normal(3, 5)), normal(3, 5) @ x.mT)
    torch.testing.assert_close(matrix.rows_on_left(normal(3, 7)), normal(3, 7) @ x)
    assert matrix.energy() == pytest.approx(float((x**2).sum()))
    ranges = [(0, 2), (2, 4), (4, 6), (6, 7)]
    assert calls == ranges + ranges[kept:] * 3
    matrix.release()
    assert torch.equal(matrix.dense(), x)
    assert len(calls) == 4 + 3 * (4 - kept) + 4
    assert torch.equal(matrix.scaled(-2).dense(), x * -2)
    assert matrix.scaled(1) is matrix


@pytest.mark.parametrize(
    ("wrong", "text"),
    [(lambda x: x.mT, r"has shape \(5, 2\)"), (lambda x: x[:1], "has shape"), (lambda x: x.float(), "torch.float32")],
)
@pytest.mark.parametrize("hold", [0, 1 << 20])
def test_row_blocks_refuse_other_shapes_and_dtypes(monkeypatch, hold, wrong, text) -> None:
    monkeypatch.setattr(blocks, "MATRIX_BLOCK_ELEMENTS", 12)
    monkeypatch.setattr(blocks, "HOLD_ELEMENTS", hold)
    x = normal(8, 5)
    with pytest.raises(ValueError, match=text):
        RowBlocks((8, 5), lambda start, stop: wrong(x[start:stop]), torch.float64).dense()


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_the_energy_of_what_has_no_square_in_float32(size) -> None:
    x = (normal(30, 20) * size).float()
    assert RowBlocks((30, 20), lambda i, j: x[i:j], torch.float32).energy() == pytest.approx(float(x.double().square().sum()))


@pytest.mark.parametrize("stride", [2, 5, 100])
def test_strided_block_ranges_hold_as_many_rows(monkeypatch, stride) -> None:
    monkeypatch.setattr(blocks, "MATRIX_BLOCK_ELEMENTS", 12)
    ranges = list(block_ranges(33, 4, stride))
    assert [i for start, stop in ranges for i in range(start, stop, stride)] == list(range(0, 33, stride))
    assert all(len(range(start, stop, stride)) <= 3 for start, stop in ranges)


def test_keys_name_streams() -> None:
    assert Key(1).child("a", "b") == Key(1).child("a").child("b")
    states = {Key(s, w).state() for s in (0, 1) for w in ((), ("a",), ("b",), ("a", "b"), ("ab",), ("b", "a"))}
    assert len(states) == 12


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**63 - 1), st.lists(st.text(min_size=1, max_size=5), max_size=3))
def test_any_seed_and_any_words_make_a_key(seed, words) -> None:
    assert 0 <= Key(seed, tuple(words)).state() < 2**63
