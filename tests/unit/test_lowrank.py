"""The algebra of low-rank deltas, and the layouts on disk, by properties."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from plait.adapters import layouts as kinds
from plait.adapters.layouts import LAYOUTS, Layout, layout_type
from plait.adapters.lowrank import LowRank
from tests.adapters_on_disk import Conv, Embedding, Experts, Linear
from tests.every import every

sizes = st.integers(1, 9)
ranks = st.integers(0, 6)
seeds = st.integers(0, 2**32)


def low_rank(shape: tuple[int, int], rank: int, seed: int, dtype: torch.dtype = torch.float64) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype) for s in ((rank, shape[1]), (shape[0], rank)))
    return LowRank(a, b)


@st.composite
def families(draw: st.DrawFn) -> list[LowRank]:
    """A few deltas of one shape and any ranks, 0 included."""
    shape = draw(sizes), draw(sizes)
    return [low_rank(shape, draw(ranks), draw(seeds)) for _ in range(draw(st.integers(1, 4)))]


def close(x: torch.Tensor, y: torch.Tensor) -> None:
    torch.testing.assert_close(x, y, rtol=0, atol=1e-11 * (1 + float(y.abs().max() if y.numel() else 0)))


@settings(deadline=None)
@given(families(), st.data())
def test_concatenate_is_the_weighted_sum(parts, data) -> None:
    c = data.draw(st.lists(st.floats(-3, 3), min_size=len(parts), max_size=len(parts)))
    found = LowRank.concatenate(parts, c)
    close(found.dense(), sum(x * p.dense() for x, p in zip(c, parts, strict=True)))
    assert found.rank == sum(p.rank for x, p in zip(c, parts, strict=True) if x != 0)
    assert found.shape == parts[0].shape


@pytest.mark.parametrize("coefficient", [2.225073858507e-311, 5e-324, -1e-308])
def test_a_coefficient_below_the_smallest_normal_number_is_one(coefficient) -> None:
    part = LowRank(torch.tensor([[1.5410]], dtype=torch.float64), torch.tensor([[-0.2934]], dtype=torch.float64))
    found = LowRank.concatenate([part], [coefficient]).dense().item()
    assert found == pytest.approx(coefficient * 1.5410 * -0.2934, rel=1e-3, abs=1e-323)
    assert found != 0 or coefficient == 5e-324


@settings(deadline=None)
@given(families())
def test_concatenate_of_nothing_but_zeros_is_zero(parts) -> None:
    found = LowRank.concatenate(parts, [0.0] * len(parts))
    assert (found.rank, found.shape) == (0, parts[0].shape)
    assert (found.dense() == 0).all()


def test_concatenate_needs_a_coefficient_each() -> None:
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        LowRank.concatenate([low_rank((2, 2), 1, 0)] * 2, [1.0])


@settings(deadline=None)
@given(sizes, sizes, ranks, seeds)
def test_canonical_is_the_same_delta_balanced(m, n, rank, seed) -> None:
    x = low_rank((m, n), rank, seed)
    found = x.canonical()
    close(found.dense(), x.dense())
    assert found.rank <= min(m, n, rank) or rank == 0
    close(found.b.mT @ found.b, found.a @ found.a.mT)  # both are diag(S)
    close(found.b.mT @ found.b, torch.diag((found.b.mT @ found.b).diagonal()))


@settings(deadline=None, max_examples=50)
@given(sizes, sizes, st.integers(1, 4), seeds)
def test_canonical_factors_do_not_know_the_gauge(m, n, rank, seed) -> None:
    x = low_rank((m, n), rank, seed)
    q = torch.linalg.qr(low_rank((rank, rank), rank, seed + 1).dense()).Q
    turned = LowRank(q.mT @ x.a / 3, x.b @ q * 3).canonical()
    same = x.canonical()
    s = x.singular_values()
    gaps = (s[:-1] - s[1:]) if len(s) > 1 else s
    assume(float(min(gaps.min(), s[-1])) > 1e-3)  # vectors of nearly equal values may turn into each other
    signs = (turned.b * same.b).sum(0).sign()
    torch.testing.assert_close(turned.b * signs, same.b, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(turned.a * signs[:, None], same.a, rtol=1e-6, atol=1e-6)


@settings(deadline=None)
@given(sizes, sizes, ranks, st.integers(0, 5), seeds)
def test_padded_is_the_same_delta(m, n, rank, more, seed) -> None:
    x = low_rank((m, n), rank, seed)
    found = x.padded(rank + more)
    assert (found.rank, found.shape) == (rank + more, (m, n))
    assert torch.equal(found.b[:, :rank], x.b)
    assert torch.equal(found.a[:rank], x.a)
    assert (found.a[rank:] == 0).all()
    assert (found.b[:, rank:] == 0).all()
    close(found.dense(), x.dense())


@settings(deadline=None)
@given(sizes, sizes, ranks, ranks, seeds)
def test_inner_and_energy_are_those_of_the_dense_matrices(m, n, first, second, seed) -> None:
    x, y = low_rank((m, n), first, seed), low_rank((m, n), second, seed + 1)
    scale = 1 + float(x.dense().norm() * y.dense().norm())
    assert abs(x.inner(y) - float((x.dense() * y.dense()).sum())) < 1e-11 * scale
    assert x.inner(y) == pytest.approx(y.inner(x), abs=1e-11 * scale)
    assert x.energy() == pytest.approx(float((x.dense() ** 2).sum()), rel=1e-10, abs=1e-12)
    assert x.energy() == pytest.approx(float((x.singular_values() ** 2).sum()), rel=1e-9, abs=1e-12)
    assert x.energy() >= 0


@settings(deadline=None)
@given(sizes, sizes, ranks, seeds, st.floats(-4, 4))
def test_scaled(m, n, rank, seed, factor) -> None:
    x = low_rank((m, n), rank, seed)
    close(x.scaled(factor).dense(), factor * x.dense())
    assert x.scaled(1) is x


@settings(deadline=None)
@given(sizes, sizes, st.integers(1, 6), seeds)
def test_svd(m, n, rank, seed) -> None:
    x = low_rank((m, n), rank, seed)
    found = x.svd()
    close((found.u * found.s) @ found.vh, x.dense())
    close(found.s, torch.linalg.svdvals(x.dense())[: len(found.s)])
    close(LowRank.from_svd(found).dense(), x.dense())
    assert LowRank.from_svd(found.head(1)).rank == 1


def test_zero_and_dtypes() -> None:
    zero = LowRank.zero((3, 4), torch.float64)
    assert (zero.rank, zero.shape, zero.dense().dtype) == (0, (3, 4), torch.float64)
    assert zero.canonical() is zero
    assert (zero.energy(), zero.inner(low_rank((3, 4), 2, 0))) == (0.0, 0.0)
    assert low_rank((3, 4), 2, 0).to(torch.float32).dense().dtype == torch.float32


def test_energy_of_a_difference_is_never_negative() -> None:
    """x − x by concatenation: round-off must not make an energy below 0, of which a root is taken."""
    for seed in range(50):
        x = low_rank((6, 5), 3, seed, torch.float32)
        assert LowRank.concatenate([x, x], [1.0, -1.0]).energy() >= 0


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Layout, object, int]:
    """A layout, the same kind of layer as the test factory knows it, and PEFT's r."""
    kind = draw(st.sampled_from(["linear", "embedding", "conv", "experts"]))
    m, n, rank = draw(sizes), draw(sizes), draw(st.integers(1, 4))
    if kind == "linear":
        return kinds.Linear(m, n), Linear(m, n), rank
    if kind == "embedding":
        return kinds.Embedding(m, n), Embedding(n, m), rank
    if kind == "experts":
        count = draw(st.integers(1, 4))
        return kinds.Parameter(m, n, count), Experts(count, m, n), rank
    groups, kernel = draw(st.integers(1, 3)), tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=2)))
    layout = kinds.Convolution(m, n * int(np.prod(kernel)), groups, (n, *kernel))
    return layout, Conv(m * groups, n * groups, kernel, groups), rank * groups


