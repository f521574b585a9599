"""A model and the examples of a task → answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from plait.errors import TaskError
from plait.evaluation import harness
from plait.evaluation.generation import generate
from plait.evaluation.heads import head_outputs, text_vectors, word_labels
from plait.evaluation.hearing import sound_outputs
from plait.evaluation.likelihood import log_likelihoods
from plait.evaluation.model_calls import StepListener, vocabulary
from plait.evaluation.transcribing import announce_cut, written
from plait.evaluation.vision import class_likeness, image_outputs
from plait.tasks.answers import Answer
from plait.tasks.asking import (
    Choices,
    ClassPrompts,
    Generated,
    Harness,
    LabelHead,
    Length,
    NumberHead,
    Reading,
    Similarity,
    TagHead,
    TargetLikelihood,
    Transcribed,
)
from plait.tasks.encoding import PromptEncoder, Question, encode_readings
from plait.tasks.examples import Examples
from plait.tasks.inputs import Example


def answer_examples(
    model: Any,
    tokenizer: Any,
    examples: Examples,
    *,
    processor: Any = None,
    batch_size: int,
    report: StepListener = lambda done: None,
    contender: str = "the model",
) -> list[Answer]:
    """Ask a model everything.

    Args:
        model: of transformers: causal or encoder-decoder, or a sequence classifier for that kind of task.
        tokenizer: its tokenizer; None where nothing is read.
        examples: what is asked.
        processor: what makes its inputs of images or sounds, where there are some.
        batch_size: prompts at a time; changes the last bits of scores, as every regrouping of sums does.
        report: called with the number of examples finished since it was last called.
        contender: what the model is called in announcements.

    Raises:
        TaskError: the task does not suit the model.
    """
    task, ask = examples.task, examples.task.ask
    if not isinstance(ask, (Reading, Transcribed)) and not model.can_generate():
        raise TaskError(
            f"task {task.name!r} ({task.kind}) asks for texts, but {type(model).__name__} generates none; kinds that suit it "
            "are 'sequence_classification', 'token_classification', 'regression' and 'sentence_similarity'."
        )
    if isinstance(ask, (Choices, Generated, TargetLikelihood)):
        apart, size = bool(model.config.is_encoder_decoder), vocabulary(model)
        encoder = PromptEncoder(tokenizer, task, encoder_decoder=apart, vocabulary=size, processor=processor)
        match ask:
            case Choices():
                return _choose(model, encoder, examples, ask, batch_size, report)
            case Generated():
                return _generate(model, encoder, examples, ask, batch_size, report, contender)
        return _score_target(model, encoder, examples, batch_size, report)
    if any(e.image is not None for e in examples.items):
        return _see(model, tokenizer, processor, examples, batch_size=batch_size, report=report)
    if any(e.audio is not None for e in examples.items):
        return _hear(model, tokenizer, processor, examples, batch_size=batch_size, report=report, contender=contender)
    others = {name for e in examples.items for name in e.inputs} - {"text", "messages", "second", "words"}
    if others:
        raise TaskError(
            f"task {task.name!r} ({task.kind}) has inputs {', '.join(sorted(others))}; models are given text, images or sounds."
        )
    return _WAYS[type(ask)](model, tokenizer, examples, ask, batch_size, report)


def likeliest(scores: Sequence[float], texts: Sequence[str], tokens: Sequence[int], length: Length) -> int:
    """Return which answer is taken: the first of the highest.

    Args:
        scores: log-likelihood per answer.
        texts: the answers, whose UTF-8 bytes count for `bytes`.
        tokens: length per answer.
        length: how scores are divided.
    """
    sizes = {"sum": [1] * len(scores), "tokens": tokens, "bytes": [len(t.encode()) for t in texts]}[length]
    fair = [s / n for s, n in zip(scores, sizes, strict=True)]
    return fair.index(max(fair))


def _choose(
    model: Any, encoder: PromptEncoder, examples: Examples, ask: Choices, batch_size: int, report: StepListener
) -> list[Answer]:
    questions = encoder.questions(examples, [e.choices for e in examples.items])
    scores = log_likelihoods(model, questions, batch_size=batch_size, report=report)
    blanks = _blank_scores(model, encoder, examples, batch_size)
    answers = []
    for example, question, row in zip(examples.items, questions, scores, strict=True):
        gain = [s - b for s, b in zip(row, blanks[example.choices], strict=True)] if blanks else row
        tokens = tuple(map(len, question.answers))
        given = example.choices[likeliest(gain, example.choices, tokens, ask.length)]
        answers.append(Answer(id=example.id, target=example.target, given=given, scores=tuple(row), tokens=tokens))
    return answers


def _blank_scores(
    model: Any, encoder: PromptEncoder, examples: Examples, batch_size: int
) -> Mapping[tuple[str, ...], list[float]]:
    """Return each answer's log-likelihood after the content-free prompt (Zhao et al. 2021, Calibrate Before Use, §4).

    Taking it off is the paper's W = diag(p_cf)⁻¹ with b = 0: the same answer is the largest.
    """
    if examples.blank is None:
        return {}
    kinds = list(dict.fromkeys(e.choices for e in examples.items))
    questions = [encoder.question(examples.blank, choices) for choices in kinds]
    return dict(zip(kinds, log_likelihoods(model, questions, batch_size=batch_size), strict=True))


def _generate(
    model: Any,
    encoder: PromptEncoder,
    examples: Examples,
    ask: Generated,
    batch_size: int,
    report: StepListener,
    contender: str,
) -> list[Answer]:
    cut: list[int] = []
    texts = generate(
        model,
        encoder.tokenizer,
        encoder.questions(examples, [()] * len(examples.items)),
        max_new_tokens=ask.max_new_tokens,
        stop=ask.stop,
        batch_size=batch_size,
        report=report,
        unfinished=cut.append,
    )
    if ask.transcript:
        announce_cut(examples, sum(cut), contender)
    return [Answer(id=e.id, target=e.target, given=text) for e, text in zip(examples.items, texts, strict=True)]


def _score_target(
    model: Any, encoder: PromptEncoder, examples: Examples, batch_size: int, report: StepListener
) -> list[Answer]:
    questions = encoder.questions(examples, [(e.target,) for e in examples.items])
    scores = log_likelihoods(model, questions, batch_size=batch_size, report=report)
    return [
        Answer(id=e.id, target=e.target, given=None, scores=tuple(row), tokens=(len(q.answers[0]),))
        for e, q, row in zip(examples.items, questions, scores, strict=True)
    ]


def _classify(
    model: Any, tokenizer: Any, examples: Examples, ask: LabelHead, batch_size: int, report: StepListener
) -> list[Answer]:
    texts = _readings(model, tokenizer, examples, ask)
    rows = head_outputs(model, tokenizer, texts, outputs=len(ask.labels), batch_size=batch_size, report=report)
    return _labeled(examples, ask.labels, rows)


def _see(
    model: Any, tokenizer: Any, processor: Any, examples: Examples, *, batch_size: int, report: StepListener
) -> list[Answer]:
    ask, images = examples.task.ask, [e.image or b"" for e in examples.items]
    match ask:
        case ClassPrompts(labels=labels, texts=texts):
            rows = class_likeness(model, tokenizer, processor, images, texts, batch_size=batch_size, report=report)
        case LabelHead(labels=labels):
            rows = image_outputs(model, processor, images, outputs=len(labels), batch_size=batch_size, report=report)
        case _:
            raise TaskError(f"task {examples.task.name!r} ({examples.task.kind}): only labels are asked of images.")
    return _labeled(examples, labels, rows)


def _hear(
    model: Any, tokenizer: Any, processor: Any, examples: Examples, *, batch_size: int, report: StepListener, contender: str
) -> list[Answer]:
    match examples.task.ask:
        case Transcribed() as ask:
            found = written(
                model, tokenizer, processor, examples, ask, batch_size=batch_size, report=report, contender=contender
            )
            return [Answer(id=e.id, target=e.target, given=one.text) for e, one in zip(examples.items, found, strict=True)]
        case LabelHead(labels=labels):
            rows = sound_outputs(model, processor, examples, outputs=len(labels), batch_size=batch_size, report=report)
            return _labeled(examples, labels, rows)
    raise TaskError(f"task {examples.task.name!r} ({examples.task.kind}): only labels and transcripts are asked of sounds.")


def _labeled(examples: Examples, labels: Sequence[str], rows: Sequence[Sequence[float]]) -> list[Answer]:
    """Return the label of the largest score of every example."""
    return [
        Answer(id=e.id, target=e.target, given=labels[row.index(max(row))], scores=tuple(row))
        for e, row in zip(examples.items, rows, strict=True)
    ]


def _label_words(
    model: Any, tokenizer: Any, examples: Examples, ask: TagHead, batch_size: int, report: StepListener
) -> list[Answer]:
    texts = _readings(model, tokenizer, examples, ask)
    rows = word_labels(model, tokenizer, texts, outputs=len(ask.labels), batch_size=batch_size, report=report)
    return [
        Answer(id=e.id, target=e.target, given=" ".join(ask.labels[i] for i in row))
        for e, row in zip(examples.items, rows, strict=True)
    ]


def _give_numbers(
    model: Any, tokenizer: Any, examples: Examples, ask: NumberHead, batch_size: int, report: StepListener
) -> list[Answer]:
    texts = _readings(model, tokenizer, examples, ask)
    rows = head_outputs(model, tokenizer, texts, outputs=1, batch_size=batch_size, report=report)
    return [_number(e, row[0]) for e, row in zip(examples.items, rows, strict=True)]


def _compare(
    model: Any, tokenizer: Any, examples: Examples, ask: Similarity, batch_size: int, report: StepListener
) -> list[Answer]:
    texts = _readings(model, tokenizer, examples, ask)
    vectors = text_vectors(model, tokenizer, texts, pooling=ask.pooling, batch_size=batch_size, report=_every_second(report))
    cosines = torch.cosine_similarity(vectors[::2].double(), vectors[1::2].double()).tolist()
    return [_number(e, value) for e, value in zip(examples.items, cosines, strict=True)]


def _every_second(report: StepListener) -> StepListener:
    """Return a listener to texts that reports pairs."""
    left = 0

    def tell(done: int) -> None:
        nonlocal left
        pairs, left = divmod(left + done, 2)
        report(pairs)

    return tell


def _number(example: Example, value: float) -> Answer:
    return Answer(id=example.id, target=example.target, given=f"{value:.6g}", scores=(value,))


def _readings(model: Any, tokenizer: Any, examples: Examples, ask: Reading) -> list[Question]:
    prompts = [e.prompt for e in examples.items]
    return encode_readings(tokenizer, examples.task, ask, prompts, vocabulary=vocabulary(model))


def _through_harness(
    model: Any, tokenizer: Any, examples: Examples, ask: Harness, batch_size: int, report: StepListener
) -> list[Answer]:
    return harness.run_harness(model, tokenizer, examples, batch_size=batch_size, report=report)


#: Way of asking → what does it; the kinds of tasks that ask so are not known here.
_WAYS: Mapping[type, Callable[[Any, Any, Examples, Any, int, StepListener], list[Answer]]] = {
    LabelHead: _classify,
    TagHead: _label_words,
    NumberHead: _give_numbers,
    Similarity: _compare,
    Harness: _through_harness,
}
