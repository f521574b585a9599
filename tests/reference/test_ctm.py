"""Compress then Merge (2606.03723, §4), densely: HOOI on norm-blended deltas by SVDs of unfoldings, TIES on projected cores.

The projection is compared as it is; TIES is compared in core coordinates of the projected deltas (the paper's are the bases
with which HOOI happens to end).
"""

from __future__ import annotations

import numpy as np
import pytest

from plait.methods import METHODS
from plait.testing import cohort, subject_of
from tests.adapters_on_disk import Linear
from tests.every import every
from tests.reference.harness import adapter, adapters, assert_equal, run, stacks
from tests.reference.test_core import literal
from tests.reference.test_ties import core_space

WEIGHTS = [0.7, -1.6, 0.9]
RANKS = (1, 3, 2)
MODULES = {"q_proj": Linear(9, 7), "up_proj": Linear(8, 11)}


def leading(unfolding, rank):
    return np.linalg.svd(unfolding, full_matrices=False)[0][:, :rank]


def projected(deltas, rank, beta):
    """Tucker-2 of the blended deltas (300 iterations: converged), then the deltas themselves between its bases."""
    norms = [np.linalg.norm(d) for d in deltas]
    blended = [d / n * (beta * n + (1 - beta) * np.mean(norms)) for d, n in zip(deltas, norms, strict=True)]
    v = leading(np.concatenate(blended).T, rank)
    for _ in range(300):
        u = leading(np.concatenate([d @ v for d in blended], axis=1), rank)
        v = leading(np.concatenate([(u.T @ d).T for d in blended], axis=1), rank)
    return [u @ u.T @ d @ v @ v.T for d in deltas]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return adapters(tmp_path_factory.mktemp("ctm"), ranks=RANKS, modules=MODULES)


@pytest.mark.parametrize(("rank", "beta"), [(2, 0.25), (4, 0.0), (3, 1.0)])
def test_the_projection(tmp_path, written, rank, beta):
    expected = {
        m: sum(w * d for w, d in zip(WEIGHTS, projected(list(x), rank, beta), strict=True)) for m, x in stacks(written).items()
    }
    tucker = {"name": "tucker", "to": rank, "beta": beta, "iterations": 2000, "tolerance": 0}
    method = {"name": "pipeline", "space": "core", "pre": [tucker]}
    assert_equal(adapter(tmp_path / "out", written, WEIGHTS, MODULES, method=method), expected, 5e-5)


def test_ctm(tmp_path, written):
    expected = {}
    for module, x in stacks(written).items():
        u, cores, v = literal(projected(list(x), 3, 0.25))
        expected[module] = u @ core_space({"x": np.stack(cores)}, WEIGHTS, 0.25)["x"] @ v.T
    converged = {"name": "tucker", "iterations": 2000, "tolerance": 0}
    trim = {"name": "trim", "density": 0.25, "scope": "module", "kept": "inclusive"}
    elect = {"name": "elect", "zero_sign": "majority", "scope": "module"}
    method = {"name": "pipeline", "space": "core", "pre": [converged, trim], "combine": elect}
    assert_equal(adapter(tmp_path / "out", written, WEIGHTS, MODULES, method=method), expected, 5e-5)
    preset = METHODS["ctm"].pipeline(METHODS["ctm"].spec(name="ctm", space="core"))
    spelled = "trim(density=0.25, scope=module, kept=inclusive) → elect(zero_sign=majority, scope=module)"
    assert str(preset) == f"tucker → {spelled}", "what is compared here is what the preset does, but for the iterations"


def test_the_rank_is_that_of_the_adapters_and_exact(tmp_path, written):
    result = run(tmp_path / "out", written, WEIGHTS, method="ctm")
    assert (result.record.result, result.record.rank) == ("exact", 3)
    result = run(tmp_path / "two", written, WEIGHTS, method={"name": "ctm", "rank": 2})
    assert (result.record.result, result.record.rank) == ("exact", 2)


@every("combine", ["sum", "polar", "cart"])
@every("space", ["core", "knots"])
def test_any_combine_keeps_the_rank_of_the_spaces(combine, space):
    made = cohort([(12, 10), (3, 7)], (2, 4, 3))
    subject = subject_of("pipeline", {"pre": [{"name": "tucker", "to": 4}], "combine": combine})
    run = subject.prepare(made, subject.recipe(made, space))
    assert [m.exact_rank for m in run.plan.modules] == [4, 3]
    for merged in run.deltas().values():
        s = np.linalg.svd(merged.numpy(), compute_uv=False)
        assert (s > 1e-10 * s[0]).sum() <= 4


def test_rank_enough_for_all_changes_nothing():
    made = cohort([(12, 10)], (2, 1, 3))
    found = subject_of("pipeline", {"pre": [{"name": "tucker", "to": 6}]}).merge(made, "core")
    for module, x in subject_of("linear").merge(made, "core").items():
        np.testing.assert_allclose(found[module], x, atol=1e-12)
