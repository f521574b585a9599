"""`AdapterFormat`: how a program stores its LoRA, read and written in PEFT's terms.

A format translates. What it reads is a configuration and a file of tensors with PEFT's names and orientation, which its own
are views of; what it writes comes as targets with their factors. Everything else of plait knows the translation alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from pydantic import Field

from plait.adapters.config import AdapterConfig
from plait.adapters.layouts import Layout
from plait.adapters.lowrank import LowRank
from plait.deferred import Tensor, torch
from plait.plugins import Registry
from plait.records import Record
from plait.tensorfiles.reader import TensorFile


class Origin(Record):
    """Which program an adapter's files are of, and what they say besides numbers.

    Attributes:
        format: name of the format.
        writer: the program that wrote the file, with its version, as far as the file says.
        metadata: texts of the file's header (training settings, trigger words, license), carried to what is written.
        notes: what is odd about the file, as complete sentences.
    """

    format: str
    writer: str | None = None
    metadata: dict[str, str] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter as its format translates it.

    Attributes:
        config: in PEFT's terms.
        file: its tensors under PEFT's names.
        origin: what it was.
        files: what was read.
        scalings: target module → s in ΔW = s · B A, for formats that give it; None where PEFT's rules for the configuration do.
        towers: components of a pipeline that the paths begin with; none where they are of one model.
    """

    config: AdapterConfig
    file: TensorFile
    origin: Origin
    files: tuple[Path, ...]
    scalings: Mapping[str, float] | None = None
    towers: tuple[str, ...] = ()


class OutgoingTarget(NamedTuple):
    """A target module that is to be written: ΔW = scaling · B A.

    Attributes:
        layout: of its factors.
        rank: of one of its matrices.
        scaling: s.
        dtype: of the factors.
        has_bias: it has a `lora_bias`.
        is_dora: it has DoRA's magnitudes.
    """

    layout: Layout
    rank: int
    scaling: float
    dtype: torch.dtype
    has_bias: bool = False
    is_dora: bool = False


class ModuleFactors(NamedTuple):
    """The factors of a target module.

    Attributes:
        target: its path.
        slices: a delta per matrix, without the scaling.
        bias: (d_out,) of `lora_bias`.
        magnitude: (d_out,) of DoRA.
    """

    target: str
    slices: Sequence[LowRank]
    bias: Tensor | None = None
    magnitude: Tensor | None = None


@dataclass(frozen=True)
class OutgoingAdapter:
    """An adapter that is to be written.

    Attributes:
        targets: path → target.
        settings: keys of `adapter_config.json` that do not follow from the targets: base model, task, selection of modules.
        metadata: texts for the file's header.
        towers: components of a pipeline that the paths begin with (`unet`, `text_encoder`); none where they are of one model.
        base_config: the base model's `config.json`, for formats that need it.
        others: full tensors, by name, and settings that change when it acts; a format without a place for them refuses.
    """

    targets: Mapping[str, OutgoingTarget]
    settings: Mapping[str, object] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    towers: Sequence[str] = ()
    others: Sequence[str] = ()
    base_config: Mapping[str, Any] = field(default_factory=dict, repr=False)


Factors = Iterable[ModuleFactors]  # of every target, once each, in any order


class AdapterFormat(ABC):
    """One program's way to store a LoRA.

    Attributes:
        name: on the command line and in records.
        program: that writes it.
        file_name: of the tensors that are written.
        of_one_model: paths start at a model; else at a pipeline, whose components they name.
        reads_base: writing needs the base model's `config.json`.
    """

    name: ClassVar[str]
    program: ClassVar[str]
    file_name: ClassVar[str]
    of_one_model: ClassVar[bool] = True
    reads_base: ClassVar[bool] = False

    @abstractmethod
    def matches(self, place: Path) -> bool:
        """Return whether a folder, or a single file, is of this format."""

    @abstractmethod
    def read(self, place: Path) -> StoredAdapter:
        """Open an adapter by its headers.

        Raises:
            AdapterError: with everything that is wrong with it.
        """

    def read_for(self, place: Path, modules: Callable[[], Collection[str]]) -> StoredAdapter:
        """Open an adapter whose base model is at hand; see `read`. A format whose names are complete does not ask for modules.

        Args:
            place: a folder, or a single file.
            modules: gives the base model's, as paths that begin with a component; headers are read when it is called.

        Raises:
            AdapterError: as `read`.
        """
        return self.read(place)

    def problems(self, outgoing: OutgoingAdapter) -> list[str]:
        """Return why an adapter cannot be written in this format; complete sentences."""
        return []

    def notes(self, outgoing: OutgoingAdapter) -> list[str]:
        """Return what an adapter loses, or how it changes, in this format; complete sentences."""
        return []

    @abstractmethod
    def write(self, folder: Path, outgoing: OutgoingAdapter, factors: Factors) -> dict[str, str]:
        """Write an adapter that has no problems.

        Args:
            folder: an existing one.
            outgoing: what is written.
            factors: of every target, once each, in any order.

        Returns:
            The sha256 of the tensor file by its name.
        """


def _check(offered: object) -> None:
    if not isinstance(offered, AdapterFormat):
        raise TypeError(f"an entry point of {FORMATS.group} must name an instance of AdapterFormat, got {offered!r}")


#: Name → format; the first that matches a place reads it. Others add theirs by the entry-point group `plait.adapter_formats`.
FORMATS: Registry[AdapterFormat] = Registry("plait.adapter_formats", "format of adapters", _check)


def carried(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return what of a header is carried on: everything but the mark of the library that wrote it."""
    return {key: text for key, text in metadata.items() if key != "format"}


def only_file(folder: Path, suffix: str) -> Path | None:
    """Return the file of a folder that alone there has a suffix; None where there is none, or several."""
    found = [p for p in folder.glob(f"*{suffix}") if p.is_file()]
    return found[0] if len(found) == 1 else None
