"""The tokenizer of a model, without the model."""

from __future__ import annotations

from typing import Any

from plait.errors import TaskError
from plait.extras import optional
from plait.hub.download import resolve_model

#: What a tokenizer is made of; the first pattern is in every model folder.
_FILES = ("*.json", "*.model", "*.txt", "*.jinja")


def load_tokenizer(model: str) -> Any:
    """Return the tokenizer of a model.

    Args:
        model: a folder, or `org/repo[@revision]`.

    Raises:
        AddressError: the reference leads nowhere.
        MissingPackageError: transformers is not installed.
        TaskError: there is no tokenizer.
    """
    transformers = optional("transformers", "eval", "a tokenizer")
    folder = resolve_model(model, files=_FILES).folder
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise TaskError(f"{folder}: no tokenizer can be loaded: {' '.join(str(error).split())[:200]}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer
