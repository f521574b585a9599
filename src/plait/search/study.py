"""A search in Optuna's storage: what is there is not evaluated again, whichever process put it there.

A trial's parameters are Optuna's own; what came of it is its user attribute `plait`. Trials that have begun and not ended are
taken up, where they are this process's to take.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.samplers import BaseSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from plait.errors import OutputError, listed
from plait.libraries.optuna import lost_tables, open_storage, quiet_optuna, sqlite_url, storage_failures, taken_up
from plait.notices import announce
from plait.parsing import as_record, is_there, shown
from plait.recipes.candidates import Point
from plait.records import Record
from plait.search.outcome import ANEW, FOUND, PHASE, Outcome, Studied, studied
from plait.search.space import SearchSpace, point_key

STORAGE = "study.db"
LOCK = ".lock"  # of the folder, while a process is at work there
_WORKER, _BATCH = "worker", "batch"  # further attributes of a trial
_PARALLEL = "parallel"  # an attribute of the study


class Batch(Record):
    """Trials that are suggested together, before one of them is known.

    Attributes:
        first: number of the first.
        size: how many there are; None for one that is not written down.
    """

    first: int
    size: int | None = None


class Study:
    """A search's trials.

    Args:
        folder: of the study; its own storage is `study.db` there.
        url: of a storage that several machines share, in place of that.
        name: of this search in the storage: two searches that differ in what their scores depend on have two names.
        space: the candidates.
        goals: how many numbers are maximized.
        parallel: trials of a batch, where that is asked for.
        usual: where it is not, and the study is new.

    Attributes:
        parallel: trials of a batch; a study keeps the number that it began with.

    Raises:
        OutputError: the storage cannot be opened; or the study there is another one, or began with another number.
    """

    def __init__(
        self,
        folder: Path,
        url: str | None,
        name: str,
        space: SearchSpace,
        goals: int,
        parallel: int | None = None,
        usual: int = 1,
    ) -> None:
        self.url, self.name, self._space = url, name, space
        self._alone = url is None
        self._begun: set[int] = set()  # trials of this process
        self._where = f"{folder / STORAGE}" if self._alone else "--storage (storage=)"
        is_new = self._alone and not is_there(folder / STORAGE, OutputError)
        if self._alone and not is_new:
            check_tables(folder / STORAGE)
        address = url or sqlite_url(str((folder / STORAGE).absolute()))
        with quiet_optuna():
            try:
                storage = open_storage(address)
                names = optuna.get_all_study_names(storage)
                others = [other for other in names if other != name and other.startswith("plait-")]
                if self._alone and others and name not in names:
                    raise OutputError(
                        f"{folder} holds another search: of other adapters, tasks, examples or values. Give another -o, or "
                        "--force to begin anew there."
                    )
                self._study = optuna.create_study(
                    storage=storage, study_name=name, directions=["maximize"] * goals, load_if_exists=True
                )
                self.parallel = self._agreed(parallel, usual)
                self._check(goals)
            except OutputError:
                raise
            except Exception as error:  # SQLAlchemy and its drivers raise any class
                if is_new:
                    with suppress(OSError):
                        (folder / STORAGE).unlink()  # as far as it was made before the disk was full, say
                raise OutputError(f"{self._where}: Optuna cannot open this storage: {first_line(error)}.") from None

    def _check(self, goals: int) -> None:
        """Read all trials: what is damaged is found now, and not after hours.

        Raises:
            OutputError: the study has other goals, or what one of its trials says cannot be read.
        """
        if self._study.directions != [StudyDirection.MAXIMIZE] * goals:
            found = ", ".join(d.name.lower() for d in self._study.directions) or "none"
            raise OutputError(f"{self._where}: the goals of the study must be {goals} × maximize, got {found}. {ANEW}")
        self.finished()
        for trial in self._study.get_trials(deepcopy=False):
            if trial.state is TrialState.COMPLETE and trial.values is None:
                raise OutputError(f"{self._where}: trial {trial.number} is complete, and has no value. {ANEW}")
            self._batch(trial)

    def _agreed(self, parallel: int | None, usual: int) -> int:
        """Return the number of trials of a batch, and write it down for a study that is new.

        Raises:
            OutputError: the study began with another number.
        """
        found: Any = self._study.user_attrs.get(_PARALLEL)
        if found is None:
            found = 1 if self._study.get_trials(deepcopy=False) else parallel or usual
            self._study.set_user_attr(_PARALLEL, found)
        if isinstance(found, bool) or not isinstance(found, int) or found < 1:
            raise OutputError(f"{self._where}: the number of trials of a batch is {shown(found)}. {ANEW}")
        if parallel not in (None, found):
            raise OutputError(
                f"search.parallel is {parallel}, and the study that is there began with {found}: what is suggested depends on "
                f"it. Give --parallel {found} or none, another -o, or --force to begin anew."
            )
        return int(found)

    @property
    def optuna(self) -> optuna.Study:
        """Optuna's own."""
        return self._study

    def finished(self) -> list[Studied]:
        """Return the trials that came to an end, in their order."""
        with self._storage():
            trials = self._study.get_trials(deepcopy=False)
        return [studied(t, self._where) for t in trials if t.state.is_finished() and FOUND in t.user_attrs]

    def waiting(self) -> int:
        """Return how many points are still to be tried before anything is suggested."""
        with self._storage():
            return len(self._study.get_trials(deepcopy=False, states=[TrialState.WAITING]))

    def add(self, phase: Literal["start", "zero", "warm_start"], outcome: Outcome, values: Sequence[float]) -> None:
        """Put a candidate there that has been evaluated already, unless it is there."""
        known = {point_key(found.outcome.params) for found in self.finished()}
        if point_key(outcome.params) in known:
            return
        with self._storage():
            self._study.add_trial(
                create_trial(
                    params=self._space.labels(outcome.params),
                    distributions=self._space.distributions(outcome.params),
                    values=list(values),
                    user_attrs={FOUND: outcome.model_dump(mode="json"), PHASE: phase},
                )
            )

    def enqueue(self, points: Sequence[Point]) -> None:
        """Have points tried before anything is suggested; those that are there already are not added again."""
        with self._storage():
            for point in points:
                self._study.enqueue_trial(self._space.labels(point), user_attrs={PHASE: "point"}, skip_if_exists=True)

    def open_batch(self) -> Batch | None:
        """Return the batch of which a trial was begun by a process that is gone; None where there is none.

        Of a process that was killed before it could write down to which batch a trial belongs, the trial begins one, or is the
        next of the one that had begun.
        """
        left = self._left_over()
        known = [found for trial in left if (found := self._batch(trial)) is not None]
        return known[0] if known else Batch(first=left[0].number) if left else None

    def next(self, sampler: BaseSampler, batch: Batch | None, size: int) -> tuple[Trial, dict[str, Any], Batch]:
        """Return the next trial of a batch and its point: one whose process is gone, or a new one.

        Args:
            sampler: suggests.
            batch: which one; the trial begins one when None.
            size: of a batch that begins.
        """
        with self._storage():
            self._study.sampler = sampler
            number = min(
                (t.number for t in self._left_over() if batch is None or self._batch(t) in (batch, None)), default=None
            )
            trial = self._study.ask() if number is None else taken_up(self._study, number)
            self._begun.add(trial.number)
            batch = batch or Batch(first=trial.number, size=size)
            trial.set_user_attr(_BATCH, batch.model_dump())
            trial.set_user_attr(_WORKER, f"{socket.gethostname()}:{os.getpid()}")
            return trial, self._space.suggest(trial), batch

    def ended_of(self, batch: Batch) -> int:
        """Return how many trials of a batch have ended."""
        with self._storage():
            trials = self._study.get_trials(deepcopy=False)
        return sum(self._batch(t) == batch and t.state.is_finished() for t in trials)

    def tell(self, trial: Trial, outcome: Outcome, values: Sequence[float]) -> None:
        """Report what came of a trial; one with an `error` has failed."""
        with self._storage():
            trial.set_user_attr(FOUND, outcome.model_dump(mode="json"))
            if outcome.error is not None:
                self._study.tell(trial.number, state=TrialState.FAIL)
            else:
                self._study.tell(trial.number, list(values))

    def importance(self) -> dict[str, float]:
        """Return path → share of the variance of the first number (fANOVA); empty where trials are too few, or all alike."""
        from optuna.importance import FanovaImportanceEvaluator, get_param_importances

        with self._storage():
            trials = self._study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
            values = {t.values[0] for t in trials}
            if len(trials) < 4 or len(values) < 2:
                return {}
            try:
                found = get_param_importances(
                    self._study, evaluator=FanovaImportanceEvaluator(seed=0), target=lambda t: t.values[0]
                )
            except (ValueError, RuntimeError) as error:  # of trials that have no path in common, or of no variance
                announce(f"the study does not say which paths matter: {first_line(error)}.")
                return {}
        return {str(name): float(share) for name, share in found.items()}

    def left_over(self) -> int:
        """Return how many trials were begun by processes that are gone."""
        return len(self._left_over())

    def _left_over(self) -> list[FrozenTrial]:
        with self._storage():
            running = self._study.get_trials(deepcopy=False, states=[TrialState.RUNNING])
        return [t for t in running if t.number not in self._begun and (self._alone or _is_gone(t.user_attrs))]

    def _batch(self, trial: FrozenTrial) -> Batch | None:
        """Return the batch of a trial; None of one that has none.

        Raises:
            OutputError: what is there is none.
        """
        found, source = trial.user_attrs.get(_BATCH), f"{self._where}: trial {trial.number}"
        return None if found is None else as_record(Batch, found, source, OutputError, what="a batch", advice=ANEW)

    @contextmanager
    def _storage(self) -> Iterator[None]:
        """Keep Optuna quiet, and refuse what its storage fails at, such as a disk that is full.

        Raises:
            OutputError: the storage fails.
        """
        try:
            with quiet_optuna():
                yield
        except storage_failures() as error:
            raise OutputError(f"{self._where}: Optuna's storage failed: {first_line(error)}.") from error


def check_tables(file: Path) -> None:
    """Refuse a storage that has lost a part of what it held.

    Raises:
        OutputError: it has.
    """
    if lost := lost_tables(file):
        raise OutputError(f"{file}: there is no table {listed(map(repr, lost))}, and there are others of a study. {ANEW}")


def _is_gone(attributes: Mapping[str, Any]) -> bool:
    """Whether a trial's process ran on this machine and does not any more; what runs elsewhere is left to it."""
    host, _, number = str(attributes.get(_WORKER, "")).rpartition(":")
    if host != socket.gethostname() or not number.isdecimal() or int(number) == os.getpid():
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def first_line(error: Exception) -> str:
    """Return the first line of what was raised, without a full stop; of the database's error where Optuna wraps it."""
    lines = str(error.__cause__ or error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")
