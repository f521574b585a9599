"""SCE, Consensus TA, PCB-Merging, RAM and MagMax, each written here from its formulas in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest

from plait.linalg import blocks
from tests.adapters_on_disk import Experts, Linear
from tests.reference.harness import adapters, assert_equal, by_entry, dense, stacks
from tests.reference.test_ties import FIRST, exact, flatten, unflatten

WEIGHTS = [0.7, 1.6, 0.9]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return adapters(tmp_path_factory.mktemp("consensus"), ranks=(2, 3, 1))


def weighted(stack, weights=WEIGHTS):
    return {m: np.array(weights)[:, None, None] * x for m, x in stack.items()}


# ------------------------------------------------------------------------------------------------------------------- SCE


def sce(stack, density, *, divide=True):
    """Select the entries of largest variance in a matrix; weigh by mean square; erase those against the sum's sign."""
    merged = {}
    for module, x in stack.items():
        variance = np.var(x, axis=0)
        k = max(1, math.floor(density * variance.size))
        selected = variance >= np.sort(variance.ravel())[-k]
        x = np.where(selected, x, 0)
        eta = np.array([np.mean(t**2) for t in x])
        eta = eta / eta.sum()
        sign = np.sign(x.sum(0))
        agreeing = (np.sign(x) == sign) & (sign != 0)
        total = (eta[:, None, None] * x * agreeing).sum(0)
        share = (eta[:, None, None] * agreeing).sum(0)
        merged[module] = total / np.where(share > 0, share, 1) if divide else total
    return merged


@pytest.mark.parametrize("density", [0.1, 0.43, 1.0])
def test_sce(tmp_path, written, density):
    stack = weighted(stacks(written))
    for divisor in ("share", "none"):
        method = {"name": "sce", "density": density, "divisor": divisor}
        found = dense(tmp_path / divisor, written, WEIGHTS, method=method)
        assert_equal(found, sce(stack, density, divide=divisor == "share"))


def test_sce_selects_what_differs_and_not_what_is_large(tmp_path):
    written = exact(tmp_path, "a", [[9.0, 1.0, 0.1]]) | exact(tmp_path, "b", [[9.0, -3.0, 0.2]])
    found = dense(tmp_path / "out", written, method={"name": "sce", "density": 0.34})[FIRST]
    np.testing.assert_allclose(found, [[0, -3, 0]], rtol=1e-6)


def test_sce_of_adapters_that_do_not_differ_is_their_mean(tmp_path):
    written = exact(tmp_path, "a", [[9.0, 1.0]]) | exact(tmp_path, "b", [[9.0, 1.0]])
    np.testing.assert_array_equal(dense(tmp_path / "out", written, method="sce")[FIRST], [[9, 1]])


def test_sce_of_a_perfect_tie(tmp_path):
    written = exact(tmp_path, "a", [[2.0, 1.0]]) | exact(tmp_path, "b", [[-2.0, 1.0]])
    for zero_sign, expected in (("drop", 0), ("plus", 2)):
        method = {"name": "sce", "density": 1, "zero_sign": zero_sign}
        assert dense(tmp_path / zero_sign, written, method=method)[FIRST][0, 0] == expected


def test_sce_counts_all_matrices_of_a_module(tmp_path):
    """Experts are one parameter: one threshold, one share per adapter."""
    written = adapters(tmp_path, modules={"layers.0.experts.down_proj": Experts(3, 5, 4)})
    found = dense(tmp_path / "out", written, method={"name": "sce", "density": 0.3})
    assert_equal(found, _experts(sce, stacks(written), 0.3))


def _experts(method, stack, *arguments):
    flat = {m: x.reshape(len(x), -1, x.shape[-1]) for m, x in stack.items()}
    return {m: x.reshape(stack[m].shape[1:]) for m, x in method(flat, *arguments).items()}


@pytest.mark.parametrize("name", ["sce", "consensus", "pcb", "ram_plus"])
def test_the_cut_into_blocks_makes_no_difference(tmp_path, written, name, monkeypatch):
    whole = dense(tmp_path / "whole", written, WEIGHTS, method=name)
    monkeypatch.setattr(blocks, "MATRIX_BLOCK_ELEMENTS", 14)
    monkeypatch.setattr(blocks, "HOLD_ELEMENTS", 0)
    for module, x in dense(tmp_path / "cut", written, WEIGHTS, method=name).items():
        np.testing.assert_allclose(x, whole[module], rtol=1e-6)
        np.testing.assert_array_equal(x == 0, whole[module] == 0)


