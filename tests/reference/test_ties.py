"""TIES (Yadav et al. 2023, Algorithm 1) and the readings of it in circulation, each written here from its description.

Every reading takes stacks (T, m, n) per module, weights and a density, and returns one delta per module, in float64.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.adapters_on_disk import Experts, Linear, write_adapter
from tests.reference.harness import adapter, adapters, assert_equal, dense, run, stacks

WEIGHTS = [0.7, 1.6, 0.9]


def flatten(stack):
    """Every adapter as one long vector, (T, entries)."""
    return np.concatenate([x.reshape(len(x), -1) for x in stack.values()], axis=1)


def unflatten(vector, stack):
    parts, start = {}, 0
    for module, x in stack.items():
        size = x[0].size
        parts[module] = vector[start : start + size].reshape(x.shape[1:])
        start += size
    return parts


def keep_largest(vector, count):
    """Zero all but `count` entries of largest magnitude; no two magnitudes are equal in these tests."""
    kept = np.zeros_like(vector)
    largest = np.argsort(-np.abs(vector))[:count]
    kept[largest] = vector[largest]
    return kept


def paper(stack, weights, density):
    """Algorithm 1: trim each whole task vector to its top-k %, elect by total magnitude, mean of those that agree.

    The weights are not in the paper; here they multiply what has survived.
    """
    tau = flatten(stack)
    k = max(1, math.floor(density * tau.shape[1]))
    trimmed = np.stack([keep_largest(t, k) for t in tau])
    gamma = np.sign(trimmed.sum(0))
    merged = np.zeros(tau.shape[1])
    for p in range(tau.shape[1]):
        agreeing = [t for t in range(len(tau)) if gamma[p] != 0 and np.sign(trimmed[t, p]) == gamma[p]]
        if agreeing:
            merged[p] = sum(weights[t] * trimmed[t, p] for t in agreeing) / len(agreeing)
    return unflatten(merged, stack)


def peft(stack, weights, density, sign="total"):
    """Per tensor; the vote knows no weights; a tie is plus; divided by the count of those that agree."""
    merged = {}
    for module, x in stack.items():
        size = x[0].size
        pruned = np.stack([keep_largest(t.ravel(), int(density * size)) for t in x])
        votes = (pruned if sign == "total" else np.sign(pruned)).sum(0)
        majority = np.where(votes >= 0, 1, -1)
        mask = np.sign(pruned) == majority
        counted = np.maximum(mask.sum(0), 1)
        merged[module] = ((np.array(weights)[:, None] * pruned * mask).sum(0) / counted).reshape(x.shape[1:])
    return merged


def mergekit(stack, weights, density, sign="total"):
    """Per tensor; weights come before the vote; a tie is plus; divided by the weights of those that agree."""
    merged = {}
    for module, x in stack.items():
        size = x[0].size
        result = np.zeros(size)
        pruned = [keep_largest(t.ravel(), int(density * size)) for t in x]
        for p in range(size):
            weighted = [w * t[p] for w, t in zip(weights, pruned, strict=True)]
            vote = sum(weighted) if sign == "total" else sum(np.sign(weighted))
            elected = 1.0 if vote >= 0 else -1.0
            agreeing = [t for t, v in enumerate(weighted) if np.sign(v) == elected]
            divisor = sum(weights[t] for t in agreeing)
            result[p] = sum(weighted[t] for t in agreeing) / (divisor if abs(divisor) > 1e-8 else 1)
        merged[module] = result.reshape(x.shape[1:])
    return merged


def at_least_kth(vector, density):
    """Threshold at the (d − int(dK))-th smallest magnitude and keep what is at least that: one entry more than int(dK)."""
    d = len(vector)
    k = max(1, d - int(d * density))
    threshold = np.sort(np.abs(vector))[k - 1]
    return np.where(np.abs(vector) >= threshold, vector, 0)


def elected_with_majority(trimmed, sign):
    votes = np.sign((trimmed if sign == "total" else np.sign(trimmed)).sum(0))
    return np.where(votes == 0, np.sign(votes.sum()), votes)


def fusion_bench(stack, weights, density, sign="total"):
    """Over all layers at once; k-th value kept too; a tie takes the majority sign; sum of those that agree, no division."""
    trimmed = np.stack([at_least_kth(t, density) for t in flatten(stack)])
    elected = elected_with_majority(trimmed, sign)
    agreeing = np.sign(trimmed) == elected
    return unflatten((np.array(weights)[:, None] * trimmed * agreeing).sum(0), stack)


def core_space(stack, weights, density, sign="total"):
    """Per layer; k-th value kept too; a tie takes the layer's majority sign; mean of those that agree."""
    merged = {}
    for module, x in stack.items():
        trimmed = np.stack([at_least_kth(t.ravel(), density) for t in x])
        agreeing = np.sign(trimmed) == elected_with_majority(trimmed, sign)
        total = (np.array(weights)[:, None] * trimmed * agreeing).sum(0)
        merged[module] = (total / np.maximum(agreeing.sum(0), 1)).reshape(x.shape[1:])
    return merged


