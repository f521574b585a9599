"""A LoRA adapter from a full fine-tune: per layer the best low-rank approximation of fine-tune − base, streamed.

Eckart & Young 1936: the truncated SVD is the nearest matrix of its rank. It is computed as in a merge
(`linalg.truncated_svd`), so that the same models give the same bytes with any number of workers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from plait.adapters.layouts import Embedding
from plait.checkpoints.digests import weight_digests
from plait.errors import OutputError
from plait.extraction.card import extract_card
from plait.extraction.pairing import Pair, Pairing, pair_checkpoints
from plait.extraction.plan import ExtractPlan, survey
from plait.extraction.record import ExtractRecord, Leftover
from plait.extraction.request import ExtractRequest, select_layers
from plait.extraction.writing import write_extraction
from plait.inspection.compatibility import max_lora_rank
from plait.records import ShortRepr
from plait.results.disk import check_not_an_input
from plait.results.lock import LOCK, RUN_RECORD, Lock, locked_input, new_lock, output_digests
from plait.results.progress import Progress, SilentProgress
from plait.results.records import ModuleRecord, write_json
from plait.results.staging import output_problem, staged
from plait.results.threads import worker_count
from plait.version import __version__


@dataclass(frozen=True, repr=False)
class ExtractResult(ShortRepr):
    """A finished extraction: the adapter's folder and what happened."""

    folder: Path
    record: ExtractRecord


def run_extract(
    request: ExtractRequest,
    *,
    out: Path,
    force: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
    written_as: tuple[str, str | None] | None = None,
) -> ExtractResult:
    """Write the adapter that turns a base model into (nearly) its full fine-tune.

    Args:
        request: what is asked for.
        out: where to write.
        force: replace an adapter at `out`.
        workers: tensors worked on at a time; never changes a byte.
        progress: receives stages and steps.
        written_as: name and revision of the base model in the adapter; as the request says when None.

    Raises:
        PlaitError: anything wrong with what the user gave; nothing is left at `out` then.
    """
    started = time.perf_counter()
    workers = worker_count(workers)
    progress = progress or SilentProgress()
    problem = output_problem(out, force=force)
    if problem:
        raise OutputError(problem)
    pairing = pair_checkpoints(request.base, request.finetuned)
    check_not_an_input(
        out, {"the base model": pairing.base.folder, "the fine-tune": pairing.tuned.folder}, command="extraction"
    )
    located = pairing.base.located
    name = written_as or ((request.base_id, None) if request.base_id else (located.repo or request.base, located.commit))
    selected = select_layers(pairing.pairs, request)
    plan = survey(pairing, selected, request, workers, progress)
    with staged(out, force=force) as place:
        modules = write_extraction(pairing, plan, request, place, name, workers, progress)
        record = _record(pairing, plan, selected, modules, request, name[0], started)
        (place / "README.md").write_text(extract_card(pairing, record, place), encoding="utf-8")
        write_json(place / LOCK, _lock(pairing, request, place, out))
        write_json(place / RUN_RECORD, record)
    return ExtractResult(out, record)


def _record(
    pairing: Pairing,
    plan: ExtractPlan,
    selected: Sequence[Pair],
    modules: tuple[ModuleRecord, ...],
    request: ExtractRequest,
    base_model: str,
    started: float,
) -> ExtractRecord:
    held = {p.name for p in plan.targets}
    kept_in_full = {p.name for p in (*plan.full, *plan.biases.values())}
    leftovers = tuple(
        Leftover(tensor=p.name, kind=p.kind, energy=plan.energies[p.name], kept=p.name in kept_in_full)
        for p in (*pairing.pairs, *pairing.copies)
        if p.name in plan.energies and p.name not in held
    )
    truncated = sum((m.energy or 0.0) * (1 - m.kept) for m in modules)
    energies = [plan.energies.get(p.name, 0.0) for p in plan.targets]
    of_targets = math.fsum(energies)
    held_energy = math.fsum(e * m.kept for e, m in zip(energies, modules, strict=True))
    is_served = pairing.task == "CAUSAL_LM" and not plan.saved and not any(x.kept for x in leftovers)
    is_served = is_served and all(layout.served_by_vllm for layout in plan.layouts.values())
    return ExtractRecord(
        plait=__version__,
        request=request.model_dump(mode="json"),
        base_model=base_model,
        task_type=pairing.task,
        rank=plan.rank,
        max_lora_rank=max_lora_rank(plan.rank) if is_served else None,
        kept=held_energy / of_targets if of_targets else 1.0,
        lowest_kept=min(m.kept for m in modules),
        lost=(truncated + math.fsum(x.energy for x in leftovers if not x.kept)) / math.fsum(plan.energies.values()),
        modules=modules,
        unchanged=tuple(p.module for p in selected if p.name not in plan.energies),
        saved=plan.saved,
        leftovers=leftovers,
        notes=tuple(_notes(pairing, plan, leftovers)),
        finished=datetime.now().astimezone().isoformat(timespec="seconds"),
        seconds=round(time.perf_counter() - started, 3),
    )


def _notes(pairing: Pairing, plan: ExtractPlan, leftovers: Sequence[Leftover]) -> Iterator[str]:
    outweighed = {p.name for p in pairing.pairs if p.is_outweighed}
    role = {p.name: p.form for p in (*pairing.pairs, *pairing.copies)}
    experts = [x for x in leftovers if role[x.tensor] == "expert"]
    if experts:
        yield (
            f"{len(experts)} tensors of experts have changed, such as {experts[0].tensor!r}; they are not extracted, since it "
            "is not known as which parameters the model holds them."
        )
    grouped = [x for x in leftovers if not x.kept and x.tensor in outweighed]
    if grouped:
        yield (
            f"{len(grouped)} grouped convolutions have changed, such as {grouped[0].tensor!r}; they are left out, since PEFT's "
            "LoRA, every group of which reads all channels, would be larger than they are. --modules-to-save keeps them in "
            "full, --targets makes them a LoRA all the same."
        )
    yield from pairing.notes
    if pairing.ties_head and any(p.form is Embedding for p in (*plan.targets, *plan.full)):
        yield "the embedding is tied to the head in these models; the adapter changes the embedding alone."


def _lock(pairing: Pairing, request: ExtractRequest, place: Path, out: Path) -> Lock:
    sides = {"base": pairing.base.located, "finetuned": pairing.tuned.located}
    return new_lock(
        "extract",
        recipe=request.model_dump(mode="json"),
        inputs={name: locked_input(p, weight_digests(p.folder), out) for name, p in sides.items()},
        outputs=output_digests(place),
    )
