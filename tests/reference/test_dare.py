"""DARE (Yu et al. 2024, eq. 2–4): x̂ = m ⊙ x / (1 − p) with m ~ Bernoulli(1 − p), then a sum, or TIES' election.

The masks come from the keyed integers, so that what is random is known; then they are looked at as random numbers.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.adapters_on_disk import Experts, Linear, write_adapter
from tests.every import every
from tests.reference.harness import adapter, adapters, assert_equal, dense, recipe, stacks
from tests.reference.keyed_integers import mask, uniforms

WEIGHTS = [0.7, -1.6, 0.9]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return adapters(tmp_path_factory.mktemp("dare"))


def dropped(stack, names, seed, density):
    """Eq. 3 and 4: zero what the mask drops, divide the rest by 1 − p."""
    return {
        module: np.stack([mask(seed, n, module, t.shape, density) * t / density for n, t in zip(names, x, strict=True)])
        for module, x in stack.items()
    }


def elected(stack, weights, *, sign="total", weighted_vote=False, zero="drop", divisor="count", majority=0.0):
    """TIES' steps 2 and 3 on what is left, entry by entry."""
    merged = {}
    for module, x in stack.items():
        merged[module] = np.zeros(x.shape[1:])
        for place in np.ndindex(x.shape[1:]):
            values = x[(slice(None), *place)]
            voters = [w * v for w, v in zip(weights, values, strict=True)] if weighted_vote else list(values)
            gamma = np.sign(sum(voters) if sign == "total" else sum(np.sign(voters)))
            if gamma == 0:
                gamma = {"drop": 0, "plus": 1, "majority": majority}[zero]
            agreeing = [t for t, v in enumerate(voters) if gamma != 0 and np.sign(v) == gamma]
            over = {"count": len(agreeing), "weight": sum(weights[t] for t in agreeing), "none": 1}[divisor]
            over = over if abs(over) > 1e-8 else 1  # weights that cancel
            if agreeing:
                merged[module][place] = sum(weights[t] * values[t] for t in agreeing) / over
    return merged


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_dare_linear(tmp_path, written, density):
    x = dropped(stacks(written), written, 5, density)
    expected = {m: np.tensordot(WEIGHTS, s, 1) for m, s in x.items()}
    assert_equal(
        dense(tmp_path / "out", written, WEIGHTS, method={"name": "dare_linear", "density": density}, seed=5), expected
    )


@pytest.mark.parametrize("name", ["dare_ties", "dare_ties_svd"])
@pytest.mark.parametrize(
    "election",
    [
        {},
        {"sign": "frequency"},
        {"sign": "frequency", "zero_sign": "plus"},
        {"weighted_vote": True, "divisor": "weight"},
        {"divisor": "none"},
    ],
    ids=str,
)
def test_dare_ties(tmp_path, written, name, election):
    x = dropped(stacks(written), written, 3, 0.5)
    options = {"zero" if k == "zero_sign" else k: v for k, v in election.items()}
    method = {"name": name, "density": 0.5, **election}
    assert_equal(dense(tmp_path / "out", written, WEIGHTS, method=method, seed=3), elected(x, WEIGHTS, **options))


def test_dare_ties_with_the_majority_of_the_model(tmp_path, written):
    """The majority is that of the elected signs over all modules, after dropping."""
    x = dropped(stacks(written), written, 4, 0.5)
    majority = np.sign(sum(np.sign(np.sign(s).sum(0)).sum() for s in x.values()))
    assert majority != 0
    expected = elected(x, WEIGHTS, sign="frequency", zero="majority", majority=majority)
    method = {"name": "dare_ties", "density": 0.5, "sign": "frequency", "zero_sign": "majority"}
    assert_equal(dense(tmp_path / "out", written, WEIGHTS, method=method, seed=4), expected)


@pytest.mark.parametrize("name", ["dare_linear_svd", "dare_ties_svd"])
def test_svd_variants_truncate_to_the_largest_source_rank(tmp_path, written, name):
    x = dropped(stacks(written), written, 0, 0.5)
    merged = elected(x, WEIGHTS) if "ties" in name else {m: np.tensordot(WEIGHTS, s, 1) for m, s in x.items()}
    for module, found in adapter(tmp_path / "out", written, WEIGHTS, method=name).items():
        u, s, vh = np.linalg.svd(merged[module])
        np.testing.assert_allclose(found, (u[:, :2] * s[:2]) @ vh[:2], atol=1e-5 * s[0])


def test_factors_draw_for_a_and_for_b(tmp_path):
    """PEFT drops entries of A and of B apart, then weighs A by sign(c) √|c| and B by √|c| with c = weight · scaling."""
    rng = np.random.default_rng(0)
    values = {n: (rng.standard_normal((2, 7)), rng.standard_normal((5, 2))) for n in "ab"}
    written = {
        n: write_adapter(tmp_path / n, {"proj": Linear(5, 7, values=v)}, r=2, alpha=3.0 + i)
        for i, (n, v) in enumerate(values.items())
    }
    weights = [0.7, -0.4]
    a, b = np.zeros((2, 7)), np.zeros((5, 2))
    for (name, (own_a, own_b)), w in zip(values.items(), weights, strict=True):
        c = w * written[name].scalings["proj"]
        a += np.sign(c) * np.sqrt(abs(c)) * own_a * mask(1, name, "proj", a.shape, 0.5, "A") / 0.5
        b += np.sqrt(abs(c)) * own_b * mask(1, name, "proj", b.shape, 0.5, "B") / 0.5
    method = {"name": "dare_linear", "space": "factors", "density": 0.5}
    assert_equal(dense(tmp_path / "out", written, weights, method=method, seed=1), {"proj": b @ a})


