"""recipe + tasks → texts → closed form → its scale → its factors → adapter: what command line and Python both call."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

import torch

from plait.adapters.lowrank import LowRank
from plait.calibration.inputs import check_texts, load_for_texts
from plait.calibration.rebuilding import check_same_texts, request_of
from plait.calibration.request import base_digests, base_of, locked_request
from plait.calibration.texts import Texts
from plait.errors import OutputError, PlanError
from plait.evaluation.loaded_base import with_used_dtype
from plait.evaluation.scores import adapter_digest, digest
from plait.extras import require
from plait.hub.pretrained import LoadOptions
from plait.merging.engine import MergedModule
from plait.merging.inventory import Inventory, take_inventory
from plait.merging.pipeline import input_folders
from plait.merging.record import input_digests, make_lock, sources
from plait.mixture import Mixture
from plait.recipes.naming import naming_its_file
from plait.recipes.schema import Recipe
from plait.recipes.tuning import TuneSpec
from plait.records import ShortRepr
from plait.results.disk import check_not_an_input
from plait.results.lock import LOCK, RUN_RECORD, Lock, locked_input
from plait.results.older_keys import with_older_keys
from plait.results.progress import Progress, SilentProgress
from plait.results.records import write_json
from plait.results.staging import output_problem, staged, tuning_folder
from plait.results.threads import worker_count
from plait.results.versions import library_versions
from plait.tuning import coefficients
from plait.tuning.card import tune_card
from plait.tuning.coefficients import (
    coefficient_columns,
    describe_coefficients,
    learn_in_tree,
    make_learner,
    random_like,
)
from plait.tuning.held_out import HeldOutScore, SplitLessons, evaluate_held_out, split_off, with_references
from plait.tuning.learners import FactorLearner, Learner
from plait.tuning.learning import LearningRun, run_loop
from plait.tuning.notes import notes_on
from plait.tuning.record import TUNING, Control, TuneRecord
from plait.tuning.scale import scale_start
from plait.tuning.span import energy_outside_span, relative_distance
from plait.tuning.start import ClosedForm, plan_start
from plait.tuning.teaching import Lesson, make_lesson
from plait.tuning.texts import seen_texts, tuning_texts, without_test_texts
from plait.tuning.working import WorkingState, alone
from plait.tuning.writing import LearnedMerge, with_deltas, write_learned
from plait.verification.inputs import FoundInput
from plait.version import __version__
from plait.views import Viewed

_FRESH_RATE = 2e-3  # at which a fresh LoRA learns best: a control at the rate of a merge would be weaker than it is
_HELD_MOST = 24  # texts of a task that are held out, at most


@dataclass(frozen=True)
class TuneOptions:
    """How to tune on this machine, besides what the recipe says.

    Attributes:
        load: how the base is loaded.
        control: also let a fresh LoRA of the same rank learn the same, and record how far it comes.
        controls: the same, and random adapters of equal norms.
        workers: modules merged at a time; never changes a bit.
    """

    load: LoadOptions = field(default_factory=LoadOptions)
    control: bool = False
    controls: bool = False
    workers: int | None = None


@dataclass(frozen=True, repr=False)
class TuneResult(Viewed, ShortRepr):
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


@naming_its_file
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
        force: replace a result at `out`.
        options: how, on this machine.
        progress: receives stages and steps.

    Raises:
        PlaitError: anything wrong with what was given; nothing is left at `out` then.
    """
    require("plait tune", {"eval": ["transformers", "accelerate", "jinja2"]})
    if problem := output_problem(out, force=force):
        raise OutputError(problem)
    with alone(tuning_folder(out), out):
        return _run(recipe, folder, out, options or TuneOptions(), progress or SilentProgress(), force=force)


