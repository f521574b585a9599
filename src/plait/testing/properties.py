"""The rows of the contract: what holds for every merge method, and a check for each.

A check merges small cohorts and raises `Broken` with the case that broke. Values are compared in float64, where a
difference above `_CLOSE` of the largest value is no rounding.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from plait.adapters.adapter import CONFIG, WEIGHTS
from plait.adapters.lowrank import LowRank
from plait.linalg import blocks
from plait.merging.pipeline import run_recipe
from plait.merging.record import LOCK
from plait.methods import METHODS, Block, Method, Preset
from plait.stages.base import EntryCombine, EntryStage, Reduction, StageParams, Survey
from plait.stages.pipeline import Pipeline
from plait.testing.cohorts import Cohort, Shape, cohort
from plait.testing.parameters import parameter_problems
from plait.testing.subject import Subject, installed

_CLOSE = 1e-9
_RANK = 1e-9  # singular values below this share of the largest are round-off
_SHAPES: tuple[Shape, ...] = ((1, 1), (2, 1), (1, 7), (7, 2), (8, 5))
_ORDINARY: tuple[Shape, ...] = ((12, 10), (6, 9))
_BOUND = 4.0  # a merge of adapters that all but agree is at most so many times Σ ‖wₜ ΔWₜ‖; rescaling at random doubles it


class Broken(AssertionError):
    """A property does not hold; the message says in which case and what was found."""


@dataclass(frozen=True)
class Property:
    """One row of the contract.

    Attributes:
        name: short, for test ids.
        about: what holds, one sentence.
        check: raises `Broken` where it does not, for a subject in a space.
        applies: whether a subject promises it in a space.
    """

    name: str
    about: str
    check: Callable[[Subject, str], None]
    applies: Callable[[Subject, str], bool]


def parameters(subject: Subject, space: str) -> None:
    """Every parameter is described, bounded and has a default within its bounds."""
    problems = parameter_problems(subject.method, subject.params)
    if problems:
        raise Broken("; ".join(problems))


def shapes(subject: Subject, space: str) -> None:
    """Shape and dtype are those of the adapters and all values are finite, however small or empty the adapters are."""
    for case, adapters in _degenerate(subject, space):
        with _case(case):
            run = subject.prepare(adapters, subject.recipe(adapters, space))
            _sound({module: emitted.slices[0].dense() for module, emitted in run.emitted().items()}, adapters)


def zero(subject: Subject, space: str) -> None:
    """Zero deltas merge to zero."""
    adapters = _ordinary(subject, space, _SHAPES)
    with _case("all adapters zero"):
        for module, merged in subject.merge(adapters.zeroed(*adapters.factors), space).items():
            _require(bool((merged == 0).all()), f"{module} has {int((merged != 0).sum())} entries that are not zero")


def nonzero(subject: Subject, space: str) -> None:
    """Deltas that are not zero do not vanish."""
    adapters = _ordinary(subject, space, [(24, 20), (20, 24)])
    with _case("own parameters"):
        _not_all_zero(subject.merge(adapters, space))
    if not subject.method.randomised:
        ones = adapters.map(lambda adapter, module, f: LowRank(torch.ones_like(f.a), torch.ones_like(f.b)))
        with _case("all entries of a delta equal"):
            _not_all_zero(subject.merge(replace(ones, weights=dict.fromkeys(ones.weights, 1.0)), space))
    if subject.identity is not None:
        with _case("small shapes, nothing dropped"):
            for module, merged in subject.merge(_ordinary(subject, space, _SHAPES), space, subject.identity).items():
                _not_all_zero({module: merged})


def inputs(subject: Subject, space: str) -> None:
    """Neither the adapters' tensors nor the blocks that a method is shown are changed."""
    adapters = _ordinary(subject, space)
    before = [t.clone() for t in adapters.tensors()]
    with _case("two modules"), installed(_watched(subject.method)):
        subject.merge(adapters, space)
        changed = sum(not torch.equal(x, y) for x, y in zip(before, adapters.tensors(), strict=True))
        _require(not changed, f"{changed} of the adapters' tensors were changed in place")


