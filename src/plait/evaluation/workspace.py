"""Where results go: a bundle per run, results by tag, an index that only grows, and links from the tasks' own folders.

    <workspace>/merged/<method>/<adapters>/runs/run_<time>/    merge_metadata.json summary.json eval_results_<split>.json
    <workspace>/merged/<method>/<adapters>/eval/<split>/eval_results_<tag>_<split>.json
    <workspace>/merged/<method>/<adapters>/eval/<split>/per_task/<task>/<task>_<tag>_metrics.json
    <workspace>/merged/<method>/<adapters>/eval/index.json
    <workspace>/merged/<method>/<adapters>/sweeps/sweep_<study>.json  → the record of a search
    <workspace>/<task>/metrics/eval/<split>/merged/<others>/<tag>/metrics.json → the per-task file
    <workspace>/.scores/                                               finished answers

Tags are hashes of everything that a result depends on, so no result has another's name.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from plait.errors import OutputError, TaskError
from plait.evaluation.record import Evaluation, TaskResult
from plait.notices import announce
from plait.parsing import is_there, read_object
from plait.results.disk import writing_problem
from plait.results.lock import RUN_RECORD, SUMMARY
from plait.results.locking import has_locks
from plait.results.older_keys import INDEX, RESULTS, task_with_older_keys, with_older_keys
from plait.results.run_folders import new_run_folder
from plait.results.staging import place_problem
from plait.results.writing import write_json_atomic

SCORES = ".scores"
COMPARED = "compared"
_TAKEN = ("merged", COMPARED)  # names of folders next to the tasks'
_LONGEST_NAME = 120


def check_task_names(names: Sequence[str]) -> None:
    """Refuse tasks whose folder would be one of the workspace's own.

    Raises:
        TaskError: there is one.
    """
    taken = [name for name in names if name in _TAKEN]
    if taken:
        raise TaskError(f"a task cannot be called {taken[0]!r}: results have a folder of that name next to the tasks'.")


def check_workspace(workspace: Path) -> None:
    """Make sure, before anything is computed, that results can be kept.

    Raises:
        OutputError: they cannot.
    """
    if problem := place_problem(workspace):
        raise OutputError(f"the workspace: {problem}")
    for place in (workspace, workspace / SCORES):
        try:
            problem = writing_problem(place)
        except OSError as error:
            problem = f"{error.strerror or error}"
        if problem:
            raise OutputError(f"the workspace {workspace} cannot be written: {problem}. Give another --workspace (workspace=).")


def check_index(workspace: Path, what: str, names: Sequence[str]) -> None:
    """Make sure, before anything is computed, that the index of some results can be added to.

    Args:
        workspace: where results are kept.
        what: the method, or what kind of thing is evaluated.
        names: of the single adapters; of what is evaluated where there is none.

    Raises:
        OutputError: it cannot.
    """
    _entries(_home(workspace, what, names) / "eval" / "index.json")


def write_evaluation(workspace: Path, found: Evaluation) -> Path:
    """Write everything about one evaluation; return its run folder.

    Raises:
        OutputError: it cannot be written.
    """
    home = _home(workspace, found.method or found.kind, [s.name for s in found.sources] or [found.name])
    results = home / "eval" / found.split / f"eval_results_{found.tag}_{found.split}.json"
    data = found.model_dump(mode="json")
    in_older_words = with_older_keys(RESULTS, data)
    _write_once(results, in_older_words)
    for task in found.tasks:
        _write_task(workspace, home, found, task)
    run = new_run_folder(home / "runs")
    own = run / f"eval_results_{found.split}.json"
    write_json_atomic(own, in_older_words)
    kept = ("plait", "name", "kind", "method", "space", "recipe", "base_model", "sources", "notes", "finished")
    write_json_atomic(run / RUN_RECORD, with_older_keys(RUN_RECORD, data, {key: data[key] for key in kept}))
    about = data | {"results_path": str(own.absolute())}
    write_json_atomic(run / SUMMARY, with_older_keys(SUMMARY, about, evaluation_summary(found)))
    index = home / "eval" / "index.json"
    about = data | {"results_path": str(results.absolute()), "run_path": str(run.absolute())}
    with _alone(index):  # what the index holds is never changed
        write_json_atomic(
            index, {"entries": [*_entries(index), with_older_keys(INDEX, about, _entry(workspace, found, results, run))]}
        )
    return run


def link_study(workspace: Path, method: str, names: Sequence[str], study: str, file: Path) -> None:
    """Link the record of a search to where the earlier framework kept the summaries of its sweeps.

    Raises:
        OutputError: it cannot be written.
    """
    _link(_home(workspace, method, names) / "sweeps" / f"sweep_{study}.json", file)


def write_comparison(workspace: Path, names: Sequence[str], data: Mapping[str, Any]) -> Path:
    """Write a leaderboard to `<workspace>/compared/<adapters>/run_<time>/leaderboard.json`; return that folder."""
    run = new_run_folder(workspace / COMPARED / _joined(names))
    write_json_atomic(run / "leaderboard.json", data)
    return run


def evaluation_summary(found: Evaluation) -> dict[str, Any]:
    """Return the few numbers one looks at first."""
    return {
        "name": found.name,
        "tag": found.tag,
        "method": found.method,
        "space": found.space,
        "adapters": [s.name for s in found.sources],
        "split": found.split,
        "mean_recovery": found.mean_recovery,
        "worst_recovery": found.worst_recovery,
        "worst_task": found.worst_task,
        "below_base": list(found.below_base),
        "undefined": list(found.undefined),
        "tasks": {t.task: {"metric": t.metric, "merged": t.merged, "recovery": t.recovery} for t in found.tasks},
        "finished": found.finished,
        "seconds": found.seconds,
    }


def _write_task(workspace: Path, home: Path, found: Evaluation, task: TaskResult) -> None:
    file = home / "eval" / found.split / "per_task" / task.task / f"{task.task}_{found.tag}_metrics.json"
    head = {"name": found.name, "tag": found.tag, "method": found.method, "split": found.split}
    _write_once(file, task_with_older_keys(head | task.model_dump(mode="json")))
    others = sorted(s.name for s in found.sources if s.name != task.adapter)
    label = {0: "self", 1: "".join(others)}.get(len(others), f"multi_{_joined(others)}")
    link = workspace / task.task / "metrics" / "eval" / found.split / "merged" / label / found.tag / "metrics.json"
    _link(link, file)


def _write_once(file: Path, data: Mapping[str, Any]) -> None:
    """Write results where they are not yet: a tag has one content. What cannot be read is written again."""
    try:
        if is_there(file, OutputError) and read_object(file, OutputError, constants=True, nul=True).get("tag") == data["tag"]:
            return
    except OutputError as error:
        announce(f"{error} It is written again.")
    write_json_atomic(file, data)


def _link(link: Path, file: Path) -> None:
    try:
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.unlink(missing_ok=True)  # one that leads nowhere any more
        with suppress(FileExistsError):
            try:
                link.symlink_to(os.path.relpath(file.resolve(), link.parent.resolve()))
            except (NotImplementedError, PermissionError) as error:  # Windows, without the right to make links
                announce(
                    f"{link.parent} and folders like it hold copies of results, not links: {error}.", once="copied results"
                )
                shutil.copyfile(file, link)
    except OSError as error:
        raise OutputError(f"{link} cannot be written: {error.strerror or error}.") from None


def _entry(workspace: Path, found: Evaluation, results: Path, run: Path) -> dict[str, Any]:
    return {
        "finished": found.finished,
        "tag": found.tag,
        "name": found.name,
        "method": found.method,
        "space": found.space,
        "adapters": [s.name for s in found.sources],
        "tasks": [t.task for t in found.tasks],
        "split": found.split,
        "subsets": {t.task: t.subset for t in found.tasks if t.subset is not None},
        "mean_recovery": found.mean_recovery,
        "worst_recovery": found.worst_recovery,
        "results": results.relative_to(workspace).as_posix(),
        "run": run.relative_to(workspace).as_posix(),
    }


def _home(workspace: Path, what: str, names: Sequence[str]) -> Path:
    return workspace / "merged" / what / _joined(names)


def _entries(index: Path) -> list[Any]:
    """Return what an index holds; nothing where there is none.

    Raises:
        OutputError: it is not an index.
    """
    if not is_there(index, OutputError):
        return []
    advice = "It cannot be added to; move it away, and a new one is begun."
    entries = read_object(index, OutputError, advice=advice).get("entries", ())
    if not isinstance(entries, list):
        raise OutputError(f"{index}: 'entries' must be a list. {advice}")
    return entries


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Keep other processes from the same file while the block runs, where the system can."""
    if not has_locks():
        yield
        return
    import fcntl

    file.parent.mkdir(parents=True, exist_ok=True)
    with (file.parent / f".{file.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _joined(names: Sequence[str]) -> str:
    text = "_".join(sorted(names))
    return text if len(text) <= _LONGEST_NAME else f"{len(names)}_adapters"
