"""One base model, some single adapters and some tasks: whatever is evaluated on them shares their references."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from plait.adapters.adapter import Adapter
from plait.evaluation.candidates import Candidate, base_candidate, single_candidate
from plait.evaluation.loaded_base import LoadedBase
from plait.evaluation.model_calls import BrokenOutputsError, StepListener
from plait.evaluation.record import Bounds, Confusion, InterferenceMatrix, Sample, TaskResult
from plait.evaluation.recovery import BootstrapDraws, PairedStatistics, central_interval, mean_and_worst, recovery, task_seed
from plait.evaluation.scores import Answers, ScoreCache, adapter_digest, answers_digest, digest
from plait.evaluation.scoring import answer_examples
from plait.evaluation.subsets import ChosenSubset
from plait.recipes.evaluation import EvalSpec
from plait.results.progress import Progress
from plait.tasks.answers import Answer, Metric
from plait.tasks.asking import Ask as WayOfAsking
from plait.tasks.asking import Generated, NumberHead, Similarity, Transcribed
from plait.tasks.examples import Examples
from plait.tasks.images import thumbnail
from plait.tasks.inputs import Example
from plait.tasks.metrics import metric_of
from plait.tasks.schema import Task
from plait.tasks.sounds import shown_prompt, waveform

_SAMPLES = 5
_MOST_LABELS = 20  # of a table with a row and a column for each
T = TypeVar("T")


@dataclass(frozen=True)
class TaskExamples:
    """The examples of one task that are asked, and the sample that they are."""

    examples: Examples
    subset: ChosenSubset | None

    @property
    def task(self) -> Task:
        """Their task."""
        return self.examples.task


@dataclass(frozen=True)
class Totals:
    """What holds over all tasks; see `Evaluation`."""

    mean: float | None
    mean_interval: Bounds | None
    worst: float | None
    worst_interval: Bounds | None
    worst_task: str | None


@dataclass(frozen=True, eq=False)
class Ask:
    """What a candidate is asked, and is not known to have answered.

    Attributes:
        key: hash of everything that the answers depend on.
        candidate: who is asked.
        owner: adapter whose full tensors act; None for the base's.
        examples: what is asked.
        batch_size: prompts at a time.
    """

    key: str
    candidate: Candidate
    owner: str | None
    examples: Examples
    batch_size: int


class Elsewhere(Protocol):
    """Where candidates are asked, if not in this process."""

    def submit(self, ask: Ask) -> None:
        """Have something asked."""

    def next(self, report: StepListener) -> tuple[Ask, Sequence[Answer]]:
        """Wait until something that was submitted is answered."""


Wanted = Iterable[tuple[Candidate, TaskExamples]]


class AnswerSession:
    """Asks and compares; every answer is asked for once, in this process and, through the cache, in later ones.

    Args:
        live: the base with all adapters.
        base_key: hash of the base model's files.
        adapters: the single adapters by name.
        tasks: the tasks.
        spec: how to evaluate.
        setting: what else answers depend on (dtype, device).
        cache: of finished answers.
        progress: receives stages and steps.
        elsewhere: where candidates are asked; on `live` when None.
    """

    def __init__(
        self,
        live: LoadedBase,
        base_key: str,
        adapters: Mapping[str, Adapter],
        tasks: Sequence[TaskExamples],
        spec: EvalSpec,
        setting: Sequence[str],
        cache: ScoreCache,
        progress: Progress,
        elsewhere: Elsewhere | None = None,
    ) -> None:
        self.tasks = tuple(tasks)
        self.spec = spec
        self.adapters = adapters
        self.live = live
        self._setting = (base_key, answers_digest(), *setting, spec.batch_size)
        self._cache = cache
        self._progress = progress
        self._metrics: dict[str, Metric] = {a.task.name: metric_of(a.task) for a in tasks}
        self._known: dict[str, tuple[Answer, ...]] = {}
        self._elsewhere = elsewhere

    def on(self, tasks: Sequence[TaskExamples], spec: EvalSpec) -> AnswerSession:
        """Return a session of the same base and adapters on other examples; it asks nothing again that this one knows."""
        other = copy(self)
        other.tasks, other.spec = tuple(tasks), spec
        other._setting = (*self._setting[:-1], spec.batch_size)
        other._metrics = {a.task.name: metric_of(a.task) for a in tasks}
        return other

    def tag(self, candidate: Candidate) -> str:
        """Return a hash of everything that the results of a candidate depend on; 10 hex digits."""
        return self.digest(candidate)[:10]

    def digest(self, candidate: Candidate) -> str:
        """Return that hash; 32 hex digits."""
        return digest(candidate.key, self._setting, [a.examples.digest for a in self.tasks])

    def results(self, candidate: Candidate) -> tuple[tuple[TaskResult, ...], Totals]:
        """Evaluate a candidate on every task, next to base and single adapters."""
        drawn: dict[str, BootstrapDraws] = {}
        results = [self._result(candidate, entry, drawn) for entry in self.tasks]
        return tuple(results), _totals(results, drawn)

    def matrix(self) -> InterferenceMatrix:
        """Evaluate every single adapter on every task."""
        values, shares = [], []
        for name in self.adapters:
            row = [self._value(single_candidate(name, self.adapters), entry) for entry in self.tasks]
            bases = [self._value(base_candidate(self.adapters), entry) for entry in self.tasks]
            owns = [None if (own := self.own(a.task)) is None else self._value(own, a) for a in self.tasks]
            values.append(tuple(row))
            shares.append(
                tuple(
                    recovery(self._metrics[a.task.name], b, own, v)
                    for a, b, own, v in zip(self.tasks, bases, owns, row, strict=True)
                )
            )
        tasks = tuple(a.task.name for a in self.tasks)
        return InterferenceMatrix(adapters=tuple(self.adapters), tasks=tasks, values=tuple(values), recovery=tuple(shares))

    def draws(self, candidate: Candidate) -> dict[str, BootstrapDraws]:
        """Return the bootstrap draws of every task; of two candidates they hold the same examples, and so can be compared."""
        return {a.task.name: self._draws(self._sides(candidate, a), a) for a in self.tasks}

    def _sides(self, candidate: Candidate, entry: TaskExamples) -> PairedStatistics:
        metric, own = self._metrics[entry.task.name], self.own(entry.task)
        alone = None if own is None else metric.statistics(self.answers(own, entry))
        base, merged = (metric.statistics(self.answers(c, entry)) for c in (base_candidate(self.adapters), candidate))
        return PairedStatistics(metric, np.asarray(base), alone, np.asarray(merged))

    def _draws(self, sides: PairedStatistics, entry: TaskExamples) -> BootstrapDraws:
        return sides.draws(self.spec.draws, task_seed(self.spec.seed, entry.task.name))

    def _result(self, candidate: Candidate, entry: TaskExamples, drawn: dict[str, BootstrapDraws]) -> TaskResult:
        task, metric = entry.task, self._metrics[entry.task.name]
        base = self.answers(base_candidate(self.adapters), entry)
        own = self.own(task)
        alone = None if own is None else self.answers(own, entry)
        merged = self.answers(candidate, entry)
        values = metric.value(base), None if alone is None else metric.value(alone), metric.value(merged)
        found = recovery(metric, *values)
        draws = self._draws(self._sides(candidate, entry), entry)
        if found is not None:
            drawn[task.name] = draws
        return TaskResult(
            task=task.name,
            kind=task.kind,
            metric=metric.name,
            higher_is_better=metric.higher_is_better,
            adapter=None if own is None else own.name,
            examples=len(entry.examples.items),
            subset=None if entry.subset is None else entry.subset.tag,
            base=values[0],
            single=values[1],
            merged=values[2],
            base_interval=central_interval(draws.base, values[0]),
            single_interval=None if own is None else central_interval(draws.single, values[1] or 0.0),
            merged_interval=central_interval(draws.merged, values[2]),
            base_stderr=metric.stderr(base),
            single_stderr=None if alone is None else metric.stderr(alone),
            merged_stderr=metric.stderr(merged),
            recovery=found,
            recovery_interval=None if found is None else central_interval(draws.recovery, found),
            undefined=_undefined_reason(task, values, found, self.adapters),
            below_base=values[2] < values[0] if metric.higher_is_better else values[2] > values[0],
            samples=_samples(
                entry.examples.items,
                base,
                alone,
                merged,
                judged=_is_judged(task.ask),
            ),
            confusion=_confusion(task, alone, merged),
        )

    def answers(self, candidate: Candidate, entry: TaskExamples) -> tuple[Answer, ...]:
        """Return what a candidate answers to a task: known, kept, or asked for now."""
        key, ask = self._wanted(candidate, entry)
        if ask is not None:
            if self._elsewhere is None:
                self._learn(ask, self._ask(ask))
            else:
                self.prepare([(candidate, entry)])
        return self._known[key]

    def prepare(self, wanted: Wanted) -> None:
        """Have candidates asked at the same time where that is done elsewhere; here they are asked when they must answer."""
        if self._elsewhere is not None:
            self.together([_wanting(wanted)])

    def together(self, work: Sequence[Generator[Wanted, None, T]]) -> list[T]:
        """Return what each piece of work returns; they run side by side where candidates are asked elsewhere.

        Args:
            work: yields what it will have asked of `answers` next.
        """
        elsewhere = self._elsewhere
        if elsewhere is None:
            return [_exhausted(piece) for piece in work]
        found: dict[int, T] = {}
        missing: dict[int, set[str]] = {}
        given: set[str] = set()

        def go_on(i: int) -> int:
            """Run a piece to the next answer that is not known; return how many more examples are asked."""
            more = 0
            while not missing.get(i):
                try:
                    wanted = next(work[i])
                except StopIteration as end:
                    found[i] = end.value
                    missing.pop(i, None)
                    break
                asks = {ask.key: ask for pair in wanted if (ask := self._wanted(*pair)[1]) is not None}
                missing[i] = {*asks}
                for key in [key for key in asks if key not in given]:
                    given.add(key)
                    more += len(asks[key].examples.items)
                    elsewhere.submit(asks[key])
            return more

        total = sum(go_on(i) for i in range(len(work)))
        self._progress.start("asked on the cluster", total, "examples")
        try:
            while missing:
                ask, answers = elsewhere.next(self._progress.advance)
                self._learn(ask, answers)
                for i in [i for i, keys in missing.items() if ask.key in keys]:
                    missing[i].remove(ask.key)
                    go_on(i)
        finally:
            self._progress.finish()
        return [found[i] for i in range(len(work))]

    def _wanted(self, candidate: Candidate, entry: TaskExamples) -> tuple[str, Ask | None]:
        """Return the key of what a candidate answers to a task, and what is to be asked where that is not known."""
        examples, owner = entry.examples, candidate.heads(entry.task)
        # full tensors of its own are in a candidate's key
        heads = adapter_digest(self.adapters[owner]) if owner is not None and owner in self.adapters else None
        key = digest(candidate.key, heads, examples.digest, self._setting)
        if key not in self._known:
            found = self._cache.find(key, len(examples.items))
            if found is None:
                return key, Ask(key, candidate, owner, examples, self.spec.batch_size)
            self._known[key] = found.answers
        return key, None

    def _learn(self, ask: Ask, found: Sequence[Answer]) -> None:
        """Keep answers."""
        kept = Answers(contender=ask.candidate.name, task=ask.examples.task.name, answers=tuple(found))
        if ask.candidate.kept:
            self._cache.keep(ask.key, kept)
        self._known[ask.key] = kept.answers

    def _ask(self, ask: Ask) -> Sequence[Answer]:
        readers, examples = self.live.readers(ask.examples.task), ask.examples
        with ask.candidate.act(self.live, ask.owner) as model:
            self._progress.start(f"{ask.candidate.name} · {examples.task.name}", len(examples.items), "examples")
            try:
                return answer_examples(
                    model,
                    readers.tokenizer,
                    examples,
                    processor=readers.processor,
                    batch_size=ask.batch_size,
                    report=self._progress.advance,
                    contender=ask.candidate.name,
                )
            except BrokenOutputsError as error:
                raise BrokenOutputsError(f"{self.live.with_folder(ask.candidate.name)}: {error}") from None
            finally:
                self._progress.finish()

    def own(self, task: Task) -> Candidate | None:
        """Return a task's own adapter; None where none is known."""
        return single_candidate(task.own_adapter, self.adapters) if task.own_adapter in self.adapters else None

    def _value(self, candidate: Candidate, entry: TaskExamples) -> float:
        return self._metrics[entry.task.name].value(self.answers(candidate, entry))