def global_state(subject: Subject, space: str) -> None:
    """The global random generators of torch, numpy and Python are left as they were."""
    adapters = _ordinary(subject, space)
    before = _generators()
    with _case("two modules"):
        subject.merge(adapters, space)
        for name, state in _generators().items():
            _require(state == before[name], f"the global generator of {name} was used")


def seed(subject: Subject, space: str) -> None:
    """One seed gives one result, to the bit; another seed gives another exactly when the method says it is randomised."""
    adapters = _ordinary(subject, space)
    with _case("seed 7 twice"):
        first = subject.merge(adapters, space, seed=7)
        _identical(subject.merge(adapters, space, seed=7), first)
    with _case("seeds 7 and 8"):
        other = subject.merge(adapters, space, seed=8)
        differs = any(not torch.equal(other[m], first[m]) for m in first)
        declared = subject.method.randomised
        what = "the results are equal" if declared else "the results differ"
        _require(differs == declared, f"randomised is declared {declared}, and {what}")


def row_blocks(subject: Subject, space: str) -> None:
    """The result does not depend on how a matrix is cut into blocks of rows."""
    adapters = _ordinary(subject, space)
    whole = subject.merge(adapters, space)
    for rows in (1, 5):
        with _case(f"blocks of {rows} rows"), _cut(rows * max(n for _, n in _ORDINARY)):
            parts = subject.merge(adapters, space)
            _close(parts, whole)
            if space == "delta":  # elsewhere the lift mixes entries, and no zero is exact
                for module, merged in parts.items():
                    moved = int(((merged == 0) != (whole[module] == 0)).sum())
                    _require(not moved, f"{module}: {moved} entries are kept in one cut and dropped in the other")


def workers(subject: Subject, space: str) -> None:
    """The written files do not depend on the number of workers, by a byte."""
    adapters = _ordinary(subject, space, [*_ORDINARY, (5, 5), (3, 8), (10, 2)], dtype=torch.float32)
    with TemporaryDirectory() as name:
        folder = Path(name)
        adapters.save(folder)
        recipe = subject.recipe(adapters, space, folder=folder)
        first: dict[str, bytes] = {}
        for count in (1, 2, 4):
            with _case(f"{count} workers"):
                run_recipe(recipe, out=folder / f"out{count}", workers=count)
                files = {n: (folder / f"out{count}" / n).read_bytes() for n in (WEIGHTS, CONFIG, LOCK)}
                first = first or files
                for n, data in files.items():
                    _require(data == first[n], f"{n} differs from that of 1 worker")


def order_of_work(subject: Subject, space: str) -> None:
    """The result does not depend on the order in which modules are worked on, nor on what was merged before."""
    adapters = _ordinary(subject, space, [*_ORDINARY, (5, 5)])
    forth = subject.merge(adapters, space)
    with _case("modules in the opposite order"):
        _identical(subject.merge(adapters.reversed_modules(), space), forth)
    with _case("one combiner, every module twice"):
        run = subject.prepare(adapters, subject.recipe(adapters, space))
        run.deltas()
        _identical(run.deltas(), forth)


def order_of_adapters(subject: Subject, space: str) -> None:
    """The result does not depend on the order of the adapters."""
    adapters = _ordinary(subject, space)
    with _case("adapters in the opposite order"):
        _close(subject.merge(adapters.reversed_adapters(), space), subject.merge(adapters, space))


def scale(subject: Subject, space: str) -> None:
    """merge(c · ΔW) = c · merge(ΔW): there is no absolute threshold."""
    adapters = _ordinary(subject, space)
    plain = subject.merge(adapters, space)
    for factor in (1e-14, 3e7):
        with _case(f"c = {factor:g}"):
            _close(subject.merge(adapters.scaled(factor), space), {m: factor * x for m, x in plain.items()})


def recipe_scale(subject: Subject, space: str) -> None:
    """The recipe's `scale` multiplies the result, once."""
    adapters = _ordinary(subject, space)
    plain = subject.merge(adapters, space)
    for factor in (2.5, -0.5):
        with _case(f"scale {factor:g}"):
            _close(subject.merge(adapters, space, scale=factor), {m: factor * x for m, x in plain.items()})


