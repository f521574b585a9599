"""TSV-M (Gargiulo et al. 2025, Algorithm 1), densely: SVD of every delta, polar factors by SVD of the stacks, product.

The paper's polar factor by SVD, U Vᵀ of X = U S Vᵀ, is unique for stacks of full column rank only; these are.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from plait.adapters.lowrank import LowRank
from plait.linalg.keyed import Key
from plait.stages import Site
from plait.stages.polar import Polar
from plait.testing import cohort, subject_of
from tests.adapters_on_disk import Linear
from tests.reference.harness import adapter, adapters, assert_equal, stacks

WEIGHTS = [0.7, -1.6, 0.9]
RANKS = (1, 3, 2)


def orthonormal(x):
    """The polar factor by SVD."""
    u, _, vh = np.linalg.svd(x, full_matrices=False)
    return u @ vh


def directions(delta, count=None):
    """The leading singular directions; all that are not round-off when no count is given."""
    u, s, vh = np.linalg.svd(delta, full_matrices=False)
    count = int((s > 1e-5 * s[0]).sum()) if count is None else count
    return u[:, :count], s[:count], vh[:count]


def paper(deltas, counts):
    parts = [directions(d, k) for d, k in zip(deltas, counts, strict=True)]
    u = orthonormal(np.concatenate([p[0] for p in parts], axis=1))
    v = orthonormal(np.concatenate([p[2] for p in parts]).T)
    return u @ np.diag(np.concatenate([p[1] for p in parts])) @ v.T


def expected(written, counts, weights=WEIGHTS):
    return {m: paper([w * d for w, d in zip(weights, x, strict=True)], counts) for m, x in stacks(written).items()}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return adapters(tmp_path_factory.mktemp("tsv"), ranks=RANKS, modules={"q_proj": Linear(9, 7), "up_proj": Linear(6, 11)})


MODULES = {"q_proj": Linear(9, 7), "up_proj": Linear(6, 11)}


def test_the_paper(tmp_path, written):
    found = adapter(tmp_path / "out", written, WEIGHTS, MODULES, method="tsv")
    assert_equal(found, expected(written, RANKS), 2e-5)


def test_a_share_of_the_directions(tmp_path, written):
    found = adapter(tmp_path / "out", written, WEIGHTS, MODULES, method={"name": "tsv", "keep": 0.5})
    assert_equal(found, expected(written, (1, 1, 1)), 2e-5)


def test_full_rank_deltas_cut_to_their_share_as_in_the_authors_code(tmp_path):
    """Full-rank deltas, k = min(m, n) / T: the dense algorithm as it is published."""
    shapes = {"proj": Linear(8, 6)}
    made = adapters(tmp_path, modules=shapes, ranks=(6, 6, 6))
    found = adapter(tmp_path / "out", made, WEIGHTS, shapes, method={"name": "tsv", "keep": 1 / 3})
    assert_equal(found, expected(made, (2, 2, 2)), 2e-5)


def test_one_a_shared_by_all_is_stable_and_not_arbitrary():
    """The stack of V is rank deficient: [V V V] has the polar factor V / √3 thrice, and noise of 1e-13 changes nothing."""
    made = cohort([(12, 9)], (2, 2, 2), shared_a=True)
    (module,) = made.shapes
    found = subject_of("tsv").merge(made, "core")[module].numpy()
    noisy = made.map(lambda name, m, f: type(f)(f.a * (1 + 1e-13 * len(name)), f.b))
    np.testing.assert_allclose(subject_of("tsv").merge(noisy, "core")[module], found, atol=1e-9)
    deltas = [made.weights[n] * made.delta(n, module).numpy() for n in made.factors]
    rows = np.linalg.svd(np.concatenate(deltas))[2][:2]
    np.testing.assert_allclose(found @ rows.T @ rows, found, atol=1e-10)  # the rows of the merge are those of A, no others


@pytest.mark.parametrize("apart", [1.0, 0.3, 0.1, 0.01])
def test_adapters_that_are_nearly_one(apart):
    """Whichever way the joint bases are found, the result is the paper's to 1e-6."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    a, b = normal(3, 40), normal(30, 3)
    deltas = [LowRank(a + apart * normal(3, 40), b + apart * normal(30, 3)) for _ in range(3)]
    site = Site("module", tuple(deltas), torch.tensor(WEIGHTS, dtype=torch.float64), Key(0))
    wanted = paper([w * d.dense().numpy() for w, d in zip(WEIGHTS, deltas, strict=True)], [3, 3, 3])
    found = Polar().combine(site).dense().numpy()
    assert np.abs(found - wanted).max() <= 1e-6 * np.abs(wanted).max()


def test_a_direction_of_round_off_is_no_direction():
    """Rank 3 in the file, rank 2 in truth: whitening would give the third one a say over the others."""
    made = cohort([(12, 9)], (2, 2))
    (module,) = made.shapes
    noise = cohort([(12, 9)], (1, 1), seed=5)

    def widen(name, m, f):
        extra = noise.factors[name][m]
        return type(f)(torch.cat([f.a, extra.a]), torch.cat([f.b, 1e-9 * extra.b], dim=1))

    found = subject_of("tsv").merge(made.map(widen), "core")[module]
    np.testing.assert_allclose(found, subject_of("tsv").merge(made, "core")[module], atol=1e-7)
