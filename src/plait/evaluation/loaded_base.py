"""The base model with adapters, loaded when something is really asked of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from plait.adapters.adapter import Adapter
from plait.errors import TaskError
from plait.hub.pretrained import LoadOptions
from plait.libraries.transformers import quiet_loading
from plait.mixture import Mixture
from plait.notices import announce
from plait.results.progress import Progress

_FLOAT32 = 4  # bytes
_LARGE = 20_000_000  # parameters, from which on it matters how fast they are multiplied
_SLOW = 1.5


class LoadedBase:
    """A mixture that costs nothing until it is used.

    Args:
        base: folder of the base model.
        adapters: that can be made active.
        options: how it is loaded; a `base` of theirs has been found by now, and is not read.
        progress: receives stages and steps.
    """

    def __init__(self, base: Path, adapters: Sequence[Adapter], options: LoadOptions, progress: Progress) -> None:
        self.base, self._adapters, self._options, self._progress = base, adapters, options, progress

    @cached_property
    def mixture(self) -> Mixture:
        """The base with the adapters."""
        return self._load(self.base, self._adapters)

    @property
    def tokenizer(self) -> Any:
        """The base's tokenizer.

        Raises:
            TaskError: it has none.
        """
        if self.mixture.tokenizer is None:
            raise TaskError(f"{self.base}: there is no tokenizer; only tasks of text are covered, not sound or images.")
        return self.mixture.tokenizer

    @contextmanager
    def model(self, folder: Path) -> Iterator[Any]:
        """Offer another full model, loaded as the base is."""
        with self._load(folder, ()).active(None) as model:
            yield model

    def _load(self, folder: Path, adapters: Sequence[Adapter]) -> Mixture:
        self._progress.start("load", 1, "model")
        with quiet_loading():
            loaded = Mixture.load(
                folder,
                adapters,
                dtype=self._options.dtype,
                device_map=placement(self._options.device_map),
                trust_remote_code=self._options.trust_remote_code,
            )
        self._progress.advance()
        self._progress.finish()
        if self._options.dtype == "auto":
            _announce_a_slow_dtype(loaded.model)
        return loaded


def _announce_a_slow_dtype(model: Any) -> None:
    """Announce it where the checkpoint's own dtype is slow on this processor; small models are fast anyway."""
    from plait.linalg.speed import slowness

    if model.device.type != "cpu" or model.dtype.itemsize >= _FLOAT32 or model.num_parameters() < _LARGE:
        return
    ratio = slowness(model.dtype)
    if ratio > _SLOW:
        name = str(model.dtype).removeprefix("torch.")
        announce(
            f"the base is computed in its own dtype, {name}, which this processor multiplies {ratio:.1f} times slower than "
            "float32: --load-dtype float32 (dtype='float32') is faster, with twice the memory."
        )


def placement(wanted: str) -> Any:
    """Return what transformers is given: `auto` is the first accelerator, or, as `cpu` is, None: the processor."""
    import torch

    if wanted != "auto":
        return None if wanted == "cpu" else wanted
    if torch.cuda.is_available():
        return {"": "cuda"}
    return {"": "mps"} if torch.backends.mps.is_available() else None
