"""The first pass over both models: what changed, by how much, and at which rank it is written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from plait.adapters.layouts import Embedding, Layout, uniform_rank
from plait.errors import PlanError
from plait.extraction.pairing import Pair, Pairing, is_saved, saved_module
from plait.extraction.request import ExtractRequest
from plait.libraries.peft import TASK_HEADS
from plait.linalg.blocks import block_ranges
from plait.linalg.finite import all_finite
from plait.linalg.keyed import Key
from plait.merging.truncation import rank_at_energy
from plait.recipes.schema import Output
from plait.results.progress import Progress
from plait.results.threads import in_order


@dataclass(frozen=True)
class ExtractPlan:
    """What the first pass over the models decides.

    Attributes:
        targets: pairs that become factors, sorted.
        ranks: target module → its own rank, of one matrix.
        energies: tensor → ‖Δ‖²_F; tensors that did not change are left out.
        biases: target module → pair of its changed bias, to be kept as `lora_bias`.
        saved: modules to be kept in full, as `modules_to_save` names them.
        full: their pairs.
    """

    targets: tuple[Pair, ...]
    ranks: dict[str, int]
    energies: dict[str, float]
    biases: dict[str, Pair]
    saved: tuple[str, ...]
    full: tuple[Pair, ...]

    @cached_property
    def layouts(self) -> dict[str, Layout]:
        """Target module → how its factors are stored."""
        return {p.module: p.layout for p in self.targets}

    @cached_property
    def rank(self) -> int:
        """PEFT's r of the adapter."""
        return uniform_rank(self.ranks, self.layouts)


def survey(
    pairing: Pairing, selected: Sequence[Pair], request: ExtractRequest, workers: int, progress: Progress
) -> ExtractPlan:
    """Pass over both models once.

    Args:
        pairing: the models.
        selected: parameters that are to become factors.
        request: ranks, and what else to keep.
        workers: threads.
        progress: receives stages and steps.

    Raises:
        PlanError: values that are not finite, or nothing that changed.
    """
    wanted = {p.name for p in selected}
    energy = Output(rank=request.rank).energy

    def look(pair: Pair) -> tuple[float, int]:
        is_wanted = pair.name in wanted
        looked = [_measure(pair, number, energy if is_wanted else None) for number in range(len(pair.matrices))]
        size = math.fsum(one for one, _ in looked)
        if not math.isfinite(size):
            damaged = _not_finite(pair)
            where = damaged or f"{pairing.base.folder} and {pairing.tuned.folder}: {pair.name!r}"
            what = "holds NaN or infinite values" if damaged else "the difference overflows float32"
            raise PlanError(f"{where}: {what}. The file is damaged, or the model's training diverged; use another checkpoint.")
        if size == 0 or not is_wanted:
            return size, 0
        rank = max(1, int(request.rank) // pair.layout.rank_unit) if energy is None else max(found for _, found in looked)
        return size, min(rank, *pair.matrix_shape)

    found = list(in_order("compare", look, pairing.pairs, workers, progress))
    energies = {p.name: size for p, (size, _) in zip(pairing.pairs, found, strict=True) if size}
    ranks = {p.module: rank for p, (_, rank) in zip(pairing.pairs, found, strict=True) if rank}
    saved = _saved(pairing, selected, energies, request)
    full = tuple(p for p in (*pairing.pairs, *pairing.copies, *pairing.constants) if is_saved(p.layer, saved))
    able = [p for p in selected if not is_saved(p.layer, saved)]
    biases = _biases(pairing.pairs, able, energies) if request.modules_to_save and not request.embeddings else {}
    ranks |= {module: 1 for module in biases if module not in ranks}
    targets = [p for p in able if p.module in ranks]
    targets += [c for c in pairing.copies if any(c.shares == p.module for p in targets)]
    if not targets:
        what = "these layers are" if request.targets or energies else "the two models are"
        raise PlanError(f"{what} the same in {request.base} and {request.finetuned}: there is nothing to extract.")
    for copy in pairing.copies:
        if copy in targets or copy in full:  # every use counts
            energies |= dict.fromkeys([copy.name], energies.get(f"{copy.shares}.weight", 0.0))
    ranks = {p.module: ranks[p.shares or p.module] for p in targets}
    return ExtractPlan(tuple(sorted(targets, key=lambda p: p.name)), ranks, energies, biases, saved, full)


def _measure(pair: Pair, number: int, energy: float | None) -> tuple[float, int]:
    """Return ‖Δ‖²_F of one matrix, and the rank that keeps a share of it; matrices are held one at a time."""
    delta = pair.delta(number)
    size = delta.energy()
    if energy is None or not math.isfinite(size) or not size:
        return size, 1
    return size, rank_at_energy([delta], energy, truncation_key(pair, number))


def _not_finite(pair: Pair) -> str | None:
    """Return the file and the name of the first tensor of a pair that holds a NaN or infinite value; None where none does."""
    for rows in (rows for matrix in pair.matrices for rows in matrix):
        for file, name in (rows.base, rows.tuned):
            for start, stop in block_ranges(rows.count, rows.columns):
                at, size = (rows.first + start) * rows.columns, (stop - start) * rows.columns
                if not all_finite(file.values(name, at, size)):
                    return f"{file.path}: {name!r}"
    return None


def _biases(pairs: Sequence[Pair], targets: Sequence[Pair], energies: dict[str, float]) -> dict[str, Pair]:
    """Return target module → its bias, where that has changed; PEFT has no lora_bias on embeddings and parameters."""
    if any(p.is_parameter and p.name in energies for p in targets):
        return {}
    layers = {p.layer for p in targets if p.layout.takes_bias}
    return {p.layer: p for p in pairs if p.form == "bias" and p.name in energies and p.layer in layers}


def _saved(pairing: Pairing, selected: Sequence[Pair], energies: dict[str, float], request: ExtractRequest) -> tuple[str, ...]:
    """Return the modules that are kept in full: a task's head, and on request what has changed and cannot be a LoRA."""
    names = TASK_HEADS.get(pairing.task or "", ())
    saved = {module for p in pairing.pairs if (module := saved_module(p.layer, names)) is not None}
    if request.modules_to_save:
        able = {
            p.layer
            for p in pairing.pairs
            if p.name == f"{p.layer}.weight" and (p.form in ("other", Embedding) or p.is_outweighed)
        }
        able -= {p.layer for p in selected}
        able -= {p.layer for p in pairing.pairs if not p.is_stored}
        changed = {p.layer for p in pairing.pairs if p.name in energies and p.layer in able}
        saved |= changed | {c.layer for c in pairing.copies if c.shares in changed}
    return tuple(sorted(saved))


def truncation_key(pair: Pair, number: int) -> Key:
    """Return the key of what is random about truncating one matrix of a layer; uses of one embedding have the same."""
    key = Key(0).child("extract", pair.shares or pair.module)
    return key if len(pair.matrices) == 1 else key.child(str(number))