READINGS = {"paper": paper, "peft": peft, "mergekit": mergekit, "fusion_bench": fusion_bench, "core_space": core_space}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return adapters(tmp_path_factory.mktemp("ties"))


@pytest.mark.parametrize("density", [0.2, 0.37, 0.9])
@pytest.mark.parametrize("flavor", READINGS)
def test_flavor(tmp_path, written, flavor, density):
    expected = READINGS[flavor](stacks(written), WEIGHTS, density)
    method = {"name": "ties", "flavor": flavor, "density": density}
    assert_equal(dense(tmp_path / "out", written, WEIGHTS, method=method), expected)
    flavored = {name: reading(stacks(written), WEIGHTS, density) for name, reading in READINGS.items()}
    others = [f for f in READINGS if f != flavor and any(np.abs(flavored[f][m] - x).max() > 1e-3 for m, x in expected.items())]
    assert len(others) == 4, "these adapters do not tell the flavors apart"


@pytest.mark.parametrize("flavor", ["peft", "mergekit", "fusion_bench", "core_space"])
def test_vote_by_heads(tmp_path, written, flavor):
    expected = READINGS[flavor](stacks(written), WEIGHTS, 0.6, sign="frequency")
    method = {"name": "ties", "flavor": flavor, "density": 0.6, "sign": "frequency"}
    assert_equal(dense(tmp_path / "out", written, WEIGHTS, method=method), expected)


@pytest.mark.parametrize("flavor", ["paper", "peft", "mergekit", "core_space"])
def test_negative_weights(tmp_path, written, flavor):
    """In mergekit's reading an adapter of negative weight votes, and agrees, with its sign turned."""
    weights = [0.7, -0.8, 0.9]
    expected = READINGS[flavor](stacks(written), weights, 0.5)
    assert_equal(dense(tmp_path / "out", written, weights, method={"name": "ties", "flavor": flavor, "density": 0.5}), expected)


def test_the_default_is_the_paper(tmp_path, written):
    assert_equal(dense(tmp_path / "out", written, WEIGHTS, method="ties"), paper(stacks(written), WEIGHTS, 0.2))


def test_density_one_trims_nothing(tmp_path, written):
    for flavor in READINGS:
        expected = READINGS[flavor](stacks(written), WEIGHTS, 1.0)
        method = {"name": "ties", "flavor": flavor, "density": 1}
        assert_equal(dense(tmp_path / flavor, written, WEIGHTS, method=method), expected)


def test_scale_is_the_lambda(tmp_path, written):
    expected = {m: 1.7 * x for m, x in paper(stacks(written), WEIGHTS, 0.2).items()}
    assert_equal(dense(tmp_path / "out", written, WEIGHTS, method="ties", scale=1.7), expected)


def test_explicit_parameters_win_over_the_flavor(tmp_path, written):
    method = {"name": "ties", "flavor": "mergekit", "weighted_vote": False, "divisor": "count", "density": 0.3}
    assert_equal(dense(tmp_path / "out", written, WEIGHTS, method=method), peft(stacks(written), WEIGHTS, 0.3))


