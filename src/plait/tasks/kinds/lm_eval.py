"""Tasks of EleutherAI's lm-evaluation-harness (lm-eval), opened with its own classes.

Its YAML may name Python functions: a task of the harness runs code, unlike one of plait's. Tensors and models are not seen
here; what asks a model is `evaluation.harness`.
"""

from __future__ import annotations

import io
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Annotated, Any, Literal, cast

import numpy as np
from pydantic import Field

from plait.errors import TaskError, did_you_mean
from plait.extras import optional
from plait.recipes.evaluation import SplitName
from plait.tasks.answers import Answer, FloatArray, Metric, of_shares, ratio
from plait.tasks.asking import Harness
from plait.tasks.inputs import Example
from plait.tasks.schema import Task, kind

LM_EVAL = "lm_eval:"  # before the name of one of the harness's tasks, as a kind and as a reference
Aggregation = Literal["mean", "perplexity", "weighted_perplexity", "bits_per_byte"]
_AGGREGATIONS: tuple[Aggregation, ...] = ("mean", "perplexity", "weighted_perplexity", "bits_per_byte")
_EXTRA = "lm-eval"
_FEWSHOT_SEED = 1234  # the harness's default
_NO_FILTER = "none"
_NOTHING = (0.0, 0.0)  # an example that the metric leaves out
#: The harness's aggregations, as functions of Σ value / Σ weight.
_FINISHED: Mapping[Aggregation, Callable[[FloatArray], FloatArray]] = {
    "mean": lambda ratio: ratio,
    "perplexity": lambda ratio: np.exp(-ratio),
    "weighted_perplexity": lambda ratio: np.exp(-ratio),
    "bits_per_byte": lambda ratio: -ratio / math.log(2),
}


@kind("lm_eval")
class LmEval(Task):
    """A task of EleutherAI's lm-evaluation-harness: its data, prompts and metric, run by its own evaluator."""

    kind: Annotated[str, Field(pattern=rf"^{LM_EVAL}.+$", description="`lm_eval:` and the harness's name of the task.")]
    metric: Annotated[
        str | None, Field(min_length=1, description="As the harness names it, with `,filter` where it has several; its first.")
    ] = None
    num_fewshot: Annotated[int | None, Field(ge=0, description="Examples in the prompt; as the harness has it.")] = None
    chat: Annotated[bool, Field(description="Put prompts through the model's chat template.")] = False
    include: Annotated[
        str | None, Field(min_length=1, description="A folder with tasks of your own, in the harness's YAML; in place of its.")
    ] = None

    @property
    def harness_name(self) -> str:
        """What the harness calls it."""
        return self.kind.removeprefix(LM_EVAL)

    @property
    def split_names(self) -> tuple[SplitName, ...]:
        """`test`: the documents that the harness evaluates on, its own test split or, where there is none, its validation."""
        return ("test",)

    @property
    def ask(self) -> Harness:
        """How a model is asked."""
        return Harness()

    def read(self, split: SplitName) -> list[Example]:
        """Return all documents that the harness evaluates on, in its order, as it puts them without a chat template.

        Raises:
            TaskError: as `fresh_task`; or another split is wanted.
        """
        if split not in self.split_names:
            raise TaskError(
                f"task {self.name!r} has no split {split!r}: lm-eval evaluates on documents of its own choice, which are "
                "called 'test' here."
            )
        inner = fresh_task(self)
        with silence_harness():
            inner.build_all_requests()
        requests: dict[int, list[Any]] = {}
        for request in inner.instances:
            requests.setdefault(request.doc_id, []).append(request)
        return [_example(inner, requests[number]) for number in sorted(requests)]

    def own_digest(self) -> Mapping[str, Any]:
        """Return what answers depend on besides the documents: the task's configuration and lm-eval's version."""
        config = sorted(_opened(self).dump_config().items(), key=lambda pair: pair[0])
        return {"harness": {"version": version("lm_eval"), "config": str(config)}}

    def own_metric(self) -> Metric:
        """Return a metric of the harness: its own aggregation of its own values, and for the bootstrap the sums behind it."""
        found = harness_metric(self)
        finish = _FINISHED[found.aggregation]

        def statistics(answers: Sequence[Answer]) -> FloatArray:
            return np.array([_NOTHING if not a.scores else (*a.scores, 1.0)[:2] for a in answers], dtype=np.float64)

        def values(answers: Sequence[Answer]) -> list[Any]:
            return [a.scores if len(a.scores) > 1 else a.scores[0] for a in answers if a.scores]

        def value(answers: Sequence[Answer]) -> float:
            known = values(answers)
            return float(found.aggregate(known)) if known else math.nan

        def stderr(answers: Sequence[Answer]) -> float | None:
            known = values(answers)
            return float(found.stderr(known)) if found.stderr is not None and len(known) > 1 else None

        shares = of_shares if found.aggregation == "mean" and found.higher_is_better else lambda statistics: None
        return Metric(found.metric, found.higher_is_better, statistics, lambda sums: finish(ratio(sums)), value, stderr, shares)


@dataclass(frozen=True)
class HarnessMetric:
    """How the harness judges a task.

    Attributes:
        metric: its name there.
        filter: which of the task's filters its answers went through.
        aggregation: what is made of the documents' values.
        aggregate: the harness's function that does it.
        higher_is_better: the metric's orientation.
        stderr: the harness's function for the standard error, where it is a formula.
    """

    metric: str
    filter: str
    aggregation: Aggregation
    aggregate: Callable[[Sequence[Any]], float]
    higher_is_better: bool
    stderr: Callable[[Sequence[Any]], float] | None


