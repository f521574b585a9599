"""Whisper's generation configuration, and the tokens that it begins with."""

from __future__ import annotations

from importlib import import_module
from typing import Any

#: What says, in Whisper's generation configuration, what languages and tasks are and what is never written.
_SETTINGS = (
    "alignment_heads", "begin_suppress_tokens", "bos_token_id", "decoder_start_token_id", "eos_token_id", "forced_decoder_ids",
    "is_multilingual", "lang_to_id", "language", "no_timestamps_token_id", "pad_token_id", "prev_sot_token_id",
    "suppress_tokens", "task", "task_to_id",
)  # fmt: skip


def is_whisper(model: Any) -> bool:
    """Whether a model writes down sounds by Whisper's own code."""
    return hasattr(model, "detect_language")


def settings(model: Any) -> dict[str, Any]:
    """Return the parts of Whisper's own generation configuration that its transcripts depend on, sampling and beams aside."""
    own = model.generation_config
    return {name: value for name in _SETTINGS if (value := getattr(own, name, None)) is not None}


def beginning(model: Any, language: str | None = None, task: str | None = None) -> list[int] | None:
    """Return the tokens that Whisper's `generate` puts before a transcript without times, the first included.

    Args:
        model: a Whisper; its weights are not used.
        language: as its generation configuration calls it (`<|fr|>`); None for the configuration's own.
        task: `transcribe` or `translate`; likewise.

    Returns:
        The tokens; None where it would first hear what language is spoken.
    """
    own = model.generation_config
    language, task = language or getattr(own, "language", None), task or getattr(own, "task", None)
    found: list[int | None] = [own.decoder_start_token_id]
    if language is None and task is None:  # an older form, which the newer one replaces
        forced = getattr(own, "forced_decoder_ids", None) or getattr(model.config, "forced_decoder_ids", None) or []
        for place, token in forced:
            found += [token] * (place == len(found))
    languages, tasks = getattr(own, "lang_to_id", None), getattr(own, "task_to_id", None) or {}
    if language is not None and languages:
        found[1:2] = [languages[language if language in languages else f"<|{language_code(language)}|>"]]
    elif languages and found[1:2] in ([], [None]):
        return None
    if task is not None or (language is not None and tasks):
        found.append(tasks[task or "transcribe"])
    end = getattr(own, "no_timestamps_token_id", None)
    if end is not None and found[-1] != end:
        found.append(end)
    return [token for token in found if token is not None]


def language_code(language: str) -> str:
    """Return Whisper's code of a language that is given by its name or its code."""
    known = import_module("transformers.models.whisper.tokenization_whisper").TO_LANGUAGE_CODE
    return str(known.get(language.lower(), language.lower()))
