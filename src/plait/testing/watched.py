"""A method that looks whether its blocks are changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from plait.methods import Block, Method
from plait.stages.base import EntryCombine, EntryStage, Reduction, Survey
from plait.stages.pipeline import Pipeline
from plait.testing.claims import require


def watched(method: Method) -> Method:
    """Return a method that looks whether its blocks are changed."""
    return cast("Method", _WatchedMethod(method))


class _WatchedMethod:
    """A method whose stages on entries are watched; all else is the method's own."""

    def __init__(self, method: Method) -> None:
        self._method = method

    def __getattr__(self, name: str) -> Any:
        return getattr(self._method, name)

    def pipeline(self, params: Any) -> Pipeline:
        plain = self._method.pipeline(params)
        pre = tuple(_WatchedStage(s) if isinstance(s, EntryStage) else s for s in plain.pre)
        combine = _WatchedCombine(plain.combine) if isinstance(plain.combine, EntryCombine) else plain.combine
        return replace(plain, pre=pre, combine=combine)


class _WatchedStage(EntryStage):
    def __init__(self, stage: EntryStage) -> None:
        self._stage = stage

    def surveys(self) -> tuple[Survey, ...]:
        return _watched_surveys(self._stage)

    def apply(self, block: Block) -> Tensor:
        with _unchanged(block, str(self._stage)):
            return self._stage.apply(block)


class _WatchedCombine(EntryCombine):
    def __init__(self, stage: EntryCombine) -> None:
        self._stage = stage

    def surveys(self) -> tuple[Survey, ...]:
        return _watched_surveys(self._stage)

    def combine(self, block: Block) -> Tensor:
        with _unchanged(block, str(self._stage)):
            return self._stage.combine(block)


def _watched_surveys(stage: EntryStage | EntryCombine) -> tuple[Survey, ...]:
    return tuple(Survey(s.scope, lambda adapters, s=s: _Watched(s.start(adapters))) for s in stage.surveys())  # type: ignore[misc]


class _Watched:
    def __init__(self, reduction: Reduction) -> None:
        self._reduction = reduction

    def observe(self, block: Block) -> None:
        with _unchanged(block, "a survey"):
            self._reduction.observe(block)

    def end_pass(self) -> bool:
        return self._reduction.end_pass()

    @property
    def values(self) -> Tensor:
        return self._reduction.values


@contextmanager
def _unchanged(block: Block, who: str) -> Iterator[None]:
    before = [t.clone() for t in (block.x, block.weights, *block.statistics)]
    yield
    for name, old, new in zip(
        ("x", "weights", *["statistics"] * 9), before, (block.x, block.weights, *block.statistics), strict=False
    ):
        require(torch.equal(old, new), f"{who} changed block.{name} in place")
