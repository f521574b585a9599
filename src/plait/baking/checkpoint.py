"""A base model on disk: headers of all its shards, its configuration; tensors are read by blocks of rows."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plait.adapters.tensorfile import SafetensorsFile, TensorInfo
from plait.errors import AdapterError, PlanError, collect
from plait.hub.download import COMPANION_FILES, MODEL_FILES, Located, resolve_model

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
FILES = (*MODEL_FILES, *COMPANION_FILES, "*.py", "NOTICE*")
FLOATS = ("F64", "F32", "F16", "BF16")

# names under which bitsandbytes, GPTQ, AWQ, compressed-tensors and fp8 checkpoints store what a float weight is not
_QUANTISED = re.compile(
    r"\.(qweight|qzeros|g_idx|weight_packed|weight_scale|weight_scale_inv|absmax|quant_map|SCB|weight_format"
    r"|\w+_blocks|weight\.(absmax|quant_map|quant_state\.\S+))$"
)


@dataclass(frozen=True)
class Shard:
    """One safetensors file.

    Attributes:
        name: of the file.
        file: its header, checked.
        lead: the bytes before the first tensor: the header's length and the header.
        metadata: of the header.
    """

    name: str
    file: SafetensorsFile
    lead: bytes = field(repr=False)
    metadata: Mapping[str, str] = field(repr=False)

    @staticmethod
    def open(path: Path) -> Shard:
        """Read a shard's header.

        Raises:
            AdapterError: the file is truncated or not safetensors.
        """
        file = SafetensorsFile(path)
        with path.open("rb") as stream:
            length = stream.read(8)
            lead = length + stream.read(int.from_bytes(length, "little"))
        return Shard(path.name, file, lead, json.loads(lead[8:]).get("__metadata__") or {})

    @property
    def in_order(self) -> list[tuple[str, TensorInfo]]:
        """The tensors as they lie in the file."""
        return sorted(self.file.tensors.items(), key=lambda item: (item[1].start, item[1].nbytes, item[0]))


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
    def open(reference: str, *, base: Path | None = None) -> BaseCheckpoint:
        """Find a base model and read its headers.

        Args:
            reference: a folder, or `org/repo[@revision][/subfolder]`.
            base: what a relative path is relative to.

        Raises:
            AddressError: it leads nowhere.
            AdapterError: files that are missing, cut off or not safetensors, all at once.
            PlanError: it is quantised.
        """
        located = resolve_model(reference, base=base, files=FILES)
        folder = located.folder
        names, index, weight_map = _shard_names(folder)
        shards, problems = [], []
        for name in names:
            try:
                shards.append(Shard.open(folder / name))
            except AdapterError as error:
                problems.append(str(error))
            except OSError as error:
                problems.append(f"{folder / name}: {error.strerror or error}. Fetch the base model again.")
        home = {tensor: shard for shard in shards for tensor in shard.file.tensors}
        if not problems:
            problems += [
                f"{folder / INDEX}: {tensor!r} should be in {name}, but is not. Fetch the base model again."
                for tensor, name in weight_map.items()
                if tensor not in home or home[tensor].name != name
            ][:5]
        collect(AdapterError, problems, f"{folder}: the base model is not whole")
        checkpoint = BaseCheckpoint(located, _config(folder), tuple(shards), index, home)
        collect(PlanError, [p for p in [checkpoint._quantised()] if p], "")
        return checkpoint

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self.located.folder

    def info(self, tensor: str) -> TensorInfo:
        """Return what the header says of a tensor."""
        return self.home[tensor].file.tensors[tensor]

    def _quantised(self) -> str | None:
        way_out = (
            "Rounding a merge to a few bits again would lose most of it. Give the 16- or 32-bit model that it was made from "
            "(--base-id), bake that, and quantise the result; or save a dequantised copy with transformers "
            "(model.dequantize(), then save_pretrained) and give that."
        )
        for holder in (self.config, self.config.get("text_config") or {}):
            settings = holder.get("quantization_config")
            if settings:
                kind = settings.get("quant_method") or "a method that is not named" if isinstance(settings, dict) else settings
                return f"{self.folder}: the base model is quantised ({kind}, in {CONFIG}). {way_out}"
        for name, shard in self.home.items():
            dtype = shard.file.tensors[name].dtype
            if _QUANTISED.search(name) or dtype.startswith(("F8", "F4", "F6")):
                return f"{self.folder}: the base model is quantised ({name!r} is stored as {dtype}). {way_out}"
        return None


def sections(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield a configuration and the text model's part of it, where it has one."""
    yield config
    text = config.get("text_config")
    if isinstance(text, dict):
        yield text


def _shard_names(folder: Path) -> tuple[list[str], Mapping[str, Any] | None, Mapping[str, str]]:
    """Return the files with tensors, and metadata and map of the index when there is one."""
    path = folder / INDEX
    if path.is_file():
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            weight_map = {str(k): str(v) for k, v in index["weight_map"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise AdapterError(f"{path}: not an index of safetensors ({error}). Fetch the base model again.") from None
        outside = [name for name in weight_map.values() if Path(name).name != name]
        if outside:
            raise AdapterError(f"{path}: names {outside[0]!r}, which is not a file beside it.")
        return sorted(set(weight_map.values())), index.get("metadata") or {}, weight_map
    if (folder / SINGLE).is_file():
        return [SINGLE], None, {}
    found = sorted(p.name for p in folder.iterdir())
    hint = " It holds an adapter; give the base model." if "adapter_config.json" in found else ""
    other = [name for name in found if name.endswith((".bin", ".pt", ".pth", ".gguf"))]
    if other:
        hint = f" It holds {other[0]}; convert it first (load it with transformers, then save_pretrained)."
    raise AdapterError(f"{folder}: neither {SINGLE} nor {INDEX} is here.{hint}")


def _config(folder: Path) -> Mapping[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError(f"{path}: not valid JSON ({error}).") from None
    if not isinstance(config, dict):
        raise AdapterError(f"{path}: expected a JSON object, found {type(config).__name__}.")
    return config
