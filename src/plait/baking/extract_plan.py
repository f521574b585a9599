"""The first pass over both models: what changed, by how much, and at which rank it is written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from plait.baking.extract_request import ExtractRequest, select
from plait.baking.pairing import Pair, Pairing
from plait.baking.threads import in_order
from plait.errors import PlanError
from plait.linalg.keyed import Key
from plait.merging.emit import rank_at_energy
from plait.merging.progress import Progress
from plait.recipes.schema import Output

_WITH_BIAS = ("linear", "conv1d", "conv")


@dataclass(frozen=True)
class ExtractPlan:
    """What the first pass over the models decides.

    Attributes:
        targets: pairs that become factors, sorted.
        ranks: target module → its own rank.
        energies: tensor → ‖Δ‖²_F; tensors that did not change are left out.
        biases: target module → pair of its changed bias, to be kept as `lora_bias`.
        whole: pairs to be kept whole, as `modules_to_save`.
    """

    targets: tuple[Pair, ...]
    ranks: dict[str, int]
    energies: dict[str, float]
    biases: dict[str, Pair]
    whole: tuple[Pair, ...]

    @property
    def rank(self) -> int:
        """PEFT's r of the adapter."""
        return max(self.ranks.values())


def survey(
    pairing: Pairing, selected: Sequence[Pair], request: ExtractRequest, workers: int, progress: Progress
) -> ExtractPlan:
    """Pass over both models once.

    Args:
        pairing: the models.
        selected: parameters that are to become factors.
        request: ranks, and what else to keep.
        workers: threads.
        progress: who listens.

    Raises:
        PlanError: values that are not finite, or nothing that changed.
    """
    wanted = {p.name for p in selected}
    energy = Output(rank=request.rank).energy

    def look(pair: Pair) -> tuple[float, int]:
        is_wanted = pair.name in wanted
        looked = [_look(pair, number, energy if is_wanted else None) for number in range(len(pair.matrices))]
        size = math.fsum(one for one, _ in looked)
        if not math.isfinite(size):
            raise PlanError(
                f"{pair.name!r}: the difference holds NaN or infinite values, or overflows float32. One of the two models is "
                "damaged, or its training diverged; use another checkpoint."
            )
        if size == 0 or not is_wanted:
            return size, 0
        rank = int(request.rank) if energy is None else max(found for _, found in looked)
        return size, min(rank, *pair.matrix_shape)

    found = list(in_order("compare", look, pairing.pairs, workers, progress))
    energies = {p.name: size for p, (size, _) in zip(pairing.pairs, found, strict=True) if size}
    ranks = {p.module: rank for p, (_, rank) in zip(pairing.pairs, found, strict=True) if rank}
    biases, whole = _kept_whole(pairing.pairs, energies, request) if request.modules_to_save else ({}, ())
    ranks |= {module: 1 for module in biases if module not in ranks}
    if not ranks:
        what = "these layers are" if request.targets or energies else "the two models are"
        raise PlanError(f"{what} the same in {request.base} and {request.finetuned}: there is nothing to extract.")
    targets = tuple(p for p in selected if p.module in ranks)
    return ExtractPlan(targets, ranks, energies, biases, whole)


def _look(pair: Pair, number: int, energy: float | None) -> tuple[float, int]:
    """Return ‖Δ‖²_F of one matrix, and the rank that keeps a share of it; matrices are held one at a time."""
    delta = pair.delta(number)
    size = delta.energy()
    if energy is None or not math.isfinite(size) or not size:
        return size, 1
    return size, rank_at_energy([delta], energy, key_of(pair, number))


def _kept_whole(
    pairs: Sequence[Pair], energies: dict[str, float], request: ExtractRequest
) -> tuple[dict[str, Pair], tuple[Pair, ...]]:
    """Return the biases that go into `lora_bias`, and the tensors of the modules that are saved whole."""
    kinds = {p.module: p.kind for p in pairs if p.name == f"{p.module}.weight"}
    of_linear = {p.module: p for p in pairs if p.kind == "bias" and kinds.get(p.module) in _WITH_BIAS}
    selected = {p.module for p in select(pairs, request)}
    fused = any(p.kind == "experts" and p.module in selected and p.name in energies for p in pairs)
    # PEFT has lora_bias beside neither embeddings nor experts
    biases = {} if request.embeddings or fused else {m: p for m, p in of_linear.items() if p.name in energies and m in selected}
    able = {m for m, kind in kinds.items() if kind == "other" or (kind == "embedding" and m not in selected)}
    able -= {p.module for p in pairs if not p.is_stored}
    changed = {p.module for p in pairs if p.name in energies and p.module in able}
    return biases, tuple(p for p in pairs if p.module in changed)


def key_of(pair: Pair, number: int) -> Key:
    """Return the key of what is random about truncating one matrix of a layer."""
    key = Key(0).child("extract", pair.module)
    return key if len(pair.matrices) == 1 else key.child(str(number))