# ------------------------------------------------------------------------------------------------------------- consensus


def consensus(stack, thresholds, wanted_by):
    def entry(tau):
        merged = sum(tau)
        wants = sum(abs(t) > bound * abs(merged - t) for t, bound in zip(tau, thresholds, strict=True))
        return merged if wants >= wanted_by else 0.0

    return by_entry(stack, entry)


@pytest.mark.parametrize(("threshold", "wanted_by"), [(0.4, 2), (0.2, 3), (0.6, 1), ([0.2, 0.6, 0.4], 2), (0.3, 0)])
def test_consensus(tmp_path, written, threshold, wanted_by):
    each = threshold if isinstance(threshold, list) else [threshold] * 3
    method = {"name": "consensus", "threshold": threshold, "wanted_by": wanted_by}
    found = dense(tmp_path / "out", written, WEIGHTS, method=method)
    assert_equal(found, consensus(weighted(stacks(written)), each, wanted_by))


def test_consensus_drops_selfish_and_catastrophic_entries(tmp_path):
    """Entries: both want it, one wants it, they cancel so that neither gets what it wants."""
    written = exact(tmp_path, "a", [[1.0, 5.0, 1.0]]) | exact(tmp_path, "b", [[1.0, 0.1, 0.0]])
    np.testing.assert_array_equal(dense(tmp_path / "out", written, method="consensus")[FIRST], [[2, 0, 0]])


def test_one_adapter_is_consensus_enough(tmp_path):
    written = exact(tmp_path, "a", [[1.0, -5.0]])
    np.testing.assert_array_equal(dense(tmp_path / "out", written, method="consensus")[FIRST], [[1, -5]])


def test_thresholds_of_the_wrong_number_are_refused(tmp_path, written):
    with pytest.raises(ValueError, match="threshold has 2 numbers for 3 adapters; give one, or one for each"):
        dense(tmp_path / "out", written, method={"name": "consensus", "threshold": [0.2, 0.3]})


# ------------------------------------------------------------------------------------------------------------------- PCB


def normed(x):
    low, high = x.min(), x.max()
    return (x - low) / (high - low)


def softmax(x):
    return np.exp(x) / np.exp(x).sum()


def pcb_paper(tau, weights, density):
    """Equations 2 to 5 on whole vectors (T, D); β is normalised over what is kept, and the rest is 0."""
    adapters, entries = tau.shape
    share = []
    for t in range(adapters):
        intra = softmax(adapters * normed(tau[t] * tau[t]))
        inter = sum(softmax(normed(tau[t] * tau[s])) for s in range(adapters))
        beta = intra * inter
        kept = beta >= np.sort(beta)[int((1 - density) * entries)]
        share.append(normed(np.where(kept, beta, 0)))
    return (np.array(share) * np.array(weights)[:, None] * tau).sum(0) / np.maximum(np.sum(share, axis=0), 1e-300)


def pcb_code(tau, weights, density):
    """Clamp, square the normed magnitudes, multiply by the product with the sum; keep the top by clamping from below."""
    adapters, entries = tau.shape
    size = np.sort(np.abs(tau), axis=1)
    low, high = size[:, int(entries * 1e-4)], size[:, int(entries * (1 - 1e-4) - 1)]
    clamped = np.sign(tau) * np.clip(np.abs(tau), low[:, None], high[:, None])
    share = []
    for t in range(adapters):
        beta = np.exp(adapters * normed(np.abs(clamped[t])) ** 2) * (tau[t] * tau.sum(0))
        kept = np.sort(beta)[int(entries * (1 - density))]
        assert kept > 0, "below 0 the code gives opposed entries a say, and plait does not"
        share.append(normed(np.maximum(beta, kept)))
    return (np.array(share) * np.array(weights)[:, None] * clamped).sum(0) / np.maximum(np.sum(share, axis=0), 1e-300)


READINGS = {"paper": pcb_paper, "code": pcb_code}


@pytest.mark.parametrize("scope", ["model", "module"])
@pytest.mark.parametrize("density", [0.1, 0.22])
@pytest.mark.parametrize("reading", READINGS)
def test_pcb(tmp_path, written, reading, density, scope):
    stack = stacks(written)
    if scope == "model":
        expected = unflatten(READINGS[reading](flatten(stack), WEIGHTS, density), stack)
    else:
        expected = {
            m: READINGS[reading](x.reshape(len(x), -1), WEIGHTS, density).reshape(x.shape[1:]) for m, x in stack.items()
        }
    method = {"name": "pcb", "reading": reading, "density": density, "scope": scope}
    assert_equal(dense(tmp_path / "out", written, WEIGHTS, method=method), expected, 5e-6)


