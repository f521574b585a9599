"""What an adapter reads of its task's texts while its modules' inputs are looked at."""

from __future__ import annotations

from typing import Any

from plait.calibration.passages import Passage
from plait.calibration.texts import Texts
from plait.errors import TaskError
from plait.evaluation.generation import generate_tokens
from plait.evaluation.likelihood import check_lengths, log_likelihoods
from plait.mixture import Mixture
from plait.tasks.asking import Generated, Head, TargetLikelihood
from plait.tasks.encoding import PromptEncoder

_ANSWER = 32  # tokens of a free answer that a decoder reads, at most


def encode_texts(mixture: Mixture, texts: Texts, adapter: str, *, answered: bool = False) -> tuple[Passage, ...]:
    """Return a task's texts as tokens: the prompts, and the texts themselves of a perplexity task.

    The decoder of an encoder-decoder model reads nothing of a prompt; it gets the answer that the task's own adapter gives: the
    label that it finds likeliest, or its greedy answer, up to 32 tokens. So does a causal model, `answered`. No label of the
    data is read.

    Args:
        mixture: the base with the adapters.
        texts: of the task.
        adapter: the task's own.
        answered: with answers.

    Raises:
        TaskError: the base has no tokenizer, or a text is longer than its context.
    """
    task, tokenizer, model = texts.task, mixture.tokenizer, mixture.model
    config: Any = model.config
    if tokenizer is None:
        raise TaskError("the base model has no tokenizer; only tasks of text can be calibrated on.")
    if isinstance(task.ask, Head):
        cut: dict[str, Any] = {"truncation": task.ask.max_tokens is not None, "max_length": task.ask.max_tokens}
        rows = tokenizer([str(p) for p in texts.prompts], **cut)["input_ids"]
        check_lengths(model, [len(r) for r in rows])
        return tuple(Passage(tuple(r)) for r in rows)
    encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
    answered = answered or encoder_decoder
    answers = texts.choices if answered or isinstance(task.ask, TargetLikelihood) else [()] * len(texts.prompts)
    questions = PromptEncoder(tokenizer, task, encoder_decoder=encoder_decoder).encode(texts.prompts, answers)
    check_lengths(model, [len(q.prompt) + max(map(len, q.answers), default=0) for q in questions])
    chosen: list[list[int]] = [[] for _ in questions]
    if isinstance(task.ask, TargetLikelihood):
        chosen = [q.answers[0] for q in questions]
    elif answered:
        with mixture.active({adapter: 1.0}) as acting:
            if isinstance(task.ask, Generated):
                most = min(_ANSWER, task.ask.max_new_tokens)
                chosen = generate_tokens(acting, tokenizer, questions, max_new_tokens=most, batch_size=16)
            else:
                scores = log_likelihoods(acting, questions, batch_size=16)
                chosen = [q.answers[row.index(max(row))] for q, row in zip(questions, scores, strict=True)]
    return tuple(Passage(tuple(q.prompt), tuple(c), tuple(q.lead)) for q, c in zip(questions, chosen, strict=True))
