"""Keeps transformers from drawing bars, logging and warning."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Keep transformers and PEFT from drawing bars and warning while they load a model inside the block.

    They would hide plait's own messages.
    """
    logging = import_module("transformers.utils.logging")
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def silence() -> Iterator[None]:
    """As `quiet_loading`, and keep transformers from logging of its own affairs too; errors are shown."""
    logging = import_module("transformers.utils.logging")
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with quiet_loading():
            yield
    finally:
        logging.set_verbosity(level)