def _wanting(wanted: Wanted) -> Generator[Wanted, None, None]:
    yield wanted


def _exhausted(work: Generator[Wanted, None, T]) -> T:
    """Run work here, where it asks by itself."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            found: T = end.value
            return found


def _undefined_reason(
    task: Task, values: tuple[float, float | None, float], found: float | None, singles: Collection[str]
) -> str | None:
    base, alone, _ = values
    if found is not None:
        return None
    if alone is None:
        if not singles:
            return f"the task's own adapter is not known; name it with --source {task.own_adapter}=PATH (sources=)"
        return f"no adapter is called {task.own_adapter!r}; name the task's own with 'adapter' in its file"
    return f"no headroom: the single adapter ({alone:.4g}) is not better than the base ({base:.4g})"


def _totals(results: Sequence[TaskResult], drawn: Mapping[str, BootstrapDraws]) -> Totals:
    known = {r.task: r.recovery for r in results if r.recovery is not None}
    if not known:
        return Totals(None, None, None, None, None)
    mean, worst = mean_and_worst({name: d.recovery for name, d in drawn.items()})
    lowest = min(known, key=known.__getitem__)
    average = sum(known.values()) / len(known)
    return Totals(average, central_interval(mean, average), known[lowest], central_interval(worst, known[lowest]), lowest)


def _confusion(task: Task, alone: Sequence[Answer] | None, merged: Sequence[Answer]) -> Confusion | None:
    labels = task.closed_labels
    if labels is None or len(labels) > _MOST_LABELS:
        return None

    def counted(answers: Sequence[Answer]) -> tuple[tuple[int, ...], ...]:
        found = Counter((a.target, a.given) for a in answers)
        return tuple(tuple(found[right, given] for given in labels) for right in labels)

    return Confusion(labels=labels, single=None if alone is None else counted(alone), merged=counted(merged))


def _is_judged(ask: WayOfAsking) -> bool:
    """Whether an answer is right or wrong."""
    match ask:
        case NumberHead() | Similarity() | Transcribed() | Generated(transcript=True):
            return False
    return True


def _samples(
    items: Sequence[Example],
    base: Sequence[Answer],
    alone: Sequence[Answer] | None,
    merged: Sequence[Answer],
    *,
    judged: bool,
) -> tuple[Sample, ...]:
    """Take a few examples: those first on which the sides differ, in their order."""
    sides = [base, merged] if alone is None else [base, alone, merged]
    given = [tuple(a.given for a in answers) for answers in zip(*sides, strict=True)]
    order = sorted(range(len(items)), key=lambda i: len(set(given[i])) == 1)[:_SAMPLES]
    return tuple(
        Sample(
            id=items[i].id,
            prompt=shown_prompt(items[i]),
            target=items[i].target,
            base=base[i].given,
            single=None if alone is None else alone[i].given,
            merged=merged[i].given,
            image=thumbnail(images) if (images := items[i].images) else None,
            waveforms=tuple(map(waveform, items[i].sounds)),
            judged=judged,
        )
        for i in order
    )
