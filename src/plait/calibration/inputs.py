"""What an adapter reads of its task's texts while its modules' inputs are looked at."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from plait.adapters.adapter import Adapter
from plait.calibration.passages import Passage
from plait.calibration.perceiving import check_perceived, is_perceived, perceived_passages
from plait.calibration.texts import Texts
from plait.errors import TaskError, collect
from plait.evaluation.generation import generate_tokens
from plait.evaluation.likelihood import log_likelihoods
from plait.evaluation.loaded_base import LoadedBase
from plait.evaluation.model_calls import check_lengths
from plait.hub.pretrained import LoadOptions
from plait.libraries.transformers.senses import media_tokens
from plait.mixture import Mixture
from plait.results.progress import Progress
from plait.tasks.asking import Generated, Reading, TargetLikelihood
from plait.tasks.encoding import PromptEncoder, Question, encode_readings
from plait.tasks.schema import files_of_chats

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
        TaskError: the base has no tokenizer or processor, texts are longer than its context, or sounds than what it hears; of
            all tasks at once.
    """
    problems = []
    for name, own in texts.items():
        try:
            with naming(own):
                labels = (right or {}).get(name)
                if is_perceived(own):
                    check_perceived(mixture, own, right=labels)
                else:
                    tokenize(mixture, own, answered=answered, right=labels)
        except TaskError as error:
            problems.append(str(error))
    collect(TaskError, problems, "texts must fit the base")


def load_for_texts(
    base: Path, adapters: Sequence[Adapter], options: LoadOptions, texts: Iterable[Texts], progress: Progress
) -> Mixture:
    """Load a base with adapters that are to read texts; what its processor does not take is refused before.

    Args:
        base: folder of the base.
        adapters: that read.
        options: how it is loaded.
        texts: of all tasks.
        progress: receives stages and steps.

    Raises:
        PlaitError: chats have images or sounds, and the base has no processor of such; or it cannot be loaded.
    """
    live, problems = LoadedBase(base, adapters, options, progress), []
    for own in texts:
        try:
            with naming(own):
                live.check(own.examples)
        except TaskError as error:
            problems.append(str(error))
    collect(TaskError, problems, "texts must fit the base")
    return live.mixture


def encode_texts(mixture: Mixture, texts: Texts, adapter: str) -> tuple[Passage, ...]:
    """Return what an adapter reads of a task's texts: the prompts, the texts themselves of a perplexity task, images, sounds.

    The decoder of an encoder-decoder model reads nothing of a prompt; it gets the answer that the adapter gives (see
    `own_answers`). No label of the data is read.

    Args:
        mixture: the base with the adapters.
        texts: of the task; they fit the base (`check_texts`).
        adapter: the task's own.

    Raises:
        TaskError: the adapter cannot answer, such as with scores that are NaN.
    """
    with naming(texts):
        if is_perceived(texts):
            return perceived_passages(mixture, texts, adapter)
        questions, _ = tokenize(mixture, texts)
        return passages_of(questions, own_answers(mixture, texts, adapter, questions))


def own_answers(
    mixture: Mixture, texts: Texts, adapter: str, questions: Sequence[Question], *, answered: bool = False
) -> Sequence[Sequence[int]]:
    """Return the answer that an adapter gives to every question: the label that it finds likeliest, or its greedy answer.

    The latter has up to 32 tokens, a transcript all of them, and is given by an encoder-decoder model, or where it is
    `answered`. The text of a perplexity task is its own answer; what is read as a whole has none.

    Args:
        mixture: the base with the adapters.
        texts: of the task.
        adapter: the task's own.
        questions: the texts as tokens.
        answered: whether a causal model answers freely too.

    Raises:
        TaskError: its scores are NaN.
    """
    ask = texts.task.ask
    if isinstance(ask, TargetLikelihood):
        return [q.answers[0] for q in questions]
    if isinstance(ask, Generated) and (answered or is_encoder_decoder(mixture)):
        with mixture.active({adapter: 1.0}) as acting:
            tokenizer, most = _tokenizer(mixture, texts), _most(ask)
            found = generate_tokens(acting, tokenizer, questions, max_new_tokens=most, batch_size=16)
        return [_until_media(acting, answer) for answer in found] if files_of_chats(texts.task) is not None else found
    if not any(q.answers for q in questions):
        return [()] * len(questions)
    with mixture.active({adapter: 1.0}) as acting:
        scores = log_likelihoods(acting, questions, batch_size=16)
    return [q.answers[row.index(max(row))] for q, row in zip(questions, scores, strict=True)]


