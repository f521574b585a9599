"""RegMean (Jin et al. 2023): closest to every model's outputs on its own inputs, α on the off-diagonals; here with a ridge."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import plait
from tests.adapters_on_disk import Experts, Linear, layers, read_deltas, write_adapter
from tests.reference.harness import MODULES, assert_equal
from tests.reference.least_squares import adapters, fit, inputs, merged, moments, save

WEIGHTS = [0.7, 1.6, -0.9]


def damped(x, alpha):
    """Inputs whose second moments are those of x with α times the off-diagonal entries."""
    spread = np.sqrt((1 - alpha) * len(x) * np.diag(moments(x)))
    rows = np.concatenate([np.sqrt(alpha) * x, np.diag(spread)])
    return rows * np.sqrt(len(rows) / len(x))


def reading(written, found, weights, ridge=1e-2, alpha=0.9):
    result = {}
    for module in MODULES:
        names = [n for n in written if (n, module) in found]
        targets = [
            weights[list(written).index(n)] * written[n].deltas.get(module, np.zeros(shape_of(written, module))) for n in names
        ]
        xs = [damped(found[n, module], alpha) for n in names]
        total = sum(moments(x) for x in xs)
        result[module] = fit(targets, xs, ridge * np.trace(total) / len(total))
    return result


def shape_of(written, module):
    return next(w.deltas[module].shape for w in written.values() if module in w.deltas)


@pytest.mark.parametrize(("ridge", "alpha"), [(1e-2, 0.9), (1e-1, 1.0), (1e-3, 0.1), (0.5, 0.0)])
def test_it_is_the_least_squares_solution(tmp_path, ridge, alpha):
    written = adapters(tmp_path)
    found = inputs(written)
    folder = save(tmp_path / "moments", found)
    settings = {"method": "regmean", "ridge": ridge, "off_diagonal": alpha, "weights": WEIGHTS, "moments": folder}
    result = merged(tmp_path / "out", written, **settings)
    assert_equal(result, reading(written, found, WEIGHTS, ridge, alpha), 5e-6)


def test_without_ridge_it_is_the_papers_formula_on_whole_weights(tmp_path):
    """(Σ Xᵀ X)⁻¹ Σ Xᵀ X W, with W the base's weight plus the delta; the smallest ridge is what is left of a difference."""
    written = adapters(tmp_path)
    found = inputs(written)
    folder = save(tmp_path / "moments", found)
    result = merged(tmp_path / "out", written, method="regmean", ridge=0, off_diagonal=1, moments=folder)
    rng = np.random.default_rng(5)
    for module in MODULES:
        base = rng.normal(size=shape_of(written, module))
        grams = [moments(found[n, module]) for n in written]
        whole = [(base + w.deltas[module]).T for w in written.values()]
        expected = np.linalg.inv(sum(grams)) @ sum(g @ x for g, x in zip(grams, whole, strict=True))
        assert_equal({module: result[module]}, {module: expected.T - base}, 2e-3)


def test_the_result_has_the_sum_of_the_ranks_and_nothing_is_lost(tmp_path):
    written = adapters(tmp_path)
    found = inputs(written)
    folder = save(tmp_path / "moments", found)
    result = plait.merge({n: w.folder for n, w in written.items()}, method="regmean", moments=folder, out=tmp_path / "out")
    # Σ r = 6, but for modules with 5 rows
    assert {m.target: m.rank for m in result.record.modules} == {m: 6 if "q_proj" in m else 5 for m in MODULES}
    assert result.record.result == "exact"
    assert_equal(read_deltas(result.folder, MODULES), reading(written, found, [1, 1, 1]), 5e-6)


def test_an_adapter_without_the_module_pulls_to_zero_only_where_it_has_inputs(tmp_path):
    written = adapters(tmp_path / "a")
    lacking = {m: x for m, x in MODULES.items() if "q_proj" not in m}
    written["c"] = write_adapter(tmp_path / "a" / "short", lacking, r=3, alpha=3.0, seed=2)
    without, with_inputs = inputs(written), inputs(written, missing=True)
    results = []
    for label, found in (("without", without), ("with", with_inputs)):
        folder = save(tmp_path / label, found)
        results.append(merged(tmp_path / f"out-{label}", written, method="regmean", moments=folder))
        assert_equal(results[-1], reading(written, found, [1, 1, 1]), 5e-6)
    module = next(m for m in MODULES if "q_proj" in m)
    assert np.linalg.norm(results[1][module]) < 0.9 * np.linalg.norm(results[0][module])


