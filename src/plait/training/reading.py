"""PHASES.yaml → `TrainingPlan`, or everything that is wrong with it, by line.

Reads the file and the task files that it names; no data, no model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from plait.errors import AddressError, PlaitError, RecipeError, join_words
from plait.folders import absolute, expanded, one_file, working_folder
from plait.hub.references import parse_reference
from plait.hub.task_adapters import ADAPTER, PHASES
from plait.methods import METHODS
from plait.recipes.documents import YamlDocument, open_document
from plait.recipes.file_kinds import refuse_other_kind
from plait.recipes.loading import plain_data
from plait.recipes.overrides import parse_override, set_values
from plait.recipes.paths import Plain, get_item
from plait.recipes.problems import Moves, Origins, Problem, show_value
from plait.recipes.validation import check_recipe, validate
from plait.tasks.asking import LabelHead, Transcribed
from plait.tasks.inputs import FileColumn
from plait.tasks.loading import load_task
from plait.tasks.schema import Task
from plait.training.classification import MAX_LENGTH
from plait.training.data import TrainingData, is_local, training_problem
from plait.training.job import FILE_ARGUMENTS, TrainingJob, TrainingKind
from plait.training.phases import Phase, Phases, PlannedPhase, TrainingPlan, phase_seed

#: Arguments of phases unless the file has others: a killed run loses a tenth at most; the curve has fifty points.
_ARGUMENTS = {
    "save_strategy": "steps", "save_steps": 0.1, "save_total_limit": 1,
    "logging_strategy": "steps", "logging_steps": 0.02, "logging_first_step": True, "report_to": "none",
}  # fmt: skip
#: Arguments that may name a file.
_PATHS = (*FILE_ARGUMENTS, "resume_from_checkpoint")
#: What phases may differ in and still be merged as adapters of one kind.
_PER_PHASE_KEYS = ("dropout", "init_seed")
#: Keys of a recipe that follow from the phases.
_RESERVED_KEYS = ("version", "adapters", "base_model", "tasks", "eval")


def read_phases(
    source: str | Path | Mapping[str, Plain],
    *,
    out: Path,
    base: str | None = None,
    sets: Sequence[str] = (),
    settings: Mapping[str, Plain] | None = None,
) -> TrainingPlan:
    """Return what a file, or a mapping of the same form, asks for.

    Args:
        source: the file, or its content.
        out: where everything is to be written.
        base: the base model, in place of the file's.
        sets: `PATH=VALUE`, applied on top, such as `arguments.max_steps=10`.
        settings: keys of the file that replace its own.

    Raises:
        RecipeError: it is not valid; all that is wrong is listed with its line.
    """
    out = absolute(expanded(out))
    if isinstance(source, Mapping):
        document, name, folder = YamlDocument(plain_data(source, "the phases"), {}), "the phases", working_folder()
    else:
        file = expanded(source)
        folder, document, name = absolute(file).parent, open_document(file, source=str(source)), str(source)
    if not isinstance(document.data, Mapping) or not document.data:
        raise RecipeError(f"{name}: phases are a mapping (key: value) with at least 'base_model' and 'phases'.")
    refuse_other_kind(document.data, "a file of phases", name)
    overrides = [(key, plain_data(value, "the phases")) for key, value in (settings or {}).items()]
    if base:  # a local path starts here; in the file, relative ones start at its folder
        reference = parse_reference(base, allow_bare=True)
        overrides.append(("base_model", base if reference.path is None else str(absolute(expanded(reference.path)))))
    overrides += map(parse_override, sets)
    data, overridden, dead_ends = set_values(document.data, overrides)
    data, tasks, bad_tasks = _name_phases(data, folder)
    origins = Origins(name, document.lines, overridden=tuple(overridden))
    problems = [*document.problems, *dead_ends, *bad_tasks, *_merge_problems(data, out)]
    phases, invalid = validate(Phases, data)
    problems += invalid
    if phases is None:
        origins.refuse(problems)
        raise AssertionError("phases without problems were not built")
    problems += [*_phase_problems(phases, tasks), *_task_problems(phases, tasks), *_path_problems(phases, folder)]
    base_text, bad_base = _base(phases.base_model, folder)
    origins.refuse([*problems, *bad_base])
    return _plan(phases, tasks, name, out, base_text, folder, origins)


def _name_phases(data: Mapping[str, Plain], folder: Path) -> tuple[dict[str, Plain], dict[int, Task], list[Problem]]:
    """Load the tasks, and name the phases after them that have no name of their own.

    Returns:
        The data, index → task, and tasks that cannot be used.
    """
    entries = data.get(PHASES)
    if not isinstance(entries, list):
        return dict(data), {}, []
    named: list[Plain] = []
    tasks: dict[int, Task] = {}
    problems: list[Problem] = []
    for i, given in enumerate(entries):
        entry = {"task": given} if isinstance(given, str) else given
        text = get_item(entry, "task")
        if isinstance(text, str) and text:
            file = absolute(expanded(text), folder)
            entry = {**entry, "task": str(file)}
            try:
                tasks[i] = load_task(file)
            except PlaitError as error:
                problems.append(Problem((PHASES, i, "task"), str(error)))
                entry = {"name": f"phase-{i}", **entry}  # its name is not what is missing
            else:
                entry = {"name": tasks[i].own_adapter, **entry}
        named.append(entry)
    return {**data, PHASES: named}, tasks, problems


def _merge_data(data: Mapping[str, Plain], out: Path) -> dict[str, Plain] | None:
    """Return the recipe that the file's `merge` describes; None where it is not known."""
    merge, entries = data.get("merge") or {}, data.get(PHASES)
    merge = {"method": merge} if isinstance(merge, str) else merge
    if not isinstance(merge, Mapping) or not isinstance(entries, (list, tuple)) or not entries:
        return None
    if not all(isinstance(get_item(entry, "name"), str) for entry in entries):
        return None
    adapters = [
        {"name": e["name"], "path": str(out / PHASES / e["name"] / ADAPTER), "weight": e.get("weight", 1.0)} for e in entries
    ]
    return {**{str(k): v for k, v in merge.items() if k not in _RESERVED_KEYS}, "adapters": adapters}


