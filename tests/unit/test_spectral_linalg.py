"""Numerical rank, polar factors by Gram, joint coordinates, smoothed spectra, Tucker bases."""

from __future__ import annotations

import math

import pytest
import torch

from plait.adapters.lowrank import LowRank
from plait.linalg.factored import flattener
from plait.linalg.keyed import Key
from plait.linalg.spectral import joint_coordinates, numerical_rank, polar, smooth_spectrum, tucker_bases
from plait.stages import Site
from plait.stages.calibrate import Iso
from plait.stages.joint import Joint, joint_sum
from tests.every import every


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_numerical_rank() -> None:
    s = torch.tensor([2.0, 1.0, 1e-4, 1e-6], dtype=torch.float64)
    assert numerical_rank(s) == 3
    assert numerical_rank(s, tolerance=1e-3) == 2
    assert numerical_rank(s, 1e3) == 2  # of another matrix's largest
    assert numerical_rank(1e-30 * s) == 3
    assert numerical_rank(torch.zeros(3)) == numerical_rank(torch.zeros(0)) == 0


@pytest.mark.parametrize("shape", [(9, 4), (6, 6), (5, 1), (4, 0)])
def test_polar_of_full_column_rank_is_that_of_the_svd(shape) -> None:
    x = normal(*shape)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    torch.testing.assert_close(polar(x), u @ vh, atol=1e-10, rtol=0)


def test_polar_of_copies_shares_a_direction_between_them() -> None:
    x = normal(7, 2)
    torch.testing.assert_close(polar(torch.cat([x, x, x], dim=1)), torch.cat([polar(x)] * 3, dim=1) / 3**0.5)


def test_polar_below_the_tolerance_is_a_partial_isometry() -> None:
    """Five columns in three dimensions, and one column of zeros: singular values of the factor are 1 or 0."""
    x = torch.cat([normal(3, 5), torch.zeros(3, 1, dtype=torch.float64)], dim=1)
    s = torch.linalg.svdvals(polar(x))
    torch.testing.assert_close(s, torch.ones(3, dtype=torch.float64))
    assert (polar(x)[:, -1] == 0).all()
    u = torch.linalg.qr(normal(6, 3)).Q
    nearly = torch.cat([u, u[:, :1] + 1e-7 * normal(6, 1, seed=1)], dim=1)
    assert int((torch.linalg.svdvals(polar(nearly)) > 0.5).sum()) == 3  # 1e-7 is round-off of float32
    apart = torch.cat([u, u[:, :1] + 1e-3 * normal(6, 1, seed=1)], dim=1)
    assert int((torch.linalg.svdvals(polar(apart)) > 0.5).sum()) == 4


def test_polar_does_not_depend_on_the_size_of_x() -> None:
    x = normal(6, 3)
    torch.testing.assert_close(polar(1e-20 * x), polar(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_joint_coordinates(dtype) -> None:
    blocks = [normal(8, 2, dtype=dtype), normal(8, 0, dtype=dtype), normal(8, 3, seed=1, dtype=dtype)]
    q, coordinates = joint_coordinates(blocks)
    basis = q.times(torch.eye(5, dtype=torch.float64))
    assert (basis.shape, basis.dtype) == ((8, 5), dtype)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(5, dtype=dtype))
    for block, x in zip(blocks, coordinates, strict=True):
        assert x.dtype == torch.float64
        torch.testing.assert_close(q.times(x), block)


@every(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.float64, 1e-13)])
@every("weakest", [0.5, 0.1, 0.075, 0.07, 0.03, 1e-4, 0])
def test_bases_are_orthonormal_however_nearly_dependent_the_columns_are(weakest, dtype, tolerance) -> None:
    """One weak direction among 64, on either side of where the Gram matrix gives way to QR."""
    x = normal(1024, 64)
    u, s, vh = torch.linalg.svd(x / x.norm(dim=0), full_matrices=False)
    s[-1] = weakest
    x = ((u * s) @ vh).to(dtype)
    q, (coordinates,) = joint_coordinates([x])
    basis = q.times(torch.eye(64, dtype=torch.float64)).double()
    assert float((basis.mT @ basis - torch.eye(64, dtype=torch.float64)).abs().max()) <= tolerance
    torch.testing.assert_close(q.times(coordinates), x)
    torch.testing.assert_close(q.times_transposed(coordinates), x.mT)


