"""Sounds that a model writes down: Whisper, other encoder-decoder models of speech, and models with CTC."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from plait.errors import TaskError, did_you_mean
from plait.evaluation.generation import announced_rereading, configured, end_tokens
from plait.evaluation.hearing import heard
from plait.evaluation.model_calls import StepListener, check_numbers, decoder_start
from plait.hub.pretrained import refuse_failures
from plait.libraries.transformers import kinds, quiet, whisper
from plait.notices import announce
from plait.tasks.asking import Transcribed
from plait.tasks.examples import Examples

_WHISPER_LEAD = 4  # tokens at most before a transcript: the start, language, task and that no times are wanted


class Transcript(NamedTuple):
    """What a model wrote down of a sound.

    Attributes:
        text: without special tokens, and without blanks at its ends.
        tokens: that its decoder wrote after the beginning, with the end, where it came to one; of CTC the likeliest labels.
        is_cut: whether it has as many tokens as it may have.
    """

    text: str
    tokens: tuple[int, ...]
    is_cut: bool = False


def written(
    model: Any,
    tokenizer: Any,
    extractor: Any,
    examples: Examples,
    ask: Transcribed,
    *,
    batch_size: int,
    report: StepListener = lambda done: None,
    contender: str = "the model",
) -> list[Transcript]:
    """Return what a model writes down of every sound.

    Args:
        model: of transformers, which writes down sounds.
        tokenizer: its tokenizer.
        extractor: what makes its input of samples.
        examples: with sounds, and texts before them where the task has a prompt.
        ask: how.
        batch_size: sounds at a time.
        report: called with the number of sounds finished since it was last called.
        contender: what the model is called in announcements.

    Raises:
        TaskError: the model writes down no sounds or does not take the options, a sound is too long or too short for it, or its
            output is NaN.
    """
    write = writer_of(model, tokenizer, extractor, examples, ask)
    found: list[Transcript | None] = [None] * len(examples.items)
    for batch, given in heard(model, extractor, examples, batch_size):
        with torch.inference_mode():
            made = write(given, examples.items[batch[0]].text or "")
        for i, one in zip(batch, made, strict=True):
            found[i] = one._replace(text=one.text.strip())
        report(len(batch))
    all_found = [one for one in found if one is not None]
    announce_cut(examples, sum(one.is_cut for one in all_found), contender)
    return all_found


def announce_cut(examples: Examples, cut: int, contender: str) -> None:
    """Announce how many of a task's transcripts are as long as they may be, where there are some."""
    if cut:
        announce(
            f"{examples.task.where}: {contender}: {cut} of {len(examples.items)} transcripts reach max_new_tokens or the end "
            "of what the decoder writes, and may lack their end; their errors count as they are.",
            once=f"cut transcripts {examples.task.name} {contender}",
        )


#: Takes a batch of inputs and the text before; returns the transcripts, with the blanks at their ends.
_Writer: TypeAlias = Callable[[Tensor, str], list[Transcript]]


def writer_of(model: Any, tokenizer: Any, extractor: Any, examples: Examples, ask: Transcribed) -> _Writer:
    """Return what writes down a batch; arguments as `written` has them, and the model's weights are not used yet.

    Raises:
        TaskError: the model writes down no sounds, or does not take the options.
    """
    where, name = examples.task.where, type(model).__name__
    texts = {e.text for e in examples.items if e.text is not None}
    if whisper.is_whisper(model):
        return _whisper(model, tokenizer, where, ask, texts)
    if given := [key for key in ("language", "task") if getattr(ask, key) is not None] + ["prompt"] * bool(texts):
        raise TaskError(f"{where}: {given[0]!r} is for Whisper; {name} has no such setting.")
    if name.endswith("ForCTC"):
        if ask.beams > 1 or ask.max_new_tokens is not None:
            raise TaskError(f"{where}: 'beams' and 'max_new_tokens' are for models that generate; {name} labels every moment.")
        return _ctc(model, tokenizer, extractor)
    if model.config.is_encoder_decoder and model.can_generate() and kinds.writes_sounds_down(model.config.model_type):
        return _decoder(model, tokenizer, where, ask)
    raise TaskError(
        f"{where} (asr) asks for transcripts, but {name} writes none; those that do are Whisper, other models of "
        "AutoModelForSpeechSeq2Seq and those with CTC."
    )