def _merge_problems(data: Mapping[str, Plain], out: Path) -> Iterator[Problem]:
    merge = data.get("merge")
    for key in _RESERVED_KEYS:
        if isinstance(merge, Mapping) and key in merge:
            yield Problem(("merge", key), f"{key!r} is not a key of 'merge': the phases determine it. Take it out.")
    found = _merge_data(data, out)
    if found is None:
        return
    recipe, problems = check_recipe(found)
    for problem in problems:
        if problem.path[:1] != ("adapters",):  # names and weights are checked as those of phases
            yield Problem(("merge", *problem.path), problem.text)
    if recipe is not None and METHODS[recipe.method_name].pipeline(recipe.method).needs_moments:
        yield Problem(
            ("merge", "method"),
            f"method {recipe.method_name!r} needs second moments of the modules' inputs, which only finished adapters have. "
            "Merge here by another method, then collect them (plait.save_moments) and run `plait merge` on the recipe.yaml "
            "in the output folder.",
        )


def _phase_problems(phases: Phases, tasks: Mapping[int, Task]) -> Iterator[Problem]:
    """Find names given twice, what phases must not change in the LoRA configuration, and losses on rows that are not there."""
    names = [p.name for p in phases.phases]
    for i, phase in enumerate(phases.phases):
        if (first := next(k for k, name in enumerate(names) if one_file(name, phase.name))) < i:
            called = f"{phase.name!r} too" if names[first] == phase.name else f"{names[first]!r}, the same to some file systems"
            text = f"phases.{first} is called {called}; give names that differ (name: …)."
            yield Problem((PHASES, i, "name"), text)
        strategy, task = (phases.arguments | phase.arguments).get("eval_strategy", "no"), tasks.get(i)
        if strategy != "no" and (task is None or "validation" not in task.split_names):
            what = "a phase without a task" if task is None else f"task {task.name!r}"
            text = f"eval_strategy is {strategy!r}, and {what} has no split 'validation' to measure the loss on. Leave it out."
            yield Problem((PHASES, i, "arguments"), text)
        for key in sorted(phase.lora.model_fields_set):
            own, shared = getattr(phase.lora, key), getattr(phases.lora, key)
            if key not in _PER_PHASE_KEYS and own != shared:
                yield Problem(
                    (PHASES, i, "lora", key),
                    f"{key} is {show_value(own)}; all phases share one LoRA configuration, where it is {show_value(shared)}. "
                    f"A phase has only {join_words(_PER_PHASE_KEYS)} of its own: set {key} under the file's own 'lora'.",
                )


