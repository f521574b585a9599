"""Radix selection against sorting."""

from __future__ import annotations

import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from plait.linalg.select import MagnitudeSelect
from tests.every import every


def select(x, ranks, blocks=1, shuffle=False):
    """Run all passes over x (rows, entries), cut into blocks; return (thresholds, passes)."""
    found = MagnitudeSelect(len(x), lambda entries: ranks(entries) if callable(ranks) else ranks)
    pieces = [p.unsqueeze(1) for p in x.chunk(blocks, dim=1)]
    for passes in itertools.count(1):
        for piece in reversed(pieces) if shuffle and passes % 2 else pieces:
            found.observe(piece)
        if found.end_pass():
            return found.values, passes
    raise AssertionError


def awkward(dtype):
    tiny = torch.finfo(dtype).smallest_normal
    values = [0.0, -0.0, 1.0, -1.0, 1.0, tiny, -tiny, tiny / 2, tiny / 1024, -tiny / 4, 0.5, -0.25, torch.finfo(dtype).max]
    values += [-torch.finfo(dtype).max, math.pi, math.pi * (1 + torch.finfo(dtype).eps), -math.pi, 1e-3, 1e-3, -1e-3]
    return torch.tensor([values, [0.0] * len(values), [-7.0] * len(values)], dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_rank_of_awkward_values(dtype):
    """Ties, zeros of both signs, denormals, the largest numbers, neighbors that differ in the last bit."""
    x = awkward(dtype)
    entries = x.shape[1]
    found, used = select(x, list(range(1, entries + 1)))
    assert used == 2
    assert found.dtype == dtype
    assert torch.equal(found, x.abs().sort(dim=1, descending=True).values)


@every("dtype", [torch.float32, torch.float64])
@every("blocks", [1, 3, 100])
def test_against_kthvalue(dtype, blocks):
    generator = torch.Generator().manual_seed(blocks)
    x = torch.randn(3, 1000, generator=generator, dtype=dtype) * torch.tensor([[1e-30], [1.0], [1e30]], dtype=dtype)
    ranks = [1, 2, 200, 500, 999, 1000]
    found, _ = select(x, ranks, blocks, shuffle=True)
    for i, rank in enumerate(ranks):
        assert torch.equal(found[:, i], x.abs().kthvalue(1000 - rank + 1, dim=1).values)


def test_ranks_are_asked_for_once_all_entries_are_known():
    x = torch.arange(1.0, 13.0).reshape(2, 6)
    found, _ = select(x, lambda entries: [entries // 2, entries], blocks=4)
    assert found.tolist() == [[4.0, 1.0], [10.0, 7.0]]


def test_rank_0_is_infinity_and_ranks_beyond_the_entries_are_the_last():
    x = torch.tensor([[3.0, -2.0, 1.0]])
    found, _ = select(x, [0, 3, 9])
    assert found.tolist() == [[math.inf, 1.0, 1.0]]


def test_few_distinct_values():
    """As bfloat16 adapters have: long runs of equal magnitudes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-3, 4, (2, 500), generator=generator).float() / 8
    ranks = list(range(1, 501, 7))
    found, _ = select(x, ranks, blocks=5)
    assert torch.equal(found, x.abs().sort(dim=1, descending=True).values[:, [r - 1 for r in ranks]])


def test_values_are_not_to_be_had_before_the_end():
    found = MagnitudeSelect(1, lambda entries: [1])
    found.observe(torch.ones(1, 1, 1))
    with pytest.raises(AssertionError, match="before the last pass"):
        _ = found.values


def strided(x, ranks, piece=64):
    """Run all passes over x (rows, p, q) as a merge does, one row in `stride` where that is enough; return what it took too."""
    found, strides = MagnitudeSelect(len(x), ranks), []
    while True:
        strides.append(found.stride)
        step = found.stride * piece
        for start in range(0, x.shape[1], step):
            found.observe(x[:, start : start + step : found.stride])
        if found.end_pass():
            return found.values, strides


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sample_points_the_way(dtype):
    x = torch.randn(2, 4096, 16, generator=torch.Generator().manual_seed(0), dtype=dtype)
    found, strides = strided(x, lambda entries: [entries // 5])
    assert torch.equal(found, x.flatten(1).abs().sort(dim=1, descending=True).values[:, 13106:13107])  # 65536 // 5
    assert strides == [16, 1]


def test_few_rows_of_low_rank_are_a_sample_with_a_larger_error():
    """Their norms differ by a third or so, and a sample of 64 of them is off by some percent."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(1024, 2, generator=generator) @ torch.randn(2, 128, generator=generator)).unsqueeze(0)
    found, strides = strided(x, lambda entries: [entries // 5])
    assert float(found) == x.flatten().abs().sort(descending=True).values[131072 // 5 - 1]
    assert strides == [16, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_more_entries_near_the_answer_than_are_kept(dtype):
    """They are counted; in float64 by some of their bits only, so that a pass more is needed."""
    x = 1 + torch.rand(1, 4096, 512, generator=torch.Generator().manual_seed(0), dtype=dtype) / 64
    ranks = [1, 1000, 2_000_000, 2_097_152]
    found, strides = strided(x, lambda entries: ranks)
    assert torch.equal(found, x.flatten(1).sort(dim=1, descending=True).values[:, [r - 1 for r in ranks]])
    assert strides == ([16, 1] if dtype == torch.float32 else [16, 1, 1])


@every("dtype", [torch.float32, torch.float64])
@every("misled", [1e-3, 0.0, 1e3])
def test_a_sample_that_misleads_costs_passes_not_exactness(dtype, misled):
    """The rows that are sampled are all far smaller, or larger, than the others."""
    x = torch.randn(2, 4096, 16, generator=torch.Generator().manual_seed(0), dtype=dtype)
    x[:, ::16] *= misled
    ranks = [0, 1, 100, 65_535, 65_536]
    found, strides = strided(x, lambda entries: ranks)
    expected = x.flatten(1).abs().sort(dim=1, descending=True).values
    assert (found[:, 0] == math.inf).all()
    assert torch.equal(found[:, 1:], expected[:, [r - 1 for r in ranks[1:]]])
    assert len(strides) > 2


def test_threads_may_share_one():
    """Blocks come from several threads in any order; every count arrives."""
    x = torch.randn(2, 6000, generator=torch.Generator().manual_seed(0))
    pieces = [p.unsqueeze(1) for p in x.chunk(60, dim=1)]
    found = MagnitudeSelect(2, lambda entries: [1, entries // 3, entries])
    with ThreadPoolExecutor(8) as pool:
        done = False
        while not done:
            list(pool.map(found.observe, pieces))
            done = found.end_pass()
    ordered = x.abs().sort(dim=1, descending=True).values
    assert torch.equal(found.values, ordered[:, [0, 1999, 5999]])
