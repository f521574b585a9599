"""DC-Merge (2603.06242, §3), densely, with every adapter's own rank: smoothing, cover bases, election, diagonal blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from plait.testing import cohort, subject_of
from tests.adapters_on_disk import Linear
from tests.reference.harness import adapter, adapters, assert_equal, stacks
from tests.reference.test_tsv import directions, orthonormal

WEIGHTS = [0.7, -1.6, 0.9]
RANKS = (1, 3, 2)
MODULES = {"q_proj": Linear(9, 7), "up_proj": Linear(8, 11)}


def smoothed(s, rho):
    if rho is None:
        return s
    line = np.linspace(min(rho, s[0] / s[-1]), 1, len(s))
    return s.sum() * line / line.sum()


def dc_merge(deltas, ranks, rho, density):
    parts = [directions(d, r) for d, r in zip(deltas, ranks, strict=True)]
    u = orthonormal(np.concatenate([p[0] for p in parts], axis=1))
    v = orthonormal(np.concatenate([p[2] for p in parts]).T)
    cores = []
    for (left, s, right), rank in zip(parts, ranks, strict=True):
        core = u.T @ ((left * smoothed(s, rho)) @ right) @ v
        count = rank if density is None else max(1, int(density * core.size))
        cores.append(np.where(np.abs(core) >= np.sort(np.abs(core).ravel())[-count], core, 0))
    merged = np.zeros_like(cores[0])
    for place in np.ndindex(merged.shape):
        values = [c[place] for c in cores]
        agreeing = [x for x in values if x * sum(values) > 0]
        merged[place] = np.mean(agreeing) if agreeing else 0
    start = 0
    mask = np.zeros_like(merged)
    for rank in ranks:
        mask[start : start + rank, start : start + rank] = 1
        start += rank
    return u @ (merged * mask) @ v.T


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return adapters(tmp_path_factory.mktemp("dc"), ranks=RANKS, modules=MODULES)


@pytest.mark.parametrize(("rho", "density"), [(5.0, None), (1.0, 0.3), (1.5, 1.0), (None, 0.1)])
def test_the_paper(tmp_path, written, rho, density):
    expected = {
        m: dc_merge([w * d for w, d in zip(WEIGHTS, x, strict=True)], RANKS, rho, density) for m, x in stacks(written).items()
    }
    method = {"name": "dc_merge", "rho": rho, "density": density}
    assert_equal(adapter(tmp_path / "out", written, WEIGHTS, MODULES, method=method), expected, 5e-5)


def test_the_default_keeps_what_the_paper_keeps():
    """Eight adapters of rank 16: .1 % of 128² entries are 16, the number of directions of one adapter."""
    made = cohort([(140, 150)], [16] * 8)
    own = subject_of("dc_merge").merge(made, "core")
    share = subject_of("dc_merge", {"density": 0.001}).merge(made, "core")
    for module, x in own.items():
        np.testing.assert_allclose(share[module], x, atol=1e-12)


def test_adapters_without_common_directions_are_only_smoothed():
    """Nothing to resolve: the cover bases are the directions themselves."""
    made = cohort([(8, 9)], (2, 2))
    half = {"adapter0": slice(0, 4), "adapter1": slice(4, 8)}

    def part(name, module, f):
        a, b = torch.zeros_like(f.a), torch.zeros_like(f.b)
        a[:, half[name]], b[half[name]] = f.a[:, half[name]], f.b[half[name]]
        return type(f)(a, b)

    apart = made.map(part)
    (module,) = made.shapes
    found = subject_of("dc_merge", {"rho": None}).merge(apart, "core")[module]
    np.testing.assert_allclose(found, subject_of("linear").merge(apart, "core")[module], atol=1e-12)
