"""What an adapter reads of its task's texts while its modules' inputs are looked at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from plait.calibration.passages import Passage
from plait.calibration.texts import Texts
from plait.errors import TaskError, collect
from plait.evaluation.generation import generate_tokens
from plait.evaluation.likelihood import check_lengths, log_likelihoods
from plait.mixture import Mixture
from plait.tasks.asking import Generated, Head, TargetLikelihood
from plait.tasks.encoding import PromptEncoder, Question

_ANSWER = 32  # tokens of a free answer that a decoder reads, at most


def check_texts(
    mixture: Mixture, texts: Mapping[str, Texts], *, answered: bool = False, right: Mapping[str, Sequence[str]] | None = None
) -> None:
    """Make sure that every task's texts fit the base, before an adapter reads the first.

    Args:
        mixture: the base with the adapters.
        texts: task → its texts.
        answered: with answers.
        right: task → the right answer of every text, where labels are learned from.

    Raises:
        TaskError: the base has no tokenizer, or texts are longer than its context; of all tasks at once.
    """
    if mixture.tokenizer is None:
        raise TaskError("the base model has no tokenizer; only tasks of text can be calibrated on.")
    problems = []
    for name, own in texts.items():
        try:
            with _naming(own):
                _tokenized(mixture, own, answered=answered, right=(right or {}).get(name))
        except TaskError as error:
            problems.append(str(error))
    collect(TaskError, problems, "texts must fit the base")


def encode_texts(
    mixture: Mixture, texts: Texts, adapter: str, *, answered: bool = False, right: Sequence[str] | None = None
) -> tuple[tuple[Passage, ...], tuple[tuple[int, ...], ...]]:
    """Return a task's texts as tokens, and the first tokens of the labels that each offers (empty where answers are free).

    Those are the prompts, and the texts themselves of a perplexity task. The decoder of an encoder-decoder model reads nothing
    of a prompt; it gets the answer that the task's own adapter gives: the label that it finds likeliest, or its greedy answer,
    up to 32 tokens. So does a causal model, `answered`. No label of the data is read.

    Args:
        mixture: the base with the adapters.
        texts: of the task; they fit the base (`check_texts`).
        adapter: the task's own.
        answered: with answers.
        right: the right answer of every text, in place of the adapter's, where labels are learned from.

    Raises:
        TaskError: the adapter cannot answer, such as with scores that are NaN.
    """
    ask = texts.task.ask
    with _naming(texts):
        questions, labels = _tokenized(mixture, texts, answered=answered, right=right)
        chosen: list[list[int]] = [[] for _ in questions]
        if isinstance(ask, TargetLikelihood) or (right is not None and not isinstance(ask, Head)):
            chosen = [q.answers[0] for q in questions]
        elif any(q.answers for q in questions) or (isinstance(ask, Generated) and (answered or _is_encoder_decoder(mixture))):
            with mixture.active({adapter: 1.0}) as acting:
                if isinstance(ask, Generated):
                    chosen = generate_tokens(acting, mixture.tokenizer, questions, max_new_tokens=_most(ask), batch_size=16)
                else:
                    scores = log_likelihoods(acting, questions, batch_size=16)
                    chosen = [q.answers[row.index(max(row))] for q, row in zip(questions, scores, strict=True)]
    return tuple(Passage(tuple(q.prompt), tuple(c), tuple(q.lead)) for q, c in zip(questions, chosen, strict=True)), labels


@contextmanager
def _naming(texts: Texts) -> Iterator[None]:
    """Name task and texts in whatever is wrong with them."""
    try:
        yield
    except TaskError as error:
        raise TaskError(f"task {texts.task.name!r}, {texts.source}: {error}") from None


def _tokenized(
    mixture: Mixture, texts: Texts, *, answered: bool, right: Sequence[str] | None
) -> tuple[list[Question], tuple[tuple[int, ...], ...]]:
    """Return texts as tokens, with the answers that they are given or offered, and the first tokens of what they offer.

    Raises:
        TaskError: one is longer than the base's context.
    """
    ask, tokenizer, longest = texts.task.ask, mixture.tokenizer, 0
    if isinstance(ask, Head):
        cut: dict[str, Any] = {"truncation": ask.max_tokens is not None, "max_length": ask.max_tokens}
        rows = tokenizer([str(p) for p in texts.prompts], **cut)["input_ids"]
        check_lengths(mixture.model, [len(r) for r in rows])
        return [Question(row, []) for row in rows], ()
    encoder_decoder = _is_encoder_decoder(mixture)
    answered = answered or encoder_decoder
    encoder = PromptEncoder(tokenizer, texts.task, encoder_decoder=encoder_decoder)
    offered = texts.choices if answered or isinstance(ask, TargetLikelihood) else [()] * len(texts.prompts)
    questions = encoder.encode(texts.prompts, offered)
    free = isinstance(ask, (TargetLikelihood, Generated))
    labels = () if free else tuple(tuple(dict.fromkeys(a[0] for a in q.answers)) for q in questions)
    if right is not None:
        questions = encoder.encode(texts.prompts, [(text,) for text in right])
    elif isinstance(ask, Generated) and answered and not encoder_decoder:
        longest = _most(ask)  # tokens of an answer that is still to be written
    check_lengths(mixture.model, [len(q.prompt) + max(map(len, q.answers), default=longest) for q in questions])
    return questions, labels


def _is_encoder_decoder(mixture: Mixture) -> bool:
    config: Any = mixture.model.config
    return bool(getattr(config, "is_encoder_decoder", False))


def _most(ask: Generated) -> int:
    return min(_ANSWER, ask.max_new_tokens)
