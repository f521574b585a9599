"""What is written: shards, their headers and the position of every tensor; known before a byte is written."""

from __future__ import annotations

import json
import math
import re
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from plait.baking.changes import Placement, TensorChange
from plait.checkpoints.checkpoint import BaseCheckpoint, Shard
from plait.checkpoints.files import SINGLE
from plait.errors import RecipeError
from plait.tensorfiles.header import BITS
from plait.tensorfiles.reader import DTYPES, FLOATS

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class OutTensor:
    """One tensor of the baked model.

    Attributes:
        name: of it.
        dtype: safetensors' name.
        shape: of it.
        nbytes: size.
        start: where its bytes begin in the file.
        source: the base's tensor that it is made from; None when it is all new.
        change: what is done to it.
        copied: its bytes are the base's.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    start: int
    source: str | None
    change: TensorChange = field(repr=False)
    copied: bool


@dataclass(frozen=True)
class OutShard:
    """One file of the baked model.

    Attributes:
        name: of the file.
        lead: length and header.
        tensors: in the order of the file.
    """

    name: str
    lead: bytes = field(repr=False)
    tensors: tuple[OutTensor, ...]

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.lead) + sum(t.nbytes for t in self.tensors)


@dataclass(frozen=True)
class _Entry:
    name: str
    dtype: str
    shape: tuple[int, ...]
    itemsize: int
    source: str | None
    change: TensorChange

    @property
    def nbytes(self) -> int:
        return self.itemsize * math.prod(self.shape)


def plan_shards(
    checkpoint: BaseCheckpoint, placement: Placement, *, dtype: str | None, shard_size: int | None
) -> tuple[OutShard, ...]:
    """Lay out all shards.

    Args:
        checkpoint: the base.
        placement: what is changed and added.
        dtype: safetensors' name of the wanted dtype of all floats; None keeps each tensor's.
        shard_size: largest number of bytes of tensors in a file; None keeps the base's files.

    Raises:
        RecipeError: a size is given for a base whose files are what they are.
    """
    kept = [[name for name, _ in shard.in_order if name not in placement.left_out] for shard in checkpoint.shards]
    groups = [[_entry(checkpoint, placement, name, dtype) for name in names] for names in kept]
    groups[-1] += _added(checkpoint, placement, dtype)
    if shard_size is not None and not checkpoint.form.has_code:
        raise RecipeError(
            f"--shard-size (shard_size=): this base is a {checkpoint.form.kind}, whose files keep their names and "
            "what they hold. Leave it out."
        )
    if shard_size is None:
        named = zip(checkpoint.shards, groups, strict=True)
        return tuple(_shard(checkpoint, base.name, entries, base) for base, entries in named if entries)
    packed = _packed([e for group in groups for e in group], shard_size)
    names = (
        [SINGLE] if len(packed) == 1 else [f"model-{i:05}-of-{len(packed):05}.safetensors" for i in range(1, len(packed) + 1)]
    )
    return tuple(_shard(checkpoint, name, entries, None) for name, entries in zip(names, packed, strict=True))


def shard_index(checkpoint: BaseCheckpoint, shards: Sequence[OutShard]) -> dict[str, Any] | None:
    """Return a model's index; None for a single file that needs none."""
    if not checkpoint.form.has_code or (len(shards) == 1 and (checkpoint.index is None or shards[0].name == SINGLE)):
        return None
    metadata = dict(checkpoint.index or {})
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(math.prod(t.shape) for s in shards for t in s.tensors)
    metadata["total_size"] = sum(t.nbytes for s in shards for t in s.tensors)
    return {"metadata": metadata, "weight_map": {t.name: s.name for s in shards for t in s.tensors}}


