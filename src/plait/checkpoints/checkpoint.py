"""A base model on disk: headers of all its shards, its configuration; tensors are read by blocks of rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from plait.adapters.layouts.conv1d import has_conv1d
from plait.checkpoints.architecture import Architecture, ArchitectureUnknown
from plait.checkpoints.dequantize import QUANTIZED_FORMATS, PlainFile, dequantized
from plait.checkpoints.files import MODEL_CONFIG, SINGLE, read_config, sections
from plait.checkpoints.forms import BaseForm, WeightSet, base_form
from plait.checkpoints.quantization import Quantization, quantization, quantization_advice
from plait.deferred import Tensor
from plait.errors import AdapterError, PlanError, collect, listed
from plait.hub.download import COMPANION_FILES, MODEL_FILES, Located, resolve_model
from plait.hub.pretrained import damaged_files
from plait.linalg.scratch import Scratch
from plait.notices import announce
from plait.parsing import open_bytes
from plait.tensorfiles.formats import open_tensors
from plait.tensorfiles.header import TensorInfo
from plait.tensorfiles.reader import SafetensorsFile, TensorFile

CHECKPOINT_FILES = (*MODEL_FILES, *COMPANION_FILES, "*.py", "NOTICE*")


@dataclass(frozen=True)
class Shard:
    """One file of tensors.

    Attributes:
        name: of the safetensors file, from the model's folder: its own, or for a `.bin` the one that is written in its place.
        source: of the file that is read, from the base's folder.
        file: its header, checked; its tensors under their names in the checkpoint.
        lead: the bytes before the first tensor: the header's length and the header; empty for a `.bin`.
        metadata: of the header.
        left: tensors of the file that are not the model's own: further names of others.
        prefix: what the names of its tensors begin with in the checkpoint, and not in the file.
    """

    name: str
    source: str
    file: TensorFile
    lead: bytes = field(repr=False)
    metadata: Mapping[str, str] = field(repr=False)
    left: frozenset[str] = frozenset()
    prefix: str = ""

    @staticmethod
    def open(name: str, files: WeightSet) -> Shard:
        """Read the header of one of several files.

        Raises:
            AdapterError: the file is truncated or damaged.
        """
        path = files.folder / name
        file = open_tensors(path)
        if not isinstance(file, SafetensorsFile):
            stem = path.name.removesuffix(file.suffix).replace(Path(file.model_name).stem, Path(SINGLE).stem, 1)
            return Shard(stem + SafetensorsFile.suffix, path.name, file, b"", {})
        with open_bytes(path) as stream:
            length = stream.read(8)
            lead = length + stream.read(int.from_bytes(length, "little"))
        if files.prefix:
            file.tensors = {files.prefix + tensor: info for tensor, info in file.tensors.items()}
        place = files.place + name
        return Shard(place, place, file, lead, file.metadata, prefix=files.prefix)

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
        located: its folder, or file, and where that came from.
        form: in which it lies there.
        config: `config.json`; of a pipeline `model_index.json`.
        shards: sorted by name, those of one component after those of another.
        index: metadata of a model's index; None where there is none.
        home: tensor name → its shard.
    """

    located: Located
    form: BaseForm
    config: Mapping[str, Any] = field(repr=False)
    shards: tuple[Shard, ...]
    index: Mapping[str, Any] | None = field(repr=False)
    home: Mapping[str, Shard] = field(repr=False)

    @staticmethod
    def open(reference: str, *, base: Path | None = None, dequantize: bool = False) -> BaseCheckpoint:
        """Find a base model and read its headers.

        Args:
            reference: a folder, or `org/repo[@revision][/subfolder]`, of a model of transformers or a pipeline of diffusers;
                or a `.safetensors` file of SD, SDXL or Flux.
            base: what a relative path is relative to.
            dequantize: take a quantized one for the plain model that it encodes.

        Raises:
            AddressError: it leads nowhere.
            AdapterError: files that are missing, cut off or not safetensors, all at once.
            PlanError: it is quantized, and is not to be dequantized or cannot be.
        """
        located = resolve_model(reference, base=base, files=CHECKPOINT_FILES, any_form=True)
        folder, form = located.folder, base_form(located)
        shards, problems = _opened(form)
        problems += (
            []
            if located.file is not None
            else [
                f"{path}: a link that leads nowhere. Fetch the base model again, or delete the link."
                for path in sorted(folder.iterdir())
                if path.is_symlink() and not path.exists() and path.name not in form.sets[0].files.names
            ]
        )
        if form.has_code:  # whether a command carries them or not: one rule for all
            damaged = damaged_files(folder, tokenizer=False)
            problems += [f"{folder / problem}. Fetch it again, or delete it." for problem in damaged]
        home = _home(shards)
        if not problems:
            problems += list(_not_there(form, home))[:5]
        if not home and not problems:
            problems.append(f"{folder}: {listed(form.sets[0].files.names)} of the base model holds no tensors. Fetch it again.")
        collect(AdapterError, problems, f"{folder}: the base model is not complete")
        listing = form.sets[0].files.listing if form.has_code else None
        index = None if listing is None else listing.get("metadata") or {}
        config = read_config(folder) if form.has_code else form.config
        checkpoint = BaseCheckpoint(located, form, config, tuple(shards), index, home)
        if not form.has_code:
            return checkpoint
        checkpoint = checkpoint._without_copies()
        found = checkpoint.quantization()
        if found is None:
            return checkpoint
        if dequantize and found.method in QUANTIZED_FORMATS and all(s.is_safetensors for s in shards):
            return checkpoint._plain()
        raise PlanError(_refusal(folder, found, dequantize=dequantize))

    @property
    def folder(self) -> Path:
        """Its folder."""
        return self.located.folder

    def quantization(self, component: str = "") -> Quantization | None:
        """Return how it, or a component of a pipeline, is quantized; None when it is plain."""
        config = read_config(self.folder / component) if component else self.config
        prefix = f"{component}." if component else ""
        return quantization(config, {n: self.info(n) for n in self.home if n.startswith(prefix)})

    def modules(self) -> list[str]:
        """Return the paths of modules with a weight, as adapters of pipelines name them; none of one model of transformers."""
        return [module for name in self.home if (module := self.form.module_of(name)) is not None]

    def unchangeable(self, targets: Iterable[str]) -> list[str]:
        """Return why the components that some targets are in cannot be changed; complete messages."""
        if self.form.has_code:
            return []  # found when it was opened
        named = {component for s in self.form.sets if (component := s.component)}
        touched = {t.partition(".")[0].replace("diffusion_model", "transformer") for t in targets} & named if named else {""}
        found = ((self.folder / c if c else self.located.path, self.quantization(c)) for c in sorted(touched))
        return [_refusal(place, how, dequantize=False) for place, how in found if how is not None]

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
        if self.form.has_code and self.config.keys().isdisjoint(("model_type", "_class_name")):
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

    def fill(self, out: Tensor, tensor: str, first: int, scratch: Scratch) -> None:
        """Put the values of a tensor from the value `first` on into `out`, flat, in its dtype; see `TensorFile.fill`."""
        self.home[tensor].file.fill(out, tensor, first, scratch)

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


