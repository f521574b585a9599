"""What came out of an evaluation, as it is printed, written and reported. All of it is plain JSON.

`version` counts changes that a reader would notice.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from plait.recipes.evaluation import SplitName, Subset
from plait.records import Record
from plait.results.older_keys import RESULTS, OlderKeysDropped, keys_of
from plait.views import Viewed

EVALUATION_VERSION = 1
CandidateKind = Literal["merge", "adapter", "model"]
Bounds = tuple[float, float]


class Sample(Record):
    """One example and what was answered, for people.

    Attributes:
        id: of the example.
        prompt: as the task's templates make it; chat turns as `role: content` lines, a sound in words.
        target: the right answer.
        base: the base model's answer; None for perplexity.
        single: of the task's own adapter; None where there is none.
        merged: of what is evaluated.
        image: what was shown, as a small JPEG in a `data:` address; None where nothing was.
        waveforms: of every sound that was heard, how loud it is in equal parts, 0 to 1.
        judged: whether an answer is right or wrong; numbers and transcripts are not.
    """

    id: str
    prompt: str
    target: str
    base: str | None
    single: str | None
    merged: str | None
    image: Annotated[str | None, Field(pattern=r"^data:image/jpeg;base64,[A-Za-z0-9+/=]*$")] = None
    waveforms: tuple[tuple[Annotated[float, Field(ge=0, le=1)], ...], ...] = ()
    judged: bool = True


class Confusion(Record):
    """How often each label was given where another was right.

    Attributes:
        labels: in the task's order.
        single: by the task's own adapter: a row per right label, a column per given one; None where there is none.
        merged: by what is evaluated.
    """

    labels: tuple[str, ...]
    single: tuple[tuple[int, ...], ...] | None
    merged: tuple[tuple[int, ...], ...]


class TaskResult(Record):
    """One task.

    Attributes:
        task: its name.
        kind: of the task.
        metric: its name.
        higher_is_better: the metric's orientation.
        adapter: the task's own adapter; None where none is known.
        examples: how many were answered.
        subset: tag of the sample; None for the complete split.
        base: the bare base's metric.
        single: the own adapter's metric.
        merged: the metric of what is evaluated.
        base_interval: 95 %, Bayesian bootstrap over examples; so are all intervals.
        single_interval: see `base_interval`.
        merged_interval: see `base_interval`.
        base_stderr: standard error of `base` as lm-eval reports it, for its tasks; None for others, and where it has no
            formula for it. So are the next two.
        single_stderr: see `base_stderr`.
        merged_stderr: see `base_stderr`.
        recovery: (merged − base) / (single − base), oriented; None where undefined.
        recovery_interval: paired: the same examples are drawn for all sides. Draws without recovery are left out.
        undefined: why there is no recovery.
        below_base: whether it is worse than the base.
        samples: a few examples, those first on which the answers differ.
        confusion: of labels; None where answers are something else, and for more labels than a page has room for.
    """

    task: str
    kind: str
    metric: str
    higher_is_better: bool
    adapter: str | None
    examples: int
    subset: str | None
    base: float
    single: float | None
    merged: float
    base_interval: Bounds | None
    single_interval: Bounds | None
    merged_interval: Bounds | None
    base_stderr: float | None = None
    single_stderr: float | None = None
    merged_stderr: float | None = None
    recovery: float | None
    recovery_interval: Bounds | None
    undefined: str | None
    below_base: bool
    samples: tuple[Sample, ...]
    confusion: Confusion | None = None


class InterferenceMatrix(Record):
    """Every single adapter on every task.

    Attributes:
        adapters: rows.
        tasks: columns.
        values: the tasks' metrics.
        recovery: of the task's own adapter's gain, how much each adapter brings: 1 for the own adapter; below 0 it harms.
            None where undefined.
    """

    adapters: tuple[str, ...]
    tasks: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]
    recovery: tuple[tuple[float | None, ...], ...]


class SingleAdapter(Record):
    """One single adapter.

    Attributes:
        name: its name.
        path: where it was found, as it was written.
        repo: on the Hub; None for local files.
        commit: there.
        sha256: of its tensor file.
    """

    name: str
    path: str
    repo: str | None
    commit: str | None
    sha256: str


class Evaluation(Viewed, OlderKeysDropped):
    """What one merge, adapter or model kept.

    >>> found = plait.evaluate("merged", tasks=["tasks/intent.yaml", "tasks/langid.yaml"])
    >>> found.worst_recovery, found.worst_interval, found.to_pandas()

    Attributes:
        version: of this format.
        plait: version that made it.
        name: of what is evaluated, for people.
        kind: `merge` (made in memory), `adapter` or `model` (read from files).
        path: of those files; None for a merge in memory.
        tag: `<method>_<hash>` of everything that the result depends on but the tasks; distinguishes files.
        method: of the merge; None for anything that plait did not merge.
        space: of the merge.
        recipe: as run, every default spelled out; None where it is not known.
        base_model: as it was written.
        sources: the single adapters.
        split: of every task.
        subset: of every task's split, as it was asked for; None for all of it.
        dtype: of the base model.
        batch_size: prompts at a time.
        draws: of the bootstrap.
        seed: of the bootstrap.
        tasks: one result each.
        mean_recovery: over the tasks that have one; None when none has.
        mean_interval: 95 %, over draws in which all of those have one.
        worst_recovery: the smallest; None when none has one.
        worst_interval: see `mean_interval`.
        worst_task: whose it is.
        below_base: tasks on which it is worse than the base.
        undefined: tasks without recovery.
        matrix: single adapters on all tasks, when asked for.
        notes: what else is worth knowing.
        finished: local time, ISO 8601.
        seconds: wall time.
    """

    OLDER_KEYS: ClassVar[frozenset[str]] = keys_of(RESULTS)

    version: int = EVALUATION_VERSION
    plait: str
    name: str
    kind: CandidateKind
    path: str | None = None
    tag: str
    method: str | None
    space: str | None
    recipe: dict[str, Any] | None
    base_model: str
    sources: tuple[SingleAdapter, ...]
    split: SplitName
    subset: Subset | None = None
    dtype: str
    batch_size: int
    draws: int
    seed: int
    tasks: tuple[TaskResult, ...]
    mean_recovery: float | None
    mean_interval: Bounds | None
    worst_recovery: float | None
    worst_interval: Bounds | None
    worst_task: str | None
    below_base: tuple[str, ...]
    undefined: tuple[str, ...]
    matrix: InterferenceMatrix | None
    notes: tuple[str, ...]
    finished: str
    seconds: float
