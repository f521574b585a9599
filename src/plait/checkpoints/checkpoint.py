"""A base model on disk: headers of all its shards, its configuration; tensors are read by blocks of rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from plait.adapters.layouts.conv1d import has_conv1d
from plait.checkpoints.architecture import Architecture, ArchitectureUnknown
from plait.checkpoints.dequantize import QUANTIZED_FORMATS, PlainFile, dequantized
from plait.checkpoints.files import INDEX, MODEL_CONFIG, SINGLE, WeightFiles, find_weights, index_name, read_config
from plait.checkpoints.quantization import quantization, quantization_advice
from plait.errors import AdapterError, PlanError, collect, listed
from plait.hub.download import COMPANION_FILES, MODEL_FILES, Located, resolve_model
from plait.notices import announce
from plait.tensorfiles.formats import TENSOR_FORMATS, open_tensors
from plait.tensorfiles.header import TensorInfo
from plait.tensorfiles.reader import SafetensorsFile, TensorFile

CHECKPOINT_FILES = (*MODEL_FILES, *COMPANION_FILES, "*.py", "NOTICE*")


@dataclass(frozen=True)
class Shard:
    """One file of tensors.

    Attributes:
        name: of the safetensors file: its own, or for a `.bin` the one that is written in its place.
        file: its header, checked.
        lead: the bytes before the first tensor: the header's length and the header; empty for a `.bin`.
        metadata: of the header.
        left: tensors of the file that are not the model's own: further names of others.
    """

    name: str
    file: TensorFile
    lead: bytes = field(repr=False)
    metadata: Mapping[str, str] = field(repr=False)
    left: frozenset[str] = frozenset()

    @staticmethod
    def open(path: Path) -> Shard:
        """Read a shard's header.

        Raises:
            AdapterError: the file is truncated or damaged.
        """
        file = open_tensors(path)
        if not isinstance(file, SafetensorsFile):
            stem = path.name.removesuffix(file.suffix).replace(Path(file.model_name).stem, Path(SINGLE).stem, 1)
            return Shard(stem + SafetensorsFile.suffix, file, b"", {})
        with path.open("rb") as stream:
            length = stream.read(8)
            lead = length + stream.read(int.from_bytes(length, "little"))
        return Shard(path.name, file, lead, file.metadata)

    @property
    def is_safetensors(self) -> bool:
        """Whether it is of the format that is written; one of another has no header to keep."""
        return isinstance(self.file, SafetensorsFile)

    @property
    def is_plain(self) -> bool:
        """Whether the file is described as stored; a quantized one may be described as what it encodes."""
        return not isinstance(self.file, PlainFile)

    @property
    def in_order(self) -> list[tuple[str, TensorInfo]]:
        """The tensors in the order of the file."""
        own = ((name, info) for name, info in self.file.tensors.items() if name not in self.left)
        return sorted(own, key=lambda item: (item[1].start, item[1].nbytes, item[0]))


@dataclass(frozen=True)
class BaseCheckpoint:
    """A base model.

    Attributes:
        located: its folder and where that came from.
        config: `config.json`.
        shards: sorted by name.
        index: metadata of the index; None for a single file.
        home: tensor name → its shard.
    """

    located: Located
    config: Mapping[str, Any] = field(repr=False)
    shards: tuple[Shard, ...]
    index: Mapping[str, Any] | None = field(repr=False)
    home: Mapping[str, Shard] = field(repr=False)

    @staticmethod
    def open(reference: str, *, base: Path | None = None, dequantize: bool = False) -> BaseCheckpoint:
        """Find a base model and read its headers.

        Args:
            reference: a folder, or `org/repo[@revision][/subfolder]`.
            base: what a relative path is relative to.
            dequantize: take a quantized one for the plain model that it encodes.

        Raises:
            AddressError: it leads nowhere.
            AdapterError: files that are missing, cut off or not safetensors, all at once.
            PlanError: it is quantized, and is not to be dequantized or cannot be.
        """
        located = resolve_model(reference, base=base, files=CHECKPOINT_FILES)
        folder = located.folder
        weights, index = _weight_files(folder)
        names = weights.names
        where = folder / (weights.index_name or "the index")
        shards, problems = [], []
        for name in names:
            try:
                shards.append(Shard.open(folder / name))
            except AdapterError as error:
                problems.append(str(error))
            except OSError as error:
                problems.append(f"{folder / name}: {error.strerror or error}. Fetch the base model again.")
        problems += [
            f"{path}: a link that leads nowhere. Fetch the base model again, or delete the link."
            for path in sorted(folder.iterdir())
            if path.is_symlink() and not path.exists() and path.name not in names
        ]
        home = _home(shards)
        if not problems:
            problems += [
                f"{where}: {tensor!r} should be in {name}, but is not. Fetch the base model again."
                for tensor, name in weights.home.items()
                if tensor not in home or home[tensor].file.path.name != name
            ][:5]
        if not home and not problems:
            problems.append(f"{folder}: {listed(names)} of the base model holds no tensors. Fetch it again.")
        collect(AdapterError, problems, f"{folder}: the base model is not complete")
        checkpoint = BaseCheckpoint(located, read_config(folder), tuple(shards), index, home)._without_copies()
        found = quantization(checkpoint.config, {n: s.file.tensors[n] for n, s in home.items()})
        if found is None:
            return checkpoint
        if dequantize and found.method in QUANTIZED_FORMATS and all(s.is_safetensors for s in shards):
            return checkpoint._plain()
        raise PlanError(
            f"{folder}: the base model is quantized ({found.description}). "
            f"{quantization_advice(found.method, requested=dequantize)}"
        )

    @property
    def folder(self) -> Path:
        """Its folder."""
        return self.located.folder

    @cached_property
    def has_conv1d(self) -> bool | None:
        """Whether its layers that can be Conv1D by their names are; None where neither tensors nor configuration decide."""
        return has_conv1d(self.config, {n: s.file.tensors[n].shape for n, s in self.home.items()})

    def info(self, tensor: str) -> TensorInfo:
        """Return a tensor's entry in the header."""
        return self.home[tensor].file.tensors[tensor]

    @property
    def notes(self) -> list[str]:
        """What a user should know of it."""
        notes = []
        if self.config.keys().isdisjoint(("model_type", "_class_name")):
            there = (self.folder / MODEL_CONFIG).is_file()
            found = f"{MODEL_CONFIG} names no model_type" if there else f"there is no {MODEL_CONFIG}"
            notes.append(
                f"in the base model's folder, {found}, so that transformers cannot load the result, and what it would show "
                "(tied weights, fused or renamed layers, labels) is not checked. Put the base model's own file there."
            )
        if other := [s.file.path.name for s in self.shards if not s.is_safetensors]:
            notes.append(f"the base model is stored as {', '.join(other[:3])}; safetensors are written.")
        elif made := sum(len(s.file.computed) for s in self.shards if isinstance(s.file, PlainFile)):
            notes.append(f"{made} tensors of the base model are quantized, and are dequantized as they are read.")
        return notes

    def is_computed(self, tensor: str) -> bool:
        """Return whether a tensor's values are computed when read (dequantized, put in order): its bytes cannot be copied."""
        return not self.home[tensor].file.is_in_order(tensor)

    def values(self, tensor: str, first: int, count: int) -> Tensor:
        """Return `count` values of a tensor from the value `first` on, flat; dequantized ones in float32, not rounded yet.

        Raises:
            AdapterError: the file ends early or cannot be read.
        """
        return self.home[tensor].file.values(tensor, first, count)

    def _without_copies(self) -> BaseCheckpoint:
        """Return the checkpoint without further names of a stored tensor that the model's code ties to it anyway.

        A `.bin` names a tied tensor as often as the model has it; safetensors hold it once, under the name that it has first.
        """
        again = {name: first for shard in self.shards if not shard.is_safetensors for name, first in _repeated(shard.file)}
        if not again or not any(s.get("tie_word_embeddings", True) for s in sections(self.config)):
            return self
        try:
            tied = Architecture.of(self.folder, {n: s.file.tensors[n].shape for n, s in self.home.items()}).tied
        except ArchitectureUnknown as error:
            announce(f"{self.folder}: tensors that it holds under several names are written under all of them: {error}.")
            return self
        one = {name: tied.get(name, name) for name in (*again, *again.values())}
        left = {name for name, first in again.items() if one[name] == one[first]}
        home = {name: shard for name, shard in self.home.items() if name not in left}
        return replace(self, home=home, shards=tuple(replace(s, left=frozenset(left)) for s in self.shards))

    def _plain(self) -> BaseCheckpoint:
        """Return the plain model that a quantized one encodes.

        Raises:
            PlanError: tensors that have no plain form here.
        """
        found = dequantized([s.file for s in self.shards if isinstance(s.file, SafetensorsFile)], self.config)
        if found.problems:
            raise PlanError(
                f"{self.folder}: {len(found.problems)} tensors cannot be dequantized here: {', '.join(found.problems[:4])}. "
                "Give the 16- or 32-bit model that it was made from (--base-id)."
            )
        shards = tuple(replace(s, file=f) for s, f in zip(self.shards, found.files, strict=True))
        return replace(self, shards=shards, home=_home(shards))


