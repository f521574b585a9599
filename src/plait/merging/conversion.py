"""An adapter in another format: the same factors, read and written one module at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from plait.adapters.adapter import Adapter
from plait.adapters.formats import FORMATS, AdapterFormat, ModuleFactors, OutgoingAdapter, OutgoingTarget
from plait.deferred import torch
from plait.errors import PlanError, RecipeError, collect, did_you_mean
from plait.hub.download import Located
from plait.inspection.doubts import adapter_doubts
from plait.merging.inventory import modules_of, open_adapters
from plait.merging.output_format import base_config, settings_of
from plait.records import Record, ShortRepr
from plait.results.digests import sha256
from plait.results.disk import check_not_an_input, check_space
from plait.results.lock import LOCK, locked_input, new_lock, output_digests
from plait.results.progress import Progress, SilentProgress
from plait.results.records import write_json
from plait.results.staging import checking_output, staged
from plait.tensorfiles.reader import torch_dtype


class ConvertPlan(Record):
    """What a conversion does.

    Attributes:
        adapter: its name.
        source: format that it is in.
        writer: the program that wrote it, as far as its files say.
        to: format that is written.
        towers: components of a pipeline that are written; none where the adapter is of one model.
        modules: number of target modules.
        ranks: the distinct ranks, ascending.
        metadata: keys of the header's texts that are carried.
        output_bytes: of the factors.
        notes: what changes.
    """

    adapter: str
    source: str
    writer: str | None
    to: str
    towers: tuple[str, ...]
    modules: int
    ranks: tuple[int, ...]
    metadata: tuple[str, ...]
    output_bytes: int
    notes: tuple[str, ...]


@dataclass(frozen=True, repr=False)
class ConvertResult(ShortRepr):
    """A finished conversion: where it was written, and what was done."""

    folder: Path
    plan: ConvertPlan


def _format(name: str) -> AdapterFormat:
    FORMATS.load_plugins()
    if name not in FORMATS:
        raise RecipeError(f"--to {name}: no such format.{did_you_mean(name, FORMATS)} There are: {', '.join(FORMATS)}.")
    return FORMATS[name]


def plan_convert(
    reference: str,
    *,
    to: str,
    out: Path | None = None,
    force: bool = False,
    tower: str | None = None,
    base_model: str | None = None,
) -> ConvertPlan:
    """Return what `run_convert` would do with the same arguments; reads headers, no factor."""
    return _planned(reference, to, out, tower, base_model, force=force).plan


def run_convert(
    reference: str,
    *,
    to: str,
    out: Path,
    force: bool = False,
    tower: str | None = None,
    base_model: str | None = None,
    progress: Progress | None = None,
) -> ConvertResult:
    """Write an adapter in another format.

    Args:
        reference: of the adapter.
        to: name of the format.
        out: folder to write.
        force: replace a result of plait's at `out`.
        tower: component of a pipeline that alone is written; all when None.
        base_model: the base model's name in what is written, in place of the adapter's own; a folder or a place on the Hub.
        progress: receives stages and steps.

    Raises:
        PlaitError: anything wrong with what the user gave, or the format has no place for something; nothing is left at `out`.
    """
    found = _planned(reference, to, out, tower, base_model, force=force)
    check_space(out, found.plan.output_bytes, what="the adapter")
    listener = progress or SilentProgress()
    listener.start("convert", len(found.outgoing.targets))
    try:
        with staged(out, force=force) as place:
            written = found.format.write(place, found.outgoing, _factors(found, listener))
            files = {p.name: sha256(p) for p in found.adapter.files}
            options = {"tower": tower, "base_model": base_model}
            request: dict[str, Any] = {"adapter": reference, "to": to} | {k: v for k, v in options.items() if v is not None}
            inputs = {found.adapter.name: locked_input(found.located, files, out)}
            outputs = output_digests(place, written)
            write_json(place / LOCK, new_lock("convert", recipe=request, inputs=inputs, outputs=outputs))
    finally:
        listener.finish()
    return ConvertResult(out, found.plan)


@dataclass(frozen=True)
class _Conversion:
    adapter: Adapter
    located: Located
    format: AdapterFormat
    outgoing: OutgoingAdapter
    paths: dict[str, str]  # target as it is written → in the adapter
    plan: ConvertPlan


def _planned(
    reference: str, to: str, out: Path | None, tower: str | None, base_model: str | None, *, force: bool
) -> _Conversion:
    wanted = _format(to)
    with checking_output(out, force=force):
        (located,), (adapter,) = open_adapters([(None, reference)], modules=modules_of(base_model, None))
        if adapter.origin.format == wanted.name and tower is None:
            raise PlanError(f"{adapter.place}: this is an adapter of format {to!r} already.")
        paths = _paths(adapter, tower, wanted)
        named = base_model or adapter.config.base_model
        outgoing = replace(_outgoing(adapter, paths, tower, named), base_config=base_config(wanted, named))
        file = adapter.files[0]
        problems = [f"{file}: {problem}" for problem in wanted.problems(outgoing)]
        collect(PlanError, problems, f"{adapter.place}: this adapter cannot be written as {to!r}")
    check_not_an_input(out, {f"adapter {adapter.name!r}": adapter.place}, command="conversion")
    plan = ConvertPlan(
        adapter=adapter.name,
        source=adapter.origin.format,
        writer=adapter.origin.writer,
        to=to,
        towers=tuple(outgoing.towers),
        modules=len(outgoing.targets),
        ranks=tuple(sorted({t.rank for t in outgoing.targets.values()})),
        metadata=tuple(outgoing.metadata),
        output_bytes=sum(_bytes(t) for t in outgoing.targets.values()),
        notes=(*adapter.origin.notes, *adapter_doubts([adapter]), *wanted.notes(outgoing)),
    )
    return _Conversion(adapter, located, wanted, outgoing, paths, plan)


def _paths(adapter: Adapter, tower: str | None, wanted: AdapterFormat) -> dict[str, str]:
    """Return target as it is written → in the adapter.

    Raises:
        RecipeError: there is no such tower.
    """
    if tower is not None and tower not in adapter.towers:
        there = f"There are: {', '.join(adapter.towers)}." if adapter.towers else "It is of one model, and has none."
        raise RecipeError(f"--tower {tower}: {adapter.name!r} has no such tower. {there}")
    kept = [path for path in adapter.targets if tower is None or path.startswith(f"{tower}.")]
    towers = adapter.towers if tower is None else (tower,)
    if len(towers) == 1 and wanted.of_one_model:
        return {path.removeprefix(f"{towers[0]}."): path for path in kept}
    return {path: path for path in kept}


def _outgoing(adapter: Adapter, paths: dict[str, str], tower: str | None, base_model: str | None) -> OutgoingAdapter:
    """Describe some targets of an adapter as they are to be written."""
    targets = {}
    for path, own in paths.items():
        t = adapter.targets[own]
        stored = [torch_dtype(adapter.file.tensors[t.tensors[p]].dtype) for p in (t.layout.a_part, t.layout.b_part)]
        targets[path] = OutgoingTarget(t.layout, t.rank, t.scaling, torch.promote_types(*stored), t.has_bias, t.is_dora)
    layouts = {path: t.layout for path, t in targets.items()}
    acting = [key for key in ("alora_invocation_tokens", "layer_replication") if adapter.config.raw.get(key)]
    return OutgoingAdapter(
        targets=targets,
        settings=settings_of([adapter], layouts, base_model),
        metadata=adapter.origin.metadata,
        towers=adapter.towers if tower is None else (tower,),
        others=(*adapter.full_tensors, *acting),
    )


def _factors(found: _Conversion, progress: Progress) -> Iterator[ModuleFactors]:
    for path, target in found.outgoing.targets.items():
        own = found.paths[path]
        yield ModuleFactors(
            path,
            found.adapter.read(own, target.dtype),
            found.adapter.read_part(own, "lora_B.bias", target.dtype) if target.has_bias else None,
            found.adapter.read_part(own, "lora_magnitude_vector", target.dtype) if target.is_dora else None,
        )
        progress.advance()


def _bytes(target: OutgoingTarget) -> int:
    return target.dtype.itemsize * sum(math.prod(shape) for shape in target.layout.packed_shapes(target.rank))
