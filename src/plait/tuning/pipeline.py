"""recipe + tasks → texts → closed form → its scale → its factors → adapter: what command line and Python both call."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from plait.adapters.lowrank import LowRank
from plait.calibration.texts import Texts, read_texts, shown
from plait.checkpoints.digests import weight_files
from plait.errors import OutputError, PlanError, TaskError, collect
from plait.evaluation.live import Live
from plait.extras import require
from plait.hub.download import Located, resolve_model
from plait.merging.adapter_output import MergedAdapter
from plait.merging.emit import Emitted
from plait.merging.engine import MergedModule
from plait.merging.heads import write_heads
from plait.merging.inventory import Inventory, take_inventory
from plait.merging.pipeline import default_workers, input_folders
from plait.merging.record import input_digests, make_lock, sources
from plait.mixture import Mixture
from plait.mixture.factors import LearntFactors
from plait.recipes.schema import Recipe
from plait.recipes.tuning import TuneSpec
from plait.results.digests import sha256
from plait.results.disk import check_not_an_input
from plait.results.lock import LOCK, locked_input
from plait.results.progress import Progress, Silent
from plait.results.records import write_json
from plait.results.staging import output_problem, staged
from plait.tasks.loading import load_tasks, placed
from plait.tasks.schema import Task
from plait.tuning.card import tune_card
from plait.tuning.learning import Class, Held, best_scale, learn, look, split_off
from plait.tuning.record import TUNING, Control, SeenTexts, TuneRecord
from plait.tuning.span import distance, outside
from plait.tuning.start import closed_form, planned
from plait.tuning.teaching import Lesson, lesson_of, passages_of
from plait.version import __version__

_SHOWN = 3
_HELD_MOST = 24  # texts of a task that are held out, at most


@dataclass(frozen=True)
class TuneOptions:
    """How to tune on this machine, besides what the recipe says.

    Attributes:
        base: the base model, in place of the one that recipe or adapters name.
        dtype: of the base in memory, as transformers takes it; `auto` is the checkpoint's.
        device_map: as transformers takes it; `auto` is the first accelerator, or the processor.
        trust_remote_code: let transformers run code that lies beside the weights.
        control: also let a fresh LoRA of the same rank learn the same, and record how far it comes.
        workers: modules merged at a time; never changes a bit.
    """

    base: str | None = None
    dtype: str = "auto"
    device_map: str = "auto"
    trust_remote_code: bool = False
    control: bool = False
    workers: int | None = None


@dataclass(frozen=True)
class TuneResult:
    """A finished tuning.

    Attributes:
        folder: where the adapter was written.
        record: what was done.
    """

    folder: Path
    record: TuneRecord


@dataclass
class _Clock:
    """Wall time per stage."""

    seconds: dict[str, float] = field(default_factory=dict)
    _last: float = field(default_factory=time.perf_counter)

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = round(now - self._last, 2)
        self._last = now


def run_tune(
    recipe: Recipe,
    *,
    folder: Path | None,
    out: Path,
    force: bool = False,
    options: TuneOptions | None = None,
    progress: Progress | None = None,
) -> TuneResult:
    """Merge, then let the merge learn from texts what it lost.

    Args:
        recipe: adapters, tasks, `tune`, and the method of the start.
        folder: what its relative paths are relative to; the current folder when None.
        out: where to write the adapter.
        force: replace a result that stands at `out`.
        options: how, on this machine.
        progress: told of the work.

    Raises:
        PlaitError: anything wrong with what was given; nothing is left at `out` then.
    """
    require("plait tune", {"eval": ["transformers", "accelerate", "jinja2"]})
    options, progress, clock = options or TuneOptions(), progress or Silent(), _Clock()
    workers = options.workers or default_workers()
    if problem := output_problem(out, force=force):
        raise OutputError(problem)
    inventory = take_inventory(recipe, folder)
    check_not_an_input(out, input_folders(inventory), command="tuning")
    planned(inventory)
    rank = _rank(inventory)
    texts, owners = _texts(recipe, folder, inventory)
    base = _base(inventory, folder, options)
    clock.lap("check")

    mixture = _load(base, inventory, options, progress)
    clock.lap("load")
    lessons = _lessons(mixture, texts, owners, progress)
    clock.lap("answers of the adapters")
    merged = closed_form(inventory, mixture, lessons, workers=workers, progress=progress)
    factors = mixture.learnt(merged, rank=rank)
    clock.lap("closed form")
    taught = split_off(lessons, share=recipe.tune.held_out, most=_HELD_MOST, seed=recipe.tune.seed)
    scale, scales, start = _scaled(mixture, factors, taught, recipe, progress)
    clock.lap("scale")
    before = factors.deltas()
    looks, losses = _learned(mixture, factors, taught, recipe.tune, start, progress)
    clock.lap("learning")
    control = _control(mixture, factors, taught, recipe.tune, progress) if options.control else None
    if options.control:
        clock.lap("control")

    deltas = factors.deltas()
    kept = min(looks, key=lambda h: (h.share, h.step))
    with staged(out, force=force) as place:
        written, digest_of = _write(inventory, _merged(merged, deltas), place)
        digests = input_digests(inventory)
        record = TuneRecord(
            plait=__version__,
            recipe=recipe.model_dump(mode="json", by_alias=True),
            sources=sources(inventory, [digests[a.file.path] for a in inventory.adapters]),
            texts=_seen(texts, owners, taught),
            scale=scale,
            scales=tuple(scales),
            base={x.task: x.base for x in lessons},
            looks=tuple(looks),
            losses=tuple(losses),
            kept_step=kept.step,
            rank=written,
            distance=distance(deltas, before),
            outside=outside(deltas, inventory),
            control=control,
            notes=tuple(_notes(texts, taught)),
            seconds=clock.seconds,
            finished=datetime.now().astimezone().isoformat(timespec="seconds"),
        )
        (place / "README.md").write_text(tune_card(inventory, record, place), encoding="utf-8")
        write_json(place / TUNING, record)
        lock = make_lock(inventory, digests, place, kind="tune", known=digest_of)
        base_files = {p.name: sha256(p) for p in weight_files(base.folder)}
        locked_base = locked_input(base, base_files, out)
        write_json(place / LOCK, lock.model_copy(update={"base": locked_base}))
    return TuneResult(out, record)


def _rank(inventory: Inventory) -> int:
    """Return the rank to learn at: the recipe's, or that of the largest source."""
    wanted = inventory.recipe.output
    if wanted.kind != "adapter" or wanted.energy is not None:
        raise PlanError("output: a tuning writes an adapter of a fixed rank; give output.rank (--rank) a number, or 'auto'.")
    return int(wanted.rank) if wanted.rank != "auto" else max(r for a in inventory.adapters for r in a.ranks)