def test_ties_svd_reads_as_peft_does_and_truncates(tmp_path, written):
    expected = peft(stacks(written), WEIGHTS, 0.5)
    method = {"name": "ties_svd", "density": 0.5}
    assert_equal(dense(tmp_path / "dense", written, WEIGHTS, method=method), expected)
    result = run(tmp_path / "out", written, WEIGHTS, method=method)
    assert (result.record.result, result.record.rank) == ("truncated", 2)
    for module, x in adapter(tmp_path / "again", written, WEIGHTS, method=method).items():
        u, s, vh = np.linalg.svd(expected[module])
        np.testing.assert_allclose(x, (u[:, :2] * s[:2]) @ vh[:2], atol=1e-5 * s[0])


def exact(folder, name, *matrices):
    """An adapter whose deltas are exactly these matrices: A is the identity."""
    modules, rank = {}, max(np.shape(m)[1] for m in matrices)
    for i, matrix in enumerate(matrices):
        b = np.zeros((np.shape(matrix)[0], rank))
        b[:, : np.shape(matrix)[1]] = matrix
        modules[f"model.layers.{i}.proj"] = Linear(*np.shape(matrix), values=(np.eye(rank, np.shape(matrix)[1]), b))
    return {name: write_adapter(folder / name, modules, r=rank, alpha=rank)}


FIRST = "model.layers.0.proj"


@pytest.mark.parametrize(
    ("flavor", "expected"),
    [
        # entries: a tie, an agreement, two disagreements, a lone voter, nobody
        ("paper", [[0, 3, -5, -6, 1, 0]]),
        ("peft", [[4, 3, -5, -6, 1, 0]]),
        ("mergekit", [[4, 3, -5, -6, 1, 0]]),
        ("core_space", [[-4, 3, -5, -6, 1, 0]]),
        ("fusion_bench", [[-4, 6, -5, -6, 1, 0]]),
    ],
)
def test_a_tie(tmp_path, flavor, expected):
    """γ = (0, +, −, −, +, 0): the majority is even until a seventh entry says minus."""
    written = exact(tmp_path, "a", [[4, 3, -5, -6, 1, 0, -1]]) | exact(tmp_path, "b", [[-4, 3, 2, 5, 0, 0, -1]])
    found = dense(tmp_path / "out", written, method={"name": "ties", "flavor": flavor, "density": 1})[FIRST]
    np.testing.assert_array_equal(found[:, :-1], expected)


def test_the_majority_of_the_model_and_of_a_module(tmp_path):
    """A tie in the first module, where plus prevails; over both modules minus does."""
    written = exact(tmp_path, "a", [[4, 3]], [[-1, -1]]) | exact(tmp_path, "b", [[-4, 3]], [[-1, -1]])
    for scope, expected in (("module", [[4, 3]]), ("model", [[-4, 3]])):
        method = {"name": "ties", "zero_sign": "majority", "scope": scope, "density": 1}
        np.testing.assert_array_equal(dense(tmp_path / scope, written, method=method)[FIRST], expected)


def test_a_perfectly_even_majority_drops_the_tie(tmp_path):
    written = exact(tmp_path, "a", [[4, 3, -3]]) | exact(tmp_path, "b", [[-4, 3, -3]])
    method = {"name": "ties", "zero_sign": "majority", "density": 1}
    np.testing.assert_array_equal(dense(tmp_path / "out", written, method=method)[FIRST], [[0, 3, -3]])


def test_mass_and_heads_disagree(tmp_path):
    written = exact(tmp_path, "a", [[9.0, 1.0]]) | exact(tmp_path, "b", [[-2.0, 1.0]]) | exact(tmp_path, "c", [[-4.0, -3.0]])
    for vote, expected in (("total", [[9, -3]]), ("frequency", [[-3, 1]])):
        found = dense(tmp_path / vote, written, method={"name": "ties", "sign": vote, "density": 1})[FIRST]
        np.testing.assert_array_equal(found, expected)


