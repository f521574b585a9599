"""The files of an extracted adapter: factors under PEFT's names, and the configuration that makes PEFT find them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from plait.adapters.layouts import Linear
from plait.adapters.lowrank import LowRank
from plait.adapters.selection import names_or_paths
from plait.adapters.writing import AdapterWriter, output_dtype
from plait.deferred import Tensor, torch
from plait.errors import PlanError
from plait.extraction.pairing import Pair, Pairing
from plait.extraction.plan import ExtractPlan, truncation_key
from plait.extraction.request import ExtractRequest
from plait.linalg.blocks import block_ranges
from plait.merging.truncation import OutputFactors, truncate_module
from plait.results.progress import Progress
from plait.results.records import ModuleRecord
from plait.results.threads import in_order
from plait.tensorfiles.reader import DTYPES as STORED
from plait.tensorfiles.writer import TensorEntry


def write_extraction(
    pairing: Pairing,
    plan: ExtractPlan,
    request: ExtractRequest,
    place: Path,
    base: tuple[str, str | None],
    workers: int,
    progress: Progress,
) -> tuple[ModuleRecord, ...]:
    """Write the adapter; return what happened to every layer.

    Args:
        pairing: the models.
        plan: what is written.
        request: dtype and layout.
        place: an existing folder.
        base: name and revision of the base model.
        workers: layers worked on at a time.
        progress: receives stages and steps.

    Raises:
        PlanError: a value overflows in the dtype asked for, or all of a tensor vanish.
    """
    writer = AdapterWriter(
        plan.layouts,
        plan.ranks,
        dtype=output_dtype(request.dtype),
        uniform=request.layout == "uniform",
        has_bias=bool(plan.biases),
    )
    config = writer.config(
        {
            "base_model_name_or_path": base[0],
            "revision": base[1],
            "task_type": pairing.task,
            "fan_in_fan_out": any(layout.fan_in_fan_out for layout in plan.layouts.values()),
            "target_modules": names_or_paths(
                {p.module for p in plan.targets if not p.is_parameter}, {p.layer for p in (*pairing.pairs, *pairing.copies)}
            ),
            "target_parameters": [p.module for p in plan.targets if p.is_parameter] or None,
            "modules_to_save": list(plan.saved) or None,
        }
    )
    if [p.form for p in (*plan.targets, *plan.full) if p.shares] == [Linear]:
        config["ensure_weight_tying"] = True  # a key of PEFT since 0.18; 0.21 fails on more uses than embedding and head
    done: list[ModuleRecord] = []

    def tensors() -> Iterator[dict[str, Tensor]]:
        found = in_order("extract", lambda pair: _factors(plan, pair), plan.targets, workers, progress)
        for pair, emitted in zip(plan.targets, found, strict=True):
            bias = plan.biases.get(pair.module)
            values = torch.zeros(pair.layout.outputs) if bias is None else bias.delta().dense().flatten()
            slices = [LowRank(s.b.mT, s.a.mT) if pair.is_transposed else s for s in emitted.slices]
            slices = plan.layouts[pair.module].as_factors(slices)
            named = writer.tensors(pair.module, slices, bias=values if plan.biases else None)
            yield {name: _cast(pair, tensor, request.dtype) for name, tensor in named.items()}
            done.append(_module_record(pair, emitted))

    full = [(TensorEntry(p.name, getattr(torch, STORED[p.info.dtype]), p.shape), _rows(p)) for p in plan.full]
    writer.write(place, tensors(), config, full)
    return tuple(done)


def _factors(plan: ExtractPlan, pair: Pair) -> OutputFactors:
    """Return the factors of every matrix; one difference is held at a time."""
    if pair.name not in plan.energies:  # its bias alone has changed
        return OutputFactors((LowRank.zero(pair.matrix_shape, rank=1),), 0.0, 0.0)
    parts = [
        truncate_module([pair.delta(i)], plan.ranks[pair.module], truncation_key(pair, i)) for i in range(len(pair.matrices))
    ]
    slices = tuple(s for part in parts for s in part.slices)
    return OutputFactors(slices, math.fsum(p.energy or 0.0 for p in parts), math.fsum(p.kept or 0.0 for p in parts))


def _cast(pair: Pair, tensor: Tensor, dtype: str) -> Tensor:
    """Return a tensor in the dtype asked for.

    Raises:
        PlanError: it overflows there, or vanishes.
    """
    cast = tensor.to(output_dtype(dtype))
    wider = f"in {dtype}; write --dtype bfloat16 or float32"
    if not bool(torch.isfinite(cast).all()):
        raise PlanError(f"{pair.name!r}: the factors overflow {wider}.")
    if bool(tensor.any()) and not bool(cast.any()):
        raise PlanError(f"{pair.name!r}: the factors are too small and vanish {wider}.")
    return cast


def _rows(pair: Pair) -> Iterator[tuple[int, Tensor]]:
    """Yield a tensor of the fine-tune as it is, by rows: an embedding is large."""
    file, name = pair.tuned
    shape = pair.info.shape
    if not shape:
        yield 0, file.read(name)
        return
    for start, stop in block_ranges(shape[0], math.prod(shape[1:])):
        yield start, file.read_rows(name, start, stop)


def _module_record(pair: Pair, emitted: OutputFactors) -> ModuleRecord:
    energy, held = emitted.energy or 0.0, emitted.kept or 0.0
    kept = min(1.0, held / energy) if energy else 1.0
    is_exact = emitted.rank >= min(pair.matrix_shape) or not energy
    return ModuleRecord(
        target=pair.module,
        rank=emitted.rank,
        result="exact" if is_exact else "truncated",
        energy=None if is_exact else energy,
        kept=1.0 if is_exact else kept,
    )
