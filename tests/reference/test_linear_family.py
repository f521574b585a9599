"""Task arithmetic (Ilharco et al. 2023, eq. 2): ΔW = Σ wₜ ΔWₜ, and what is the same by other names; the best rank-r sum."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.adapters_on_disk import Conv, Embedding, Experts, Linear, layers
from tests.reference.harness import MODULES, SHAPES, adapter, adapters, assert_equal, dense, run, stacks

WEIGHTS = [0.7, -0.4, 1.3]


def weighted_sum(written, weights=WEIGHTS, scale=1.0):
    return {m: scale * sum(w * x for w, x in zip(weights, stack, strict=True)) for m, stack in stacks(written).items()}


@pytest.mark.parametrize("name", ["linear", "cat", "task_arithmetic"])
@pytest.mark.parametrize("ranks", [(2, 2, 2), (1, 4, 2)])
def test_weighted_sum(tmp_path, name, ranks):
    written = adapters(tmp_path, ranks=ranks)
    expected = weighted_sum(written, scale=0.5)
    assert_equal(dense(tmp_path / "dense", written, WEIGHTS, method=name, scale=0.5), expected)
    assert_equal(adapter(tmp_path / "adapter", written, WEIGHTS, method=name, scale=0.5), expected)


@pytest.mark.parametrize("space", ["delta", "core", "knots"])
def test_every_space_gives_the_same_sum_and_says_exact(tmp_path, space):
    written = adapters(tmp_path, ranks=(1, 2, 1))
    result = run(tmp_path / "out", written, WEIGHTS, method={"name": "linear", "space": space})
    assert (result.plan.result, result.record.result, result.record.kept) == ("exact", "exact", 1.0)
    assert {m.exact_rank for m in result.plan.modules} == {4}
    assert_equal(
        adapter(tmp_path / "again", written, WEIGHTS, method={"name": "linear", "space": space}), weighted_sum(written)
    )


EVERY_KIND = {
    "embed": Embedding(11, 6),
    "layers.0.q_proj": Linear(6, 5, rank=3, alpha=7.0),
    "layers.0.back": Linear(5, 6),
    "layers.0.experts.gate_up_proj": Experts(3, 4, 6),
    "layers.0.experts.down_proj": Experts(3, 6, 2),
    "layers.1.experts.down_proj": Experts(2, 3, 4, alpha=1.0),
    "conv1": Conv(4, 3, (3,)),
    "conv2": Conv(4, 2, (2, 3), alpha=9.0),
    "grouped": Conv(6, 4, (3,), groups=2),
}


@pytest.mark.parametrize("layout", ["uniform", "pattern"])
def test_every_kind_of_layer(tmp_path, layout):
    """Experts and groups do not mix, whatever the ranks; embeddings are transposed; scalings are each module's own."""
    written = adapters(tmp_path, modules=EVERY_KIND, ranks=(2, 4, 6))
    expected = weighted_sum(written)
    assert_equal(dense(tmp_path / "dense", written, WEIGHTS), expected)
    output = {"layout": layout}
    assert_equal(adapter(tmp_path / "adapter", written, WEIGHTS, EVERY_KIND, output=output), expected)


def test_every_kind_of_layer_truncates_to_the_best_of_each_matrix(tmp_path):
    """Rank 2 of every expert and of every group apart, not of a stack of them."""
    written = adapters(tmp_path, modules=EVERY_KIND, ranks=(2, 4, 6))
    found = adapter(tmp_path / "adapter", written, WEIGHTS, EVERY_KIND, output={"rank": 2})
    for module, x in weighted_sum(written).items():
        kind = EVERY_KIND[module]
        if isinstance(kind, Experts):
            matrices, parts = x, found[module]
        else:
            groups = kind.groups if isinstance(kind, Conv) else 1
            matrices = x.reshape(groups, x.shape[0] // groups, -1)
            parts = found[module].reshape(matrices.shape)
        for matrix, part in zip(matrices, parts, strict=True):
            u, s, vh = np.linalg.svd(matrix, full_matrices=False)
            np.testing.assert_allclose(part, (u[:, :2] * s[:2]) @ vh[:2], atol=1e-5 * s[0])


def test_a_missing_module_is_a_zero_delta(tmp_path):
    written = adapters(tmp_path, 2)
    partial = adapters(tmp_path / "more", 3, layers(1, SHAPES))
    mixed = {**written, "c": partial["c"]}
    assert_equal(adapter(tmp_path / "union", mixed, WEIGHTS), weighted_sum(mixed))
    common = {m: x for m, x in weighted_sum(mixed).items() if m in partial["c"].deltas}
    assert_equal(adapter(tmp_path / "common", mixed, WEIGHTS, layers(1, SHAPES), merge_mode="common"), common)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_stored_values_are_taken_as_they_are(tmp_path, dtype):
    written = adapters(tmp_path, dtype=dtype)
    assert_equal(adapter(tmp_path / "out", written, WEIGHTS), weighted_sum(written))


@pytest.mark.parametrize("rank", ["auto", 1, 3])
def test_svd_is_the_best_approximation(tmp_path, rank):
    """Eckart & Young 1936, on the dense sum; `auto` is the largest source rank."""
    written = adapters(tmp_path, ranks=(1, 4, 2))
    result = run(tmp_path / "out", written, WEIGHTS, method="svd", output={"rank": rank})
    found = adapter(tmp_path / "again", written, WEIGHTS, method="svd", output={"rank": rank})
    kept, energy = 0.0, 0.0
    for module, x in weighted_sum(written).items():
        u, s, vh = np.linalg.svd(x)
        r = 4 if rank == "auto" else rank
        np.testing.assert_allclose(found[module], (u[:, :r] * s[:r]) @ vh[:r], atol=1e-5 * s[0])
        kept, energy = kept + (s[:r] ** 2).sum(), energy + (s**2).sum()
    assert result.record.result == "truncated"
    assert result.record.kept == pytest.approx(kept / energy, abs=1e-6)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.999, 1.0])
def test_energy_asks_for_the_smallest_rank_that_holds_it(tmp_path, share):
    written = adapters(tmp_path)
    result = run(tmp_path / "out", written, WEIGHTS, output={"rank": f"energy:{share}"})
    for module, x in weighted_sum(written).items():
        s = np.linalg.svd(x, compute_uv=False)
        shares = np.cumsum(s**2) / (s**2).sum()
        wanted = next(i + 1 for i, value in enumerate(shares) if value >= share - 1e-9)
        (found,) = (m.rank for m in result.record.modules if m.target == module)
        assert found == wanted
    assert result.record.lowest_kept >= share - 1e-6


def test_weights_of_a_module_are_products(tmp_path):
    written = adapters(tmp_path)
    weights = {
        "policy": "per_layer",
        "default": 9.0,
        "layers": {"0": 0.5, "1": {"a": 2.0, "b": -1.0}},
    }
    expected = {}
    for module, stack in stacks(written).items():
        factors = [0.5, 0.5, 0.5] if ".0." in module else [2.0, -1.0, 1.0]
        expected[module] = sum(w * f * x for w, f, x in zip(WEIGHTS, factors, stack, strict=True))
    assert_equal(adapter(tmp_path / "out", written, WEIGHTS, weights=weights), expected)
    assert set(expected) == set(MODULES)