def test_an_adapter_that_sees_nothing_else_is_kept(tmp_path):
    """Inputs in orthogonal subspaces: each delta stays as it was on its own, and nothing of the others is felt there."""
    modules = layers(1, {"q_proj": (4, 6)})
    written = {n: write_adapter(tmp_path / n, modules, r=2, alpha=2.0, seed=s) for n, s in (("a", 0), ("b", 1))}
    (module,) = modules
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(40, 6)), rng.normal(size=(40, 6))
    first[:, 3:], second[:, :3] = 0, 0
    folder = save(tmp_path / "moments", {("a", module): first, ("b", module): second})
    result = merged(tmp_path / "out", written, method="regmean", ridge=0, off_diagonal=1, moments=folder)[module]
    assert_equal({"a": result[:, :3]}, {"a": written["a"].deltas[module][:, :3]}, 1e-4)
    assert_equal({"b": result[:, 3:]}, {"b": written["b"].deltas[module][:, 3:]}, 1e-4)


def test_no_inputs_leave_the_mean(tmp_path):
    written = adapters(tmp_path)
    found = {key: 0 * x for key, x in inputs(written).items()}
    result = merged(tmp_path / "out", written, method="regmean", moments=save(tmp_path / "moments", found))
    assert_equal(result, {m: np.mean([w.deltas[m] for w in written.values()], axis=0) for m in MODULES}, 5e-6)


def test_every_expert_has_its_own_inputs(tmp_path):
    modules = {"layers.0.mlp.experts.down_proj": Experts(3, 5, 4), "layers.0.q_proj": Linear(5, 4)}
    settings = {"target_parameters": ["experts.down_proj"]}
    written = {n: write_adapter(tmp_path / n, modules, r=2, alpha=2.0, seed=s, **settings) for n, s in (("a", 0), ("b", 1))}
    rng = np.random.default_rng(1)
    found = {(n, m): rng.normal(size=(3, 30, 4) if "experts" in m else (30, 4)) for n in written for m in modules}
    for (name, module), x in found.items():
        if "experts" in module:
            x[1] *= 3 if name == "a" else 0.1
    grams = {key: np.stack([moments(e) for e in x]) if x.ndim == 3 else moments(x) for key, x in found.items()}
    result = merged(
        tmp_path / "out",
        written,
        method="regmean",
        moments=lambda adapter, module: torch.from_numpy(grams[adapter, module]),
    )
    module = "layers.0.mlp.experts.down_proj"
    for expert in range(3):
        xs = [damped(found[n, module][expert], 0.9) for n in written]
        total = sum(moments(x) for x in xs)
        expected = fit([w.deltas[module][expert] for w in written.values()], xs, 1e-2 * np.trace(total) / 4)
        assert_equal({module: result[module][expert]}, {module: expected}, 5e-6)


@pytest.mark.parametrize("apart", [1e-1, 1e-3, 1e-5])
def test_inputs_that_all_but_agree_do_not_blow_the_result_up(tmp_path, apart):
    """Adapters that answer one input differently: the plain solution grows as the inputs come nearer to each other."""
    written = adapters(tmp_path, 2)
    rng = np.random.default_rng(3)
    common = np.outer(rng.normal(size=40), rng.normal(size=7))
    found = {(n, m): common + apart * rng.normal(size=(40, 7)) * np.eye(7)[t] for t, n in enumerate(written) for m in MODULES}
    folder = save(tmp_path / "moments", found)
    result = merged(tmp_path / "out", written, method="regmean", ridge=0, off_diagonal=1, moments=folder)
    for module in MODULES:
        sane = 2 * np.sqrt(2) * np.mean([np.linalg.norm(w.deltas[module]) for w in written.values()])
        plain = fit([w.deltas[module] for w in written.values()], [found[n, module] for n in written], 1e-14)
        assert np.linalg.norm(plain) > 3 * sane or apart == 1e-1
        assert 0.1 * sane < np.linalg.norm(result[module]) <= sane
