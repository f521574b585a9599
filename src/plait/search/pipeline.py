"""From a recipe with a search to the best candidate."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from plait.cluster.connection import connected
from plait.notices import announce
from plait.recipes.schema import Recipe
from plait.recipes.search import MOST_PARALLEL
from plait.results.locking import locked
from plait.results.progress import Progress, SilentProgress
from plait.search.conclusion import SweepResult, conclude
from plait.search.moments import with_moments
from plait.search.record import STUDY
from plait.search.request import OWN_FILES, Sweep, SweepOptions
from plait.search.study import LOCK, STORAGE, Study
from plait.search.trying import Trials


def run_sweep(
    recipe: Recipe, *, folder: Path | None, out: Path, force: bool, options: SweepOptions, progress: Progress | None = None
) -> SweepResult:
    """Search, choose, and ask the best once on the split of `eval`.

    Args:
        recipe: to start from; its `search` says what changes.
        folder: where its relative paths start; the working directory when None.
        out: folder of the study; one that is there already is continued.
        force: begin anew where another search is there.
        options: of this machine.
        progress: receives stages and steps.

    Raises:
        PlaitError: anything wrong with what was given. Candidates that were evaluated are kept, and not evaluated again.
    """
    progress = progress or SilentProgress()
    with ExitStack() as stack:
        cluster = None if options.cluster is None else stack.enter_context(connected(options.cluster))
        recipe = with_moments(recipe, folder, out, options, progress)
        sweep = Sweep(recipe, folder, out, options, progress, cluster)
        elsewhere = sweep.evaluator.elsewhere
        if cluster is not None and elsewhere is not None:
            cluster.check(inputs=elsewhere.read)
        stack.enter_context(_study_folder(out))
        if force:
            for name in OWN_FILES:
                (out / name).unlink(missing_ok=True)
        room = 1 if elsewhere is None else elsewhere.share.workers
        study = Study(
            out,
            options.storage,
            sweep.name,
            sweep.space,
            len(sweep.spec.maximize),
            sweep.spec.parallel,
            min(room, MOST_PARALLEL),
        )
        if os.path.lexists(out / STUDY) and not study.finished():
            announce(
                f"{out / STUDY} tells of candidates that {'its storage' if options.storage else STORAGE} does not hold: the "
                "search begins anew, and the record is replaced in the end."
            )
        if elsewhere is not None:
            elsewhere.at_once = study.parallel
            if study.parallel < room:
                announce(
                    f"{study.parallel} candidates are suggested at a time (search.parallel), and the cluster has room for "
                    f"{room}. A study keeps its number: --parallel {room} in another one uses all of it."
                )
        trials = Trials(sweep, study)
        reason = trials.run()
        return conclude(sweep, study, trials.start, reason)


@contextmanager
def _study_folder(out: Path) -> Iterator[None]:
    """Hold the folder of a study, made when missing; where nothing of a study comes to be in it, it goes again."""
    is_new = not os.path.lexists(out)
    with locked(out / LOCK, "a search"):
        try:
            yield
        finally:
            with suppress(OSError):  # of what can no longer be looked at: the error that led here matters
                if [path.name for path in out.iterdir()] == [LOCK]:
                    (out / LOCK).unlink()
                    if is_new:
                        out.rmdir()