def passages_of(questions: Sequence[Question], answers: Sequence[Sequence[int]]) -> tuple[Passage, ...]:
    """Return questions with one answer each."""
    return tuple(
        Passage(tuple(q.prompt), tuple(a), tuple(q.lead), tuple(q.segments), tuple(q.places), q.perceived)
        for q, a in zip(questions, answers, strict=True)
    )


@contextmanager
def naming(texts: Texts) -> Iterator[None]:
    """Name task and texts in whatever is wrong with them."""
    try:
        yield
    except TaskError as error:
        raise TaskError(f"task {texts.task.name!r}, {texts.source}: {error}") from None


def tokenize(
    mixture: Mixture, texts: Texts, *, answered: bool = False, right: Sequence[str] | None = None
) -> tuple[list[Question], tuple[tuple[int, ...], ...]]:
    """Return texts as tokens, with the answers that they are given or offered, and the first tokens of what they offer.

    Args:
        mixture: the base with the adapters.
        texts: of a task.
        answered: whether a causal model reads answers too.
        right: the right answer of every text, in place of those that the task offers.

    Raises:
        TaskError: the base has no tokenizer, or one is longer than its context.
    """
    ask, tokenizer, longest = texts.task.ask, _tokenizer(mixture, texts), 0
    if isinstance(ask, Reading):
        readings = encode_readings(tokenizer, texts.task, ask, texts.prompts)
        check_lengths(mixture.model, [len(q.prompt) for q in readings])
        return readings, ()
    encoder_decoder = is_encoder_decoder(mixture)
    answered = answered or encoder_decoder
    encoder = PromptEncoder(tokenizer, texts.task, encoder_decoder=encoder_decoder, processor=_chat_processor(mixture, texts))
    offered = texts.choices if answered or isinstance(ask, TargetLikelihood) else ((),) * len(texts.prompts)
    given = offered if right is None else [(*some, text) for some, text in zip(offered, right, strict=True)]
    questions = encoder.questions(texts.examples, given)
    free = isinstance(ask, (TargetLikelihood, Generated))
    sides = [q.answers[: len(some)] for q, some in zip(questions, offered, strict=True)]
    labels = () if free else tuple(tuple(dict.fromkeys(a[0] for a in answers)) for answers in sides)
    if right is not None:
        questions = [replace(q, answers=q.answers[-1:]) for q in questions]
    elif isinstance(ask, Generated) and answered and not encoder_decoder:
        longest = _most(ask)  # tokens of an answer that is still to be written
    check_lengths(mixture.model, [len(q.prompt) + max(map(len, q.answers), default=longest) for q in questions])
    return questions, labels


def is_encoder_decoder(mixture: Mixture) -> bool:
    """Whether the base has an encoder and a decoder."""
    config: Any = mixture.model.config
    return bool(getattr(config, "is_encoder_decoder", False))


def _most(ask: Generated) -> int:
    return ask.max_new_tokens if ask.transcript else min(_ANSWER, ask.max_new_tokens)


def _chat_processor(mixture: Mixture, texts: Texts) -> Any:
    """Return the processor of chats with images or sounds; None for other texts."""
    files = files_of_chats(texts.task)
    return None if files is None else mixture.processor(files.kind, chats=True)


def _tokenizer(mixture: Mixture, texts: Texts) -> Any:
    processor = _chat_processor(mixture, texts)
    tokenizer = mixture.tokenizer if processor is None else processor.tokenizer
    if tokenizer is None:
        raise TaskError("the base model has no tokenizer, and the task's texts must be read.")
    return tokenizer


def _until_media(model: Any, answer: Sequence[int]) -> Sequence[int]:
    """Return an answer up to the first token of an image or a sound, for which there would be none to read."""
    marks = media_tokens(model)
    return answer[: next((at for at, token in enumerate(answer, 1) if token in marks), len(answer))]