def test_the_readings_of_pcb_differ(written):
    stack = flatten(stacks(written))
    paper, code = (reading(stack, WEIGHTS, 0.1) for reading in READINGS.values())
    assert np.abs(paper - code).max() > 0.1 * np.abs(paper).max()


def test_a_tanh_would_change_nothing_at_the_size_of_deltas(written):
    """The authors' code takes tanh of τₜ Στ: at the size of real deltas that is the product itself."""
    tau = flatten(stacks(written)) * 1e-3
    product = tau * tau.sum(0)
    np.testing.assert_allclose(np.tanh(product), product, rtol=1e-6)


# ------------------------------------------------------------------------------------------------------- RAM and MagMax


def ram(tau, boost=0.0, cap=0.2):
    """Whole vectors (T, D) in which unchanged entries are 0."""
    active = tau != 0
    owners = active.sum(0)
    merged = np.zeros(tau.shape[1])
    for t, changed in enumerate(active):
        own, shared = changed & (owners == 1), changed & (owners > 1)
        rho = shared.sum() / max(1, own.sum())
        merged += np.where(own, (1 + boost * min(rho, cap)) * tau[t], 0) + np.where(shared, tau[t] / np.maximum(owners, 1), 0)
    return merged


def largest(vector, density):
    kept = np.argsort(-np.abs(vector))[: max(1, math.floor(density * len(vector)))]
    result = np.zeros_like(vector)
    result[kept] = vector[kept]
    return result


@pytest.mark.parametrize("scope", ["model", "module"])
@pytest.mark.parametrize(("name", "params"), [("ram", {}), ("ram_plus", {}), ("ram_plus", {"boost": 3.0, "cap": 0.9})])
def test_ram(tmp_path, written, name, params, scope):
    boost, cap = (params.get("boost", 0.1), params.get("cap", 0.2)) if name == "ram_plus" else (0, 0)

    def merged(tau):
        trimmed = np.stack([largest(t, 0.3) for t in tau])
        return ram(np.array(WEIGHTS)[:, None] * trimmed, boost, cap)

    stack = stacks(written)
    if scope == "model":
        expected = unflatten(merged(flatten(stack)), stack)
    else:
        expected = {m: merged(x.reshape(len(x), -1)).reshape(x.shape[1:]) for m, x in stack.items()}
    method = {"name": name, "density": 0.3, "scope": scope, **params}
    assert_equal(dense(tmp_path / "out", written, WEIGHTS, method=method), expected)


def test_ram_as_its_authors_threshold(tmp_path):
    """|x| > 1e-5, spelled with stages: shared entries are averaged, own ones kept, tiny ones gone."""
    written = exact(tmp_path, "a", [[4.0, 3.0, 5e-6]]) | exact(tmp_path, "b", [[2.0, 1e-6, 5e-6]])
    method = {"pre": [{"name": "cutoff", "above": 1e-5}], "combine": "average_shared"}
    np.testing.assert_array_equal(dense(tmp_path / "out", written, method=method)[FIRST], [[3, 3, 0]])


def test_magmax(tmp_path, written):
    expected = by_entry(weighted(stacks(written), [0.7, -1.6, 0.9]), lambda tau: max(tau, key=abs))
    assert_equal(dense(tmp_path / "out", written, [0.7, -1.6, 0.9], method="magmax"), expected)


def test_magmax_of_equals(tmp_path):
    written = exact(tmp_path, "a", [[4.0, 3.0]]) | exact(tmp_path, "b", [[-4.0, 3.0]])
    np.testing.assert_array_equal(dense(tmp_path / "out", written, method="magmax")[FIRST], [[0, 3]])


def test_an_adapter_that_lacks_a_module_has_no_say_there(tmp_path):
    both, one = (
        {"model.layers.0.proj": Linear(6, 5), "model.layers.1.proj": Linear(4, 5)},
        {"model.layers.0.proj": Linear(6, 5)},
    )
    written = adapters(tmp_path / "both", 1, both) | {"b": adapters(tmp_path / "one", 2, one)["b"]}
    alone = stacks(written)["model.layers.1.proj"][0]
    for name in ("ram", "magmax", "pcb"):
        found = dense(tmp_path / name, written, method={"name": name, "density": 1} if name != "magmax" else name)
        np.testing.assert_allclose(found["model.layers.1.proj"], alone, rtol=1e-5)