def _repeated(file: TensorFile) -> Iterator[tuple[str, str]]:
    """Yield the further names of tensors that have several, each with the first."""
    first: dict[object, str] = {}
    for name, info in file.tensors.items():
        if info.nbytes and file.is_in_order(name) and first.setdefault(info, name) != name:
            yield name, first[info]


def _home(shards: Iterable[Shard]) -> dict[str, Shard]:
    return {tensor: shard for shard in shards for tensor in shard.file.tensors}


def sections(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield a configuration and the text model's part of it, where it has one."""
    yield config
    text = config.get("text_config")
    if isinstance(text, dict):
        yield text


def _weight_files(folder: Path) -> tuple[WeightFiles, Mapping[str, Any] | None]:
    """Return the files with tensors, and the metadata of the index where there is one."""
    weights = find_weights(folder)
    if weights is not None:
        return weights, None if weights.listing is None else weights.listing.get("metadata") or {}
    found = sorted(p.name for p in folder.iterdir())
    hint = " It holds an adapter; give the base model." if "adapter_config.json" in found else ""
    other = [name for name in found if name.endswith((".bin", ".pt", ".pth", ".gguf"))]
    if other:
        # transformers dequantizes GGUF on loading, but saves what it made of it only on request
        gguf = f", gguf_file={other[0]!r}, quantization_config=GgufConfig(dequantize=True)" * other[0].endswith(".gguf")
        hint = f" It holds {other[0]}; convert it first: transformers' from_pretrained(…{gguf}), then save_pretrained."
    others = [name for kind in TENSOR_FORMATS[1:] for name in (kind.model_name, index_name(kind.model_name))]
    raise AdapterError(f"{folder}: neither {SINGLE} nor {INDEX} is here, nor {' or '.join(others)}.{hint}")