def _run(
    recipe: Recipe, folder: Path | None, out: Path, options: TuneOptions, progress: Progress, *, force: bool
) -> TuneResult:
    """Tune, while the folder of its state is held."""
    spec, clock = recipe.tune, _Clock()
    inventory = take_inventory(recipe, folder)
    check_not_an_input(out, input_folders(inventory), command="tuning")
    plan = plan_start(inventory)
    rank = _rank(inventory)
    if not spec.learns_factors:
        coefficients.check_coefficients(inventory)
    texts, right, owners = tuning_texts(recipe, folder, inventory)
    texts, right, excluded = (texts, right, []) if spec.allow_test else without_test_texts(texts, right)
    base = base_of(inventory, folder, options.load.base)
    options = replace(options, load=with_used_dtype(options.load, base.folder))
    digests = input_digests(inventory)
    base_files = base_digests(base.folder)
    content = [*digests.values(), base_files, *(adapter_digest(a) for a in inventory.adapters)]
    working = WorkingState(tuning_folder(out), _digest(inventory.recipe, options, texts, right, owners, content))
    clock.lap("check")

    mixture = load_for_texts(base.folder, inventory.adapters, options.load, texts.values(), progress)
    clock.lap("load")
    lessons = _lessons(mixture, texts, right, owners, progress)
    clock.lap("answers of the adapters")
    closed = ClosedForm(inventory, mixture, lessons, worker_count(options.workers), progress, working).merged()
    factors = FactorLearner(mixture, mixture.learned(closed, rank=rank if spec.learns_factors else None))
    clock.lap("closed form")
    taught = split_off(lessons, share=spec.held_out, most=_HELD_MOST, seed=spec.seed)
    taught = with_references(mixture, taught, spec)
    scale, scales, start = scale_start(factors, taught, recipe, working, progress)
    clock.lap("scale")
    before = factors.factors.deltas()
    _check_start(inventory, before)
    tuning = _Tuning(inventory, mixture, taught, closed, scale, working, progress)
    learned = tuning.factors(factors, start) if spec.learns_factors else tuning.coefficients(factors)
    clock.lap("learning")
    controls = {}
    if options.control:
        controls["control"] = tuning.fresh_lora(rank)
        clock.lap("control")
    if options.controls:
        controls = {"control": controls.get("control") or tuning.fresh_lora(rank), "random": tuning.random()}
        clock.lap("controls")

    with staged(out, force=force) as place:
        made = write_learned(inventory, learned, closed, before, place)
        record = TuneRecord(
            plait=__version__,
            recipe=recipe.model_dump(mode="json", by_alias=True),
            sources=sources(inventory, [digests[a.file.path] for a in inventory.adapters]),
            texts=seen_texts(texts, owners, taught),
            objective=spec.objective,
            scale=scale,
            scales=tuple(scales),
            base=dict(taught.base),
            looks=tuple(learned.run.looks),
            losses=tuple(learned.run.losses),
            kept_step=learned.run.kept.step,
            rank=made.rank,
            distance=relative_distance(made.deltas, before),
            outside=energy_outside_span(made.deltas, inventory),
            coefficients=learned.coefficients,
            tree=learned.tree,
            notes=(*plan.notes, *excluded, *notes_on(inventory, texts, right, taught, learned.run), *learned.notes),
            seconds=clock.seconds,
            finished=datetime.now().astimezone().isoformat(timespec="seconds"),
            **controls,
        )
        (place / "README.md").write_text(tune_card(inventory, record, place), encoding="utf-8")
        write_json(place / TUNING, record)
        data = record.model_dump(mode="json")
        write_json(place / RUN_RECORD, with_older_keys(RUN_RECORD, data, {key: data[key] for key in ("plait", "finished")}))
        asked = locked_request(recipe, folder, out, "tune", {name: t.digest for name, t in texts.items()})
        options_run = {"dtype": options.load.dtype, "device_map": options.load.device_map}
        lock = make_lock(
            made.inventory,
            {**digests, **made.digests},
            place,
            kind="tune",
            options={**asked, **options_run},
            known=made.known,
        )
        locked_base = locked_input(base, base_files, out)
        write_json(place / LOCK, lock.model_copy(update={"base": locked_base}))
    working.remove()
    return TuneResult(out, record)


