"""Whether adapters and merge results fit a model: which of its modules their targets are, and what else they replace there."""

from __future__ import annotations

from collections.abc import Sequence

from plait.adapters.adapter import Adapter
from plait.errors import PlanError, collect
from plait.inspection.compatibility import activation_problems, with_places
from plait.mixture.deltas import AdapterDelta, DenseDelta
from plait.mixture.layers import layer_type
from plait.mixture.modules import ModuleIndex, TargetModule
from plait.mixture.swaps import FullTensorSet, Swap, full_swaps


def fitting_modules(adapters: Sequence[Adapter], index: ModuleIndex) -> dict[str, TargetModule]:
    """Return path → target module of the model, over all adapters, sorted.

    Raises:
        PlanError: targets that do not fit the model, all of them.
    """
    modules: dict[str, TargetModule] = {}
    problems = dict.fromkeys(activation_problems(adapters))
    for adapter in adapters:
        for path, target in adapter.targets.items():
            try:
                found = modules.get(path) or index.find(path)
            except ValueError as error:
                problems[f"adapter {adapter.name!r}: {error}"] = None
                continue
            layout = target.layout
            problem = _misfit(found, [(layout.d_out, layout.d_in)] * layout.stack)
            if layer_type(type(layout)) is not layer_type(type(found.layout)):
                problem = (
                    f"{found.path!r} is of kind {found.layout.kind} in the model and of kind {layout.kind} in the adapter. "
                    "Is it the right base?"
                )
            if problem:
                problems[f"adapter {adapter.name!r}: {problem}"] = None
            modules[path] = found
    collect(PlanError, with_places([*problems], adapters), "these adapters do not fit the model")
    return dict(sorted(modules.items()))


def fitting_full_tensors(adapters: Sequence[Adapter], index: ModuleIndex) -> dict[str, list[Swap]]:
    """Return adapter → what its full tensors replace; nothing of one that brings copies of the model's own alone.

    Raises:
        PlanError: tensors that do not fit the model, of all adapters.
    """
    swaps: dict[str, list[Swap]] = {}
    problems = []
    for adapter in adapters:
        if adapter.full_tensors:
            try:
                if found := full_swaps(FullTensorSet.of(adapter), index):
                    swaps[adapter.name] = found
            except ValueError as error:
                problems.append(f"adapter {adapter.name!r}: {error}")
    collect(PlanError, with_places(problems, adapters), "these adapters do not fit the model")
    return swaps


def fitting_module(path: str, delta: AdapterDelta | DenseDelta, index: ModuleIndex) -> TargetModule:
    """Return where a merged delta acts.

    Raises:
        PlanError: the model has no such target, or one of another shape.
    """
    try:
        target = index.find(path)
    except ValueError as error:
        raise PlanError(str(error)) from None
    if problem := _misfit(target, [s.shape for s in delta.slices]):
        raise PlanError(problem)
    return target


def _misfit(target: TargetModule, found: Sequence[tuple[int, int]]) -> str | None:
    layout = target.layout
    if layout.names_parameter and target.home is None:
        return target.dense_problem()
    if list(found) == [(layout.d_out, layout.d_in)] * layout.stack:
        return None
    return (
        f"{target.path!r} maps {layout.d_in} → {layout.d_out}{f' × {layout.stack}' if layout.stack > 1 else ''} in the model, "
        f"the delta is {found[0][1]} → {found[0][0]}{f' × {len(found)}' if len(found) > 1 else ''}. Is it the right base?"
    )