def gauge(subject: Subject, space: str) -> None:
    """The result is a function of the deltas: B G and G⁻¹ A merge as B and A do."""
    adapters = _ordinary(subject, space)
    with _case("a random G of condition 4 per adapter and module"):
        _close(subject.merge(adapters.turned(), space), subject.merge(adapters, space))


def sign(subject: Subject, space: str) -> None:
    """merge(−ΔW) = −merge(ΔW)."""
    adapters = _ordinary(subject, space)
    with _case("all adapters negated"):
        _close(subject.merge(adapters.scaled(-1), space), {m: -x for m, x in subject.merge(adapters, space).items()})


def missing(subject: Subject, space: str) -> None:
    """A module that an adapter lacks counts as a zero delta."""
    adapters = _ordinary(subject, space)
    module = next(iter(adapters.shapes))
    names = list(adapters.factors)
    for name in dict.fromkeys((names[0], names[-1])):
        with _case(f"{name} lacks {module}"):
            zeros = adapters.map(lambda n, m, f, name=name: LowRank(f.a * 0, f.b * 0) if (n, m) == (name, module) else f)  # type: ignore[misc]
            _close(subject.merge(adapters.without(name, module), space), subject.merge(zeros, space))


def linear_sum(subject: Subject, space: str) -> None:
    """A linear method's result is Σ cₜ ΔWₜ, computed densely."""
    adapters = _ordinary(subject, space)
    run = subject.prepare(adapters, subject.recipe(adapters, space))
    with _case(f"{subject.adapters} adapters"):
        for module, merged in run.deltas().items():
            c = run.combiner.coefficients(module).tolist()
            deltas = [adapters.delta(n, module) for n in adapters.factors]
            _close({module: merged}, {module: sum(x * d for x, d in zip(c, deltas, strict=True)) + torch.zeros_like(merged)})


def lone_adapter(subject: Subject, space: str) -> None:
    """One adapter of weight 1 comes out as it went in."""
    for shape in ((8, 5), (5, 8), (1, 1)):
        adapters = cohort([shape, (6, 4)], [2])
        with _case(f"shape {shape}"):
            name = next(iter(adapters.factors))
            expected = {m: adapters.delta(name, m) for m in adapters.shapes}
            _close(subject.merge(adapters, space, subject.identity), expected)


def copies(subject: Subject, space: str) -> None:
    """Copies of one adapter, averaged, are that adapter."""
    one = cohort(_ORDINARY, [2])
    count = subject.adapters
    adapters = one.copies(count, 1.0 if subject.copies == "mean" else 1 / count)
    name = next(iter(one.factors))
    with _case(f"{count} copies of weight {next(iter(adapters.weights.values())):.3g}"):
        _close(subject.merge(adapters, space, subject.identity), {m: one.delta(name, m) for m in one.shapes})


def rank(subject: Subject, space: str) -> None:
    """The plan's exact rank bounds the rank of the result, and a module planned as exact is written as it was merged."""
    for case, adapters in _ranked(subject, space):
        with _case(case):
            run = subject.prepare(adapters, subject.recipe(adapters, space))
            deltas, written = run.deltas(), run.emitted()
            for module in run.plan.modules:
                merged, factors = deltas[module.target], written[module.target].slices[0]
                values = torch.linalg.svdvals(merged)
                found = int((values > _RANK * values[0]).sum())
                _require(found <= module.exact_rank, f"{module.target} has rank {found}, planned was {module.exact_rank}")
                planned = module.rank or 0
                _require(factors.rank <= planned, f"{module.target} is written at rank {factors.rank}, not {planned}")
                if module.result == "exact":
                    _close({module.target: factors.dense()}, {module.target: merged}, 1e-6)


