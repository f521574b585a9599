"""What an adapter reads of its task's texts while its modules' inputs are looked at."""

from __future__ import annotations

from collections.abc import Sequence
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


def encode_texts(
    mixture: Mixture, texts: Texts, adapter: str, *, answered: bool = False, right: Sequence[str] | None = None
) -> tuple[tuple[Passage, ...], tuple[tuple[int, ...], ...]]:
    """Return a task's texts as tokens, and the first tokens of the labels that each offers (empty where answers are free).

    Those are the prompts, and the texts themselves of a perplexity task. The decoder of an encoder-decoder model reads nothing
    of a prompt; it gets the answer that the task's own adapter gives: the label that it finds likeliest, or its greedy answer,
    up to 32 tokens. So does a causal model, `answered`. No label of the data is read.

    Args:
        mixture: the base with the adapters.
        texts: of the task.
        adapter: the task's own.
        answered: with answers.
        right: the right answer of every text, in place of the adapter's, where labels are learned from.

    Raises:
        TaskError: the base has no tokenizer, or a text is longer than its context.
    """
    if mixture.tokenizer is None:
        raise TaskError("the base model has no tokenizer; only tasks of text can be calibrated on.")
    try:
        return _encoded(mixture, texts, adapter, answered=answered, right=right)
    except TaskError as error:
        raise TaskError(f"task {texts.task.name!r}, {texts.source}: {error}") from None


def _encoded(
    mixture: Mixture, texts: Texts, adapter: str, *, answered: bool, right: Sequence[str] | None
) -> tuple[tuple[Passage, ...], tuple[tuple[int, ...], ...]]:
    ask, tokenizer, model = texts.task.ask, mixture.tokenizer, mixture.model
    if isinstance(ask, Head):
        cut: dict[str, Any] = {"truncation": ask.max_tokens is not None, "max_length": ask.max_tokens}
        rows = tokenizer([str(p) for p in texts.prompts], **cut)["input_ids"]
        check_lengths(model, [len(r) for r in rows])
        return tuple(Passage(tuple(r)) for r in rows), ()
    config: Any = model.config
    encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
    answered = answered or encoder_decoder
    encoder = PromptEncoder(tokenizer, texts.task, encoder_decoder=encoder_decoder)
    offered = texts.choices if answered or isinstance(ask, TargetLikelihood) else [()] * len(texts.prompts)
    questions = encoder.encode(texts.prompts, offered)
    free = isinstance(ask, (TargetLikelihood, Generated))
    labels = () if free else tuple(tuple(dict.fromkeys(a[0] for a in q.answers)) for q in questions)
    if right is not None:
        questions = encoder.encode(texts.prompts, [(text,) for text in right])
    check_lengths(model, [len(q.prompt) + max(map(len, q.answers), default=0) for q in questions])
    chosen: list[list[int]] = [[] for _ in questions]
    if right is not None or isinstance(ask, TargetLikelihood):
        chosen = [q.answers[0] for q in questions]
    elif answered:
        with mixture.active({adapter: 1.0}) as acting:
            if isinstance(ask, Generated):
                most = min(_ANSWER, ask.max_new_tokens)
                chosen = generate_tokens(acting, tokenizer, questions, max_new_tokens=most, batch_size=16)
            else:
                scores = log_likelihoods(acting, questions, batch_size=16)
                chosen = [q.answers[row.index(max(row))] for q, row in zip(questions, scores, strict=True)]
    return tuple(Passage(tuple(q.prompt), tuple(c), tuple(q.lead)) for q, c in zip(questions, chosen, strict=True)), labels