def _whisper(model: Any, tokenizer: Any, where: str, ask: Transcribed, texts: set[str]) -> _Writer:
    """Return what writes down a batch by Whisper's own `generate`, without times."""
    keywords = _spoken(model, where, ask)
    places, end = int(model.config.max_target_positions), int(tokenizer.eos_token_id)
    prompts = {"": None} | {text: _prompt(model, tokenizer, where, text) for text in texts}
    limits = {text: places - _WHISPER_LEAD - (0 if ids is None else len(ids)) for text, ids in prompts.items()}
    if (most := min(limits.values())) < (ask.max_new_tokens or 1):
        raise _too_long(where, ask, places, "the beginning and 'prompt' leave", most)
    frames = 2 * int(model.config.max_source_positions)  # the second convolution halves them

    def write(given: Tensor, text: str) -> list[Transcript]:
        if given.shape[-1] != frames:
            raise TaskError(
                f"{where}: the feature extractor makes {given.shape[-1]} frames of a sound; the model hears {frames}."
            )
        limit = ask.max_new_tokens or limits[text]
        own = {**whisper.settings(model), "return_timestamps": False}
        before = None if (ids := prompts[text]) is None else ids.to(model.device)
        out = _generated(model, ask, own, limit, input_features=given, prompt_ids=before, **keywords)
        texts, special = tokenizer.batch_decode(out, skip_special_tokens=True), set(tokenizer.all_special_ids)
        rows = [[token for token in row if token not in special] for row in out.tolist()]
        return [_transcript(*pair, limit, end) for pair in zip(texts, rows, strict=True)]

    return write


def _too_long(where: str, ask: Transcribed, places: int, taken: str, left: int) -> TaskError:
    asked = "" if ask.max_new_tokens is None else f"max_new_tokens is {ask.max_new_tokens}, but "
    return TaskError(f"{where}: {asked}the decoder has {places} places, of which {taken} {left}.")


def _spoken(model: Any, where: str, ask: Transcribed) -> dict[str, Any]:
    """Return language and task as Whisper's `generate` takes them."""
    own = model.generation_config
    given = {key: value for key in ("language", "task") if (value := getattr(ask, key)) is not None}
    if given and not getattr(own, "is_multilingual", True):
        raise TaskError(f"{where}: the model hears one language only; {next(iter(given))!r} has no place in the task.")
    for key, table in (("language", "lang_to_id"), ("task", "task_to_id")):
        if key in given and not getattr(own, table, None):
            raise TaskError(f"{where}: {key!r} needs {table!r} in the model's generation_config.json, which is not there.")
    if ask.language is not None:
        code = whisper.language_code(ask.language)
        known = [token.strip("<|>") for token in own.lang_to_id]
        if code not in known:
            raise TaskError(
                f"{where}: language {ask.language!r} is none of the model's: {', '.join(known)}.{did_you_mean(code, known)}"
            )
        given["language"] = f"<|{code}|>"
    return given


def _prompt(model: Any, tokenizer: Any, where: str, text: str) -> Tensor | None:
    """Return a text as tokens that were spoken before, (n,); None where it is empty."""
    if not text.strip():
        return None
    if not hasattr(tokenizer, "get_prompt_ids"):
        raise TaskError(f"{where}: a prompt needs Whisper's tokenizer, not {type(tokenizer).__name__}.")
    with refuse_failures("the base", f"the tokenizer cannot read the prompt of {where}", TaskError):
        ids: Tensor = tokenizer.get_prompt_ids(text, return_tensors="pt")
    most = int(model.config.max_target_positions) // 2 - 1
    if len(ids) > most:
        raise TaskError(f"{where}: the prompt {text[:40]!r}… has {len(ids)} tokens; Whisper takes {most}. Shorten it.")
    return ids


def beginning(model: Any, tokenizer: Any, where: str, ask: Transcribed, text: str) -> list[int]:
    """Return the tokens that a decoder is given before a transcript, as `written` has them.

    Args:
        model: of transformers, with an encoder of sounds and a decoder; its weights are not used.
        tokenizer: its tokenizer.
        where: whose transcripts they are, for messages.
        ask: how.
        text: what was spoken before; empty for nothing.

    Raises:
        TaskError: the model does not take the options, or hears the language before it writes.
    """
    if not whisper.is_whisper(model):
        return [decoder_start(model)]
    found = whisper.beginning(model, **_spoken(model, where, ask))
    if found is None:
        raise TaskError(
            f"{where}: the model would first hear which language is spoken, and transcripts are learned of a known one. Give "
            "'language' in the task."
        )
    prompt = _prompt(model, tokenizer, where, text)
    return [*([] if prompt is None else prompt.tolist()), *found]