def fresh_task(task: LmEval) -> Any:
    """Return the harness's task, as if nothing had been drawn from it: the same examples are in every prompt.

    Raises:
        MissingPackageError: lm-eval is not installed.
        TaskError: lm-eval has no such task, or cannot read its data; or the task is not covered.
    """
    inner = _opened(task)
    inner.set_fewshot_seed(_FEWSHOT_SEED)
    return inner


def harness_metric(task: LmEval) -> HarnessMetric:
    """Return how a task is judged.

    Raises:
        TaskError: as `fresh_task`; the task has no such metric, or one that is not a function of sums over documents.
    """
    inner = _opened(task)
    filters = [f["name"] for f in inner.config.filter_list or ()] or [_NO_FILTER]
    aggregations = inner.aggregation()
    usable = {metric: name for metric, function in aggregations.items() if (name := _name(function)) is not None}
    wanted, _, through = (task.metric or next(iter(usable), "")).partition(",")
    through = through or filters[0]
    where = f"task {task.name!r}: metric"
    if wanted not in usable and wanted not in aggregations:
        near = did_you_mean(wanted, aggregations)
        raise TaskError(f"{where} {task.metric!r}: {task.kind} has {', '.join(aggregations)}.{near}")
    if wanted not in usable:
        raise TaskError(
            f"{where} {wanted!r}: lm-eval makes it of all answers together, not of sums over examples, so it has no paired "
            f"bootstrap here. Metrics of {task.kind} that have one: {', '.join(usable) or 'none'}."
        )
    if through not in filters:
        raise TaskError(f"{where} {task.metric!r}: {task.kind} has no filter {through!r}; there are {', '.join(filters)}.")
    stderr = _metrics().mean_stderr if usable[wanted] == "mean" else None
    return HarnessMetric(wanted, through, usable[wanted], aggregations[wanted], bool(inner.higher_is_better()[wanted]), stderr)


@contextmanager
def silence_harness() -> Iterator[None]:
    """Keep lm-eval and datasets from printing: plait reports what is asked and the results."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@cache
def _opened(task: LmEval) -> Any:
    optional("lm_eval", _EXTRA, f"task {task.name!r}: {task.kind}")
    manager = _index(task.include)
    name = task.harness_name
    entry = manager.task_index.get(name)
    where = f"task {task.name!r}: {task.kind}"
    if entry is None:
        place = task.include or "lm-eval"
        raise TaskError(f"{where}: {place} has no task of that name.{did_you_mean(name, manager.all_subtasks)}")
    if entry.kind.name in ("GROUP", "TAG"):
        raise TaskError(f"{where} is a group of tasks; name the tasks one by one. `lm_eval ls tasks` lists them.")
    try:
        with silence_harness():
            inner = manager.load(name)["tasks"][name]
    except Exception as error:  # lm-eval, datasets and their transport raise many classes
        raise TaskError(f"{where} cannot be opened: {type(error).__name__}: {' '.join(str(error).split())}") from error
    if getattr(inner, "MULTIMODAL", False):
        raise TaskError(f"{where} shows images or sounds; only tasks of text are covered.")
    if getattr(inner, "UNSAFE_CODE", False):
        raise TaskError(f"{where} runs code that the model writes; that is not done here.")
    given = inner.get_config("num_fewshot")  # of examples in the prompt: as in the harness, a task's own 0 is kept
    if task.num_fewshot and given == 0:
        raise TaskError(f"{where}: num_fewshot is {task.num_fewshot}, but lm-eval's task is meant without examples (0).")
    inner.set_config(key="num_fewshot", value=given or 0 if task.num_fewshot is None else task.num_fewshot)
    return inner


@cache
def _index(include: str | None) -> Any:
    tasks = optional("lm_eval.tasks", _EXTRA, "a task of lm-eval")
    with silence_harness():
        return tasks.TaskManager(include_path=include, include_defaults=include is None)


def _metrics() -> Any:
    return optional("lm_eval.api.metrics", _EXTRA, "a task of lm-eval")


def _name(function: Any) -> Aggregation | None:
    return next((name for name in _AGGREGATIONS if getattr(_metrics(), name) is function), None)


def _example(inner: Any, requests: Sequence[Any]) -> Example:
    first = requests[0]
    target = inner.doc_to_target(first.doc)
    if first.request_type == "loglikelihood_rolling":
        return Example.of("", str(first.args[0]), ())
    if first.request_type == "generate_until":
        return Example.of(_text(first.args[0]), _text(target), ())
    scored = [r for r in requests if r.args[0]] or requests  # without those that only weigh a choice by itself
    texts = tuple(str(r.args[1]) for r in scored)
    if len(texts) > 1 and len(set(texts)) == 1:  # choices precede what is scored, as in cloze tests
        texts = tuple(_text(r.args[0]) + str(r.args[1]) for r in scored)
        return Example.of("", _chosen(texts, inner.doc_to_text(first.doc)), texts)
    return Example.of(_text(first.args[0]), _chosen(texts, target), texts if len(texts) > 1 else ())


def _chosen(texts: Sequence[str], target: object) -> str:
    """Return the right one of some texts, where it is given by its number; else the target as it is."""
    numbered = isinstance(target, int) and not isinstance(target, bool) and 0 <= target < len(texts)
    return texts[cast("int", target)] if numbered else _text(target)


def _text(value: object) -> str:
    return value if isinstance(value, str) else str(value)