def parse_size(text: str) -> int:
    """Read a size such as `5GB` (decimal, as transformers reads it) or `4GiB`.

    Raises:
        RecipeError: it is none.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B?)\s*", text, re.IGNORECASE)
    unit = found[2].upper() if found else None
    if found is None or unit not in _UNITS or not float(found[1]):
        raise RecipeError(f"{text!r} is not a size of a shard; it must be a number of bytes with a unit, such as 5GB or 900MB.")
    return int(float(found[1]) * _UNITS[unit])


def _entry(checkpoint: BaseCheckpoint, placement: Placement, name: str, dtype: str | None) -> _Entry:
    info = checkpoint.info(name)
    change = placement.changes.get(name, TensorChange())
    shape = change.replaced.shape if change.replaced is not None else info.shape
    wanted = _wanted(info.dtype, dtype)
    # one that is copied may have a dtype that only its header knows
    itemsize = BITS[wanted] // 8 if wanted in DTYPES else info.nbytes // max(1, math.prod(info.shape))
    return _Entry(name, wanted, shape, itemsize, name, change)


def _added(checkpoint: BaseCheckpoint, placement: Placement, dtype: str | None) -> Iterator[_Entry]:
    usual = _usual_dtype(checkpoint)
    for name, added in placement.added.items():
        own = checkpoint.info(added.source).dtype if added.source else usual
        wanted = _wanted(own, dtype)
        yield _Entry(name, wanted, added.shape, BITS[wanted] // 8, added.source, added.change)


def _usual_dtype(checkpoint: BaseCheckpoint) -> str:
    """Return the dtype of most float values."""
    counts: Counter[str] = Counter()
    for name in checkpoint.home:
        info = checkpoint.info(name)
        if info.dtype in FLOATS:
            counts[info.dtype] += math.prod(info.shape)
    return max(counts, key=counts.__getitem__, default="F32")


def _wanted(own: str, dtype: str | None) -> str:
    return dtype if dtype is not None and own in FLOATS else own


def _packed(entries: Sequence[_Entry], limit: int) -> list[list[_Entry]]:
    """Fill files in order; a tensor larger than the limit has one of its own."""
    packed: list[list[_Entry]] = [[]]
    size = 0
    for entry in entries:
        if packed[-1] and size + entry.nbytes > limit:
            packed.append([])
            size = 0
        packed[-1].append(entry)
        size += entry.nbytes
    return packed


def _shard(checkpoint: BaseCheckpoint, name: str, entries: Sequence[_Entry], base: Shard | None) -> OutShard:
    """Lay out one file: the base's header, byte for byte, where it still holds; a new one else."""
    if (
        base is not None
        and base.is_plain
        and base.is_safetensors
        and [(e.name, e.dtype, e.shape) for e in entries] == [(n, i.dtype, i.shape) for n, i in base.in_order]
    ):
        starts = [info.start for _, info in base.in_order]
        lead = base.lead
    else:
        # larger item sizes first keeps every tensor aligned; else the base's order stays
        entries = sorted(entries, key=lambda e: -e.itemsize)
        lead = _header(
            entries, checkpoint.shards[0].metadata if base is None else base.metadata, "" if base is None else base.prefix
        )
        starts, at = [], len(lead)
        for entry in entries:
            starts.append(at)
            at += entry.nbytes
    tensors = tuple(
        OutTensor(e.name, e.dtype, e.shape, e.nbytes, start, e.source, e.change, _is_copy(checkpoint, e))
        for e, start in zip(entries, starts, strict=True)
    )
    return OutShard(name, lead, tensors)


def _is_copy(checkpoint: BaseCheckpoint, entry: _Entry) -> bool:
    source = entry.source
    return (
        source is not None
        and entry.change == TensorChange()
        and checkpoint.info(source).dtype == entry.dtype
        and not checkpoint.is_computed(source)
    )


def _header(entries: Sequence[_Entry], metadata: Mapping[str, str], prefix: str) -> bytes:
    header: dict[str, object] = {"__metadata__": dict(metadata) or {"format": "pt"}}
    at = 0
    for entry in entries:
        header[entry.name.removeprefix(prefix)] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [at, at + entry.nbytes],
        }
        at += entry.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
