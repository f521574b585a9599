"""From what is asked for to an `Evaluation`: everything is found and checked before a model is loaded."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from copy import copy
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

from plait.adapters.adapter import Adapter
from plait.adapters.config import ADAPTER_CONFIG
from plait.cluster.connection import Cluster
from plait.errors import AddressError, PlanError, TaskError, did_you_mean
from plait.evaluation.asking import ClusterAsking
from plait.evaluation.candidates import (
    Candidate,
    base_candidate,
    live_candidate,
    merge_candidate,
    model_candidate,
    saved_candidate,
)
from plait.evaluation.loaded_base import LoadedBase, placement, with_used_dtype
from plait.evaluation.record import CandidateKind, Evaluation, SingleAdapter
from plait.evaluation.recovery import BootstrapDraws
from plait.evaluation.scores import ScoreCache, model_digest
from plait.evaluation.session import AnswerSession, TaskExamples
from plait.evaluation.subsets import check_names, choose_subset, write_subset
from plait.evaluation.workspace import SCORES, check_index, check_task_names, check_workspace
from plait.extras import require
from plait.hub.download import COMPANION_FILES, MODEL_FILES, Located, resolve, resolve_model
from plait.hub.pretrained import LoadOptions
from plait.hub.references import parse_reference
from plait.hub.task_adapters import task_adapter
from plait.inspection.doubts import adapter_doubts
from plait.merging.inventory import Inventory, naming_base, open_adapters, take_inventory
from plait.mixture import Mixture
from plait.notices import announce
from plait.recipes.evaluation import EvalSpec
from plait.recipes.schema import Recipe
from plait.recipes.writing import recipe_json
from plait.results.lock import LOCK, Lock, read_lock
from plait.results.progress import Progress, SilentProgress
from plait.tasks.examples import read_examples
from plait.tasks.loading import load_tasks, recipe_tasks
from plait.tasks.metrics import metric_of
from plait.tasks.overlap import check_disjoint, overlaps
from plait.tasks.schema import SPLITS, Task
from plait.verification.inputs import check_inputs
from plait.version import __version__


@dataclass(frozen=True)
class EvaluateOptions:
    """How to evaluate, besides what a recipe says.

    Attributes:
        workspace: where results and finished answers are kept; None keeps nothing.
        load: how the base is loaded.
        matrix: evaluate every single adapter on every task.
        workers: modules merged at a time.
        cluster: where candidates are asked; this process when None.
    """

    workspace: Path | None = Path("artifacts")
    load: LoadOptions = field(default_factory=LoadOptions)
    matrix: bool = False
    workers: int | None = None
    cluster: Cluster | None = None


@dataclass(frozen=True, eq=False)
class EvalSubject:
    """What is evaluated.

    Attributes:
        name: for people.
        kind: a merge, or what files hold.
        candidate: puts it on the base.
        method: of the merge, where it is known.
        space: of the merge.
        recipe: of the merge.
        path: of the files; None for a merge in memory.
    """

    name: str
    kind: CandidateKind
    candidate: Candidate
    method: str | None = None
    space: str | None = None
    recipe: Mapping[str, Any] | None = None
    path: str | None = None


class Evaluator:
    """A session with what is needed to describe its results.

    Args:
        base: as it was written.
        folder: where a relative base starts; the working directory when None.
        singles: the tasks' own adapters, and where they were found.
        others: adapters that are evaluated, but belong to no task.
        tasks: on which it is judged.
        spec: how to evaluate.
        options: how to evaluate, on this machine.
        progress: receives stages and steps.

    Attributes:
        tasks: with the examples that are asked.
        singles: the tasks' own adapters by name.
        session: asks the model, and keeps its answers.
        elsewhere: the cluster on which models are asked; None where they are in this process.
    """

    def __init__(
        self,
        base: str | None,
        folder: Path | None,
        singles: Sequence[tuple[Adapter, Located, str]],
        others: Sequence[Adapter],
        tasks: Sequence[Task],
        spec: EvalSpec,
        options: EvaluateOptions,
        progress: Progress,
    ) -> None:
        self.spec = spec
        self.progress = progress
        self.singles = {a.name: a for a, _, _ in singles}
        self._asked = tuple(tasks)
        self.tasks, task_notes = _read_tasks(tasks, spec, options.workspace)
        self.notes = [*task_notes, *adapter_doubts([*self.singles.values(), *others])]
        if self.singles:
            _announce_alone(self.tasks, self.singles)
        self.base, place = find_base(base, folder, [*self.singles.values(), *others], options.load.base)
        self._sources = tuple(
            SingleAdapter(name=a.name, path=text, repo=p.repo, commit=p.commit, sha256=a.sha256()) for a, p, text in singles
        )
        everyone = [*self.singles.values(), *others]
        key, self.elsewhere = model_digest(place.folder), None
        if options.cluster is None:
            load = with_used_dtype(options.load, place.folder)
            device = str(placement(load.device_map))  # `auto` is another device on another machine
        else:
            self.elsewhere = ClusterAsking(options.cluster, place.folder, key, everyone, options.load, workers=options.workers)
            load, device = self.elsewhere.load, self.elsewhere.placement
        self.options = replace(options, load=load)
        live = LoadedBase(place.folder, everyone, load, progress)
        for entry in self.tasks:
            live.check(entry.examples)
        cache = ScoreCache(None if options.workspace is None else options.workspace / SCORES)
        self.session = AnswerSession(
            live, key, self.singles, self.tasks, spec, (load.dtype, device), cache, progress, self.elsewhere
        )

    def evaluate(self, subject: EvalSubject) -> Evaluation:
        """Evaluate one candidate next to base and single adapters."""
        started = time.perf_counter()
        results, totals = self.session.results(subject.candidate)
        return Evaluation(
            plait=__version__,
            name=subject.name,
            kind=subject.kind,
            path=subject.path,
            tag=f"{subject.method or subject.kind}_{self.session.tag(subject.candidate)}",
            method=subject.method,
            space=subject.space,
            recipe=None if subject.recipe is None else dict(subject.recipe),
            base_model=self.base,
            sources=self._sources,
            split=self.spec.split,
            subset=self.spec.subset,
            dtype=self.options.load.dtype,
            batch_size=self.spec.batch_size,
            draws=self.spec.draws,
            seed=self.spec.seed,
            tasks=results,
            mean_recovery=totals.mean,
            mean_interval=totals.mean_interval,
            worst_recovery=totals.worst,
            worst_interval=totals.worst_interval,
            worst_task=totals.worst_task,
            below_base=tuple(r.task for r in results if r.below_base),
            undefined=tuple(r.task for r in results if r.recovery is None),
            matrix=self.session.matrix() if self.options.matrix else None,
            notes=tuple(self.notes),
            finished=datetime.now().astimezone().isoformat(timespec="seconds"),
            seconds=round(time.perf_counter() - started, 3),
        )

    @property
    def mixture(self) -> Mixture:
        """The base with the tasks' own adapters, loaded when it is first asked for."""
        return self.session.live.mixture

    def score(self, state: Callable[[str | None], AbstractContextManager[Any]], *, name: str = "live") -> Evaluation:
        """Evaluate what acts in a context of `mixture`; base and single adapters are asked once, or were by an earlier process.

        >>> found = evaluator.score(lambda heads: evaluator.mixture.mixed(coefficients, "module", heads=heads))

        Args:
            state: adapter whose heads act on a task (None for none) → a context in which the model acts as is to be scored.
            name: for people.
        """
        return self.evaluate(EvalSubject(name, "merge", live_candidate(name, state, self.singles)))

    def prepare(self, subjects: Sequence[EvalSubject]) -> None:
        """Have subjects, base and own adapters asked side by side where candidates are asked elsewhere; do nothing here."""
        wanted = []
        for entry in self.tasks:
            own = self.session.own(entry.task)
            sides = [base_candidate(self.singles), *([] if own is None else [own]), *(s.candidate for s in subjects)]
            wanted += [(side, entry) for side in sides]
        self.session.prepare(wanted)

    def draws(self, subject: EvalSubject) -> dict[str, BootstrapDraws]:
        """Return the bootstrap draws of every task; those of two subjects are of the same examples, and so can be compared."""
        return self.session.draws(subject.candidate)

    def on(self, spec: EvalSpec) -> Evaluator:
        """Return an evaluator of the same base and adapters, loaded once, on other examples of the same tasks.

        Raises:
            TaskError: a task has no such examples.
        """
        other = copy(self)
        other.spec = spec
        other.tasks, notes = _read_tasks(self._asked, spec, self.options.workspace)
        other.notes = [*dict.fromkeys([*self.notes, *notes])]
        other.session = self.session.on(other.tasks, spec)
        return other

    def merge(self, inventory: Inventory, name: str) -> EvalSubject:
        """Return a merge, to be made in memory.

        Raises:
            PlanError: it cannot be done.
        """
        recipe = inventory.recipe
        candidate = merge_candidate(inventory, self.singles, workers=self.options.workers, progress=self.progress)
        return EvalSubject(name, "merge", candidate, recipe.method_name, recipe.space_name, recipe_json(recipe))