def _task_problems(phases: Phases, tasks: Mapping[int, Task]) -> Iterator[Problem]:
    first = next(iter(tasks.values()), None)
    for i, phase in enumerate(phases.phases):
        task = tasks.get(i)
        if task is not None and (untrained := training_problem(task)):
            yield Problem((PHASES, i, "task"), untrained)
        elif task is not None:
            yield from _splits_problems(i, phase, task, phases.eval.split)
            yield from _name_problems(i, phase, task, [t for t in tasks.values() if t is not task])
        elif phase.task is None and first is not None and _kind(first) != "causal":
            yield Problem((PHASES, i, "data"), f"next to {first.kind}, only tasks are learned; give 'task'.")
        if task is not None and first is not None and _kind(task) != _kind(first):
            yield Problem(
                (PHASES, i, "task"),
                f"{task.name!r} is {task.kind}, {first.name!r} is {first.kind}: they are learned by different classes of "
                "the base. Train them by files of their own.",
            )


def _splits_problems(i: int, phase: Phase, task: Task, evaluated: str) -> Iterator[Problem]:
    data, there = phase.data or TrainingData(), join_words(task.split_names)
    if data.place is not None and _kind(task) != "causal":
        yield Problem((PHASES, i, "data", "place"), f"{task.kind} is learned from the task's own splits; give 'split' here.")
    if data.place is None and data.split not in task.split_names:
        text = f"task {task.name!r} has no split {data.split!r} to train on; it has {there}. Add it, or give 'data'."
        yield Problem((PHASES, i, "data" if phase.data else "task"), text)
    if evaluated not in task.split_names:
        text = f"task {task.name!r} has no split {evaluated!r} to evaluate on; it has {there}. Add it, or change eval.split."
        yield Problem((PHASES, i, "task"), text)


def _name_problems(i: int, phase: Phase, task: Task, others: Sequence[Task]) -> Iterator[Problem]:
    if phase.name != task.own_adapter:
        yield Problem(
            (PHASES, i, "name"),
            f"name is {phase.name!r}, but the own adapter of task {task.name!r} is called {task.own_adapter!r}: recovery "
            f"would not be known. Leave the name out, or write adapter: {phase.name} into the task's file.",
        )
    if same := next((t.name for t in others if one_file(t.name, task.name)), None):
        yield Problem((PHASES, i, "task"), f"another phase's task is called {same!r} too; task names must be unique.")


def _kind(task: Task) -> TrainingKind:
    if isinstance(task.ask, Transcribed):
        return "speech_to_text"
    if not isinstance(task.ask, LabelHead):
        return "causal"
    column: FileColumn | None = getattr(task, "file_column", None)
    kinds: dict[str, TrainingKind] = {"image": "image_classification", "audio": "audio_classification"}
    return "sequence_classification" if column is None else kinds[column.kind]


def _base(text: str, folder: Path) -> tuple[str, list[Problem]]:
    """Return the base model as a reference that means the same in any working directory."""
    try:
        reference = parse_reference(text, base=folder, allow_bare=True)
    except AddressError as error:
        return text, [Problem(("base_model",), str(error))]
    if reference.path is None:
        return text, []
    place = absolute(expanded(reference.path), folder)
    if not (place / "config.json").is_file():
        return text, [Problem(("base_model",), f"{place}: there is no model (config.json). Give its folder, or org/repo.")]
    return str(place), []


