"""Pico (2604.16826, §3): shared output directions are shrunk before the merge, and the merge's norm is restored."""

from __future__ import annotations

import numpy as np
import pytest

from plait.testing import cohort, subject_of
from tests.adapters_on_disk import Linear
from tests.reference.harness import adapter, adapters, assert_equal, stacks
from tests.reference.test_core import literal
from tests.reference.test_ties import peft

WEIGHTS = [0.7, -1.6, 0.9]
RANKS = (1, 3, 2)
MODULES = {"q_proj": Linear(9, 7), "up_proj": Linear(6, 11)}


def shrunk(deltas):
    """α = 1 / (1 + (T − 1) c) on the output directions of all deltas side by side, c their share of the energy."""
    u, s, _ = np.linalg.svd(np.concatenate(deltas, axis=1), full_matrices=False)
    alpha = 1 / (1 + (len(deltas) - 1) * s**2 / (s**2).sum())
    return [d + u @ np.diag(alpha - 1) @ u.T @ d for d in deltas]


def norm_restored(merged, deltas):
    return merged * np.mean([np.linalg.norm(d) for d in deltas]) / np.linalg.norm(merged)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return adapters(tmp_path_factory.mktemp("pico"), ranks=RANKS, modules=MODULES)


def test_the_paper(tmp_path, written):
    expected = {}
    for module, x in stacks(written).items():
        merged = sum(w * d for w, d in zip(WEIGHTS, shrunk(list(x)), strict=True))
        expected[module] = norm_restored(merged, [w * d for w, d in zip(WEIGHTS, x, strict=True)])
    assert_equal(adapter(tmp_path / "out", written, WEIGHTS, MODULES, method="pico"), expected, 2e-5)


def test_before_ties(tmp_path, written):
    """Pico as a stage of its own, before an elementwise method in core space."""
    expected = {}
    for module, x in stacks(written).items():
        u, cores, v = literal(shrunk(list(x)))
        expected[module] = u @ peft({"x": np.stack(cores)}, WEIGHTS, 0.5)["x"] @ v.T
    method = {
        "name": "pipeline",
        "space": "core",
        "pre": ["pico", {"name": "trim", "density": 0.5, "scope": "module"}],
        "combine": {"name": "elect", "zero_sign": "plus"},
    }
    assert_equal(adapter(tmp_path / "out", written, WEIGHTS, MODULES, method=method), expected, 5e-5)


def test_a_shared_direction_is_shrunk_and_others_are_not():
    """T adapters that all write in one direction alone: c = 1 there, α = 1 / T."""
    made = cohort([(6, 5)], (1,)).copies(3, 1.0)
    (module,) = made.shapes
    method = {"pre": ["pico"], "combine": "sum"}
    found = subject_of("pipeline", method).merge(made, "core")[module]
    np.testing.assert_allclose(found, made.delta("adapter00", module), atol=1e-12)


def test_an_adapter_without_the_module_is_not_counted():
    """Two adapters have it, of three: α is that of two."""
    made = cohort([(6, 5), (4, 4)], (2, 1, 2))
    module = next(iter(made.shapes))
    without = made.without("adapter2", module)
    deltas = [made.delta(n, module).numpy() for n in ("adapter0", "adapter1")]
    expected = sum(made.weights[n] * d for n, d in zip(made.factors, shrunk(deltas), strict=False))
    found = subject_of("pipeline", {"pre": ["pico"]}).merge(without, "core")[module]
    np.testing.assert_allclose(found, expected, atol=1e-12)
