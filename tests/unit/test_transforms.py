"""What happens to each adapter before the method."""

from __future__ import annotations

import numpy as np
import pytest

from plait.adapters.lowrank import LowRank
from plait.methods import METHODS
from plait.recipes.schema import Recipe
from plait.transforms import TRANSFORMS, Transform, TransformParams, register_transform
from tests.adapters_on_disk import Embedding, Experts, Linear
from tests.every import every
from tests.reference.harness import adapter, adapters, assert_equal, dense, stacks

TOWERS = {
    "audio.layers.0.proj": Linear(5, 4),
    "audio.layers.1.proj": Linear(5, 4),
    "text.layers.0.q_proj": Linear(6, 5),
    "text.layers.0.experts.down_proj": Experts(2, 4, 3),
    "text.layers.1.q_proj": Linear(6, 5),
    "embed": Embedding(8, 5),
    "head": Linear(3, 5),
}
LAYERS = {
    "audio 0": ["audio.layers.0.proj"],
    "audio 1": ["audio.layers.1.proj"],
    "text 0": ["text.layers.0.q_proj", "text.layers.0.experts.down_proj"],
    "text 1": ["text.layers.1.q_proj"],
    "outside": ["embed", "head"],
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return adapters(tmp_path_factory.mktemp("transforms"), 2, TOWERS, ranks=(2, 3))


def normalised(deltas, target_norm=1.0, *, outside=True):
    """Scale the deltas of each layer to one joint Frobenius norm; one adapter."""
    result = {}
    for layer, modules in LAYERS.items():
        norm = np.sqrt(sum((deltas[m] ** 2).sum() for m in modules))
        for module in modules:
            result[module] = deltas[module] * (target_norm / norm if outside or layer != "outside" else 1)
    return result


def summed(written, weights, change):
    changed = [change(w.deltas) for w in written.values()]
    return {m: sum(w * d[m] for w, d in zip(weights, changed, strict=True)) for m in TOWERS}


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, {}),
        ({"target_norm": 2.5}, {"target_norm": 2.5}),
        ({"include_non_layer_keys": False}, {"outside": False}),
        ({"target_norm": 0}, {"target_norm": 0}),
    ],
    ids=str,
)
def test_layer_l2_normalize(tmp_path, written, params, expected) -> None:
    """One norm per layer of a tower; scalings count; audio and text layers of one index are two layers."""
    found = adapter(
        tmp_path / "out",
        written,
        [0.7, -0.4],
        TOWERS,
        transforms=[{"name": "layer_l2_normalize", **params}],
        output={"rank": "auto"},
    )
    wanted = summed(written, [0.7, -0.4], lambda d: normalised(d, **expected))
    assert_equal(found, wanted)


def test_it_acts_on_deltas_before_any_method(tmp_path, written) -> None:
    """The magnitude of a whole task vector is judged after the layers were brought to one norm."""
    transforms = ["layer_l2_normalize"]
    method = {"name": "magnitude_prune", "density": 0.3, "scope": "model"}
    found = dense(tmp_path / "out", written, method=method, transforms=transforms)
    expected = {m: 0.0 for m in TOWERS}
    for w in written.values():
        deltas = normalised(w.deltas)
        flat = np.sort(np.abs(np.concatenate([d.ravel() for d in deltas.values()])))[::-1]
        threshold = flat[int(0.3 * len(flat)) - 1] * (1 - 1e-6)
        for module, d in deltas.items():
            expected[module] = expected[module] + np.where(np.abs(d) >= threshold, d, 0)
    assert_equal(found, expected)


def test_transforms_follow_one_another(tmp_path, written) -> None:
    transforms = [
        {"name": "layer_l2_normalize", "target_norm": 9},
        "identity",
        {"name": "layer_l2_normalize", "target_norm": 0.5},
    ]
    found = adapter(tmp_path / "out", written, None, TOWERS, transforms=transforms)
    assert_equal(found, summed(written, [1, 1], lambda d: normalised(d, 0.5)))


def test_identity_changes_nothing(tmp_path, written) -> None:
    first = adapter(tmp_path / "one", written, None, TOWERS, transforms=["identity"])
    second = adapter(tmp_path / "two", written, None, TOWERS)
    for module, x in first.items():
        np.testing.assert_array_equal(x, second[module])
    assert_equal(first, {m: x.sum(0) for m, x in stacks(written).items()})


def test_a_layer_of_zeros_stays_zero(tmp_path) -> None:
    """0 / 0 has no norm to bring it to."""
    zeros = {"layers.0.proj": Linear(3, 4, values=(np.ones((2, 4)), np.zeros((3, 2)))), "layers.1.proj": Linear(3, 4)}
    written = adapters(tmp_path, 1, zeros)
    found = adapter(tmp_path / "out", written, None, zeros, transforms=["layer_l2_normalize"])
    assert (found["layers.0.proj"] == 0).all()
    assert np.linalg.norm(found["layers.1.proj"]) == pytest.approx(1)


def test_layers_below_eps_are_left(tmp_path) -> None:
    one = {"layers.0.proj": Linear(3, 4)}
    written = adapters(tmp_path, 1, one)
    norm = np.linalg.norm(written["a"].deltas["layers.0.proj"])
    for eps, expected in ((norm * 1.01, norm), (norm * 0.99, 1.0)):
        found = adapter(tmp_path / str(eps), written, None, one, transforms=[{"name": "layer_l2_normalize", "eps": eps}])
        assert np.linalg.norm(found["layers.0.proj"]) == pytest.approx(expected, rel=1e-5)


@every(
    "bad",
    [
        {"target_norm": -1},
        {"eps": 0},
        {"eps": float("nan")},
        {"target_norm": float("inf")},
        {"norm": 1},
        {"include_non_layer_keys": "x"},
    ],
)
def test_parameters_that_are_refused(bad) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Recipe(adapters=["./a"], transforms=[{"name": "layer_l2_normalize", **bad}])


def test_an_unknown_transform_is_refused() -> None:
    with pytest.raises(ValueError, match="layer_l2_normalize"):
        Recipe(adapters=["./a"], transforms=["layer_norm"])


def test_a_name_is_taken_once() -> None:
    again = Transform("identity", "Again.", TransformParams, lambda delta, params, found: delta)
    before = dict(TRANSFORMS)
    with pytest.raises(ValueError, match="registered already"):
        register_transform(again)
    assert before == TRANSFORMS
    assert "identity" not in METHODS


def test_a_transform_is_a_function_of_one_delta() -> None:
    delta = LowRank.zero((2, 3))
    assert TRANSFORMS["identity"].apply(delta, None, None) is delta
    assert TRANSFORMS["layer_l2_normalize"].apply(delta, None, None) is delta
