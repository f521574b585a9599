"""The tokenizer, or the processor of chats, of a model, without the model."""

from __future__ import annotations

from typing import Any

from plait.extras import optional
from plait.hub import pretrained
from plait.hub.download import resolve_model

#: What a tokenizer is made of; the first pattern is in every model folder.
_FILES = ("*.json", "*.model", "*.txt", "*.jinja")


def load_task_tokenizer(model: str, *, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer of a model.

    Args:
        model: a folder, or `org/repo[@revision]`.
        trust_remote_code: run code that comes with its files.

    Raises:
        AddressError: the reference leads nowhere.
        MissingPackageError: transformers is not installed.
        TaskError: there is no tokenizer.
    """
    optional("transformers", "eval", "a tokenizer")
    folder = resolve_model(model, files=_FILES).folder
    return pretrained.with_padding_token(pretrained.load_tokenizer(folder, trust_remote_code=trust_remote_code))


def load_task_processor(model: str, *, trust_remote_code: bool = False) -> Any:
    """Return the processor of a model's chats with images or sounds; arguments and errors as `load_task_tokenizer`."""
    optional("transformers", "eval", "a processor")
    folder = resolve_model(model, files=_FILES).folder
    return pretrained.load_chat_processor(folder, trust_remote_code=trust_remote_code)