def recipe_evaluator(
    recipe: Recipe,
    folder: Path | None,
    options: EvaluateOptions,
    progress: Progress | None = None,
    *,
    without_tasks: bool = False,
) -> tuple[Evaluator, Inventory]:
    """Find everything that the evaluation of a recipe needs.

    Args:
        recipe: of a merge.
        folder: where its relative paths start; the working directory when None.
        options: how, on this machine.
        progress: receives stages and steps.
        without_tasks: whether there may be none, where nothing is evaluated.

    Raises:
        PlaitError: anything that is not there, or does not fit.
    """
    _require_libraries()
    tasks = () if without_tasks and not recipe.tasks else recipe_tasks(recipe, folder)
    inventory = take_inventory(recipe, folder)
    paths = [entry.path for entry in recipe.adapters]
    singles = list(zip(inventory.adapters, inventory.located, paths, strict=True))
    with naming_base(recipe, inventory.adapters, given=options.load.base):
        return Evaluator(
            recipe.base_model, folder, singles, (), tasks, recipe.eval, options, progress or SilentProgress()
        ), inventory


def evaluate_saved(
    reference: str,
    tasks: Sequence[str | Path],
    spec: EvalSpec,
    options: EvaluateOptions,
    *,
    sources: Mapping[str, str],
    progress: Progress | None = None,
    check: Callable[[list[str]], object] = lambda tasks: None,
) -> Evaluation:
    """Evaluate an adapter or a full model from its files.

    Args:
        reference: a folder, a place on the Hub, or a task whose best adapter is in `artifacts/`.
        tasks: files, or `lm_eval:NAME`.
        spec: how to evaluate.
        options: how to evaluate, on this machine.
        sources: name → reference of the tasks' own adapters; those of its `plait.lock` when empty.
        progress: receives stages and steps.
        check: given the tasks' names before anything is computed; may raise.

    Raises:
        PlaitError: anything wrong with what was given.
    """
    _require_libraries()
    if not tasks:
        raise TaskError("there are no tasks; give --tasks FILE.yaml (tasks=[...] in Python).")
    saved = find_saved(reference, sources)
    place, lock, adapter = saved.place, saved.lock, saved.adapter
    recipe = lock.recipe if lock is not None and lock.has_adapters else None
    method = recipe["method"] if recipe else {}
    if options.workspace is not None:
        taken = [a.name for a, _, _ in saved.singles] or [saved.name]
        check_index(options.workspace, method.get("name") or ("model" if adapter is None else "adapter"), taken)
    others = [] if adapter is None else [adapter]
    with naming_base(None, [a for a, _, _ in saved.singles] + others, given=saved.base or options.load.base):
        evaluator = Evaluator(
            saved.base, None, saved.singles, others, load_tasks(tasks), spec, options, progress or SilentProgress()
        )
    evaluator.notes.extend(saved.notes)
    check([entry.task.name for entry in evaluator.tasks])
    known = {**evaluator.singles, **{a.name: a for a in others}}
    candidate = model_candidate(saved.name, place.folder) if adapter is None else saved_candidate(adapter.name, known)
    kind: CandidateKind = "model" if adapter is None else "adapter"
    where = place.folder if adapter is None else place.path
    return evaluator.evaluate(
        EvalSubject(saved.name, kind, candidate, method.get("name"), method.get("space"), recipe, str(where.absolute()))
    )


