"""The cohorts that the contract's checks merge: an ordinary one, degenerate ones, nearly equal adapters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from plait.adapters.lowrank import LowRank
from plait.testing.cohorts import Cohort, MatrixShape, cohort
from plait.testing.subject import Subject

SMALL: tuple[MatrixShape, ...] = ((1, 1), (2, 1), (1, 7), (7, 2), (8, 5))
ORDINARY: tuple[MatrixShape, ...] = ((12, 10), (6, 9))


def ordinary(
    subject: Subject,
    space: str,
    shapes: list[MatrixShape] | tuple[MatrixShape, ...] = ORDINARY,
    *,
    dtype: torch.dtype = torch.float64,
) -> Cohort:
    """Return a well-conditioned cohort: mixed ranks, but for `factors`, which needs equal ones."""
    ranks = [2, 2, 2] if space == "factors" else [2, 1, 3]
    return cohort(shapes, ranks[: subject.adapters] + [2] * (subject.adapters - 3), dtype=dtype)


def ordinary_merge(subject: Subject, space: str) -> dict[str, Tensor]:
    """Return what the ordinary cohort merges to, computed once: what many rows compare another merge with."""
    if space not in subject.known:
        subject.known[space] = subject.merge(ordinary(subject, space), space)
    return subject.known[space]


def nearly_equal(count: int, shift: float) -> Cohort:
    """Return adapters of one A whose B are apart by a share of their size; one scaling, one weight, so that nothing cancels."""
    copies, apart = cohort(ORDINARY, [2]).copies(count, 1.0), cohort(ORDINARY, [2] * count, seed=1)
    other = dict(zip(copies.factors, apart.factors.values(), strict=True))
    return copies.map(lambda name, module, f: LowRank(f.a, f.b + shift * other[name][module].b))


def degenerate(subject: Subject, space: str) -> Iterator[tuple[str, Cohort]]:
    """Yield cohorts of every awkward kind, each with its name."""
    count, single = subject.adapters, torch.float32
    whole = ordinary(subject, space, SMALL, dtype=single)
    yield "all small shapes, float32", whole
    yield "all small shapes, float64", ordinary(subject, space, SMALL)
    for shape in ((1, 1), (2, 1), (1, 7)):  # what is asked over the complete model is asked over these few entries
        yield f"shape {shape} alone", ordinary(subject, space, [shape], dtype=single)
    if subject.method.min_adapters == 1 and not subject.by_position:
        yield "one adapter", cohort(SMALL, [2], dtype=single)
        yield "one adapter, shape (1, 1) alone", cohort([(1, 1)], [1], dtype=single)
    yield "rank above both dimensions", cohort([(3, 2), (2, 3)], [5] * count, dtype=single)
    yield "one A shared by all", cohort(SMALL, [2] * count, dtype=single, shared_a=True)
    first, module = next(iter(whole.factors)), next(iter(whole.shapes))
    yield "one adapter all zero", whole.zeroed(first)
    yield "one weight zero", replace(whole, weights={**whole.weights, first: 0.0})
    yield "all weights zero", replace(whole, weights=dict.fromkeys(whole.weights, 0.0))
    yield "one adapter lacks a module", whole.without(first, module)
    alone = whole
    for name in list(whole.factors)[1:]:
        alone = alone.without(name, module)
    yield "only one adapter has a module", alone


def extreme(subject: Subject, space: str) -> Iterator[tuple[str, Cohort]]:
    """Yield float32 cohorts whose deltas, or single entries, have squares that float32 does not hold."""
    single = ordinary(subject, space, dtype=torch.float32)
    first, module = next(iter(single.factors)), next(iter(single.shapes))

    def one_entry(adapter: str, target: str, f: LowRank) -> LowRank:
        b = f.b.clone()
        b[0, 0] = torch.finfo(b.dtype).max if (adapter, target) == (first, module) else b[0, 0]
        return LowRank(f.a, b)

    yield "deltas of 1e30", single.scaled(1e30)
    yield "deltas of 1e-30", single.map(lambda adapter, target, f: LowRank(f.a * 1e-12, f.b * 1e-18))
    yield "one adapter of 1e20", single.map(lambda adapter, target, f: LowRank(f.a, f.b * (1e20 if adapter == first else 1)))
    yield "one entry of 3.4e38", single.map(one_entry)


def ranked(subject: Subject, space: str) -> Iterator[tuple[str, Cohort]]:
    """Yield cohorts whose ranks fit into their shapes, do not fit, and are not what they seem."""
    yield "shapes that fit all ranks", ordinary(subject, space)
    yield "shapes smaller than the sum of the ranks", ordinary(subject, space, [(3, 4), (5, 2), (1, 6)])
    yield "one A shared by all", cohort(ORDINARY, [2] * subject.adapters, shared_a=True)
