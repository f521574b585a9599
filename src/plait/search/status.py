"""How far a search is: read from its storage, while it runs or after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna

from plait.errors import OutputError
from plait.folders import expanded
from plait.libraries.optuna import open_storage, quiet_optuna, sqlite_url
from plait.parsing import is_there
from plait.records import Record
from plait.results.locking import lock_holder
from plait.search.outcome import FOUND, studied
from plait.search.record import STUDY
from plait.search.study import LOCK, STORAGE, check_tables, first_line


class StudyStatus(Record):
    """How far a search is.

    Attributes:
        study: its name in the storage.
        running: whether a process of this machine is at work in its folder.
        finished: whether it has written its record.
        trials: that have ended, the start and what was known before among them.
        begun: that have begun and not ended.
        waiting: points that are still to be tried first.
        stopped: that could not win.
        failed: that could not be merged.
        best_score: the largest; None before the first.
        best_params: its values.
    """

    study: str
    running: bool
    finished: bool
    trials: int
    begun: int
    waiting: int
    stopped: int
    failed: int
    best_score: float | None
    best_params: dict[str, Any]


def read_status(folder: Path, storage: str | None = None) -> StudyStatus:
    """Return how far a search is.

    Args:
        folder: of the study.
        storage: Optuna's address of a shared storage; the file in the folder when None.

    Raises:
        OutputError: there is no study.
    """
    place = expanded(folder)
    where = f"{place / STORAGE}" if storage is None else "--storage (storage=)"
    if storage is None and not is_there(place / STORAGE, OutputError):
        raise OutputError(
            f"{folder}: there is no {STORAGE}, which a search writes when it has read its adapters and tasks; give the folder "
            "of a study (or --storage, as the sweep had it)."
        )
    if storage is None:
        check_tables(place / STORAGE)
    with quiet_optuna():
        try:
            opened = open_storage(storage or sqlite_url(str((place / STORAGE).absolute())))
            studies = [name for name in optuna.get_all_study_names(opened) if name.startswith("plait-")]
            if not studies:
                raise OutputError(f"{folder}: there is no study of plait sweep in its storage yet.")
            study = optuna.load_study(study_name=studies[-1], storage=opened)
            trials = study.get_trials(deepcopy=False)
        except OutputError:
            raise
        except Exception as error:  # SQLAlchemy and its drivers raise any class
            raise OutputError(f"{where}: Optuna cannot read this storage: {first_line(error)}.") from None
    ended = [studied(t, where).outcome for t in trials if t.state.is_finished() and FOUND in t.user_attrs]
    complete = [found for found in ended if found.score is not None and not found.stopped]
    best = max(complete, key=lambda found: found.score or 0.0, default=None)
    states = optuna.trial.TrialState
    return StudyStatus(
        study=study.study_name,
        running=lock_holder(place / LOCK, "a search") is not None,
        finished=is_there(place / STUDY, OutputError),
        trials=len(ended),
        begun=sum(t.state is states.RUNNING for t in trials),
        waiting=sum(t.state is states.WAITING for t in trials),
        stopped=sum(found.stopped for found in ended),
        failed=sum(found.error is not None for found in ended),
        best_score=None if best is None else best.score,
        best_params={} if best is None else best.params,
    )