@dataclass(frozen=True, eq=False)
class SavedResult:
    """An adapter or a full model in files, and what its lock says of it.

    Attributes:
        name: for people.
        place: where it is.
        adapter: it, under a name that none of the single adapters has; None for a model.
        lock: of the result; None without one.
        singles: the adapters that it was made from, and where they were found.
        base: the base model that its lock names.
        notes: on single adapters that were not found.
    """

    name: str
    place: Located
    adapter: Adapter | None
    lock: Lock | None
    singles: Sequence[tuple[Adapter, Located, str]]
    base: str | None
    notes: Sequence[str]


def find_saved(reference: str, sources: Mapping[str, str]) -> SavedResult:
    """Find an adapter or a full model, and the adapters that it was made from.

    Args:
        reference: a folder, a place on the Hub, or a task whose best adapter is in `artifacts/`.
        sources: name → reference of the single adapters; those of its `plait.lock` when empty.

    Raises:
        PlaitError: there is none, or a single adapter has changed.
    """
    if (own := task_adapter(reference)) is not None:
        reference = str(own)
    place, is_adapter = _find(reference)
    lock = read_lock(place.folder) if (place.folder / LOCK).is_file() else None
    singles, notes = _sources(place.folder, lock, sources)
    name, taken = parse_reference(reference, allow_bare=True).default_name(), [a.name for a, _, _ in singles]
    label = next(n for i in count(1) if (n := name if i == 1 else f"{name}-{i}") not in taken)
    adapter = Adapter.open(place.path, label) if is_adapter else None
    return SavedResult(name, place, adapter, lock, singles, None if lock is None else _locked_base(place.folder, lock), notes)


