"""Sounds that a model writes down: Whisper, other encoder-decoder models of speech, and models with CTC."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, TypeAlias

import torch
from torch import Tensor

from plait.errors import TaskError, did_you_mean
from plait.evaluation.generation import announced_rereading, configured, end_tokens
from plait.evaluation.hearing import heard
from plait.evaluation.model_calls import StepListener, check_numbers, decoder_start
from plait.hub.pretrained import refuse_failures
from plait.libraries import transformers as library
from plait.notices import announce
from plait.tasks.asking import Transcribed
from plait.tasks.examples import Examples

_WHISPER_LEAD = 4  # tokens at most before a transcript: the start, language, task and that no times are wanted


def transcripts(
    model: Any,
    tokenizer: Any,
    extractor: Any,
    examples: Examples,
    ask: Transcribed,
    *,
    batch_size: int,
    report: StepListener = lambda done: None,
    contender: str = "the model",
) -> list[str]:
    """Return what a model writes down of every sound, without special tokens.

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
    found = [""] * len(examples.items)
    cut = 0
    for batch, given in heard(model, extractor, examples, batch_size):
        with torch.inference_mode():
            texts, long = write(given, examples.items[batch[0]].text or "")
        for i, text in zip(batch, texts, strict=True):
            found[i] = text.strip()
        cut += long
        report(len(batch))
    if cut:
        announce(
            f"{examples.task.where}: {contender}: {cut} of {len(found)} transcripts reach max_new_tokens or the end of what "
            "the decoder writes, and may lack their end; their errors count as they are.",
            once=f"cut transcripts {examples.task.name} {contender}",
        )
    return found


#: Takes a batch of inputs and the text before; returns the transcripts, and how many have as many tokens as they may have.
_Writer: TypeAlias = Callable[[Tensor, str], tuple[list[str], int]]


def writer_of(model: Any, tokenizer: Any, extractor: Any, examples: Examples, ask: Transcribed) -> _Writer:
    """Return what writes down a batch; arguments as `transcripts` has them, and the model's weights are not used yet.

    Raises:
        TaskError: the model writes down no sounds, or does not take the options.
    """
    where, name = examples.task.where, type(model).__name__
    texts = {e.text for e in examples.items if e.text is not None}
    if library.is_whisper(model):
        return _whisper(model, tokenizer, where, ask, texts)
    if given := [key for key in ("language", "task") if getattr(ask, key) is not None] + ["prompt"] * bool(texts):
        raise TaskError(f"{where}: {given[0]!r} is for Whisper; {name} has no such setting.")
    if name.endswith("ForCTC"):
        if ask.beams > 1 or ask.max_new_tokens is not None:
            raise TaskError(f"{where}: 'beams' and 'max_new_tokens' are for models that generate; {name} labels every moment.")
        return _ctc(model, tokenizer, extractor)
    if model.config.is_encoder_decoder and model.can_generate() and library.writes_sounds_down(model.config.model_type):
        return _decoder(model, tokenizer, where, ask)
    raise TaskError(
        f"{where} (asr) asks for transcripts, but {name} writes none; those that do are Whisper, other models of "
        "AutoModelForSpeechSeq2Seq and those with CTC."
    )


def _whisper(model: Any, tokenizer: Any, where: str, ask: Transcribed, texts: set[str]) -> _Writer:
    """Return what writes down a batch by Whisper's own `generate`, without times."""
    keywords = _spoken(model, where, ask)
    places = int(model.config.max_target_positions)
    prompts = {"": None} | {text: _prompt(model, tokenizer, where, text) for text in texts}
    limits = {text: places - _WHISPER_LEAD - (0 if ids is None else len(ids)) for text, ids in prompts.items()}
    if (most := min(limits.values())) < (ask.max_new_tokens or 1):
        raise _too_long(where, ask, places, "the beginning and 'prompt' leave", most)
    frames = 2 * int(model.config.max_source_positions)  # the second convolution halves them

    def write(given: Tensor, text: str) -> tuple[list[str], int]:
        if given.shape[-1] != frames:
            raise TaskError(
                f"{where}: the feature extractor makes {given.shape[-1]} frames of a sound; the model hears {frames}."
            )
        limit = ask.max_new_tokens or limits[text]
        own = {**library.whisper_settings(model), "return_timestamps": False}
        before = None if (ids := prompts[text]) is None else ids.to(model.device)
        out = _generated(model, ask, own, limit, input_features=given, prompt_ids=before, **keywords)
        special = set(tokenizer.all_special_ids)
        lengths = [sum(token not in special for token in row) for row in out.tolist()]
        return tokenizer.batch_decode(out, skip_special_tokens=True), sum(length >= limit for length in lengths)

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
        code = library.language_code(ask.language)
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
    """Return the tokens that a decoder is given before a transcript, as `transcripts` has them.

    Args:
        model: of transformers, with an encoder of sounds and a decoder; its weights are not used.
        tokenizer: its tokenizer.
        where: whose transcripts they are, for messages.
        ask: how.
        text: what was spoken before; empty for nothing.

    Raises:
        TaskError: the model does not take the options, or hears the language before it writes.
    """
    if not library.is_whisper(model):
        return [decoder_start(model)]
    found = library.whisper_beginning(model, **_spoken(model, where, ask))
    if found is None:
        raise TaskError(
            f"{where}: the model would first hear which language is spoken, and transcripts are learned of a known one. Give "
            "'language' in the task."
        )
    prompt = _prompt(model, tokenizer, where, text)
    return [*([] if prompt is None else prompt.tolist()), *found]


def _ctc(model: Any, tokenizer: Any, extractor: Any) -> _Writer:
    """Return what writes down a batch by the likeliest label of every moment; the tokenizer joins what is repeated."""

    def write(given: Tensor, _: str) -> tuple[list[str], int]:
        logits = model(**{extractor.model_input_names[0]: given}).logits
        check_numbers(model, logits.amax((1, 2)).tolist())
        return [
            tokenizer.decode(row) for row in logits.argmax(-1).tolist()
        ], 0  # what joins labels needs the blank between them

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

    def write(given: Tensor, _: str) -> tuple[list[str], int]:
        out = _generated(model, ask, own, int(limit), **{model.main_input_name: given})
        rows = [_until(row, ends) for row in out[:, 1:].tolist()]
        return tokenizer.batch_decode(rows, skip_special_tokens=True), sum(len(row) >= limit for row in rows)

    return write


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
    with configured(model, config), announced_rereading(model), library.silence():
        found: Tensor = model.generate(
            generation_config=config, logits_processor=transformers.LogitsProcessorList([numbers]), **given
        )
    return found
