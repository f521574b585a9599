"""`AdapterFormat`: how a program stores its LoRA, read and written in PEFT's terms.

A format translates. What it reads is a configuration and a file of tensors with PEFT's names and orientation, which its own
are views of; what it writes comes as targets with their factors. Everything else of plait knows the translation alone.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from plait.adapters.config import AdapterConfig
from plait.adapters.layouts import Layout
from plait.adapters.lowrank import LowRank
from plait.errors import PlanError, join_words, listed
from plait.linalg.finite import all_finite
from plait.plugins import Registry
from plait.records import Record
from plait.tensorfiles.header import TensorInfo
from plait.tensorfiles.reader import DTYPES, TensorFile


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


class View(NamedTuple):
    """A tensor that is made of others when it is read."""

    shape: tuple[int, ...]
    dtype: str  # safetensors' name
    make: Callable[[], Tensor]


class TranslatedFile(TensorFile):
    """A file of tensors under other names and in other orientation.

    Args:
        path: of the file.
        views: name → how the tensor is made.
    """

    def __init__(self, path: Path, views: Mapping[str, View]) -> None:
        self.path = path
        self._views = dict(views)
        self.tensors = {name: TensorInfo(v.shape, v.dtype, _bytes(v)) for name, v in views.items()}

    def is_in_order(self, name: str) -> bool:
        """Return that its bytes cannot be copied."""
        return False

    def read(self, name: str) -> Tensor:
        """Return one tensor; errors as the file's own."""
        return self._views[name].make().reshape(self._views[name].shape).contiguous()

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return the rows [start, stop) of a tensor along its first dimension."""
        return self.read(name)[start:stop]

    def values(self, name: str, first: int, count: int) -> Tensor:
        """Return `count` values of a tensor from the value `first` on, flat."""
        return self.read(name).flatten()[first : first + count]


def _bytes(view: View) -> int:
    size: int = getattr(torch, DTYPES[view.dtype]).itemsize if view.dtype in DTYPES else 1
    return size * math.prod(view.shape)


def same(file: TensorFile, name: str) -> View:
    """Return a tensor as it is."""
    info = file.tensors[name]
    return View(info.shape, info.dtype, lambda: file.read(name))


def transposed(file: TensorFile, name: str) -> View:
    """Return a matrix as its transpose."""
    info = file.tensors[name]
    return View(info.shape[::-1], info.dtype, lambda: file.read(name).mT)


def carried(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return what of a header is carried on: everything but the mark of the library that wrote it."""
    return {key: text for key, text in metadata.items() if key != "format"}


def most_common(values: Iterable[float]) -> float:
    """Return the value that most have, the first of several."""
    return Counter(values).most_common(1)[0][0]


def common_value(values: Iterable[float]) -> float:
    """Return what most modules have, that they all can be expressed by: not 0, and 1 where they have nothing else."""
    return most_common([v for v in values if v] or [1.0])


def rescaled(delta: LowRank, factor: float, target: str) -> LowRank:
    """Return factor · ΔW of a target, rounded once where the factor is not a power of two.

    Raises:
        PlanError: the dtype does not hold the result.
    """
    if factor == 1:
        return delta
    b = (delta.b.double() * factor).to(delta.b.dtype)
    if not all_finite(b) or (factor and delta.b.any() and not b.any()):
        raise PlanError(
            f"{target}: its scaling is {abs(factor):.1e} times the one that is written for all modules, and multiplied into B "
            f"it is out of the range of {str(b.dtype).removeprefix('torch.')}. Write it as 'peft', with a scaling per module."
        )
    return LowRank(delta.a, b)


def only_plain(outgoing: OutgoingAdapter, program: str, *kinds: type[Layout], dora: bool = False) -> list[str]:
    """Return why an adapter has no place in a format of factors on some kinds of layer, with or without DoRA's magnitudes."""
    problems = []
    targets = outgoing.targets.values()
    more = {"lora_bias": any(t.has_bias for t in targets), "DoRA's magnitudes": not dora and any(t.is_dora for t in targets)}
    others = [*(what for what, has in more.items() if has), *outgoing.others]
    wrong = [path for path, t in outgoing.targets.items() if not isinstance(t.layout, kinds) or t.layout.stack > 1]
    if wrong:
        allowed = join_words([kind.kind for kind in kinds])
        problems.append(
            f"adapters of {program} hold factors on layers of kind {allowed}; {len(wrong)} targets are of another, such as "
            f"{wrong[0]!r} ({outgoing.targets[wrong[0]].layout.kind})."
        )
    if others:
        problems.append(
            f"adapters of {program} hold nothing but factors; this one also has {listed(others)}. Write it as "
            "'peft', or take them out."
        )
    return problems


def of_one_model(outgoing: OutgoingAdapter, program: str) -> list[str]:
    """Return why an adapter of a pipeline has no place in a format for one model."""
    if len(outgoing.towers) < 2:
        return []
    return [
        f"adapters of {program} are of one model; this one is of {join_words(outgoing.towers)} of a pipeline. Choose one "
        "of them (--tower, tower=)."
    ]


def of_a_pipeline(outgoing: OutgoingAdapter, program: str) -> list[str]:
    """Return why an adapter of one model has no place in a format for pipelines."""
    if outgoing.towers:
        return []
    return [f"files of {program} are of a pipeline; this adapter is of one model, and its paths do not begin with a component."]


def only_file(folder: Path, suffix: str) -> Path | None:
    """Return the file of a folder that alone there has a suffix; None where there is none, or several."""
    found = [p for p in folder.glob(f"*{suffix}") if p.is_file()]
    return found[0] if len(found) == 1 else None


def one_number(file: TensorFile, name: str) -> float:
    """Return the number that a tensor holds.

    Raises:
        ValueError: it holds several, or none that is finite.
    """
    info = file.tensors[name]
    if math.prod(info.shape) != 1:
        raise ValueError(f"{name!r} is {list(info.shape)}; an alpha is one number")
    value = float(file.read(name))
    if not math.isfinite(value):
        raise ValueError(f"{name!r} is {value}; an alpha is a finite number")
    return value