def _opened(form: BaseForm) -> tuple[list[Shard], list[str]]:
    """Read the headers of all files; return the shards, and what is wrong."""
    shards, problems = [], []
    for files in form.sets:
        for name in files.files.names:
            try:
                shards.append(Shard.open(name, files))
            except AdapterError as error:
                problems.append(str(error))
            except OSError as error:
                problems.append(f"{files.folder / name}: {error.strerror or error}. Fetch the base model again.")
    return shards, problems


def _not_there(form: BaseForm, home: Mapping[str, Shard]) -> Iterator[str]:
    """Yield what indexes promise and files do not hold."""
    for files in form.sets:
        where = files.folder / (files.files.index_name or "the index")
        for tensor, name in files.files.home.items():
            shard = home.get(files.prefix + tensor)
            if shard is None or shard.file.path.name != name:
                yield f"{where}: {tensor!r} should be in {name}, but is not. Fetch the base model again."


def _refusal(place: Path, found: Quantization, *, dequantize: bool) -> str:
    advice = quantization_advice(found.method, requested=dequantize)
    return f"{place}: the base model is quantized ({found.description}). {advice}"


def _home(shards: Iterable[Shard]) -> dict[str, Shard]:
    return {tensor: shard for shard in shards for tensor in shard.file.tensors}