def transcript_tokens(model: Any, tokenizer: Any, text: str, first: int) -> list[int]:
    """Return the tokens of a transcript and of its end, as a decoder learns to write them.

    Whisper writes a blank before a text, unless that is a token by itself, which its settings forbid at the beginning.

    Args:
        model: of transformers; its weights are not used.
        tokenizer: its tokenizer.
        text: the transcript.
        first: the last token of the `beginning`.
    """
    forbidden = getattr(model.generation_config, "begin_suppress_tokens", None)
    end = tokenizer.eos_token_id
    if forbidden is not None:
        spaced = tokenizer(f" {text}", add_special_tokens=False)["input_ids"]
        plain = tokenizer(text, add_special_tokens=False)["input_ids"]
        return [*(plain if spaced[0] in forbidden else spaced), end]
    ids: list[int] = tokenizer(text)["input_ids"]
    ids = ids[1:] if ids[:1] == [first] else ids
    return ids if ids[-1:] == [end] else [*ids, end]


def _ctc(model: Any, tokenizer: Any, extractor: Any) -> _Writer:
    """Return what writes down a batch by the likeliest label of every moment; the tokenizer joins what is repeated."""

    def write(given: Tensor, _: str) -> list[Transcript]:
        logits = model(**{extractor.model_input_names[0]: given}).logits
        check_numbers(model, logits.amax((1, 2)).tolist())
        rows = logits.argmax(-1).tolist()  # what joins labels needs the blank between them
        return [Transcript(tokenizer.decode(row), tuple(row)) for row in rows]

    return write


def _decoder(model: Any, tokenizer: Any, where: str, ask: Transcribed) -> _Writer:
    """Return what writes down a batch by a decoder; of its own settings the first and the end tokens count."""
    config = getattr(model.config, "decoder", model.config)
    places = getattr(config, "max_target_positions", None) or getattr(config, "max_position_embeddings", None)
    limit = ask.max_new_tokens or (places and int(places) - 1)
    if limit is None:
        raise TaskError(f"{where}: {type(model).__name__} does not say how much its decoder writes; give 'max_new_tokens'.")
    if places and limit >= int(places):
        raise _too_long(where, ask, int(places), "the beginning leaves", int(places) - 1)
    ends = end_tokens(model, tokenizer)
    own = {
        "decoder_start_token_id": decoder_start(model),
        "eos_token_id": sorted(ends) or None,
        "pad_token_id": 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    }

    def write(given: Tensor, _: str) -> list[Transcript]:
        out = _generated(model, ask, own, int(limit), **{model.main_input_name: given})
        rows = [_until(row, ends) for row in out[:, 1:].tolist()]
        texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
        return [_transcript(*pair, int(limit), min(ends, default=None)) for pair in zip(texts, rows, strict=True)]

    return write


def _transcript(text: str, tokens: Sequence[int], limit: int, end: int | None) -> Transcript:
    """Return a transcript of a decoder that may write so many tokens, and ends with a token if it has one."""
    is_cut = len(tokens) >= limit
    return Transcript(text, (*tokens, *([] if is_cut or end is None else [end])), is_cut)


def _until(row: Sequence[int], ends: frozenset[int]) -> list[int]:
    """Return tokens up to the first that ends them."""
    return list(row[: next((at for at, token in enumerate(row) if token in ends), len(row))])


def _generated(model: Any, ask: Transcribed, own: dict[str, Any], limit: int, **given: Any) -> Tensor:
    """Return what a model generates, without sampling."""
    transformers = import_module("transformers")
    config = transformers.GenerationConfig(**own, max_new_tokens=limit, num_beams=ask.beams, do_sample=False)

    def numbers(_: Tensor, scores: Tensor) -> Tensor:
        check_numbers(model, scores.amax(-1).tolist())
        return scores

    # Whisper's own `generate` fills in a length before it calls the common one, which then warns of two.
    with configured(model, config), announced_rereading(model), quiet.silence():
        found: Tensor = model.generate(
            generation_config=config, logits_processor=transformers.LogitsProcessorList([numbers]), **given
        )
    return found