@settings(deadline=None)
@given(layouts(), seeds)
def test_layout_is_recognized_and_packs_what_it_unpacks(case, seed) -> None:
    """From the shapes on disk to matrices and back, to the bit; and the matrices are the module's delta."""
    layout, module, r = case
    shape_a, shape_b = module.shapes(r)
    shapes = {layout.a_part: shape_a, layout.b_part: shape_b}
    found, rank = layout_type(shapes, is_parameter=layout.names_parameter).of(shape_a, shape_b, r)
    assert found == layout
    assert [kind for kind in LAYOUTS if kind.kind == layout.kind] == [type(layout)]
    assert rank * layout.rank_unit == r
    assert layout.packed_shapes(rank) == (shape_a, shape_b)
    rng = np.random.default_rng(seed)
    a, b = (torch.tensor(rng.standard_normal(s)) for s in (shape_a, shape_b))
    slices = layout.unpack(a, b)
    assert len(slices) == layout.stack
    assert all(s.rank == rank and s.shape == (layout.d_out, layout.d_in) for s in slices)
    packed_a, packed_b = layout.pack(slices)
    assert torch.equal(packed_a, a)
    assert torch.equal(packed_b, b)
    dense = torch.stack([s.dense() for s in slices])
    expected = torch.tensor(module.delta(a.numpy(), b.numpy()))
    expected = expected.mT if layout.kind == "embedding" else expected
    close(dense.reshape(expected.shape), expected)
    if layout.fits_weight:  # a weight of the base as matrices, in the orientation of the deltas, and as rows × columns
        transposed = bool(layout.is_stored_transposed)
        weight = expected.mT if transposed else expected
        assert layout.fits(tuple(weight.shape), transposed=transposed)
        close(torch.stack(layout.matrices(weight, transposed=transposed)), dense)
        assert weight.reshape(layout.as_matrix(tuple(weight.shape))).numel() == layout.entries
    assert layout.entries == expected.numel()
    assert tuple(expected.shape) == layout.dense_shape


@every(
    ("kind", "a", "b", "text"),
    [
        (kinds.Linear, (3, 5), (4, 2), "the rank must be A's first and B's second"),
        (kinds.Linear, (3,), (4, 3), "same number of dimensions"),
        (kinds.Linear, (3,), (4,), "at least 2"),
        (kinds.Parameter, (7, 5), (4, 7), "experts × rank 2"),
        (kinds.Parameter, (6, 5), (4, 8), "experts × rank 2"),
        (kinds.Convolution, (4, 3, 3), (5, 3, 1), "not a \\(grouped\\) convolution"),
        (kinds.Convolution, (4, 3, 3), (4, 4, 3), "not a \\(grouped\\) convolution"),
        (kinds.Convolution, (4, 3, 3), (5, 2, 1), "not a \\(grouped\\) convolution"),
    ],
)
def test_shapes_that_contradict_each_other(kind, a, b, text) -> None:
    with pytest.raises(ValueError, match=text):
        kind.of(a, b, 2)
