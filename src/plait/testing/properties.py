"""The rows of the contract: what holds for every merge method, and a check for each.

A check merges small cohorts (`cases.py`) and raises `Broken` with the case that broke (`claims.py`).
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

from plait.adapters.config import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from plait.adapters.lowrank import LowRank
from plait.linalg import blocks
from plait.merging.pipeline import run_recipe
from plait.methods import METHODS, Preset
from plait.results.lock import LOCK
from plait.stages.base import StageParams
from plait.testing.cases import ORDINARY, SMALL, degenerate, extreme, nearly_equal, ordinary, ordinary_merge, ranked
from plait.testing.claims import Broken, case, close, identical, not_all_zero, require, sound
from plait.testing.cohorts import cohort
from plait.testing.parameters import parameter_problems
from plait.testing.subject import Subject, installed
from plait.testing.watched import watched

_RANK = 1e-9  # singular values below this share of the largest are round-off
_SINGLE = 1e-5  # the round-off of float32, on the way through a few products
_BOUND = 4.0  # a merge of adapters that all but agree is at most so many times Σ ‖wₜ ΔWₜ‖; rescaling at random doubles it


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
    for kind, adapters in degenerate(subject, space):
        with case(kind):
            run = subject.prepare(adapters, subject.recipe(adapters, space))
            sound({module: emitted.slices[0].dense() for module, emitted in run.emitted().items()}, adapters)


def zero(subject: Subject, space: str) -> None:
    """Zero deltas merge to zero."""
    adapters = ordinary(subject, space, SMALL)
    with case("all adapters zero"):
        for module, merged in subject.merge(adapters.zeroed(*adapters.factors), space).items():
            require(bool((merged == 0).all()), f"{module} has {int((merged != 0).sum())} entries that are not zero")


def nonzero(subject: Subject, space: str) -> None:
    """Deltas that are not zero do not vanish."""
    adapters = ordinary(subject, space, [(24, 20), (20, 24)])
    with case("own parameters"):
        not_all_zero(subject.merge(adapters, space))
    if not subject.method.randomised:
        ones = adapters.map(lambda adapter, module, f: LowRank(torch.ones_like(f.a), torch.ones_like(f.b)))
        with case("all entries of a delta equal"):
            not_all_zero(subject.merge(replace(ones, weights=dict.fromkeys(ones.weights, 1.0)), space))
    if subject.identity is not None:
        with case("small shapes, nothing dropped"):
            for module, merged in subject.merge(ordinary(subject, space, SMALL), space, subject.identity).items():
                not_all_zero({module: merged})


def extremes(subject: Subject, space: str) -> None:
    """Factors as large or as small as float32 holds merge as the same numbers in float64 do."""
    for kind, adapters in extreme(subject, space):
        with case(kind):
            double = adapters.map(lambda adapter, module, f: f.to(torch.float64))
            found = {module: x.double() for module, x in subject.merge(adapters, space).items()}
            close(found, subject.merge(double, space), _SINGLE)


def inputs(subject: Subject, space: str) -> None:
    """Neither the adapters' tensors nor the blocks that a method is shown are changed."""
    adapters = ordinary(subject, space)
    before = [t.clone() for t in adapters.tensors()]
    with case("two modules"), installed(watched(subject.method)):
        subject.merge(adapters, space)
        changed = sum(not torch.equal(x, y) for x, y in zip(before, adapters.tensors(), strict=True))
        require(not changed, f"{changed} of the adapters' tensors were changed in place")


def global_state(subject: Subject, space: str) -> None:
    """The global random generators of torch, numpy and Python are left as they were."""
    adapters = ordinary(subject, space)
    before = _generators()
    with case("two modules"):
        subject.merge(adapters, space)
        for name, state in _generators().items():
            require(state == before[name], f"the global generator of {name} was used")


def seed(subject: Subject, space: str) -> None:
    """One seed gives one result, to the bit; another seed gives another exactly when the method says it is randomized."""
    adapters = ordinary(subject, space)
    first = ordinary_merge(subject, space)
    with case("one seed twice"):
        identical(subject.merge(adapters, space), first)
    with case("another seed"):
        other = subject.merge(adapters, space, seed=8)
        differs = any(not torch.equal(other[m], first[m]) for m in first)
        declared = subject.method.randomised
        what = "the results are equal" if declared else "the results differ"
        require(differs == declared, f"randomised is declared {declared}, and {what}")


