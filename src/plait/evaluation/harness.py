"""A live model asked by lm-eval's own evaluator: no second copy of the model, no file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from importlib import import_module
from typing import Any

import torch

from plait.errors import TaskError
from plait.tasks.answers import Answer
from plait.tasks.chat import limited_chats, template_name
from plait.tasks.examples import Examples
from plait.tasks.inputs import Example
from plait.tasks.kinds import lm_eval
from plait.tasks.kinds.lm_eval import LmEval

_SEED = 1234  # the harness's default


def run_harness(
    model: Any, tokenizer: Any, examples: Examples, *, batch_size: int, report: Callable[[int], object] = lambda done: None
) -> list[Answer]:
    """Return what the harness finds of every example: the value of its metric, and the answer that was taken.

    Args:
        model: of transformers, as it is now: whatever acts on it acts here.
        tokenizer: its tokenizer.
        examples: of a task of the harness.
        batch_size: requests at a time.
        report: called with the number of examples when all are done.

    Raises:
        TaskError: as `tasks.kinds.lm_eval.fresh`.
    """
    task = examples.task
    if not isinstance(task, LmEval):
        raise TaskError(f"task {task.name!r}: lm-eval can evaluate only its own tasks (lm_eval:NAME), not {task.kind!r}.")
    metric, inner = lm_eval.harness_metric(task), lm_eval.fresh_task(task)
    name = inner.task_name
    chats = limited_chats(template_name(tokenizer)) if task.chat else nullcontext()
    with lm_eval.silence_harness(), _without_retying(model), torch.random.fork_rng(), chats:
        torch.manual_seed(_SEED)  # for tasks whose answers are sampled
        found = import_module("lm_eval.evaluator").evaluate(
            lm=import_module("lm_eval.models.huggingface").HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            task_dict={"tasks": {name: inner}},
            samples=None if examples.rows is None else {name: list(examples.rows)},
            bootstrap_iters=0,  # intervals are paired, of base, single and merge together
            apply_chat_template=task.chat,
            fewshot_as_multiturn=task.chat,
        )
    logged = {s["doc_id"]: s for s in found["samples"][name] if s["filter"] == metric.filter}
    rows = range(len(examples.items)) if examples.rows is None else examples.rows
    report(len(examples.items))
    return [_answer(example, logged[row], metric.metric) for example, row in zip(examples.items, rows, strict=True)]


def _answer(example: Example, sample: Mapping[str, Any], metric: str) -> Answer:
    value = sample.get(metric, ())
    scores = tuple(float(v) for v in value) if isinstance(value, (tuple, list)) else (float(value),)
    return Answer(id=example.id, target=example.target, given=_given(example, sample["filtered_resps"]), scores=scores)


def _given(example: Example, responses: list[Any]) -> str | None:
    """Return the answer for people: what was generated, or the likeliest choice; None where a text was only read."""
    if example.choices:
        likelihoods = [float(r[0]) for r in responses[: len(example.choices)]]
        return example.choices[likelihoods.index(max(likelihoods))]
    return responses[0] if isinstance(responses[0], str) else None


@contextmanager
def _without_retying(model: Any) -> Iterator[None]:
    """Keep lm-eval from tying weights again: that would undo a head that replaces a tied one."""
    model.__dict__["tie_weights"] = lambda *_, **__: None  # of the instance; hides the method
    try:
        yield
    finally:
        del model.__dict__["tie_weights"]
