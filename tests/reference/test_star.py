"""STAR (Lee et al. 2025, §2): truncate every delta to η of its nuclear norm, restore the norm, average. And `smooth`."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from plait.testing import cohort, subject_of
from tests.adapters_on_disk import Linear
from tests.reference.harness import adapter, adapters, assert_equal, run, stacks

WEIGHTS = [0.7, -1.6, 0.9]
RANKS = (1, 5, 3)
MODULES = {"q_proj": Linear(9, 7), "up_proj": Linear(6, 11)}


def star(delta, eta):
    u, s, vh = np.linalg.svd(delta, full_matrices=False)
    kept = next(k for k in range(1, len(s) + 1) if s[:k].sum() >= eta * s.sum() * (1 - 1e-12))
    return s.sum() / s[:kept].sum() * (u[:, :kept] * s[:kept]) @ vh[:kept]


def smooth(delta, rank, rho):
    """Nuclear norm kept, a line from ratio to 1 in the place of the spectrum."""
    u, s, vh = np.linalg.svd(delta)
    line = np.linspace(min(rho, s[0] / s[rank - 1]), 1, rank)
    return (u[:, :rank] * (s[:rank].sum() * line / line.sum())) @ vh[:rank]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return adapters(tmp_path_factory.mktemp("star"), ranks=RANKS, modules=MODULES)


@pytest.mark.parametrize("eta", [0.1, 0.4, 0.75, 1.0])
def test_the_paper(tmp_path, written, eta):
    expected = {m: sum(w * star(d, eta) for w, d in zip(WEIGHTS, x, strict=True)) / 3 for m, x in stacks(written).items()}
    assert_equal(adapter(tmp_path / "out", written, WEIGHTS, MODULES, method={"name": "star", "eta": eta}), expected, 2e-5)


def test_the_rank_is_promised(tmp_path, written):
    """⌈.4 · 1⌉ + ⌈.4 · 5⌉ + ⌈.4 · 3⌉ = 1 + 2 + 2."""
    result = run(tmp_path / "out", written, WEIGHTS, method="star")
    assert (result.record.result, result.record.rank) == ("exact", 5)


def test_equal_singular_values_stay_within_the_promise():
    """All values equal is the worst case: η r of them are needed, and no more."""
    made = cohort([(10, 10)], (5, 5)).map(lambda name, module, f: type(f)(_orthonormal(f.a), _orthonormal(f.b.mT).mT))
    subject = subject_of("star")
    run = subject.prepare(made, subject.recipe(made, "core"))
    (module,) = run.plan.modules
    assert module.exact_rank == 4
    values = np.linalg.svd(run.deltas()[module.target].numpy(), compute_uv=False)
    assert (values > 1e-9).sum() == 4


def _orthonormal(rows):
    return torch.linalg.qr(rows.mT).Q.mT


@pytest.mark.parametrize("rho", [1.0, 1.3, 5.0])
def test_smooth(tmp_path, written, rho):
    expected = {
        m: sum(w * smooth(d, r, rho) for w, d, r in zip(WEIGHTS, x, RANKS, strict=True)) for m, x in stacks(written).items()
    }
    method = {"name": "pipeline", "space": "core", "pre": [{"name": "smooth", "rho": rho}]}
    assert_equal(adapter(tmp_path / "out", written, WEIGHTS, MODULES, method=method), expected, 2e-5)