def row_blocks(subject: Subject, space: str) -> None:
    """The result does not depend on how a matrix is cut into blocks of rows."""
    adapters = ordinary(subject, space)
    whole = ordinary_merge(subject, space)
    for rows in (1, 5):
        with case(f"blocks of {rows} rows"), _cut(rows * max(n for _, n in ORDINARY)):
            parts = subject.merge(adapters, space)
            close(parts, whole)
            if space == "delta":  # elsewhere the lift mixes entries, and no zero is exact
                for module, merged in parts.items():
                    moved = int(((merged == 0) != (whole[module] == 0)).sum())
                    require(not moved, f"{module}: {moved} entries are kept in one cut and dropped in the other")


def workers(subject: Subject, space: str) -> None:
    """The written files do not depend on the number of workers, by a byte."""
    adapters = ordinary(subject, space, [*ORDINARY, (5, 5), (3, 8), (10, 2)], dtype=torch.float32)
    with TemporaryDirectory() as name:
        folder = Path(name)
        adapters.save(folder)
        recipe = subject.recipe(adapters, space, folder=folder)
        first: dict[str, bytes] = {}
        for count in (1, 3):
            with case(f"{count} workers"):
                run_recipe(recipe, out=folder / f"out{count}", workers=count)
                files = {n: (folder / f"out{count}" / n).read_bytes() for n in (ADAPTER_WEIGHTS, ADAPTER_CONFIG, LOCK)}
                first = first or files
                for n, data in files.items():
                    require(data == first[n], f"{n} differs from that of 1 worker")


def order_of_work(subject: Subject, space: str) -> None:
    """The result does not depend on the order in which modules are worked on, nor on what was merged before."""
    adapters = ordinary(subject, space, [*ORDINARY, (5, 5)])
    with case("modules in the opposite order"):
        run = subject.prepare(adapters, subject.recipe(adapters, space), again=True)
        forth = run.deltas()
        identical(subject.merge(adapters.reversed_modules(), space), forth)
    with case("one combiner, every module twice"):
        identical(run.deltas(), forth)


def order_of_adapters(subject: Subject, space: str) -> None:
    """The result does not depend on the order of the adapters."""
    adapters = ordinary(subject, space)
    with case("adapters in the opposite order"):
        close(subject.merge(adapters.reversed_adapters(), space), ordinary_merge(subject, space))


def scale(subject: Subject, space: str) -> None:
    """merge(c · ΔW) = c · merge(ΔW): there is no absolute threshold."""
    adapters = ordinary(subject, space)
    plain = ordinary_merge(subject, space)
    for factor in (1e-14, 3e7):
        with case(f"c = {factor:g}"):
            close(subject.merge(adapters.scaled(factor), space), {m: factor * x for m, x in plain.items()})


def recipe_scale(subject: Subject, space: str) -> None:
    """The recipe's `scale` multiplies the result, once."""
    adapters = ordinary(subject, space)
    plain = ordinary_merge(subject, space)
    for factor in (2.5, -0.5):
        with case(f"scale {factor:g}"):
            close(subject.merge(adapters, space, scale=factor), {m: factor * x for m, x in plain.items()})


def gauge(subject: Subject, space: str) -> None:
    """The result is a function of the deltas: B G and G⁻¹ A merge as B and A do."""
    adapters = ordinary(subject, space)
    with case("a random G of condition 4 per adapter and module"):
        close(subject.merge(adapters.turned(), space), ordinary_merge(subject, space))


def sign(subject: Subject, space: str) -> None:
    """merge(−ΔW) = −merge(ΔW)."""
    adapters = ordinary(subject, space)
    with case("all adapters negated"):
        close(subject.merge(adapters.scaled(-1), space), {m: -x for m, x in ordinary_merge(subject, space).items()})


def missing(subject: Subject, space: str) -> None:
    """A module that an adapter lacks counts as a zero delta."""
    adapters = ordinary(subject, space)
    module = next(iter(adapters.shapes))
    names = list(adapters.factors)
    for name in dict.fromkeys((names[0], names[-1])):
        with case(f"{name} lacks {module}"):
            zeros = adapters.map(lambda n, m, f, name=name: LowRank(f.a * 0, f.b * 0) if (n, m) == (name, module) else f)  # type: ignore[misc]
            close(subject.merge(adapters.without(name, module), space), subject.merge(zeros, space))


def factored(subject: Subject, space: str) -> None:
    """A delta that is given as a complete matrix merges as its factors do."""
    adapters = ordinary(subject, space)
    whole = adapters.map(lambda name, module, f: LowRank(torch.eye(f.shape[1], dtype=f.a.dtype), f.b @ f.a))
    with case("B = ΔW, A = I"):
        close(subject.merge(whole, space), ordinary_merge(subject, space))