def _plan(
    phases: Phases, tasks: Mapping[int, Task], name: str, out: Path, base: str, folder: Path, origins: Origins
) -> TrainingPlan:
    planned = tuple(
        PlannedPhase(p.name, _job(phases, p, tasks.get(i), base, folder), out / PHASES / p.name, tasks.get(i))
        for i, p in enumerate(phases.phases)
    )
    found = _merge_data(phases.model_dump(), out)
    if found is None:
        raise AssertionError("phases that are valid make a recipe")
    files = [p.task for p in phases.phases if p.task is not None]
    recipe, _ = check_recipe({**found, "base_model": base, "tasks": files, "eval": phases.eval.model_dump(mode="json")})
    if recipe is None:
        raise AssertionError("a recipe without problems was not built")
    moved: Moves = {(key, i): (PHASES, i) for key in ("adapters", "tasks") for i in range(len(planned))}
    recipe = recipe.written(replace(origins, moved=moved))
    return TrainingPlan(name, out, base, planned, recipe, tuple(_notes(planned)), origins)


def _job(phases: Phases, phase: Phase, task: Task | None, base: str, folder: Path) -> TrainingJob:
    lora = phases.lora.model_copy(update={key: getattr(phase.lora, key) for key in phase.lora.model_fields_set})
    if lora.init_seed is None:
        lora = lora.model_copy(update={"init_seed": phase_seed(phases.seed, phase.name)})
    arguments = _ARGUMENTS | phases.arguments | phase.arguments
    paths = {name: _path(arguments.get(name), folder) for name in _PATHS}
    arguments |= {name: str(path) for name, path in paths.items() if path is not None}
    head = task.ask if task is not None and isinstance(task.ask, LabelHead) else None
    spoken = task.ask if task is not None and isinstance(task.ask, Transcribed) else None
    if head is not None and head.max_tokens is not None:
        arguments = {MAX_LENGTH: head.max_tokens, **arguments}  # learned as it is evaluated
    data = phase.data or TrainingData()
    if data.place is None:
        data = data.model_copy(update={"task": phase.task})
    elif (place := absolute(expanded(data.place), folder)).exists() or is_local(data.place):  # else a data set on the Hub
        data = data.model_copy(update={"place": str(place)})
    watched = task is not None and "validation" in task.split_names and arguments.get("eval_strategy", "no") != "no"
    return TrainingJob(
        base=base,
        base_name=phases.base_name,
        data=data,
        eval_data=TrainingData(task=phase.task, split="validation") if watched else None,
        kind="causal" if task is None else _kind(task),
        labels=None if head is None else head.labels,
        language=None if spoken is None else spoken.language,
        speech_task=None if spoken is None else spoken.task,
        lora=lora,
        arguments=arguments,
        model=phases.model,
        # texts that evaluation cuts are cut
        long_examples="truncate" if head is not None and head.max_tokens is not None else phases.long_examples,
        seed=phases.seed if phase.seed is None else phase.seed,
    )


def _path(value: Any, folder: Path) -> Path | None:
    """Return the local path that an argument is, which may lead nowhere; None where it is another kind of value."""
    if not isinstance(value, str) or value.lower() in ("", "true", "false") or value.lstrip().startswith("{"):
        return None
    place = absolute(expanded(value), folder)
    return place if place.exists() or is_local(value) or value.endswith(".jinja") else None


def _path_problems(phases: Phases, folder: Path) -> Iterator[Problem]:
    """Find arguments that name files which are not there."""
    own = (((PHASES, i, "arguments"), p.arguments) for i, p in enumerate(phases.phases))
    for where, arguments in [(("arguments",), phases.arguments), *own]:
        for name in _PATHS:
            path = _path(arguments.get(name), folder)
            if path is not None and not path.exists():
                yield Problem((*where, name), f"{path}: there is no such file. Relative paths start at this file's folder.")


def _notes(phases: Sequence[PlannedPhase]) -> Iterator[str]:
    by_seed: dict[int | None, list[str]] = {}
    for phase in phases:
        if phase.job.lora is not None:
            by_seed.setdefault(phase.job.lora.init_seed, []).append(phase.name)
    for seed, names in by_seed.items():
        if len(names) > 1:
            yield (
                f"{join_words(names)} begin with one A (init_seed {seed}): such adapters span nearly the same space and merge "
                "worse. Leave init_seed out, and every phase has its own."
            )
    for phase in phases:
        if phase.task is None:
            yield f"phase {phase.name!r} has no task: it is trained and merged, and what the merge keeps of it is not measured."