def rebuild_tuning(
    lock: Lock, folder: Path, inputs: Mapping[str, FoundInput], out: Path, workers: int | None, progress: Progress
) -> None:
    """Tune again, from the lock of a tuning of factors or directions; see `calibration.rebuilding`.

    Raises:
        PlaitError: it cannot be done; the texts are others now.
    """
    recipe, options, locked = request_of(lock, folder, inputs, "tune")
    load = LoadOptions(**options, base=recipe.base_model)
    recipe = recipe.changed(base_model=lock.recipe.get("base_model"))  # the name that is written, wherever the base is now
    inventory = take_inventory(recipe)
    texts, right, _ = tuning_texts(recipe, None, inventory)
    check_same_texts(texts if recipe.tune.allow_test else without_test_texts(texts, right)[0], locked)
    run_tune(recipe, folder=None, out=out, options=TuneOptions(load, workers=workers), progress=progress)


@dataclass(frozen=True, eq=False)
class _Tuning:
    """The steps of a tuning that follow the closed form."""

    inventory: Inventory
    mixture: Mixture
    taught: SplitLessons
    closed: Sequence[MergedModule]
    scale: float
    working: WorkingState
    progress: Progress

    @property
    def spec(self) -> TuneSpec:
        return self.inventory.recipe.tune

    def factors(self, learner: FactorLearner, start: HeldOutScore) -> LearnedMerge:
        """Let the merge's factors learn."""
        run = self._run(learner, start, "factors")
        return LearnedMerge(run, learner.factors.deltas())

    def coefficients(self, closed: FactorLearner) -> LearnedMerge:
        """Let coefficients of the closed form, at its scale, and of the adapters learn."""
        spec = self.spec
        found = coefficient_columns(self.inventory, self.mixture, with_deltas(self.closed, closed.factors.deltas()), self.scale)
        learner = make_learner(self.mixture, found, spec)
        first = learner.values().detach().clone()
        start = evaluate_held_out(learner, self.taught, 0, spec)
        tree: tuple[tuple[tuple[str, ...], ...], ...] = ()
        if spec.group_size and len(found.names) > spec.group_size:
            self.progress.start("learning", spec.steps + spec.polish_steps, "steps")
            try:
                learner, run, tree = learn_in_tree(
                    self.mixture, found, self.taught, spec, start, lambda *_: self.progress.advance(), working=self.working
                )
            finally:
                self.progress.finish()
        else:
            run = self._run(learner, start, "coefficients")
        values = learner.values().detach()
        merged = found.columns.merged(values, spec.used_granularity)
        about = describe_coefficients(found, spec.used_granularity, values, first)
        return LearnedMerge(run, merged, found, values, about, tree, found.notes)

    def fresh_lora(self, rank: int) -> Control:
        """Let a fresh LoRA of the output's rank learn the same for as many steps."""
        learner = FactorLearner(self.mixture, self.mixture.learned(self.closed, rank=rank))
        learner.factors.restart(self.spec.seed)
        return self._control(learner, "fresh")

    def random(self) -> Control:
        """Let random adapters, and a random start, of equal norms learn the same in the same way."""
        if self.spec.learns_factors:
            drawn = torch.Generator().manual_seed(self.spec.seed)
            closed = [random_like(m, drawn) for m in self.closed if m.factors is not None]
            rank = _rank(self.inventory)
            learner: Learner = FactorLearner(self.mixture, self.mixture.learned(closed, rank=rank))
            return self._control(learner, "random")
        found = coefficient_columns(self.inventory, self.mixture, self.closed, self.scale, random=self.spec.seed)
        return self._control(make_learner(self.mixture, found, self.spec), "random")

    def _control(self, learner: Learner, name: str) -> Control:
        spec = self.spec
        if name == "fresh":
            kept = spec.model_dump(
                exclude={"train", "granularity", "link", "initial", "normalize", "group_size", "learning_rate"}
            )
            objective = "distill" if spec.objective == "adamerging" else spec.objective
            spec = TuneSpec.model_validate({**kept, "objective": objective, "learning_rate": _FRESH_RATE})
        start = evaluate_held_out(learner, self.taught, 0, spec)
        run = self._run(learner, start, name, spec)
        return Control(held=run.kept, losses=tuple(run.losses))

    def _run(self, learner: Learner, start: HeldOutScore, name: str, spec: TuneSpec | None = None) -> LearningRun:
        spec = spec or self.spec
        self.progress.start("learning", spec.steps, "steps")
        done = 0

        def report(step: int, loss: float, held: HeldOutScore | None) -> None:
            nonlocal done
            self.progress.advance(step - done)
            done = step
            if spec.log_every and step % spec.log_every == 0:
                about = "" if held is None else f", share of the base's divergence {held.share:.4g}, score {held.score:.4g}"
                sys.stderr.write(f"{name} {step}/{spec.steps}: objective {loss:.6g}{about}\n")

        try:
            return run_loop(self.mixture, learner, self.taught, spec, start, report, working=self.working, name=name)
        finally:
            self.progress.finish()


