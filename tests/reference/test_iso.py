"""Iso-C and Iso-CTS (Marczak et al. 2025), densely, with as many directions as the deltas have together."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from plait.adapters.lowrank import LowRank
from plait.linalg.factored import ThinSVD
from plait.linalg.keyed import Key
from plait.stages import Site
from plait.stages.calibrate import Iso
from plait.testing import cohort, subject_of
from tests.adapters_on_disk import Linear
from tests.reference.harness import adapter, adapters, assert_equal, stacks
from tests.reference.test_core import literal
from tests.reference.test_ties import core_space
from tests.reference.test_tsv import orthonormal, paper

WEIGHTS = [0.7, -1.6, 0.9]
RANKS = (1, 3, 2)
MODULES = {"q_proj": Linear(9, 7), "up_proj": Linear(8, 11)}


def flattened(delta, rank):
    """Iso-C's last step on the `rank` directions that there are."""
    u, s, vh = np.linalg.svd(delta)
    return s[:rank].mean() * u[:, :rank] @ vh[:rank]


def iso_cts(deltas, ranks, share):
    """Algorithm 2 with Σ rₜ in the place of min(m, n): common directions, specific ones of the rest, polar, mean.

    Of a delta of rank r there are at most r specific directions; a further one would be an arbitrary null vector.
    """
    count, rank = len(deltas), sum(ranks)
    specific = round((rank - int(round(share * rank, 9))) / count)
    common = rank - specific * count
    u, s, vh = np.linalg.svd(sum(deltas))
    u, s, vh = u[:, :common], s[:common], vh[:common]
    us, ss, vs = [u], [s], [vh]
    for delta, most in zip(deltas, ranks, strict=True):
        own_u, own_s, own_vh = np.linalg.svd(delta - u @ u.T @ delta)
        taken = min(specific, most)
        us.append(own_u[:, :taken])
        ss.append(own_s[:taken])
        vs.append(own_vh[:taken])
    left, right = orthonormal(np.concatenate(us, axis=1)), orthonormal(np.concatenate(vs).T)
    return np.concatenate(ss).mean() * left @ right.T


def weighted(x):
    return [w * d for w, d in zip(WEIGHTS, x, strict=True)]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return adapters(tmp_path_factory.mktemp("iso"), ranks=RANKS, modules=MODULES)


def test_iso_c(tmp_path, written):
    expected = {m: flattened(sum(weighted(x)), 6) for m, x in stacks(written).items()}
    assert_equal(adapter(tmp_path / "out", written, WEIGHTS, MODULES, method="iso_c"), expected, 2e-5)


def test_iso_c_of_full_rank_deltas_is_the_dense_algorithm(tmp_path):
    made = adapters(tmp_path, ranks=(7, 3, 2), modules=MODULES)
    (x,) = (x for m, x in stacks(made).items() if m == "q_proj")
    found = adapter(tmp_path / "out", made, WEIGHTS, MODULES, method="iso_c")["q_proj"]
    assert_equal({"q_proj": found}, {"q_proj": flattened(sum(weighted(x)), 7)}, 2e-5)


@pytest.mark.parametrize("share", [0.0, 0.4, 0.8, 1.0])
def test_iso_cts(tmp_path, written, share):
    expected = {m: iso_cts(weighted(x), RANKS, share) for m, x in stacks(written).items()}
    method = {"name": "iso_cts", "common": share}
    assert_equal(adapter(tmp_path / "out", written, WEIGHTS, MODULES, method=method), expected, 5e-5)


def test_all_singular_values_are_equal():
    made = cohort([(12, 10)], (2, 1, 3))
    for name, rank in (("iso_c", 6), ("iso_cts", 6)):
        for merged in subject_of(name).merge(made, "core").values():
            s = np.linalg.svd(merged.numpy(), compute_uv=False)
            np.testing.assert_allclose(s[:rank], s[0], rtol=1e-9)
            assert s[rank] < 1e-9 * s[0]


def test_one_a_shared_by_all_is_flattened_over_the_directions_that_are_there():
    """Six columns in the factors, two directions in truth; the other four would be noise of full size."""
    made = cohort([(12, 10)], (2, 2, 2), shared_a=True)
    for name in ("iso_c", "iso_cts"):
        for merged in subject_of(name).merge(made, "core").values():
            s = np.linalg.svd(merged.numpy(), compute_uv=False)
            np.testing.assert_allclose(s[:2], s[0], rtol=1e-9)
            assert s[2] < 1e-9 * s[0]


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ((1.0, 1.0, 1.0), 3),
        ((1.0, 0.5, 0.01, 0.01), 3),  # exp(entropy) is 2.05
        ((1.0, 1e-12, 1e-12), 1),
    ],
)
def test_effective_directions(values, kept):
    s = torch.tensor(values, dtype=torch.float64)
    eye = torch.eye(5, len(s), dtype=torch.float64)
    site = Site("proj", (), torch.ones(0), Key(0))
    flat = Iso(directions="effective", tolerance=0).apply(LowRank.from_svd(ThinSVD(eye, s, eye.mT)), site).singular_values()
    assert int((flat > 0).sum()) == kept
    np.testing.assert_allclose(flat[:kept], np.mean(values[:kept]), rtol=1e-12)


def test_ties_in_core_then_iso(tmp_path, written):
    """A post stage takes what an elementwise combine in core space gives."""
    expected = {}
    for module, x in stacks(written).items():
        u, cores, v = literal(list(x))
        expected[module] = flattened(u @ core_space({"x": np.stack(cores)}, [1.0] * 3, 0.5)["x"] @ v.T, 6)
    method = {
        "name": "pipeline",
        "space": "core",
        "pre": [{"name": "trim", "density": 0.5, "scope": "module", "kept": "inclusive"}],
        "combine": {"name": "elect", "zero_sign": "majority", "scope": "module"},
        "post": ["iso"],
    }
    found = adapter(tmp_path / "out", written, [1.0] * 3, MODULES, method=method)
    assert_equal(found, expected, 1e-4)


def test_tsv_then_iso(tmp_path, written):
    expected = {m: flattened(paper(weighted(x), RANKS), 6) for m, x in stacks(written).items()}
    method = {"name": "pipeline", "space": "core", "combine": "polar", "post": ["iso"]}
    assert_equal(adapter(tmp_path / "out", written, WEIGHTS, MODULES, method=method), expected, 2e-5)