def test_joint_deltas_lift_to_themselves() -> None:
    deltas = [
        LowRank(normal(2, 7), normal(9, 2, seed=1)),
        LowRank.zero((9, 7), torch.float64),
        LowRank(normal(6, 7), normal(9, 6)),
    ]
    joint = Joint.of(deltas)
    assert joint.dense().shape == (3, 8, 7)
    assert Joint.of([LowRank.zero((9, 7), torch.float64)]).lift(LowRank.zero((0, 0), torch.float64)).shape == (9, 7)
    for delta, small, core in zip(deltas, joint.deltas, joint.dense(), strict=True):
        for lifted in (joint.lift(small), joint.lift_dense(core)):
            torch.testing.assert_close(lifted.dense(), delta.dense())
            assert lifted.rank <= 7
    assert [len(svd.s) for svd in joint.svds()] == [2, 0, 6]


def test_more_columns_than_dimensions_are_brought_down() -> None:
    joint = Joint.of([LowRank(normal(2, 3), normal(3, 2))])
    wide = joint_sum(normal(2, 5), torch.arange(5, dtype=torch.float64), normal(2, 5, seed=1))
    lifted = joint.lift(wide)
    assert lifted.rank == 2
    torch.testing.assert_close(lifted.dense(), joint.v.times(joint.u.times(wide.dense()).mT).mT)


@every(
    ("s", "ratio", "expected"),
    [
        ((6.0, 2.0, 1.0), 1.0, (3.0, 3.0, 3.0)),
        ((6.0, 2.0, 1.0), 2.0, (4.0, 3.0, 2.0)),
        ((6.0, 2.0, 1.0), 50.0, (54 / 10.5, 31.5 / 10.5, 9 / 10.5)),  # the spectrum's own ratio, 6, is less
        ((6.0,), 5.0, (6.0,)),
        ((), 5.0, ()),
    ],
)
def test_smooth_spectrum(s, ratio, expected) -> None:
    found = smooth_spectrum(torch.tensor(s, dtype=torch.float64), ratio)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_tucker_bases_of_a_common_subspace_find_it() -> None:
    u, v = torch.linalg.qr(normal(8, 2)).Q, torch.linalg.qr(normal(6, 2, seed=1)).Q
    cores = u @ normal(4, 2, 2, seed=2) @ v.mT
    found_u, found_v = tucker_bases(cores, 2, iterations=10, tolerance=1e-6)
    torch.testing.assert_close(found_u @ found_u.mT, u @ u.mT)
    torch.testing.assert_close(found_v @ found_v.mT, v @ v.mT)


def test_tucker_bases_get_better_with_iterations_and_end_by_themselves() -> None:
    cores = normal(5, 9, 7)

    def captured(iterations: int, tolerance: float = 0.0) -> float:
        u, v = tucker_bases(cores, 3, iterations=iterations, tolerance=tolerance)
        torch.testing.assert_close(u.mT @ u, torch.eye(3, dtype=torch.float64))
        torch.testing.assert_close(v.mT @ v, torch.eye(3, dtype=torch.float64))
        return float((u.mT @ cores @ v).square().sum())

    energies = [captured(i) for i in (0, 1, 3, 10, 200)]
    assert energies == sorted(energies)
    assert energies[0] < energies[-1]
    assert captured(200, 1e-2) < captured(200, 1e-8)


