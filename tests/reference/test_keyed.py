"""Keyed randomness against integers, and its quality."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from plait.linalg.keyed import Key, normal, uniform
from tests.every import every
from tests.reference.keyed_integers import key_state, splitmix64, uniforms


def test_published_outputs() -> None:
    """The first outputs of SplitMix64 from state 1234567, as printed with several implementations."""
    assert splitmix64(1234567, 3) == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@every("words", [(), ("a",), ("adapter", "model.layers.0.q_proj", "0", "delta"), ("ä", "τ")])
@every("seed", [0, 1, 2**63 - 1])
def test_state(seed, words) -> None:
    state = Key(seed).child(*words).state()
    assert state == key_state(seed, *words)
    assert 0 <= state < 2**63


@every("shape", [(1, 1), (3, 5), (7, 1), (1, 9), (40, 25)])
def test_uniform(shape) -> None:
    for seed in (0, 12345):
        found = uniform(Key(seed, ("x", "y")), 0, *shape)
        assert found.dtype == torch.float32
        np.testing.assert_array_equal(found.numpy(), uniforms(seed, ("x", "y"), *shape))


@pytest.mark.parametrize(("start", "rows"), [(0, 4), (3, 1), (5, 7), (11, 1)])
def test_a_block_is_a_piece_of_the_whole(start, rows) -> None:
    key = Key(5, ("k",))
    assert torch.equal(uniform(key, start, rows, 6), uniform(key, 0, 12, 6)[start : start + rows])


def test_far_rows_of_a_huge_matrix() -> None:
    """Counters above 2³² wrap nowhere: the same numbers as stepping the state that far."""
    start, columns = 3_000_000, 5_000
    state = (key_state(1, "big") + start * columns * 0x9E3779B97F4A7C15) & ((1 << 64) - 1)
    expected = [(z >> 40) * 2.0**-24 for z in splitmix64(state, columns)]
    np.testing.assert_array_equal(uniform(Key(1, ("big",)), start, 1, columns).numpy()[0], expected)


def test_frozen_values() -> None:
    """These numbers may never change: a recipe from today has to give the same bytes tomorrow."""
    found = uniform(Key(0).child("maths", "model.layers.0.q_proj", "0", "delta"), 0, 1, 3)
    np.testing.assert_array_equal(found.numpy(), uniforms(0, ("maths", "model.layers.0.q_proj", "0", "delta"), 1, 3))
    assert [round(x, 6) for x in found[0].tolist()] == [0.442359, 0.218084, 0.60491]


def test_uniform_is_uniform() -> None:
    x = uniform(Key(3, ("q",)), 0, 1000, 1000).double()
    n = x.numel()
    assert 0 <= float(x.min()) < 1e-5
    assert 1 - 1e-5 < float(x.max()) < 1
    assert abs(float(x.mean()) - 0.5) < 5 / (12 * n) ** 0.5
    counts = torch.histc(x, bins=64, min=0, max=1)
    chi_squared = float(((counts - n / 64) ** 2 / (n / 64)).sum())
    assert 20 < chi_squared < 120  # 63 degrees of freedom: far outside of this is no chance


def correlation(x: torch.Tensor, y: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([x.flatten(), y.flatten()]).double())[0, 1])


def test_streams_and_neighbors_are_independent() -> None:
    """Between streams whose keys differ in one word or in the seed, and along rows and columns of one stream."""
    keys = [Key(3, ("a", "m")), Key(3, ("b", "m")), Key(3, ("a", "n")), Key(4, ("a", "m")), Key(3, ("am",)), Key(3, ("m", "a"))]
    streams = [uniform(k, 0, 150, 150) for k in keys]
    bound = 5 / 150
    for i, x in enumerate(streams):
        assert abs(correlation(x[1:], x[:-1])) < bound
        assert abs(correlation(x[:, 1:], x[:, :-1])) < bound
        for y in streams[:i]:
            assert abs(correlation(x, y)) < bound


def test_normal() -> None:
    x = normal(Key(9, ("n",)), 500, 400, torch.float64)
    assert x.dtype == torch.float64
    assert torch.isfinite(x).all()
    n = x.numel()
    assert abs(float(x.mean())) < 5 / n**0.5
    assert abs(float(x.var()) - 1) < 5 * (2 / n) ** 0.5
    assert abs(float((x**4).mean()) - 3) < 5 * (96 / n) ** 0.5
    for value, share in ((-1.0, 0.158655), (0.5, 0.691462), (2.0, 0.977250)):
        assert abs(float((x < value).double().mean()) - share) < 5 * (share * (1 - share) / n) ** 0.5
    assert torch.equal(x, normal(Key(9, ("n",)), 500, 400, torch.float64))
