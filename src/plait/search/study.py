"""A search in Optuna's storage: what is there is not evaluated again, whichever process put it there.

A trial's parameters are Optuna's own; what came of it is its user attribute `plait`. Trials that have begun and not ended are
taken up, where they are this process's to take.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial
from pydantic import Field

from plait.errors import OutputError
from plait.libraries.optuna import quiet_optuna, sqlite_url, taken_up
from plait.recipes.candidates import Point
from plait.records import Record
from plait.search.record import Phase, Run, TaskOutcome
from plait.search.sampling import NumberedSampler
from plait.search.space import SearchSpace, point_key

STORAGE = "study.db"
LOCK = ".lock"  # of the folder, while a process is at work there
FOUND = "plait"  # a trial's user attribute with what came of it
_PHASE, _WORKER = "phase", "worker"


class Outcome(Record):
    """What came of a trial, as the storage has it.

    Attributes:
        params: path → value.
        key: hash of the merge.
        score: the first of what is maximized.
        worst: the worst recovery.
        mean: the mean recovery.
        results: per task.
        examples: how many it was asked.
        stopped: whether it could not win.
        error: why it cannot be merged.
        repeats: number of the trial with the same values.
        seconds: wall time.
    """

    params: dict[str, Any]
    key: str = ""
    score: float | None = None
    worst: float | None = None
    mean: float | None = None
    results: dict[str, TaskOutcome] = Field(default_factory=dict)
    examples: int = 0
    stopped: bool = False
    error: str | None = None
    repeats: int | None = None
    seconds: float = 0.0


class Studied(Record):
    """One trial of the storage.

    Attributes:
        number: of the trial.
        phase: how it came to be tried.
        outcome: what came of it.
    """

    number: int
    phase: Phase
    outcome: Outcome

    @property
    def is_new(self) -> bool:
        """Whether it counts for the budget."""
        return self.phase in ("point", "search") and self.outcome.repeats is None and self.outcome.error is None

    def run(self) -> Run:
        """Return it as a study's record has it."""
        found = self.outcome
        details: dict[str, float | str | None] = (
            {"error": found.error}
            if found.error is not None
            else {"min_interference_delta": found.worst, "mean_interference_delta": found.mean}
        )
        return Run(
            number=self.number,
            phase=self.phase,
            params=found.params,
            score=found.score,
            score_details=details,
            results=found.results,
            key=found.key,
            examples=found.examples,
            stopped=found.stopped,
            nonnegative=found.worst is not None and found.worst >= 0,
            seconds=found.seconds,
        )


class Study:
    """A search's trials.

    Args:
        folder: of the study; its own storage is `study.db` there.
        url: of a storage that several machines share, in place of that.
        name: of this search in the storage: two searches that differ in what their scores depend on have two names.
        space: the candidates.
        goals: how many numbers are maximized.

    Raises:
        OutputError: the storage cannot be opened, or the folder's own is that of another search.
    """

    def __init__(self, folder: Path, url: str | None, name: str, space: SearchSpace, goals: int) -> None:
        self.url, self.name, self._space = url, name, space
        self._alone = url is None
        address = url or sqlite_url(str((folder / STORAGE).absolute()))
        with quiet_optuna():
            try:
                storage = optuna.storages.get_storage(address)
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
            except OutputError:
                raise
            except Exception as error:  # SQLAlchemy and its drivers raise any class
                where = f"{folder / STORAGE}" if self._alone else "--storage (storage=)"
                raise OutputError(f"{where}: Optuna cannot open this storage: {_first_line(error)}.") from None

    @property
    def optuna(self) -> optuna.Study:
        """Optuna's own."""
        return self._study

    def finished(self) -> list[Studied]:
        """Return the trials that came to an end, in their order."""
        with quiet_optuna():
            trials = self._study.get_trials(deepcopy=False)
        return [
            Studied(number=t.number, phase=_phase(t), outcome=Outcome.model_validate(t.user_attrs[FOUND]))
            for t in trials
            if t.state.is_finished() and FOUND in t.user_attrs
        ]

    def waiting(self) -> int:
        """Return how many points are still to be tried before anything is suggested."""
        return len(self._study.get_trials(deepcopy=False, states=[TrialState.WAITING]))

    def add(self, phase: Literal["start", "zero", "warm_start"], outcome: Outcome, values: Sequence[float]) -> None:
        """Put a candidate there that has been evaluated already, unless it is there."""
        known = {point_key(found.outcome.params) for found in self.finished()}
        if point_key(outcome.params) in known:
            return
        with quiet_optuna():
            self._study.add_trial(
                create_trial(
                    params=self._space.labels(outcome.params),
                    distributions=self._space.distributions(outcome.params),
                    values=list(values),
                    user_attrs={FOUND: outcome.model_dump(mode="json"), _PHASE: phase},
                )
            )

    def enqueue(self, points: Sequence[Point]) -> None:
        """Have points tried before anything is suggested; those that are there already are not added again."""
        with quiet_optuna():
            for point in points:
                self._study.enqueue_trial(self._space.labels(point), user_attrs={_PHASE: "point"}, skip_if_exists=True)

    def next(self, sampler: NumberedSampler) -> tuple[Trial, dict[str, Any]]:
        """Return the next trial and its point: one whose process is gone, or a new one."""
        with quiet_optuna():
            self._study.sampler = sampler
            left = self.left_over()
            trial = self._study.ask() if left is None else taken_up(self._study, left)
            trial.set_user_attr(_WORKER, _worker())
            return trial, self._space.suggest(trial)

    def tell(self, trial: Trial, outcome: Outcome, values: Sequence[float]) -> None:
        """Report what came of a trial; one with an `error` has failed."""
        with quiet_optuna():
            trial.set_user_attr(FOUND, outcome.model_dump(mode="json"))
            if outcome.error is not None:
                self._study.tell(trial.number, state=TrialState.FAIL)
            else:
                self._study.tell(trial.number, list(values))

    def importance(self) -> dict[str, float]:
        """Return path → share of the variance of the first number (fANOVA); empty where trials are too few, or all alike."""
        from optuna.importance import FanovaImportanceEvaluator, get_param_importances

        with quiet_optuna():
            trials = self._study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
            values = {t.values[0] for t in trials}
            if len(trials) < 4 or len(values) < 2:
                return {}
            with suppress(ValueError, RuntimeError):
                found = get_param_importances(
                    self._study, evaluator=FanovaImportanceEvaluator(seed=0), target=lambda t: t.values[0]
                )
                return {str(name): float(share) for name, share in found.items()}
        return {}

    def left_over(self) -> int | None:
        """Return the number of a trial that was begun by a process that is gone; None where there is none."""
        for trial in self._study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
            if self._alone or _is_gone(trial.user_attrs):
                return trial.number
        return None


def _phase(trial: FrozenTrial) -> Phase:
    found: Phase = trial.user_attrs.get(_PHASE, "search")
    return found


def _worker() -> str:
    return f"{socket.gethostname()}:{os.getpid()}"


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


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")
