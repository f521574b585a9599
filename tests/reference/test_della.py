"""DELLA (Deep et al. 2024, §3): keep probabilities by the rank of a magnitude within its row, then as DARE-TIES."""

from __future__ import annotations

import numpy as np
import pytest

from tests.reference.harness import adapters, assert_equal, dense, recipe, stacks
from tests.reference.keyed_integers import uniforms
from tests.reference.test_dare import elected

WEIGHTS = [0.7, -1.6, 0.9]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return adapters(tmp_path_factory.mktemp("della"))


def magprune(stack, names, seed, density, epsilon):
    """Row by row: rank 0 is the smallest magnitude; p rises in equal steps from density − ε to density + ε."""
    pruned = {}
    for module, x in stack.items():
        pruned[module] = np.zeros_like(x)
        for t, name in enumerate(names):
            draws = uniforms(seed, (name, module, "0", "delta"), *x.shape[1:])
            for i, row in enumerate(x[t]):
                order = sorted(range(len(row)), key=lambda j, row=row: abs(row[j]))
                for rank, j in enumerate(order):
                    p = density if len(row) == 1 else density - epsilon + 2 * epsilon * rank / (len(row) - 1)
                    if draws[i, j] < p:
                        pruned[module][t, i, j] = row[j] / p
    return pruned


@pytest.mark.parametrize(("density", "epsilon"), [(0.7, 0.07), (0.5, 0.4), (0.3, 0.0), (1.0, 0.0)])
def test_della(tmp_path, written, density, epsilon):
    expected = elected(magprune(stacks(written), written, 4, density, epsilon), WEIGHTS)
    method = {"name": "della", "density": density, "epsilon": epsilon}
    assert_equal(dense(tmp_path / "out", written, WEIGHTS, method=method, seed=4), expected)


@pytest.mark.parametrize("election", [{"sign": "frequency"}, {"weighted_vote": True, "divisor": "weight"}], ids=str)
def test_election(tmp_path, written, election):
    expected = elected(magprune(stacks(written), written, 0, 0.7, 0.07), WEIGHTS, **election)
    assert_equal(dense(tmp_path / "out", written, WEIGHTS, method={"name": "della", **election}), expected)


def test_without_epsilon_it_is_dare_ties(tmp_path, written):
    first = dense(tmp_path / "della", written, WEIGHTS, method={"name": "della", "density": 0.6, "epsilon": 0})
    second = dense(tmp_path / "dare", written, WEIGHTS, method={"name": "dare_ties", "density": 0.6})
    assert_equal(first, second)


@pytest.mark.parametrize(("density", "epsilon"), [(0.05, 0.07), (0.95, 0.07), (0.5, 0.5)])
def test_probabilities_outside_of_0_to_1_are_refused(written, density, epsilon):
    with pytest.raises(ValueError, match=r"epsilon"):
        recipe(written, method={"name": "della", "density": density, "epsilon": epsilon})