def shared_init(subject: Subject, space: str) -> None:
    """Adapters of one A and nearly one B, as scripts that share a seed make them, merge to a result of bounded norm."""
    for shift in (1e-6, 1e-2):
        adapters = _nearly_equal(subject.adapters, shift)
        with _case(f"one A, B apart by {shift:g}"):
            merged = subject.merge(adapters, space)
            _sound(merged, adapters)
            for module, x in merged.items():
                most = _BOUND * sum(abs(w) * float(adapters.delta(n, module).norm()) for n, w in adapters.weights.items())
                _require(float(x.norm()) <= most, f"{module} has norm {float(x.norm()):.3g}, allowed is {most:.3g}")


def spelled(subject: Subject, space: str) -> None:
    """A recipe that spells the pipeline of a preset gets what the preset gives, to the bit."""
    adapters = _ordinary(subject, space)
    with _case(str(subject.pipeline(space))):
        pipeline = replace(subject, method=METHODS["pipeline"], params=_stages(subject, space))
        _identical(pipeline.merge(adapters, space), subject.merge(adapters, space))


def _promises_identity(subject: Subject, space: str) -> bool:
    return subject.identity is not None and subject.method.min_adapters == 1


def _promises_copies(subject: Subject, space: str) -> bool:
    return subject.copies is not None and subject.identity is not None and space != "factors"


def _is_linear(subject: Subject, space: str) -> bool:
    return subject.method.kind == "linear" and space != "factors"


def _can_be_spelled(subject: Subject, space: str) -> bool:
    named = all(isinstance(stage, StageParams) for stage in subject.pipeline(space).stages)
    return isinstance(subject.method, Preset) and named


def _stages(subject: Subject, space: str) -> dict[str, Any]:
    """Return the stages of a preset as a recipe spells them."""
    pipeline = subject.pipeline(space)
    pre, (combine,), post = (
        [cast(StageParams, stage).model_dump(mode="json") for stage in stages]
        for stages in (pipeline.pre, (pipeline.combine,), pipeline.post)
    )
    return {"pre": pre, "combine": combine, "post": post}


def _row(
    check: Callable[[Subject, str], None], applies: Callable[[Subject, str], bool] = lambda subject, space: True
) -> Property:
    return Property(check.__name__, (check.__doc__ or "").strip(), check, applies)


PROPERTIES: Mapping[str, Property] = {
    row.name: row
    for row in (
        _row(parameters, lambda subject, space: space == subject.method.spaces[0]),
        _row(shapes),
        _row(zero),
        _row(nonzero),
        _row(inputs),
        _row(global_state),
        _row(seed),
        _row(row_blocks),
        _row(workers),
        _row(order_of_work),
        _row(order_of_adapters, lambda subject, space: not subject.by_position),
        _row(scale),
        _row(recipe_scale),
        _row(gauge, lambda subject, space: space != "factors"),
        _row(sign, lambda subject, space: subject.odd),
        _row(missing),
        _row(linear_sum, _is_linear),
        _row(lone_adapter, _promises_identity),
        _row(copies, _promises_copies),
        _row(rank),
        _row(shared_init, lambda subject, space: space != "factors"),
        _row(spelled, _can_be_spelled),
    )
}


def _ordinary(
    subject: Subject, space: str, shapes: list[Shape] | tuple[Shape, ...] = _ORDINARY, *, dtype: torch.dtype = torch.float64
) -> Cohort:
    """Return a well-conditioned cohort: mixed ranks, but for `factors`, which needs equal ones."""
    ranks = [2, 2, 2] if space == "factors" else [2, 1, 3]
    return cohort(shapes, ranks[: subject.adapters] + [2] * (subject.adapters - 3), dtype=dtype)


def _nearly_equal(count: int, shift: float) -> Cohort:
    """Return adapters of one A whose B are apart by a share of their size; one scaling, one weight, so that nothing cancels."""
    copies, apart = cohort(_ORDINARY, [2]).copies(count, 1.0), cohort(_ORDINARY, [2] * count, seed=1)
    other = dict(zip(copies.factors, apart.factors.values(), strict=True))
    return copies.map(lambda name, module, f: LowRank(f.a, f.b + shift * other[name][module].b))