def _require_libraries() -> None:
    require("an evaluation", {"eval": ["transformers", "accelerate", "jinja2"]})


def _read_tasks(tasks: Sequence[Task], spec: EvalSpec, workspace: Path | None) -> tuple[list[TaskExamples], list[str]]:
    """Read every task's examples, and notes on its data."""
    if workspace is not None:
        check_workspace(workspace)
    check_names(spec.subset, [t.name for t in tasks])
    check_task_names([t.name for t in tasks])
    examples_of, notes = [], []
    for task in tasks:
        metric_of(task)  # the packages that it needs are installed, or this reports them
        # the split that is wanted, and those that must not share examples with it; the training split only when wanted
        split_names = [name for name in SPLITS if name == spec.split or (name in task.split_names and name != "train")]
        read = {name: read_examples(task, name) for name in split_names}
        notes += check_disjoint(task, overlaps(read))
        examples = read[spec.split]
        chosen = None if spec.subset is None else choose_subset(examples, spec.subset)
        if chosen is not None:
            if workspace is not None:
                write_subset(workspace, examples, chosen)
            examples = examples.take(chosen.indices)
        examples_of.append(TaskExamples(examples, chosen))
    return examples_of, notes


def _announce_alone(tasks: Sequence[TaskExamples], singles: Mapping[str, Adapter]) -> None:
    """Report which tasks have no adapter of their own, before hours are spent on them."""
    for task in (entry.task for entry in tasks):
        if task.own_adapter not in singles:
            near = did_you_mean(task.own_adapter, singles)
            announce(
                f"task {task.name!r}: no adapter is called {task.own_adapter!r}, so that its recovery is not defined; there "
                f"are {', '.join(singles)}.{near} Name its own with 'adapter' in the task's file, or call it so (NAME=PATH)."
            )


