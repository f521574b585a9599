"""What a search found, as it is printed, written and reported. All of it is plain JSON.

Of a run, `params`, `score`, `score_details`, `results` and `phase` are called as in the earlier framework's sweep summaries,
and so are a study's keys that it had, for scripts that read those. `version` counts changes that a reader would notice.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator

from plait.errors import OutputError
from plait.folders import expanded
from plait.parsing import is_there, read_record
from plait.recipes.search import SearchSpec
from plait.records import Record
from plait.results.older_keys import FINAL_KEYS, OUTCOME_KEYS, SWEEP, OlderKeysDropped, drop_older_params, keys_of
from plait.views import Viewed

STUDY, STUDY_VERSION = "study.json", 1
Phase = Literal["start", "zero", "point", "warm_start", "search"]
Interval = tuple[float, float]


class TaskOutcome(OlderKeysDropped):
    """One task of a candidate.

    Attributes:
        metric: the task's metric.
        recovery: share of the own adapter's gain.
        interval: 95 %, paired.
    """

    OLDER_KEYS: ClassVar[frozenset[str]] = OUTCOME_KEYS

    metric: float
    recovery: float | None
    interval: Interval | None


class Run(Record):
    """One candidate.

    Attributes:
        number: of the trial in the study; None for a start whose values are not among those that are searched.
        phase: how it came to be tried: the recipe as given, the base model, a point that was asked for, one of an earlier
            study, or one that the search suggested.
        params: path of the recipe → value.
        score: the first of what is maximized; of a candidate that was stopped, an estimate from the paired difference.
        score_details: `min_interference_delta` and `mean_interference_delta`, the worst and the mean recovery; or `error`.
        results: per task; of a candidate that was stopped, on the examples that it was asked.
        key: hash of the merge.
        examples: how many it was asked.
        stopped: whether it was stopped because it could not win.
        nonnegative: whether no task is worse than the base.
        seconds: wall time.
    """

    number: int | None
    phase: Phase
    params: dict[str, Any]
    score: float | None
    score_details: dict[str, float | str | None]
    results: dict[str, TaskOutcome]
    key: str
    examples: int
    stopped: bool
    nonnegative: bool
    seconds: float

    @property
    def worst(self) -> float | None:
        """The worst recovery."""
        return _number(self.score_details.get("min_interference_delta"))

    @property
    def mean(self) -> float | None:
        """The mean recovery."""
        return _number(self.score_details.get("mean_interference_delta"))

    @property
    def complete(self) -> bool:
        """Whether it was asked everything."""
        return self.score is not None and not self.stopped

    def goal(self, name: str) -> float | None:
        """Return one of the numbers that a search maximizes."""
        if name in ("worst_recovery", "mean_recovery"):
            return self.worst if name == "worst_recovery" else self.mean
        outcome = self.results.get(name.removesuffix(".recovery"))
        return None if outcome is None else outcome.recovery


class Difference(Record):
    """How much better the best is than another candidate, on the split that nothing was chosen on.

    Attributes:
        than: `start` or `second`.
        params: of the other.
        worst: difference of the worst recoveries.
        worst_interval: its 95 % interval, paired: the same examples are drawn for both.
        mean: difference of the means.
        mean_interval: see `worst_interval`.
    """

    than: Literal["start", "second"]
    params: dict[str, Any]
    worst: float | None
    worst_interval: Interval | None
    mean: float | None
    mean_interval: Interval | None


class Final(OlderKeysDropped):
    """What the best keeps on the split that it was not chosen on.

    Attributes:
        split: which one.
        worst_recovery: the smallest over the tasks.
        worst_interval: 95 %.
        worst_task: whose it is.
        mean_recovery: over the tasks.
        mean_interval: 95 %.
        recovery: per task.
        differences: to the start and to the second best, where these are other candidates.
        run: folder of the complete evaluation.
    """

    OLDER_KEYS: ClassVar[frozenset[str]] = FINAL_KEYS

    split: str
    worst_recovery: float | None
    worst_interval: Interval | None
    worst_task: str | None
    mean_recovery: float | None
    mean_interval: Interval | None
    recovery: dict[str, float | None]
    differences: tuple[Difference, ...]
    run: str


class StudyRecord(Viewed, OlderKeysDropped):
    """A search from its beginning to its end.

    Attributes:
        version: of this format.
        plait: version that made it.
        study: hash of everything that its scores depend on, and of how candidates were suggested; its name in the storage.
        setting: hash of what scores depend on besides the merge: base model, examples, and how they are asked.
        storage: Optuna's address, without a password; None for `study.db` in the study's folder.
        adapters: names.
        base_model: as it was written.
        method: of the recipe that it started from.
        merge_mode: of that recipe.
        recipe: that recipe, with every default.
        eval_tasks: the tasks.
        split: on which candidates were compared.
        eval_subset: the sample of it; None for all.
        selected_on_test: whether that was the split `test`: no number here is an independent judgement then.
        search: what was asked for.
        grid: values per path; empty for ranges.
        parallel: candidates that were suggested together, before one of them was known.
        maximize: what was maximized.
        constraint_nonnegative: whether candidates that are worse than the base on some task rank last.
        early_stopped: whether it ended before its budget.
        early_stop_reason: why.
        candidates: complete and stopped ones, the start among them; the best is the best of so many.
        failed: candidates whose values do not go together, or cannot be merged.
        repeated: suggestions that were there already, and were not evaluated again.
        examples_asked: of candidates, all together.
        examples_of_all: what evaluating all of them completely would have asked.
        runs: in the order of the trials.
        best_index: index in `runs`.
        best_score: its score.
        second_index: of the second best; None where there is none.
        front: indices of the runs that no other surpasses in all that is maximized (worst and mean where that is one).
        importance: path → share of the scores' variance that it explains (fANOVA, by Optuna); empty for few trials.
        post_sweep_eval: the best on the split that nothing was chosen on; None where there is none.
        notes: what else is worth knowing.
        timestamp: local time at the end, ISO 8601.
        seconds: wall time of the trials, over all processes.
    """

    OLDER_KEYS: ClassVar[frozenset[str]] = keys_of(SWEEP)

    version: int = STUDY_VERSION
    plait: str
    study: str
    setting: str
    storage: str | None
    adapters: tuple[str, ...]
    base_model: str
    method: str
    merge_mode: str
    recipe: dict[str, Any]
    eval_tasks: tuple[str, ...]
    split: str
    eval_subset: dict[str, Any] | None
    selected_on_test: bool
    search: dict[str, Any]
    grid: dict[str, Any]
    parallel: int = 1
    maximize: tuple[str, ...]
    constraint_nonnegative: bool
    early_stopped: bool
    early_stop_reason: str | None
    candidates: int
    failed: int
    repeated: int
    examples_asked: int
    examples_of_all: int
    runs: tuple[Run, ...]
    best_index: int
    best_score: float
    second_index: int | None
    front: tuple[int, ...]
    importance: dict[str, float]
    post_sweep_eval: Final | None
    notes: tuple[str, ...]
    timestamp: str
    seconds: float

    @model_validator(mode="before")
    @classmethod
    def _drop_older_params(cls, data: Any) -> Any:
        return drop_older_params(data)

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        """Refuse what points at runs that are not there, and runs without a task."""
        if self.version != STUDY_VERSION:
            raise ValueError(f"it is of version {self.version}; this plait reads {STUDY_VERSION}")
        front = {f"front.{place}": index for place, index in enumerate(self.front)}
        for name, index in {"best_index": self.best_index, "second_index": self.second_index, **front}.items():
            if index is not None and not 0 <= index < len(self.runs):
                raise ValueError(f"{name} is {index}; there are {len(self.runs)} runs")
        for number, run in enumerate(self.runs):
            if run.complete and (lacking := [task for task in self.eval_tasks if task not in run.results]):
                raise ValueError(f"runs.{number}.results lacks {', '.join(map(repr, lacking))}")
            numbers = (run.worst, run.mean, *(found.recovery for found in run.results.values()))
            if run.complete and None in numbers:
                raise ValueError(f"runs.{number}: a candidate that was asked everything has a recovery of every task")
        SearchSpec.model_validate(self.search)
        return self

    @property
    def best(self) -> Run:
        """The best candidate."""
        return self.runs[self.best_index]


def _number(value: float | str | None) -> float | None:
    return value if isinstance(value, float) else None


def read_study(folder: Path) -> StudyRecord:
    """Read the record of a search that has ended.

    Raises:
        OutputError: there is none, or it cannot be read.
    """
    file = expanded(folder) / STUDY
    if not is_there(file, OutputError):
        raise OutputError(f"{folder}: there is no {STUDY}; give the folder of a study that plait sweep has finished.")
    return read_record(StudyRecord, file, OutputError, what="the record of a search", advice="Search again.")