def _degenerate(subject: Subject, space: str) -> Iterator[tuple[str, Cohort]]:
    count, single = subject.adapters, torch.float32
    whole = _ordinary(subject, space, _SHAPES, dtype=single)
    yield "all small shapes, float32", whole
    yield "all small shapes, float64", _ordinary(subject, space, _SHAPES)
    for shape in _SHAPES:
        yield f"shape {shape} alone", _ordinary(subject, space, [shape], dtype=single)
    if subject.method.min_adapters == 1 and not subject.by_position:
        yield "one adapter", cohort(_SHAPES, [2], dtype=single)
        yield "one adapter, shape (1, 1) alone", cohort([(1, 1)], [1], dtype=single)
    yield "rank above both dimensions", cohort([(3, 2), (2, 3)], [5] * count, dtype=single)
    yield "one A shared by all", cohort(_SHAPES, [2] * count, dtype=single, shared_a=True)
    first, module = next(iter(whole.factors)), next(iter(whole.shapes))
    yield "one adapter all zero", whole.zeroed(first)
    yield "one adapter lacks a module", whole.without(first, module)
    alone = whole
    for name in list(whole.factors)[1:]:
        alone = alone.without(name, module)
    yield "only one adapter has a module", alone


def _ranked(subject: Subject, space: str) -> Iterator[tuple[str, Cohort]]:
    yield "shapes with room for all ranks", _ordinary(subject, space)
    yield "shapes smaller than the sum of the ranks", _ordinary(subject, space, [(3, 4), (5, 2), (1, 6)])
    yield "one A shared by all", cohort(_ORDINARY, [2] * subject.adapters, shared_a=True)


def _watched(method: Method) -> Method:
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
        _require(torch.equal(old, new), f"{who} changed block.{name} in place")


@contextmanager
def _cut(elements: int) -> Iterator[None]:
    """Cut matrices into blocks of so many elements, and hold none."""
    with patch.object(blocks, "BLOCK_ELEMENTS", elements), patch.object(blocks, "HOLD_ELEMENTS", 0):
        yield


def _generators() -> dict[str, Any]:
    numpy: Any = np.random.get_state(legacy=False)  # noqa: NPY002 (it is the global generator that is looked at)
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": (numpy["state"]["key"].tolist(), numpy["state"]["pos"]),
        "Python": random.getstate(),
    }


@contextmanager
def _case(text: str) -> Iterator[None]:
    """Put the case in front of what is broken in it; whatever else is raised there is broken too."""
    try:
        yield
    except Broken as broken:
        raise Broken(f"{text}: {broken}") from broken.__cause__
    except Exception as error:
        raise Broken(f"{text}: {type(error).__name__}: {error}") from error


def _require(holds: bool, otherwise: str) -> None:  # noqa: FBT001 (the condition is the argument)
    if not holds:
        raise Broken(otherwise)


def _sound(merged: Mapping[str, Tensor], adapters: Cohort) -> None:
    dtype = next(adapters.tensors()).dtype
    expected = {m: s for m, s in adapters.shapes.items() if any(m in modules for modules in adapters.factors.values())}
    _require(set(merged) == set(expected), f"merged modules are {sorted(merged)}, not {sorted(expected)}")
    for module, x in merged.items():
        _require(tuple(x.shape) == expected[module], f"{module} has shape {tuple(x.shape)}, not {expected[module]}")
        _require(x.dtype == dtype, f"{module} is {x.dtype}, the adapters are {dtype}")
        _require(bool(torch.isfinite(x).all()), f"{module} has {int((~torch.isfinite(x)).sum())} values that are not finite")


def _not_all_zero(merged: Mapping[str, Tensor]) -> None:
    _require(any(bool((x != 0).any()) for x in merged.values()), f"{', '.join(merged)}: zero everywhere")


def _identical(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for module, x in expected.items():
        _require(torch.equal(found[module], x), f"{module} differs by up to {float((found[module] - x).abs().max()):.3g}")


def _close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = _CLOSE) -> None:
    for module, x in expected.items():
        off, largest = float((found[module] - x).abs().max()), float(x.abs().max())
        _require(off <= tolerance * largest, f"{module} differs by {off:.3g} where values reach {largest:.3g}")
