"""The output folder of a cohort before the first step: nothing may be in the way, and no file of others is replaced."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from plait.errors import OutputError, collect
from plait.parsing import read_object
from plait.reports.losses import CURVES
from plait.reports.pipeline import page_problem
from plait.results.staging import output_problem
from plait.training.phases import LOGS, PHASES
from plait.training.post_training import EVALUATION, MERGED, RECIPE, REPORT
from plait.training.results import RESULT

EARLIER = "earlier"
_FOLDERS, _FILES = (PHASES, EVALUATION, EARLIER, LOGS), (RESULT, RECIPE, CURVES, REPORT)


def check_output(out: Path) -> None:
    """Make sure that everything which comes after hours of training can be written.

    Raises:
        OutputError: something is in the way; all of it.
    """
    try:
        problems = [f"{path} {what}" for path, what in _in_the_way(out)]
    except OSError as error:
        problems = [f"{out} cannot be read: {error.strerror or error}."]
    collect(OutputError, problems, f"{out} cannot take this run; move what is in the way, or choose another output folder")


def _in_the_way(out: Path) -> Iterator[tuple[Path, str]]:
    if out.exists() and not out.is_dir():
        yield out, "exists and is not a folder. Choose another output folder."
        return
    for path in (out / name for name in _FOLDERS):
        if path.exists() and not path.is_dir():
            yield path, "is a file; a folder of results has that name. Move it away, or choose another output folder."
    ours = _is_ours(out / RESULT)
    for path in (out / name for name in _FILES):
        if path.is_dir():
            yield path, "is a folder; a file of results has that name. Move it away, or choose another output folder."
        elif path.exists() and not ours:
            yield path, "was not written by plait train, and would be replaced. Move it away, or choose another output folder."
        elif path.name == REPORT and page_problem(path, force=True):
            yield path, "was not written by plait report, and would be replaced. Move it away, or choose another output folder."
    if problem := output_problem(out / MERGED, force=True):
        reason = problem.removeprefix(f"{out / MERGED} ")
        yield out / MERGED, f"{reason} The merge goes there. Move it away, or choose another output folder."


def _is_ours(result: Path) -> bool:
    """Return whether a run of plait train, of whatever version, has written a result there."""
    try:
        return "phases" in read_object(result, OutputError)
    except OutputError:
        return False