def find_base(text: str | None, folder: Path | None, adapters: Iterable[Adapter], given: str | None) -> tuple[str, Located]:
    """Return the base model as it was written, and where it is.

    Args:
        text: that a recipe or a lock names.
        folder: where a relative one starts; the working directory when None.
        adapters: whose own is taken where nothing names one.
        given: in place of both, relative to the working directory.

    Raises:
        AddressError: none is named, or it is not there.
    """
    if given is not None:
        text, folder = given, None
    text = text or next((a.config.base_model for a in adapters if a.config.base_model), None)
    if text is None:
        raise AddressError("the base model is not known: no adapter names it. Give --base-id (base_model=).")
    return text, resolve_model(text, base=folder, files=(*MODEL_FILES, *COMPANION_FILES))


def _find(reference: str) -> tuple[Located, bool]:
    """Return where a reference leads, and whether an adapter is there (else a full model)."""
    parsed = parse_reference(reference, allow_bare=True)
    if parsed.path is not None:
        if (single := resolve(parsed)).file is not None:
            return single, True
        place = resolve_model(parsed.address)
        is_adapter = (place.folder / ADAPTER_CONFIG).is_file()
        if not is_adapter and not (place.folder / "config.json").is_file():
            raise AddressError(
                f"{place.folder}: no adapter ({ADAPTER_CONFIG}) or model (config.json) found. Give a recipe (.yaml), "
                "the folder of an adapter, or that of a model."
            )
        return place, is_adapter
    try:
        return resolve(parsed), True
    except AddressError as no_adapter:
        try:
            return resolve_model(parsed.address, files=(*MODEL_FILES, *COMPANION_FILES)), False
        except AddressError:
            raise no_adapter from None


def _sources(folder: Path, lock: Lock | None, given: Mapping[str, str]) -> tuple[list[tuple[Adapter, Located, str]], list[str]]:
    """Find the single adapters: those given, else those that the lock names and that are unchanged."""
    if given:
        located, adapters = open_adapters(list(given.items()))
        return list(zip(adapters, located, given.values(), strict=True)), []
    if lock is None:
        return [], ["no single adapters are known; name them with --source NAME=PATH, and recovery is computed."]
    if not lock.has_adapters:
        return [], []
    checks, found = check_inputs(folder, lock, {})
    changed = [c.name for c in checks if c.state == "changed" and c.name in lock.inputs]
    if changed:
        raise PlanError(
            f"{', '.join(changed)}: not the adapter that {folder.name} was made from any more. Give --source NAME=PATH."
        )
    notes = [
        f"single adapter {c.name!r} is not where the lock says; name it with --source {c.name}=PATH."
        for c in checks
        if c.state == "unknown" and c.name in lock.inputs
    ]
    singles = []
    for name, entry in lock.inputs.items():
        if name not in found:
            continue
        place = Located(folder=found[name].folder, file=found[name].file, repo=entry.repo, commit=entry.commit)
        of_merge = read_lock(place.folder) if lock.kind == "bake" and (place.folder / LOCK).is_file() else None
        if of_merge is not None and of_merge.kind == "merge":  # a baked merge has the single adapters of that merge
            within, more = _sources(place.folder, of_merge, {})
            singles += within
            notes += more
        else:
            singles.append((Adapter.open(place.path, name), place, entry.path))
    return singles, notes


def _locked_base(folder: Path, lock: Lock) -> str | None:
    """Return the base model that a lock names; a relative path starts at the lock's folder."""
    if lock.base is not None and lock.base.repo is None:
        return os.path.realpath(folder / lock.base.path)  # Path.resolve raises RuntimeError where links lead in a circle
    base = lock.recipe.get("base_model")
    return str(base) if base is not None else None