def _digest(
    recipe: Recipe,
    options: TuneOptions,
    texts: Mapping[str, Texts],
    right: Mapping[str, tuple[str, ...]],
    owners: Mapping[str, str],
    content: Sequence[object],
) -> str:
    """Return a hash of everything that a tuning's state depends on: contents and settings, wherever they are kept."""
    asked = recipe.model_dump(mode="json", by_alias=True, exclude={"base_model", "tasks"})
    for entry in asked["adapters"]:
        entry.update(path=None, moments=None)
    for part in ("calibration", "tune"):
        asked[part].update(files=None)
    read = {
        name: (t.digest, right.get(name), owners[name], t.task.model_dump(mode="json", exclude={"data", "splits"}))
        for name, t in texts.items()
    }
    versions = [__version__, library_versions("transformers"), torch.get_num_threads()]
    return digest(asked, options.load.dtype, options.load.device_map, read, content, versions)


def _rank(inventory: Inventory) -> int:
    """Return the rank to learn at: the recipe's, or that of the largest source."""
    wanted = inventory.recipe.output
    if wanted.kind != "adapter":
        raise PlanError(f"output.kind (--kind) is {wanted.kind!r}: a tuning writes an adapter, of low rank. Leave it out.")
    if wanted.energy is not None:
        raise PlanError(
            f"output.rank (--rank) is {wanted.rank!r}: a tuning learns at a rank that is fixed before; it must be a number, or "
            "'auto' for the largest source's."
        )
    return int(wanted.rank) if wanted.rank != "auto" else max(r for a in inventory.adapters for r in a.ranks)


def _check_start(inventory: Inventory, start: Mapping[str, Sequence[LowRank]]) -> None:
    """Refuse to learn from nothing: the gradient of each factor is a product with the other, so that two zeros stay zero."""
    recipe = inventory.recipe
    if not recipe.tune.learns_factors and coefficients.is_linear(recipe):
        return  # the columns are the adapters, which are not zero where their weights are
    if not any(s.a.any() and s.b.any() for slices in start.values() for s in slices):
        raise PlanError(
            f"the merge that the tuning starts at is zero in every module (method {recipe.method_name!r}), and learns nothing "
            "from there: its scale or all weights are 0, or no adapter changes anything (plait inspect). Give others."
        )


def _lessons(
    mixture: Mixture,
    texts: Mapping[str, Texts],
    right: Mapping[str, tuple[str, ...]],
    owners: Mapping[str, str],
    progress: Progress,
) -> tuple[Lesson, ...]:
    check_texts(mixture, texts, answered=True, right=right)
    progress.start("answers of the adapters", sum(len(t.prompts) for t in texts.values()), "texts")
    try:
        return tuple(
            make_lesson(mixture, t, owners[name], right=right.get(name), report=progress.advance) for name, t in texts.items()
        )
    finally:
        progress.finish()
