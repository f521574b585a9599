"""Deltas of a live model as an adapter that PEFT loads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from plait.adapters.adapter import Adapter
from plait.adapters.layouts import Layout
from plait.adapters.lowrank import LowRank
from plait.adapters.writing import AdapterWriter
from plait.merging.output_format import settings_of
from plait.merging.truncation import rounded
from plait.results.staging import staged


def save_deltas(
    deltas: Mapping[str, Sequence[LowRank]],
    folder: Path,
    layouts: Mapping[str, Layout],
    adapters: Sequence[Adapter],
    dtype: torch.dtype,
) -> None:
    """Write deltas as an adapter; see `Mixture.save`.

    Args:
        deltas: target → one per matrix.
        folder: to be made.
        layouts: target → how it is stored.
        adapters: whose settings it gets.
        dtype: of its tensors.

    Raises:
        PlanError: a value overflows the dtype.
        OutputError: the folder exists, or cannot be written.
    """
    ranks = {path: max(s.rank for s in slices) for path, slices in deltas.items()}
    writer = AdapterWriter(layouts, ranks, dtype=dtype, uniform=True)
    base = next((a.config.base_model for a in adapters if a.config.base_model), None)
    with staged(folder, force=False) as place:
        tensors = (
            {name: rounded(path, tensor, dtype) for name, tensor in writer.tensors(path, slices).items()}
            for path, slices in deltas.items()
        )
        writer.write(place, tensors, writer.config(settings_of(adapters, layouts, base)))