def _texts(recipe: Recipe, folder: Path | None, inventory: Inventory) -> tuple[dict[str, Texts], dict[str, str]]:
    """Read every task's texts; return them and task → adapter.

    Raises:
        TaskError: there are no tasks, one has no adapter, an adapter has no task, or texts cannot be read; all at once.
    """
    if not recipe.tasks:
        raise TaskError("there are no tasks; give --tasks FILE.yaml, or 'tasks' in the recipe (tasks=[...] in Python).")
    tasks = load_tasks([placed(text, folder) for text in recipe.tasks])
    names = [a.name for a in inventory.adapters]
    owners = {t.name: t.own_adapter for t in tasks}
    problems = [
        f"task {t!r} belongs to adapter {a!r}, and there are {', '.join(names)}; name it with 'adapter' in the task's file."
        for t, a in owners.items()
        if a not in names
    ]
    problems += [
        f"adapter {name!r} has no task, so nothing of it would be kept. Give a task of its name, or one with 'adapter: {name}'."
        for name in names
        if name not in owners.values()
    ]
    unknown = sorted(set(recipe.tune.files) - {t.name for t in tasks})
    problems += [f"tune.files: {name!r} is not a task; there are {', '.join(owners)}." for name in unknown]
    found: dict[str, Texts] = {}
    for task in tasks:
        try:
            found[task.name] = _read(task, recipe.tune, folder)
        except TaskError as error:
            problems.append(str(error))
    collect(TaskError, problems, "these tasks and adapters do not suit each other")
    return found, owners


def _read(task: Task, spec: TuneSpec, folder: Path | None) -> Texts:
    file = spec.files.get(task.name)
    if file is not None:
        file = placed(file, folder)
    kind = None if file is not None else spec.texts
    return read_texts(task, kind=kind, count=spec.count, seed=spec.seed, split=spec.split, file=file)


def _base(inventory: Inventory, folder: Path | None, options: TuneOptions) -> Located:
    name = options.base or inventory.base_model
    if name is None:
        raise PlanError("the base model is not known: no adapter names it. Give --base-id (base_model=).")
    own = options.base is None and inventory.recipe.base_model is not None
    return resolve_model(name, base=folder if own else None)


