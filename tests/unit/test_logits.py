"""Parity of logits against a literal reading in float64."""

from __future__ import annotations

import math

import pytest
import torch

from plait.verification.logits import compare_logits, pool_parity


def literal(reference: list[list[float]], other: list[list[float]]) -> tuple[float, float, float]:
    """max |Δ|, mean KL(reference ‖ other), top-1 agreement, one number at a time."""
    largest, divergences, agreements = 0.0, [], []
    for one, two in zip(reference, other, strict=True):
        largest = max([largest, *(abs(a - b) for a, b in zip(one, two, strict=True))])
        p = [math.exp(a) / sum(math.exp(x) for x in one) for a in one]
        q = [math.exp(b) / sum(math.exp(x) for x in two) for b in two]
        divergences.append(sum(x * math.log(x / y) for x, y in zip(p, q, strict=True)))
        agreements.append(one.index(max(one)) == two.index(max(two)))
    return largest, sum(divergences) / len(divergences), sum(agreements) / len(agreements)


def random(seed: int, rows: int = 7, classes: int = 5) -> torch.Tensor:
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("spread", [1e-3, 1.0, 5.0])
def test_compare_is_the_literal_formula(spread):
    reference, other = random(0), random(0) + spread * random(1)
    found = compare_logits(reference, other)
    largest, divergence, agreement = literal(reference.tolist(), other.tolist())
    assert found.positions == 7
    assert found.max_difference == pytest.approx(largest, rel=1e-12)
    assert found.mean_kl == pytest.approx(divergence, rel=1e-6, abs=1e-15)
    assert found.top1 == agreement


def test_the_divergence_is_not_symmetric_and_reference_comes_first():
    reference, other = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 3.0]])
    assert compare_logits(reference, other).mean_kl != pytest.approx(compare_logits(other, reference).mean_kl)
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.0, 3.0]).softmax(0)
    assert compare_logits(reference, other).mean_kl == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-5)


def test_equal_logits_and_a_constant_shift():
    same = compare_logits(random(0), random(0))
    assert (same.max_difference, same.mean_kl, same.top1) == (0, 0, 1)
    shifted = compare_logits(random(0), random(0) + 3)
    assert shifted.max_difference == pytest.approx(3)
    assert shifted.mean_kl == pytest.approx(0, abs=1e-12)


def test_half_precision_is_compared_in_float64():
    reference = torch.tensor([[300.0, 1.0]])
    assert compare_logits(reference, reference.bfloat16()).max_difference == abs(300 - float(torch.tensor(300.0).bfloat16()))


def test_leading_dimensions_are_positions():
    whole, other = random(0, rows=6), random(1, rows=6)
    assert compare_logits(whole.view(2, 3, 5), other.view(2, 3, 5)) == compare_logits(whole, other)


def test_pooled_parts_are_the_whole():
    whole, other = random(0, rows=9), random(1, rows=9)
    parts = [compare_logits(whole[i:j], other[i:j]) for i, j in ((0, 2), (2, 9))]
    found, expected = pool_parity(parts), compare_logits(whole, other)
    assert found.positions == 9
    assert found.max_difference == expected.max_difference
    assert found.mean_kl == pytest.approx(expected.mean_kl, rel=1e-12)
    assert found.top1 == pytest.approx(expected.top1, rel=1e-12)


@pytest.mark.parametrize("shapes", [((2, 3), (2, 4)), ((0, 3), (0, 3)), ((), ())])
def test_what_cannot_be_compared(shapes):
    with pytest.raises(ValueError, match="cannot be compared"):
        compare_logits(torch.zeros(shapes[0]), torch.zeros(shapes[1]))