def test_a_weighted_vote_follows_the_weights(tmp_path):
    """Values (1, −0.9) with weights (1, 10): the weighted sum is negative."""
    written = exact(tmp_path, "a", [[1.0]]) | exact(tmp_path, "b", [[-0.5]])
    weights = [1, 10]
    plain = dense(tmp_path / "plain", written, weights, method={"name": "ties", "density": 1})[FIRST]
    weighted = dense(tmp_path / "weighted", written, weights, method={"name": "ties", "density": 1, "weighted_vote": True})[
        FIRST
    ]
    assert (plain.item(), weighted.item()) == (1.0, -5.0)


def test_weights_that_cancel_are_not_divided_by(tmp_path):
    """Both adapters agree on minus (1 · −2 and −1 · 3), their weights sum to 0: the sum stays."""
    written = exact(tmp_path, "a", [[-2.0]]) | exact(tmp_path, "b", [[3.0]])
    found = dense(tmp_path / "out", written, [1, -1], method={"name": "ties", "flavor": "mergekit", "density": 1})
    assert found[FIRST].item() == mergekit(stacks(written), [1, -1], 1)[FIRST].item() == -5.0


def test_weights_that_cancel_up_to_rounding_are_not_divided_by(tmp_path):
    """0.7 − 1.6 + 0.9 is 1e-16 in binary; dividing by it would turn the merge into noise of that size."""
    written = exact(tmp_path, "a", [[1.0]]) | exact(tmp_path, "b", [[-1.0]]) | exact(tmp_path, "c", [[1.0]])
    found = dense(tmp_path / "out", written, [0.7, -1.6, 0.9], method={"name": "ties", "flavor": "mergekit", "density": 1})
    assert found[FIRST].item() == pytest.approx(3.2)


def test_a_tiny_weight_divides_itself_away(tmp_path):
    written = exact(tmp_path, "a", [[2.0, 2.0]]) | exact(tmp_path, "b", [[0.0, 1.0]])
    found = dense(tmp_path / "out", written, [1e-9, 1], method={"name": "ties", "flavor": "mergekit", "density": 1})
    np.testing.assert_allclose(found[FIRST], [[2, 1]], rtol=1e-6)


def test_entries_that_tie_with_the_threshold_are_all_kept(tmp_path):
    written = exact(tmp_path, "a", [[5, -3, 3, 1, 3]])
    for density, expected in ((0.2, [[5, 0, 0, 0, 0]]), (0.4, [[5, -3, 3, 0, 3]])):
        found = dense(tmp_path / str(density), written, method={"name": "ties", "density": density})[FIRST]
        np.testing.assert_array_equal(found, expected)


def test_a_loud_layer_takes_the_budget_of_the_model(tmp_path):
    written = exact(tmp_path, "a", [[50, 60, 70, 80]], [[1, 2, 3, 4]])
    model = dense(tmp_path / "model", written, method={"name": "ties", "density": 0.5})
    module = dense(tmp_path / "module", written, method={"name": "ties", "density": 0.5, "scope": "module"})
    np.testing.assert_array_equal(model["model.layers.1.proj"], [[0, 0, 0, 0]])
    np.testing.assert_array_equal(module["model.layers.1.proj"], [[0, 0, 3, 4]])


@pytest.mark.parametrize("density", [0.13, 0.9])
@pytest.mark.parametrize("scope", ["model", "module"])
def test_experts_share_the_trim_of_their_parameter(tmp_path, scope, density):
    """A module is the whole parameter: all its matrices are ranked together."""
    modules = {"layers.0.experts.down_proj": Experts(3, 5, 4), "layers.0.proj": Linear(6, 5)}
    written = adapters(tmp_path, modules=modules)
    reading = paper if scope == "model" else peft
    method = {"name": "ties", "density": density, "scope": scope}
    assert_equal(dense(tmp_path / "out", written, WEIGHTS, method=method), reading(stacks(written), WEIGHTS, density))


def test_divisor_weight_is_refused_on_factors(tmp_path, written):
    with pytest.raises(ValueError, match=r"divisor 'weight' .* would divide by √"):
        dense(tmp_path / "out", written, method={"name": "ties", "flavor": "mergekit", "space": "factors"})