def _load(base: Located, inventory: Inventory, options: TuneOptions, progress: Progress) -> Mixture:
    live = Live(
        base.folder,
        inventory.adapters,
        dtype=options.dtype,
        device_map=options.device_map,
        trust_remote_code=options.trust_remote_code,
        progress=progress,
    )
    return live.mixture


def _lessons(mixture: Mixture, texts: Mapping[str, Texts], owners: Mapping[str, str], progress: Progress) -> tuple[Lesson, ...]:
    passages = {name: passages_of(mixture, t, owners[name]) for name, t in texts.items()}
    progress.start("answers of the adapters", sum(map(len, passages.values())), "texts")
    try:
        return tuple(lesson_of(mixture, t, passages[name], owners[name], progress.advance) for name, t in texts.items())
    finally:
        progress.finish()


def _scaled(
    mixture: Mixture, factors: LearntFactors, taught: Class, recipe: Recipe, progress: Progress
) -> tuple[float, list[tuple[float, float]], Held]:
    """Give the start its scale: the recipe's where it has one, else the one that is nearest to the adapters."""
    if "scale" in recipe.model_fields_set:
        return recipe.scale, [], look(mixture, factors, taught, 0)
    tried: list[tuple[float, float]] = []

    def report(scale: float, held: Held) -> None:
        tried.append((scale, held.share))
        progress.advance()

    progress.start("scale", 6, "scales")
    try:
        scale, start = best_scale(mixture, factors, taught, report)
    finally:
        progress.finish()
    return scale, tried, start


def _learned(
    mixture: Mixture, factors: LearntFactors, taught: Class, spec: TuneSpec, start: Held, progress: Progress
) -> tuple[list[Held], list[float]]:
    progress.start("learning", spec.steps, "steps")
    try:
        return learn(mixture, factors, taught, spec, start, lambda *_: progress.advance())
    finally:
        progress.finish()


def _control(mixture: Mixture, factors: LearntFactors, taught: Class, spec: TuneSpec, progress: Progress) -> Control:
    """Let a fresh LoRA of the same shape learn the same, and put the factors back."""
    learnt = factors.state()
    factors.restart(spec.seed)
    looks, losses = _learned(mixture, factors, taught, spec, look(mixture, factors, taught, 0), progress)
    factors.load(learnt)
    return Control(held=min(looks, key=lambda h: (h.share, h.step)), losses=tuple(losses))


def _write(inventory: Inventory, merged: Sequence[MergedModule], place: Path) -> tuple[int, dict[str, str]]:
    """Write the adapter, and each source's heads beside it; return its rank, and the sha256 of its tensor file by name."""
    recipe = inventory.recipe
    write_heads(inventory.adapters, recipe.heads, place)
    adapter = MergedAdapter(inventory, {m.target: m.factors.rank for m in merged if m.factors is not None})
    return adapter.rank, adapter.write(place, map(adapter.tensors, merged))


def _merged(merged: Sequence[MergedModule], deltas: Mapping[str, tuple[LowRank, ...]]) -> list[MergedModule]:
    """Return merged modules with the factors that were learnt, balanced."""
    return [
        MergedModule(m.target, Emitted(tuple(s.canonical().padded(s.rank) for s in deltas[m.target])), None, m.bias, None)
        for m in merged
    ]


def _seen(texts: Mapping[str, Texts], owners: Mapping[str, str], taught: Class) -> tuple[SeenTexts, ...]:
    return tuple(
        SeenTexts(
            task=name,
            adapter=owners[name],
            kind=t.kind,
            source=t.source,
            count=len(t.prompts),
            learned=len(taught.learn[name]),
            digest=t.digest,
            shown=tuple(shown(p) for p in t.prompts[:_SHOWN]),
        )
        for name, t in texts.items()
    )


def _notes(texts: Mapping[str, Texts], taught: Class) -> list[str]:
    trained = [name for name, t in texts.items() if t.source == "split 'train'"]
    notes = []
    if trained:
        notes.append(
            f"{', '.join(trained)}: the texts are of the training split, which the adapters have probably seen: "
            "held-out texts flatter. A split 'calibration' in the task, or --split, names others."
        )
    few = [name for name in texts if set(taught.learn[name]) & set(taught.held[name])]
    if few:
        notes.append(f"{', '.join(few)}: no texts were held out; scale and step were chosen on those learnt from.")
    return notes