def linear_sum(subject: Subject, space: str) -> None:
    """A linear method's result is Σ cₜ ΔWₜ, computed densely."""
    adapters = ordinary(subject, space)
    run = subject.prepare(adapters, subject.recipe(adapters, space))
    with case(f"{subject.adapters} adapters"):
        for module, merged in run.deltas().items():
            c = run.combiner.coefficients(module).tolist()
            deltas = [adapters.delta(n, module) for n in adapters.factors]
            close({module: merged}, {module: sum(x * d for x, d in zip(c, deltas, strict=True)) + torch.zeros_like(merged)})


def lone_adapter(subject: Subject, space: str) -> None:
    """One adapter of weight 1 comes out as it went in."""
    for shape in ((8, 5), (5, 8), (1, 1)):
        adapters = cohort([shape, (6, 4)], [2])
        with case(f"shape {shape}"):
            name = next(iter(adapters.factors))
            expected = {m: adapters.delta(name, m) for m in adapters.shapes}
            close(subject.merge(adapters, space, subject.identity), expected)


def copies(subject: Subject, space: str) -> None:
    """Copies of one adapter, averaged, are that adapter."""
    one = cohort(ORDINARY, [2])
    count = subject.adapters
    adapters = one.copies(count, 1.0 if subject.copies == "mean" else 1 / count)
    name = next(iter(one.factors))
    with case(f"{count} copies of weight {next(iter(adapters.weights.values())):.3g}"):
        close(subject.merge(adapters, space, subject.identity), {m: one.delta(name, m) for m in one.shapes})


def rank(subject: Subject, space: str) -> None:
    """The plan's exact rank bounds the rank of the result, and a module planned as exact is written as it was merged."""
    for kind, adapters in ranked(subject, space):
        with case(kind):
            run = subject.prepare(adapters, subject.recipe(adapters, space))
            deltas, written = run.deltas(), run.emitted()
            for module in run.plan.modules:
                merged, factors = deltas[module.target], written[module.target].slices[0]
                values = torch.linalg.svdvals(merged)
                found = int((values > _RANK * values[0]).sum())
                require(found <= module.exact_rank, f"{module.target} has rank {found}, planned was {module.exact_rank}")
                planned = module.rank or 0
                require(factors.rank <= planned, f"{module.target} is written at rank {factors.rank}, not {planned}")
                if module.result == "exact":
                    close({module.target: factors.dense()}, {module.target: merged}, 1e-6)


def shared_init(subject: Subject, space: str) -> None:
    """Adapters of one A and nearly one B, as scripts that share a seed make them, merge to a result of bounded norm."""
    for shift in (1e-6, 1e-2):
        adapters = nearly_equal(subject.adapters, shift)
        with case(f"one A, B apart by {shift:g}"):
            merged = subject.merge(adapters, space)
            sound(merged, adapters)
            for module, x in merged.items():
                most = _BOUND * sum(abs(w) * float(adapters.delta(n, module).norm()) for n, w in adapters.weights.items())
                require(float(x.norm()) <= most, f"{module} has norm {float(x.norm()):.3g}, allowed is {most:.3g}")


def spelled(subject: Subject, space: str) -> None:
    """A recipe that spells the pipeline of a preset gets what the preset gives, to the bit."""
    adapters = ordinary(subject, space)
    with case(str(subject.pipeline(space))):
        pipeline = replace(subject, method=METHODS["pipeline"], params=_stages(subject, space))
        identical(pipeline.merge(adapters, space), ordinary_merge(subject, space))


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
        _row(extremes),
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
        _row(factored, lambda subject, space: space != "factors"),
        _row(linear_sum, lambda subject, space: subject.method.kind == "linear" and space != "factors"),
        _row(lone_adapter, lambda subject, space: subject.identity is not None and subject.method.min_adapters == 1),
        _row(copies, lambda subject, space: None not in (subject.copies, subject.identity) and space != "factors"),
        _row(rank),
        _row(shared_init, lambda subject, space: space != "factors"),
        _row(spelled, _can_be_spelled),
    )
}


@contextmanager
def _cut(elements: int) -> Iterator[None]:
    """Cut matrices into blocks of so many elements, and hold none."""
    with patch.object(blocks, "MATRIX_BLOCK_ELEMENTS", elements), patch.object(blocks, "HOLD_ELEMENTS", 0):
        yield


def _generators() -> dict[str, Any]:
    numpy: Any = np.random.get_state(legacy=False)  # noqa: NPY002 (it is the global generator that is looked at)
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": (numpy["state"]["key"].tolist(), numpy["state"]["pos"]),
        "Python": random.getstate(),
    }
