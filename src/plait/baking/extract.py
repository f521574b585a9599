"""A LoRA adapter from a full fine-tune: per layer the best low-rank approximation of fine-tune − base, streamed.

Eckart & Young 1936: the truncated SVD is the nearest matrix of its rank. It is computed as in a merge
(`linalg.truncated_svd`), so that the same models give the same bytes with any number of workers.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import Field, ValidationError, field_validator
from torch import Tensor

import plait
from plait.adapters.adapter import CONFIG, WEIGHTS
from plait.adapters.lowrank import LowRank
from plait.adapters.names import PREFIX
from plait.adapters.tensorfile import DTYPES as STORED
from plait.adapters.tensorwriter import Entry, TensorWriter
from plait.baking.extract_card import extract_card
from plait.baking.pairing import Pair, Pairing, pair_checkpoints
from plait.errors import OutputError, PlanError, RecipeError, did_you_mean
from plait.linalg.keyed import Key
from plait.merging import record as records
from plait.merging.compatibility import max_lora_rank
from plait.merging.emit import Emitted, emit, rank_at_energy
from plait.merging.portable import DTYPES
from plait.merging.progress import Progress, Silent
from plait.merging.record import Lock, ModuleRecord
from plait.merging.staging import output_problem, staged
from plait.recipes.schema import Dtype, Output
from plait.records import Record

T = TypeVar("T")
R = TypeVar("R")
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


class ExtractRequest(Record):
    """What is asked for.

    Attributes:
        base: reference of the base model.
        finetuned: reference of the full fine-tune.
        rank: a number, or `energy:0.99`.
        targets: names of layers (`q_proj`) or shell patterns over module paths; all Linear layers when None.
        embeddings: also take embeddings, as `lora_embedding_*`.
        modules_to_save: keep what cannot be a LoRA whole: norms and the like as `modules_to_save`, biases as `lora_bias`.
        dtype: of the written factors.
        layout: one rank for all modules, or each its own.
        base_id: the base model's name in the adapter; the reference as given when None.
    """

    base: str
    finetuned: str
    rank: int | str
    targets: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    embeddings: bool = False
    modules_to_save: bool = False
    dtype: Dtype = "float32"
    layout: Literal["uniform", "pattern"] = "uniform"
    base_id: str | None = None

    @field_validator("rank")
    @classmethod
    def _rank(cls, value: int | str) -> int | str:
        rank = Output(rank=value).rank
        if rank == "auto":
            raise ValueError("a full fine-tune has no rank of its own: give a number, or energy:0.99")
        return rank


class Leftover(Record):
    """A changed tensor that the factors do not hold.

    Attributes:
        tensor: its name.
        kind: what it belongs to: `linear` and `conv1d` were not asked for, the rest cannot be a LoRA.
        energy: ‖Δ‖²_F of it.
        kept: whether the adapter holds it whole all the same.
    """

    tensor: str
    kind: str
    energy: float
    kept: bool


class ExtractRecord(Record):
    """What an extraction did. A function of the request and the models, but for `seconds` and `finished`.

    Attributes:
        plait: version.
        request: as run.
        base_model: the base model's name, as written into the adapter.
        task_type: PEFT's, as the base model's architecture says; None where it says nothing.
        rank: of the adapter (PEFT's r).
        max_lora_rank: smallest value of vLLM's setting that holds it; None when none does.
        kept: share of ‖ΔW‖²_F kept over the target modules.
        lowest_kept: the smallest share of a module.
        lost: share of ‖Δ‖²_F over all tensors that the adapter does not hold: truncated, or left over.
        modules: one record each.
        unchanged: layers asked for that are equal in both models, and have no factors.
        leftovers: changed tensors without factors.
        notes: what else is worth knowing.
        finished: local time, ISO 8601.
        seconds: wall time.
    """

    plait: str
    request: dict[str, Any]
    base_model: str
    task_type: str | None
    rank: int
    max_lora_rank: int | None
    kept: float
    lowest_kept: float
    lost: float
    modules: tuple[ModuleRecord, ...]
    unchanged: tuple[str, ...]
    leftovers: tuple[Leftover, ...]
    notes: tuple[str, ...]
    finished: str
    seconds: float


@dataclass(frozen=True)
class ExtractResult:
    """A finished extraction: the adapter's folder and what happened."""

    folder: Path
    record: ExtractRecord


@dataclass(frozen=True)
class _Plan:
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
        return max(self.ranks.values())


def make_request(**settings: Any) -> ExtractRequest:
    """Return a request, checked.

    Raises:
        RecipeError: with everything that is wrong.
    """
    try:
        return ExtractRequest(**settings)
    except ValidationError as error:
        said = [f"{'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors()]
        raise RecipeError("\n".join(dict.fromkeys(said))) from None


def run_extract(
    request: ExtractRequest,
    *,
    out: Path,
    folder: Path | None = None,
    force: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
    written_as: tuple[str, str | None] | None = None,
) -> ExtractResult:
    """Write the adapter that turns a base model into (nearly) its full fine-tune.

    Args:
        request: what is asked for.
        out: where to write.
        folder: what relative paths are relative to; the current folder when None.
        force: replace an adapter that stands at `out`.
        workers: tensors worked on at a time; never changes a byte.
        progress: who listens.
        written_as: name and revision of the base model in the adapter; as the request says when None.

    Raises:
        PlaitError: anything wrong with what the user gave; nothing is left at `out` then.
    """
    started = time.perf_counter()
    workers = workers or max(1, min(4, os.cpu_count() or 1))
    progress = progress or Silent()
    problem = output_problem(out, force=force)
    if problem:
        raise OutputError(problem)
    pairing = pair_checkpoints(request.base, request.finetuned, folder)
    _check_not_an_input(pairing, out)
    name = written_as or _base_name(pairing, request)
    selected = _select(pairing.pairs, request)
    plan = _survey(pairing, selected, request, workers, progress)
    with staged(out, force=force) as place:
        modules = _write(pairing, plan, request, place, workers, progress)
        _write_config(place, _config(pairing, plan, request, name))
        record = _record(pairing, plan, selected, modules, request, name[0], started)
        (place / "README.md").write_text(extract_card(pairing, record), encoding="utf-8")
        records.write_json(place / records.LOCK, _lock(pairing, request, place))
        records.write_json(place / records.RECORD, record)
    return ExtractResult(out, record)


def _check_not_an_input(pairing: Pairing, out: Path) -> None:
    for side in (pairing.base, pairing.tuned):
        if out.exists() and out.resolve() in (side.folder.resolve(), *side.folder.resolve().parents):
            raise OutputError(f"{out} is an input of this extraction. Choose another output.")


def _select(pairs: Sequence[Pair], request: ExtractRequest) -> tuple[Pair, ...]:
    """Return the layers asked for.

    Raises:
        PlanError: a pattern that no layer has, all of them at once.
    """
    able = [p for p in pairs if p.kind in ("linear", "conv1d") or (request.embeddings and p.kind == "embedding")]
    if request.targets is None:
        return tuple(able)
    problems = [text for pattern in request.targets if (text := _unmatched(pattern, able, pairs))]
    if problems:
        raise PlanError("\n".join(problems))
    return tuple(p for p in able if any(_matches(pattern, p.module) for pattern in request.targets))


def _matches(pattern: str, module: str) -> bool:
    """Say whether a pattern means a layer: the end of its path (`q_proj`, `self_attn.q_proj`), or a shell pattern."""
    return module == pattern or module.endswith(f".{pattern}") or fnmatchcase(module, pattern)


def _unmatched(pattern: str, able: Sequence[Pair], pairs: Sequence[Pair]) -> str | None:
    if any(_matches(pattern, p.module) for p in able):
        return None
    other = next((p for p in pairs if p.name.endswith(".weight") and _matches(pattern, p.module)), None)
    if other is not None and other.kind == "embedding":
        return f"--targets {pattern!r} is an embedding; add --embeddings (embeddings=True)."
    if other is not None:
        return f"--targets {pattern!r}: {other.name!r} is no Linear layer, shape {list(other.shape)}; it cannot be a LoRA here."
    names = sorted({p.module.rpartition(".")[2] for p in able})
    near = did_you_mean(pattern, names)
    return f"--targets {pattern!r} is no layer of these models.{near} There are: {', '.join(names)}; or '*.layers.0.*'."


def _survey(pairing: Pairing, selected: Sequence[Pair], request: ExtractRequest, workers: int, progress: Progress) -> _Plan:
    """Pass over both models once: what changed, by how much, and at which rank it is written."""
    wanted = {p.name for p in selected}
    energy = Output(rank=request.rank).energy

    def look(pair: Pair) -> tuple[float, int]:
        delta = pair.delta()
        size = delta.energy()
        if not math.isfinite(size):
            raise PlanError(
                f"{pair.name!r}: the difference holds NaN or infinite values, or overflows float32. One of the two models is "
                "damaged, or its training diverged; use another checkpoint."
            )
        if size == 0 or pair.name not in wanted:
            return size, 0
        rank = rank_at_energy([delta], energy, _key(pair)) if energy is not None else int(request.rank)
        return size, min(rank, *delta.shape)

    found = list(_each("compare", look, pairing.pairs, workers, progress))
    energies = {p.name: size for p, (size, _) in zip(pairing.pairs, found, strict=True) if size}
    ranks = {p.module: rank for p, (_, rank) in zip(pairing.pairs, found, strict=True) if rank}
    biases, whole = _kept_whole(pairing.pairs, energies, request) if request.modules_to_save else ({}, ())
    ranks |= {module: 1 for module in biases if module not in ranks}
    if not ranks:
        what = "these layers are" if request.targets or energies else "the two models are"
        raise PlanError(f"{what} the same in {request.base} and {request.finetuned}: there is nothing to extract.")
    targets = tuple(p for p in selected if p.module in ranks)
    return _Plan(targets, ranks, energies, biases, whole)


def _kept_whole(
    pairs: Sequence[Pair], energies: dict[str, float], request: ExtractRequest
) -> tuple[dict[str, Pair], tuple[Pair, ...]]:
    """Return the biases that go into `lora_bias`, and the tensors of the modules that are saved whole."""
    kinds = {p.module: p.kind for p in pairs if p.name == f"{p.module}.weight"}
    of_linear = {p.module: p for p in pairs if p.kind == "bias" and kinds.get(p.module) in ("linear", "conv1d")}
    selected = {p.module for p in _select(pairs, request)}
    # PEFT's lora_bias and its embeddings exclude each other
    biases = {} if request.embeddings else {m: p for m, p in of_linear.items() if p.name in energies and m in selected}
    able = {m for m, kind in kinds.items() if kind == "other" or (kind == "embedding" and m not in selected)}
    changed = {p.module for p in pairs if p.name in energies and p.module in able}
    return biases, tuple(p for p in pairs if p.module in changed)


def _write(
    pairing: Pairing, plan: _Plan, request: ExtractRequest, place: Path, workers: int, progress: Progress
) -> tuple[ModuleRecord, ...]:
    dtype = DTYPES[request.dtype]

    def factor(pair: Pair) -> Emitted:
        if pair.name not in plan.energies:  # its bias alone has changed
            return Emitted((LowRank.zero((pair.shape[0], pair.shape[1]), rank=1),), 0.0, 0.0)
        return emit([pair.delta()], plan.ranks[pair.module], _key(pair))

    done = []
    with TensorWriter(place / WEIGHTS, _entries(plan, request)) as writer:
        for pair in plan.whole:
            file, name = pair.tuned
            writer.write(PREFIX + pair.name, file.read(name))
        for pair, emitted in zip(plan.targets, _each("extract", factor, plan.targets, workers, progress), strict=True):
            a, b = _oriented(pair, emitted.slices[0].padded(_written_rank(plan, pair.module, request)))
            name_a, name_b, name_bias = _names(pair)
            writer.write(name_a, _cast(pair, a, dtype))
            writer.write(name_b, _cast(pair, b, dtype))
            if plan.biases:
                writer.write(name_bias, _bias(plan, pair))
            done.append(_module_record(pair, emitted))
    return tuple(done)


def _write_config(place: Path, config: dict[str, Any]) -> None:
    (place / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _entries(plan: _Plan, request: ExtractRequest) -> list[Entry]:
    dtype = DTYPES[request.dtype]
    entries = [Entry(PREFIX + p.name, getattr(torch, STORED[p.info.dtype]), p.shape) for p in plan.whole]
    for pair in plan.targets:
        rank = _written_rank(plan, pair.module, request)
        d_out, d_in = _delta_shape(pair)
        name_a, name_b, bias = _names(pair)
        entries += [Entry(name_a, dtype, (rank, d_in)), Entry(name_b, dtype, (d_out, rank))]
        entries += [Entry(bias, dtype, (d_out,))] * bool(plan.biases)
    return entries


def _written_rank(plan: _Plan, module: str, request: ExtractRequest) -> int:
    return plan.rank if request.layout == "uniform" else plan.ranks[module]


def _is_transposed(pair: Pair) -> bool:
    return pair.kind in ("embedding", "conv1d")  # stored as (d_in, d_out)


def _delta_shape(pair: Pair) -> tuple[int, int]:
    rows, columns = pair.shape
    return (columns, rows) if _is_transposed(pair) else (rows, columns)


def _oriented(pair: Pair, factors: LowRank) -> tuple[Tensor, Tensor]:
    """Return A and B of the layer from factors of the weight as stored."""
    return (factors.b.mT, factors.a.mT) if _is_transposed(pair) else (factors.a, factors.b)


def _names(pair: Pair) -> tuple[str, str, str]:
    path = PREFIX + pair.module
    if pair.kind == "embedding":
        return f"{path}.lora_embedding_A", f"{path}.lora_embedding_B", f"{path}.lora_B.bias"
    return f"{path}.lora_A.weight", f"{path}.lora_B.weight", f"{path}.lora_B.bias"


def _bias(plan: _Plan, pair: Pair) -> Tensor:
    bias = plan.biases.get(pair.module)
    return torch.zeros(_delta_shape(pair)[0]) if bias is None else bias.delta().dense().flatten()


def _cast(pair: Pair, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    cast = tensor.to(dtype)
    if not bool(torch.isfinite(cast).all()):
        raise PlanError(f"{pair.name!r}: the factors overflow in {dtype}; write --dtype bfloat16 or float32.")
    if bool(tensor.any()) and not bool(cast.any()):
        raise PlanError(f"{pair.name!r}: the factors are too small for {dtype} and vanish; write --dtype bfloat16 or float32.")
    return cast


def _module_record(pair: Pair, emitted: Emitted) -> ModuleRecord:
    energy, held = emitted.energy or 0.0, emitted.kept or 0.0
    kept = min(1.0, held / energy) if energy else 1.0
    is_whole = emitted.rank >= min(pair.shape) or not energy
    return ModuleRecord(
        target=pair.module,
        rank=emitted.rank,
        result="exact" if is_whole else "truncated",
        energy=None if is_whole else energy,
        kept=1.0 if is_whole else kept,
    )


def _config(pairing: Pairing, plan: _Plan, request: ExtractRequest, name: tuple[str, str | None]) -> dict[str, Any]:
    patterned = {} if request.layout == "uniform" else {m: r for m, r in sorted(plan.ranks.items()) if r != plan.rank}
    return {
        "alpha_pattern": patterned,
        "base_model_name_or_path": name[0],
        "bias": "none",
        "fan_in_fan_out": any(p.kind == "conv1d" for p in plan.targets),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": plan.rank,
        "lora_bias": bool(plan.biases),
        "lora_dropout": 0.0,
        "modules_to_save": sorted({p.module for p in plan.whole}) or None,
        "peft_type": "LORA",
        "r": plan.rank,
        "rank_pattern": patterned,
        "revision": name[1],
        "target_modules": _target_modules(pairing.pairs, {p.module for p in plan.targets}),
        "task_type": _task_type(pairing),
        "use_dora": False,
        "use_rslora": False,
    }


def _base_name(pairing: Pairing, request: ExtractRequest) -> tuple[str, str | None]:
    """Return the base model's name, and its commit where it came from the Hub."""
    if request.base_id:
        return request.base_id, None
    return pairing.base.located.repo or request.base, pairing.base.located.commit


def _target_modules(pairs: Sequence[Pair], targets: set[str]) -> list[str]:
    """Return the names of the layers where they mean exactly these, else full paths."""
    names = {t.rpartition(".")[2] for t in targets}
    meant = {p.module for p in pairs if p.module.rpartition(".")[2] in names}
    return sorted(names if meant == targets else targets)


def _task_type(pairing: Pairing) -> str | None:
    architectures = pairing.base.config.get("architectures") or [""]
    if pairing.base.config.get("is_encoder_decoder") and "ForConditionalGeneration" in architectures[0]:
        return "SEQ_2_SEQ_LM"
    return next((task for end, task in _TASKS.items() if architectures[0].endswith(end)), None)


def _record(
    pairing: Pairing,
    plan: _Plan,
    selected: Sequence[Pair],
    modules: tuple[ModuleRecord, ...],
    request: ExtractRequest,
    base_model: str,
    started: float,
) -> ExtractRecord:
    held = {f"{p.module}.weight" for p in plan.targets}
    kept_whole = {p.name for p in (*plan.whole, *plan.biases.values())}
    leftovers = tuple(
        Leftover(tensor=p.name, kind=p.kind, energy=plan.energies[p.name], kept=p.name in kept_whole)
        for p in pairing.pairs
        if p.name in plan.energies and p.name not in held
    )
    truncated = sum((m.energy or 0.0) * (1 - m.kept) for m in modules)
    total = math.fsum(plan.energies.values())
    return ExtractRecord(
        plait=plait.__version__,
        request=request.model_dump(mode="json"),
        base_model=base_model,
        task_type=_task_type(pairing),
        rank=plan.rank,
        max_lora_rank=max_lora_rank(plan.rank),
        kept=_overall_kept(modules, plan),
        lowest_kept=min(m.kept for m in modules),
        lost=(truncated + math.fsum(x.energy for x in leftovers if not x.kept)) / total,
        modules=modules,
        unchanged=tuple(p.module for p in selected if p.name not in plan.energies),
        leftovers=leftovers,
        notes=tuple(_notes(pairing, plan, leftovers)),
        finished=datetime.now().astimezone().isoformat(timespec="seconds"),
        seconds=round(time.perf_counter() - started, 3),
    )


def _overall_kept(modules: Sequence[ModuleRecord], plan: _Plan) -> float:
    energies = [plan.energies.get(f"{m.target}.weight", 0.0) for m in modules]
    total = math.fsum(energies)
    return math.fsum(e * m.kept for e, m in zip(energies, modules, strict=True)) / total if total else 1.0


def _notes(pairing: Pairing, plan: _Plan, leftovers: Sequence[Leftover]) -> Iterator[str]:
    experts = [x for x in leftovers if x.kind == "expert"]
    if experts:
        yield (
            f"{len(experts)} tensors of experts have changed, such as {experts[0].tensor!r}; they are not extracted, since "
            "checkpoints and models name and fuse them differently."
        )
    yield from pairing.notes
    if pairing.ties_head and any(p.kind == "embedding" for p in (*plan.targets, *plan.whole)):
        yield "the embedding is tied to the head in these models; the adapter changes the embedding alone."


def _lock(pairing: Pairing, request: ExtractRequest, place: Path) -> Lock:
    sides = {"base": pairing.base.located, "finetuned": pairing.tuned.located}
    return Lock(
        version=records.LOCK_VERSION,
        plait=plait.__version__,
        python=platform.python_version(),
        libraries=records.library_versions(),
        machine=platform.machine(),
        recipe=request.model_dump(mode="json"),
        inputs={name: records.locked_input(p, records.weight_digests(p.folder), place) for name, p in sides.items()},
        outputs=records.output_digests(place),
        kind="extract",
    )


def _key(pair: Pair) -> Key:
    return Key(0).child("extract", pair.module)


def _each(stage: str, work: Callable[[T], R], items: Sequence[T], workers: int, progress: Progress) -> Iterator[R]:
    """Run `work` in threads of one torch thread each, and yield results in order."""
    progress.start(stage, len(items))
    try:
        with _pool(workers) as pool:
            for result in pool.map(work, items):
                yield result
                progress.advance()
    finally:
        progress.finish()


@contextmanager
def _pool(workers: int) -> Iterator[ThreadPoolExecutor]:
    before = torch.get_num_threads()
    with ThreadPoolExecutor(workers, "plait", torch.set_num_threads, (1,)) as pool:
        try:
            yield pool
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            torch.set_num_threads(before)