def ones(folder, name, modules):
    """An adapter whose deltas are all ones: what DARE leaves of it is its mask."""
    values = {
        m: Linear(rows, columns, values=(np.ones((1, columns)), np.ones((rows, 1)))) for m, (rows, columns) in modules.items()
    }
    return {name: write_adapter(folder / name, values, r=1, alpha=1.0)}


def masks(folder, written, seed=0, density=0.3):
    found = dense(folder, written, method={"name": "dare_linear", "density": density}, seed=seed)
    return {m: x != 0 for m, x in found.items()}


SIZES = {"model.layers.0.proj": (200, 300), "model.layers.1.proj": (200, 300)}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Masks of two adapters in two modules, and of one adapter with another seed."""
    folder = tmp_path_factory.mktemp("masks")
    first, second = ones(folder, "first", SIZES), ones(folder, "second", SIZES)
    return {
        **{("first", 0, m): x for m, x in masks(folder / "1", first).items()},
        **{("second", 0, m): x for m, x in masks(folder / "2", second).items()},
        **{("first", 1, m): x for m, x in masks(folder / "3", first, seed=1).items()},
    }


def test_the_rate_is_the_density(drawn):
    n = 200 * 300
    for found in drawn.values():
        assert abs(found.mean() - 0.3) < 5 * (0.3 * 0.7 / n) ** 0.5
        rows, columns = found.mean(1), found.mean(0)
        assert np.abs(rows - 0.3).max() < 6 * (0.21 / 300) ** 0.5
        assert np.abs(columns - 0.3).max() < 6 * (0.21 / 200) ** 0.5


def test_masks_of_adapters_modules_and_seeds_are_independent(drawn):
    bound = 5 / (200 * 300) ** 0.5
    streams = list(drawn.values())
    for i, x in enumerate(streams):
        for y in streams[:i]:
            assert abs(np.corrcoef(x.ravel(), y.ravel())[0, 1]) < bound


def test_a_mask_belongs_to_the_adapter_and_not_to_its_place(tmp_path, drawn):
    """In a merge with another, in either order, each keeps what it keeps alone: 1 and 10 apart in the sum."""
    both = ones(tmp_path, "first", SIZES) | ones(tmp_path, "second", SIZES)
    alone = drawn["first", 0, "model.layers.0.proj"] * 1.0 + drawn["second", 0, "model.layers.0.proj"] * 10
    method = {"name": "dare_linear", "density": 0.3}
    forth = dense(tmp_path / "forth", both, [1, 10], method=method)
    back = dense(tmp_path / "back", dict(reversed(both.items())), [10, 1], method=method)
    np.testing.assert_allclose(forth["model.layers.0.proj"] * 0.3, alone, atol=1e-5)
    np.testing.assert_allclose(back["model.layers.0.proj"] * 0.3, alone, atol=1e-5)


def test_the_sum_is_kept_on_average(drawn):
    """1 / density makes up for what was dropped: E[m / density] = 1."""
    for found in drawn.values():
        assert abs((found / 0.3).mean() - 1) < 5 * (0.7 / 0.3 / found.size) ** 0.5


def test_the_mean_over_seeds_is_the_delta(tmp_path):
    """Over 200 seeds, through one prepared merge: the mean of what DARE makes of a random delta is the delta."""
    from plait.testing import cohort, subject_of
    from plait.testing.subject import installed

    adapters_in_memory = cohort([(6, 5)], [2, 1])
    subject = subject_of("dare_linear", {"density": 0.4})
    (module,) = adapters_in_memory.shapes
    exact = sum(adapters_in_memory.weights[n] * adapters_in_memory.delta(n, module) for n in adapters_in_memory.factors)
    with installed(subject.method):
        draws = np.stack([subject.merge(adapters_in_memory, "delta", seed=s)[module].numpy() for s in range(200)])
    spread = draws.std(0) / 200**0.5
    assert (np.abs(draws.mean(0) - exact.numpy()) < 4.5 * spread + 1e-12).all()


def test_experts_have_a_mask_each(tmp_path):
    """The index of the matrix is part of the key."""
    count, rows, columns = 3, 40, 30
    module = Experts(count, rows, columns, values=(np.ones((count, columns)), np.ones((rows, count))))
    path = "layers.0.experts.down_proj"
    written = {"a": write_adapter(tmp_path / "a", {path: module}, r=1, alpha=1.0)}
    found = dense(tmp_path / "out", written, method={"name": "dare_linear", "density": 0.5}, seed=2)[path]
    for index in range(count):
        expected = uniforms(2, ("a", path, str(index), "delta"), rows, columns) < 0.5
        np.testing.assert_array_equal(found[index] != 0, expected)


@every("bad", [{"density": 0}, {"density": 1.01}, {"density": -0.5}, {"density": float("nan")}, {"drop_rate": 0.5}])
def test_densities_that_mean_nothing_are_refused(written, bad):
    with pytest.raises(ValueError, match=r"density|drop_rate"):
        recipe(written, method={"name": "dare_linear", **bad})
