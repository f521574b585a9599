"""Kinds of tasks: one file per kind, which registers it. A new kind is one file and one line here."""

from plait.tasks.kinds import (  # noqa: F401
    asr,
    audio_classification,
    classification,
    generation,
    image_classification,
    lm_eval,
    multiple_choice,
    perplexity,
    regression,
    sentence_similarity,
    sequence_classification,
    token_classification,
)
from plait.tasks.schema import KINDS

KINDS.load_plugins()

__all__ = ["KINDS"]
