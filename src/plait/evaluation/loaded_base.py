"""The base model with adapters, loaded when something is really asked of it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from plait.adapters.adapter import Adapter, with_folder
from plait.checkpoints.files import find_weights, read_config
from plait.checkpoints.quantization import quantization
from plait.errors import PlaitError, TaskError
from plait.hub.pretrained import LoadOptions, Processors
from plait.libraries.transformers.quiet import silence
from plait.mixture import Mixture
from plait.notices import announce
from plait.results.progress import Progress
from plait.tasks.asking import ClassPrompts, Transcribed
from plait.tasks.examples import Examples
from plait.tasks.perceiving import ChatProcessor
from plait.tasks.schema import Task, files_of_chats
from plait.tensorfiles.formats import open_tensors

_NARROW = {"BF16": torch.bfloat16, "F16": torch.float16}
_FLOAT32 = 4  # bytes
_ROOM = 1.5  # of its weights' size, which a model needs while it is loaded and read with
_LARGE = 20_000_000  # parameters, from which on it matters how fast they are multiplied
_SLOW = 1.5


class Readers(NamedTuple):
    """What makes a model's inputs: its tokenizer, and its processor of images or sounds; None where a task needs none."""

    tokenizer: Any
    processor: Any = None


class LoadedBase:
    """A mixture that costs nothing until it is used.

    Args:
        base: folder of the base model.
        adapters: that can be made active.
        options: how it is loaded, `with_used_dtype`; a `base` of theirs has been found by now, and is not read.
        progress: receives stages and steps.
    """

    def __init__(self, base: Path, adapters: Sequence[Adapter], options: LoadOptions, progress: Progress) -> None:
        self.base, self.options, self._adapters, self._progress = base, options, adapters, progress
        self._processors = Processors(base, trust_remote_code=options.trust_remote_code)

    @cached_property
    def mixture(self) -> Mixture:
        """The base with the adapters."""
        loaded = self._load(self.base, self._adapters)
        loaded.processors = self._processors  # a check may have loaded one already
        return loaded

    @property
    def tokenizer(self) -> Any:
        """The base's tokenizer.

        Raises:
            TaskError: it has none.
        """
        if self.mixture.tokenizer is None:
            raise TaskError(f"{self.base}: there is no tokenizer, and texts must be read.")
        return self.mixture.tokenizer

    def readers(self, task: Task) -> Readers:
        """Return what makes the model's inputs of a task's examples.

        Raises:
            TaskError: the base has no tokenizer, or no processor of images or sounds, that the task needs.
        """
        if (files := files_of_chats(task)) is not None:
            return Readers(None, self._processors.find(files.kind, chats=True))
        column = getattr(task, "file_column", None)
        if column is None:
            return Readers(self.tokenizer)
        tokenizer = self.tokenizer if isinstance(task.ask, (ClassPrompts, Transcribed)) else None
        return Readers(tokenizer, self.mixture.processor(column.kind))

    def check(self, examples: Examples) -> None:
        """Make sure, before the model is loaded, that it can read chats with images or sounds.

        Raises:
            TaskError: it cannot.
        """
        task = examples.task
        if (files := files_of_chats(task)) is not None:
            processor = self._processors.find(files.kind, chats=True)
            ChatProcessor(processor, files.kind, task.where).check(examples)

    def with_folder(self, name: str) -> str:
        """Return a name, and where the adapter of that name is."""
        return with_folder(name, self._adapters)

    @contextmanager
    def model(self, folder: Path) -> Iterator[Any]:
        """Offer another full model, loaded as the base is."""
        with self._load(folder, ()).active(None) as model:
            yield model

    def _load(self, folder: Path, adapters: Sequence[Adapter]) -> Mixture:
        self._progress.start("load", 1, "model")
        with silence():
            loaded = Mixture.load(
                folder,
                adapters,
                dtype=self.options.dtype,
                device_map=placement(self.options.device_map),
                trust_remote_code=self.options.trust_remote_code,
            )
        self._progress.advance()
        self._progress.finish()
        return loaded


def with_used_dtype(options: LoadOptions, folder: Path) -> LoadOptions:
    """Return options with the dtype that a base is computed in: what answers and moments depend on.

    `auto` is float32 where this processor multiplies the checkpoint's own dtype much slower, and the memory for it is free;
    that is announced. Small models are fast anyway. Elsewhere `auto` and `stored` are the checkpoint's own, as transformers'
    `auto` is.

    Args:
        options: as they were given.
        folder: of the base; whatever is wrong with it is left to the one that loads it.
    """
    if options.dtype != "auto":
        return with_stored_dtype(options)
    stored = _stored(folder) if placement(options.device_map) is None else None
    if stored is None or stored.dtype not in _NARROW or stored.parameters < _LARGE:
        return options
    import psutil

    from plait.linalg.speed import slowness

    ratio = slowness(_NARROW[stored.dtype])
    if ratio <= _SLOW:
        return options
    name = str(_NARROW[stored.dtype]).removeprefix("torch.")
    needed, free = _ROOM * _FLOAT32 * stored.parameters, psutil.virtual_memory().available
    if needed > free:
        announce(
            f"the base is computed in its own dtype, {name}, which this processor multiplies {ratio:.1f} times slower than "
            f"float32: that needs {needed / 1e9:.1f} GB of free memory, and there are {free / 1e9:.1f} GB."
        )
        return options
    announce(
        f"the base is computed in float32, since this processor multiplies its own dtype, {name}, {ratio:.1f} times slower; "
        f"--load-dtype stored (load_dtype='stored') keeps {name}, with half the memory."
    )
    return replace(options, dtype="float32")


def with_stored_dtype(options: LoadOptions) -> LoadOptions:
    """Return options with transformers' word for the checkpoint's own dtype."""
    return replace(options, dtype="auto") if options.dtype == "stored" else options


class _StoredBase(NamedTuple):
    """Of a checkpoint: the dtype of most of its parameters, by safetensors' name, and how many it has."""

    dtype: str
    parameters: int


def _stored(folder: Path) -> _StoredBase | None:
    """Return the dtype and size of a plain checkpoint; None where it is quantized or cannot be read."""
    counts: Counter[str] = Counter()
    try:
        weights, config = find_weights(folder), read_config(folder)
        for name in weights.names if weights is not None else ():
            tensors = open_tensors(folder / name).tensors
            if quantization(config, tensors) is not None:
                return None
            for info in tensors.values():
                counts[info.dtype] += math.prod(info.shape)
    except (PlaitError, OSError):  # refused when it is loaded
        return None
    return _StoredBase(counts.most_common(1)[0][0], counts.total()) if counts else None


def placement(wanted: str) -> Any:
    """Return what transformers is given: `auto` is the first accelerator, or, as `cpu` is, None: the processor."""
    if wanted != "auto":
        return None if wanted == "cpu" else wanted
    if torch.cuda.is_available():
        return {"": "cuda"}
    return {"": "mps"} if torch.backends.mps.is_available() else None
