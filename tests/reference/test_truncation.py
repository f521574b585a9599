"""Truncated SVDs against dense ones: product_svd, the randomized SVD over row blocks, ranks for an energy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from plait.linalg import blocks
from plait.linalg.blocks import RowBlocks, truncated_svd
from plait.linalg.factored import product_svd, rank_for_energy, singular_values, truncated_product
from plait.linalg.keyed import Key
from plait.testing import cohort, subject_of
from plait.testing.subject import installed
from tests.every import every


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def rows_of(x):
    return RowBlocks(tuple(x.shape), lambda start, stop: x[start:stop], x.dtype)


def error(x, svd):
    return float(torch.linalg.matrix_norm(x.double() - (svd.u.double() * svd.s) @ svd.vh.double()))


def best_error(x, rank):
    return float(torch.linalg.svdvals(x.double())[rank:].square().sum().sqrt())


@every("shape", [(9, 7), (7, 9), (3, 2), (1, 8), (8, 1), (1, 1)])
@every("rank", [1, 2, 5])
@every("dtype", [torch.float32, torch.float64])
def test_product_svd(shape, rank, dtype):
    b, a = normal(shape[0], rank, dtype=dtype), normal(rank, shape[1], seed=1, dtype=dtype)
    u, s, vh = product_svd(b, a)
    k = min(*shape, rank)
    assert (u.shape, s.shape, vh.shape) == ((shape[0], k), (k,), (k, shape[1]))
    assert (u.dtype, s.dtype, vh.dtype) == (dtype, torch.float64, dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    dense = b.double() @ a.double()
    expected = torch.linalg.svdvals(dense)[:k]
    scale = float(expected[0])
    torch.testing.assert_close(s, expected, rtol=0, atol=tolerance * scale)
    torch.testing.assert_close(singular_values(b, a), expected, rtol=0, atol=tolerance * scale)
    torch.testing.assert_close((u.double() * s) @ vh.double(), dense, rtol=0, atol=4 * tolerance * scale)
    torch.testing.assert_close(u.mT @ u, torch.eye(k, dtype=dtype), rtol=0, atol=4 * tolerance)
    torch.testing.assert_close(vh @ vh.mT, torch.eye(k, dtype=dtype), rtol=0, atol=4 * tolerance)


def test_product_svd_of_deficient_factors():
    """Shared columns, zeros, and no columns at all."""
    b = normal(8, 3)
    b[:, 2] = b[:, 0]
    a = normal(3, 6, seed=1)
    assert int((product_svd(b, a).s > 1e-12).sum()) == 2
    assert product_svd(b * 0, a).s.tolist() == [0, 0, 0]
    assert product_svd(b[:, :0], a[:0]).s.shape == (0,)


@every("dtype", [torch.float32, torch.float64])
@every("largest", [1.0, 1e-20])  # the squares of the latter are below what float32 holds
@every("smallest", [1.0, 1e-6])
def test_product_svd_is_orthonormal_whatever_the_columns(dtype, largest, smallest):
    b, a = normal(90, 6) * largest * smallest ** (torch.arange(6) / 5), normal(6, 70, seed=1)
    u, s, vh = product_svd(b.to(dtype), a.to(dtype))
    eps = torch.finfo(dtype).eps
    for q in (u, vh.mT):
        assert float((q.double().mT @ q.double() - torch.eye(6, dtype=torch.float64)).abs().max()) < 16 * eps
    dense = b.to(dtype).double() @ a.to(dtype).double()
    torch.testing.assert_close((u.double() * s) @ vh.double(), dense, rtol=0, atol=8 * eps * float(s[0]))


@pytest.mark.parametrize("apart", [1e-2, 1e-4, 1e-6, 0.0])
def test_product_svd_of_factors_that_are_nearly_shared(apart):
    """Adapters of one start have nearly one A: its Gram matrix is singular in float32."""
    shared = normal(4, 70)
    a = torch.cat([shared, shared + apart * normal(4, 70, seed=1)]).float()
    b = normal(90, 8, seed=2).float()
    u, s, vh = product_svd(b, a)
    dense = b.double() @ a.double()
    torch.testing.assert_close((u.double() * s) @ vh.double(), dense, rtol=0, atol=1e-6 * float(s[0]))
    torch.testing.assert_close(u.mT @ u, torch.eye(8), rtol=0, atol=2e-6)
    torch.testing.assert_close(vh @ vh.mT, torch.eye(8), rtol=0, atol=2e-6)


def lost(b, a, factors):
    """The error of a low-rank approximation of `b @ a`, in float64."""
    return float(torch.linalg.matrix_norm(b.double() @ a.double() - factors[0].double() @ factors[1].double()))


def shared_rows(rows, apart):
    """A of two adapters of one start."""
    one = normal(rows, 110, seed=1)
    return torch.cat([one, one + apart * normal(rows, 110, seed=2)])


HARD = {
    "random": (normal(90, 12), normal(12, 110, seed=1)),
    "graded columns": (normal(90, 12) * 1e-6 ** (torch.arange(12) / 11), normal(12, 110, seed=1)),
    "tiny": (normal(90, 12) * 1e-20, normal(12, 110, seed=1)),
    "nearly one A": (normal(90, 12), shared_rows(6, 1e-4)),
    "one A": (normal(90, 12), shared_rows(6, 0.0)),
    "B that cancels": (torch.cat([normal(90, 6), -normal(90, 6)], dim=1), shared_rows(6, 1e-2)),
    "zero": (torch.zeros(90, 12), normal(12, 110, seed=1)),
    "wider than tall": (normal(5, 12), normal(12, 110, seed=1)),
}


@every("dtype", [torch.float32, torch.float64])
@every("rank", [1, 5, 12])
@every("case", list(HARD))
def test_truncated_product_loses_what_the_dense_svd_loses(case, rank, dtype):
    b, a = (x.to(dtype) for x in HARD[case])
    *factors, s = truncated_product(b, a, rank)
    dense = b.double() @ a.double()
    size, k = float(torch.linalg.matrix_norm(dense)), min(*dense.shape, 12)
    assert [tuple(f.shape) for f in factors] == [(len(dense), min(rank, k)), (min(rank, k), 110)]
    assert all(f.dtype == dtype and f.is_contiguous() for f in factors)
    assert (s.dtype, len(s)) == (torch.float64, k)
    rounding = 64 * torch.finfo(dtype).eps * float(torch.linalg.matrix_norm(b.double()) * torch.linalg.matrix_norm(a.double()))
    best = best_error(dense, min(rank, k))
    assert lost(b, a, factors) <= math.hypot(best, rounding) + 1e-9 * size
    torch.testing.assert_close(s, torch.linalg.svdvals(dense)[:k], rtol=0, atol=rounding)
    grams = factors[0].double().mT @ factors[0].double(), factors[1].double() @ factors[1].double().mT
    for gram in grams:  # balanced: both are diag(S)
        torch.testing.assert_close(gram, torch.diag(s[: min(rank, k)]), rtol=0, atol=rounding)


@pytest.mark.parametrize("rank", [1, 7, 64, 100])
def test_truncated_product_equals_the_full_one_cut_off(rank):
    """At the shapes of real adapters: r 64 each, B whose columns fall, float32."""
    b = torch.cat([normal(512, 64, seed=i) * 0.02 ** (torch.arange(64) / 63) for i in (0, 1)], dim=1).float()
    a = torch.cat([normal(64, 256, seed=i) for i in (2, 3)]).float()
    *factors, s = truncated_product(b, a, rank)
    whole = product_svd(b, a)
    assert torch.equal(s, whole.s)
    cut = whole.head(rank)
    before, size = lost(b, a, (cut.u.double() * cut.s, cut.vh)), float(whole.s.square().sum().sqrt())
    assert abs(lost(b, a, factors) - before) < 1e-9 * size
    assert abs(lost(b, a, factors) - best_error(b.double() @ a.double(), rank)) < 1e-9 * size


def spectrum(values, m=400, n=300):
    u, v = torch.linalg.qr(normal(m, len(values))).Q, torch.linalg.qr(normal(n, len(values), seed=1)).Q
    return (u * torch.tensor(values, dtype=torch.float64)) @ v.mT


@every("dtype", [torch.float32, torch.float64])
@every("rank", [1, 8, 24])
def test_a_matrix_of_low_rank_is_found_exactly(dtype, rank):
    x = spectrum([2.0**-i for i in range(rank)]).to(dtype)
    assert error(x, truncated_svd(rows_of(x), rank, Key(0))) < 1e-5


@pytest.mark.parametrize("rank", [8, 32, 64])
def test_a_flat_spectrum_is_truncated_within_one_per_cent(rank):
    """TIES of low-rank deltas: pruned, so of full rank, with a tail that hardly falls."""
    made = cohort([(400, 300)], [16, 16, 16])
    subject = subject_of("ties", {"density": 0.2})
    with installed(subject.method):
        (x,) = subject.merge(made, "delta").values()
    assert int((torch.linalg.svdvals(x) > 1e-3).sum()) == 300
    assert error(x, truncated_svd(rows_of(x), rank, Key(0))) < 1.01 * best_error(x, rank)


def test_noise_is_truncated_within_one_per_cent():
    x = normal(400, 300)
    assert error(x, truncated_svd(rows_of(x), 32, Key(0))) < 1.01 * best_error(x, 32)


@pytest.mark.parametrize("factors", [2, 32, 100], ids=["few", "as many as wanted", "many"])
@pytest.mark.parametrize("kind", ["nothing", "overflow", "one direction", "anywhere"])
def test_a_bad_guide_does_no_harm(kind, factors):
    x = normal(400, 300)
    a = {"nothing": 0.0, "overflow": math.inf, "one direction": 1.0, "anywhere": 1e-9}[kind] * normal(factors, 300, seed=5)
    guide = [(normal(400, factors, seed=6), a[:1].expand_as(a) if kind == "one direction" else a)]
    matrix = RowBlocks((400, 300), lambda start, stop: x[start:stop], x.dtype, guide)
    assert error(x, truncated_svd(matrix, 32, Key(0))) < 1.01 * best_error(x, 32)


@pytest.mark.parametrize("factors", [20, 50], ids=["as many as wanted", "many"])
def test_a_good_guide_spares_iterations(factors):
    x = spectrum([1.0] * 20) + 1e-3 * normal(400, 300, seed=7)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    guide = [(u[:, i : i + 10] * s[i : i + 10], vh[i : i + 10]) for i in range(0, factors, 10)]
    guided = RowBlocks((400, 300), lambda start, stop: x[start:stop], x.dtype, guide)
    assert error(x, truncated_svd(guided, 20, Key(0), iterations=0)) < 1.01 * best_error(x, 20)
    assert error(x, truncated_svd(rows_of(x), 20, Key(0), iterations=0)) > 1.01 * best_error(x, 20)


@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
def test_near_full_rank_it_is_the_dense_svd(shape):
    x = normal(*shape)
    for rank in (3, 20, 40, 99):
        found = truncated_svd(rows_of(x), rank, Key(0))
        assert found.s.shape == (min(rank, 40),)
        assert error(x, found) <= best_error(x, min(rank, 40)) + 1e-10


def test_singular_vectors_are_orthonormal_and_values_descend():
    found = truncated_svd(rows_of(normal(400, 300)), 16, Key(0))
    torch.testing.assert_close(found.u.mT @ found.u, torch.eye(16, dtype=torch.float64))
    torch.testing.assert_close(found.vh @ found.vh.mT, torch.eye(16, dtype=torch.float64))
    assert (found.s.diff() <= 0).all()


def test_the_sketch_is_drawn_from_the_key():
    x = rows_of(normal(400, 300))
    first, again, other = (truncated_svd(x, 16, Key(seed)) for seed in (0, 0, 1))
    assert torch.equal(first.u, again.u)
    assert not torch.equal(first.u, other.u)


@pytest.mark.parametrize("elements", [1, 900, 1 << 20])
def test_the_cut_into_blocks_does_not_matter(monkeypatch, elements):
    x = normal(400, 300)
    whole = truncated_svd(rows_of(x), 16, Key(0))
    monkeypatch.setattr(blocks, "MATRIX_BLOCK_ELEMENTS", elements)
    monkeypatch.setattr(blocks, "HOLD_ELEMENTS", 0)
    torch.testing.assert_close(truncated_svd(rows_of(x), 16, Key(0)).s, whole.s, rtol=1e-9, atol=0)


def test_a_zero_matrix():
    found = truncated_svd(rows_of(torch.zeros(400, 300)), 4, Key(0))
    assert found.s.tolist() == [0, 0, 0, 0]
    assert torch.isfinite(found.u).all()


@every("values", [[3.0, 2.0, 1.0], [1.0] * 6, [5.0], [1.0, 1e-9, 0.0], [2.0, 0.0, 0.0]])
@every("share", [1e-9, 0.5, 0.9, 0.99, 1 - 1e-6, 1.0])
def test_rank_for_energy(values, share):
    """The smallest r with Σ_{i ≤ r} σᵢ² ≥ share · Σ σᵢ²; at share 1, what is below round-off does not count."""
    power = np.array(values) ** 2
    wanted = next(r for r in range(1, len(values) + 1) if power[:r].sum() >= share * power.sum() * (1 - 1e-12))
    assert rank_for_energy(torch.tensor(values, dtype=torch.float64), share) == wanted


def test_rank_for_energy_of_nothing():
    assert rank_for_energy(torch.zeros(3, dtype=torch.float64), 0.9) == 1
    assert rank_for_energy(torch.zeros(0, dtype=torch.float64), 0.9) == 1


def near_the_hint(m, n, seed, dtype=torch.float32, rank=6, adapters=3):
    """Return a matrix of most entries of low-rank ones' sum, and these."""
    factors = [
        (normal(m, rank // adapters, seed=seed + i), normal(rank // adapters, n, seed=seed + 9 + i)) for i in range(adapters)
    ]
    factors = [(b.to(dtype), a.to(dtype)) for b, a in factors]
    total = sum((b @ a for b, a in factors), torch.zeros(m, n, dtype=dtype))
    dense = total * (total.abs() > 0.5)
    return RowBlocks((m, n), lambda start, stop: dense[start:stop], dtype, factors), dense


def test_several_at_a_time_are_each_as_one():
    """Of two shapes and dtypes, one of them zero, one of a lower rank than is wanted, and one without a hint."""
    pairs = [near_the_hint(90, 80, seed) for seed in range(3)]
    pairs += [near_the_hint(90, 80, 3, torch.float64), near_the_hint(80, 120, 4), near_the_hint(90, 80, 5)]
    zero, low = torch.zeros(90, 80), pairs[0][0].range_hint[0][0] @ pairs[0][0].range_hint[0][1]
    matrices = [m for m, _ in pairs]
    matrices += [RowBlocks((90, 80), lambda i, j, x=x: x[i:j], torch.float32, matrices[0].range_hint) for x in (zero, low)]
    matrices.append(rows_of(pairs[1][1]))
    keys = [Key(0, (str(i),)) for i in range(len(matrices))]
    for found, matrix, key in zip(blocks.truncated_svds(matrices, 6, keys), matrices, keys, strict=True):
        for mine, alone in zip(found, truncated_svd(matrix, 6, key), strict=True):
            assert torch.equal(mine, alone)
            assert torch.isfinite(mine).all()


@every("shape", [(90, 80), (80, 120), (400, 300)])
@every("dtype", [torch.float32, torch.float64])
def test_small_matrices_near_their_hint_lose_next_to_nothing(shape, dtype):
    matrix, dense = near_the_hint(*shape, seed=0, dtype=dtype)
    found = truncated_svd(matrix, 6, Key(0))
    lost = error(dense, found) ** 2 - best_error(dense, 6) ** 2
    assert lost < 1e-4 * float(dense.double().square().sum())
    for q in (found.u, found.vh.mT):
        assert float((q.mT @ q - torch.eye(6, dtype=dtype)).abs().max()) < 1e-5