def test_tucker_bases_of_zeros_and_of_more_ranks_than_dimensions() -> None:
    for cores in (torch.zeros(2, 4, 3, dtype=torch.float64), normal(2, 4, 3)):
        u, v = tucker_bases(cores, 9, iterations=5, tolerance=1e-6)
        assert (u.shape, v.shape) == ((4, 4), (3, 3))
        assert bool(torch.isfinite(u).all())
        assert bool(torch.isfinite(v).all())


def test_a_site_remembers_what_the_adapters_have() -> None:
    own, changed = LowRank(normal(1, 3), normal(2, 1)), LowRank(normal(1, 3, seed=1), normal(2, 1))
    weights = torch.tensor([2.0], dtype=torch.float64)
    before = Site("proj", (own,), weights, Key(0))
    torch.testing.assert_close(before.weighted_sources()[0].dense(), 2 * own.dense())
    after = Site("proj", (changed,), weights, Key(0), sources=(own,))
    torch.testing.assert_close(after.weighted()[0].dense(), 2 * changed.dense())
    torch.testing.assert_close(after.weighted_sources()[0].dense(), 2 * own.dense())


def _flat(b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """Return U Vᵀ times the mean singular value, by a dense SVD."""
    u, s, vh = torch.linalg.svd(b.double() @ a.double(), full_matrices=False)
    rank = b.shape[1]
    return s[:rank].mean() * u[:, :rank] @ vh[:rank]


@every(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
@every("weakest", [1.0, 1e-2, 2e-3])
def test_flattener(dtype, tolerance, weakest) -> None:
    sizes = torch.logspace(0, math.log10(weakest), 6, dtype=torch.float64)
    b, a = (normal(20, 6) * sizes).to(dtype), normal(6, 30, seed=1).to(dtype)
    x = flattener(b, a, 1e-5)
    assert x is not None
    expected = _flat(b, a)
    assert (b.double() @ x @ a.double() - expected).abs().max() <= tolerance * expected.abs().max()


def test_flattener_does_not_depend_on_the_size_of_a_row() -> None:
    b, a = normal(20, 6), normal(6, 30, seed=1)
    sizes = torch.logspace(-9, 9, 6, dtype=torch.float64).unsqueeze(1)
    x = flattener(b / sizes.mT, a * sizes, 1e-5)
    assert x is not None
    torch.testing.assert_close((b / sizes.mT) @ x @ (a * sizes), _flat(b, a))


def test_flattener_declines_what_its_squares_would_spoil() -> None:
    b, a = normal(20, 6), normal(6, 30, seed=1)
    gauge = torch.eye(6, dtype=b.dtype)
    gauge[1, :2] = torch.tensor([1, 1e-3])  # the first two rows of a come close to each other
    weak = b * torch.tensor([1, 1, 1, 1, 1, 1e-4], dtype=b.dtype)
    assert flattener(b @ gauge.inverse(), gauge @ a, 1e-5) is None
    assert flattener(weak, a, 1e-5) is None
    assert flattener(b, a, 0.9) is None, "not all singular values are above the tolerance"
    assert flattener(b, torch.cat([a[:5], a[:1]]), 1e-5) is None
    assert flattener(b, a * 0, 1e-5) is None
    assert flattener(b * 0, a, 1e-5) is None
    assert flattener(b[:, :0], a[:0], 1e-5) is None
    assert flattener(normal(4, 6), a, 1e-5) is None, "a rank above the rows of b"
    assert flattener(b, normal(6, 4), 1e-5) is None, "a rank above the columns of a"


@pytest.mark.parametrize("weakest", [1.0, 1e-2, 1e-4, 1e-7])
def test_iso_is_the_same_either_way(weakest) -> None:
    sizes = torch.logspace(0, math.log10(weakest), 6, dtype=torch.float64)
    merged = LowRank(normal(6, 30, seed=1), normal(20, 6) * sizes)
    site = Site("m", (merged,), torch.ones(1, dtype=torch.float64), Key(0))
    svd = merged.svd()
    svd = svd.head(numerical_rank(svd.s))
    torch.testing.assert_close(Iso().apply(merged, site).dense(), svd.s.mean() * svd.u @ svd.vh)
