"""A quantized checkpoint as the plain one that it encodes: tensors are dequantized as they are read, rows at a time.

Two formats whose values transformers too computes without a GPU, and to the same bits:

- `fp8`: 8-bit floats and a scale per block of `weight_block_size`, or one per tensor, as `….weight_scale_inv`; W = q · s.
  Source: DeepSeek-AI 2024 (arXiv:2412.19437), §3.3.
- `mxfp4`: 4-bit floats, 32 of which share a power of two, as `…_blocks` and `…_scales`; the parameter is stored transposed.
  Source: OCP Microscaling Formats 1.0, §5.3 and 6.3, as gpt-oss packs them.

Nothing is written: a plain copy would take as long as a bake and as much disk as its result.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from plait.checkpoints.files import sections
from plait.deferred import Tensor, torch
from plait.tensorfiles.blocks import SHORT
from plait.tensorfiles.header import BITS, TensorInfo
from plait.tensorfiles.reader import SafetensorsFile, read_bytes, torch_dtype

#: Methods of `quantization_config` that can be dequantized here.
QUANTIZED_FORMATS = ("fp8", "mxfp4")
_FP8 = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}  # in torch
_EXPONENTS = ("U8", "F8_E8M0")  # a byte that is the exponent of a power of two, plus 127
_GROUP = 32  # values of mxfp4 that share a scale
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # and their negatives
_DROPPED = (".weight_scale_inv", ".activation_scale", ".input_scale")


class ComputedTensor(Protocol):
    """A tensor whose values are made when they are read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the plain tensor."""

    def rows(self, start: int, stop: int) -> Tensor:
        """Return rows of the plain tensor, seen as (everything else, last dimension), in float32."""


@dataclass(frozen=True)
class _Stored:
    """A tensor as stored in a file."""

    file: SafetensorsFile
    name: str

    @property
    def info(self) -> TensorInfo:
        return self.file.tensors[self.name]

    def read(self, start: int = 0, count: int | None = None) -> Tensor:
        """Return bytes of it, uint8."""
        return read_bytes(self.file, self.name, self.info.start + start, self.info.nbytes if count is None else count)


@dataclass(frozen=True)
class _Fp8:
    weight: _Stored
    scale: _Stored
    block: tuple[int, int] | None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.info.shape

    def rows(self, start: int, stop: int) -> Tensor:
        height, width = self.shape[-2:]
        values = self.weight.read(start * width, (stop - start) * width).view(getattr(torch, _FP8[self.weight.info.dtype]))
        matrix = values.view(stop - start, width).to(torch.float32)
        scales = _scales(self.scale)
        if self.block is None:
            return matrix * scales
        tall, wide = self.block
        grid = scales.view(-1, -(-height // tall), -(-width // wide))
        rows = torch.arange(start, stop)
        of_rows = grid[rows // height, rows % height // tall]
        return matrix * of_rows.repeat_interleave(wide, dim=1)[:, :width]


@dataclass(frozen=True)
class _Mxfp4:
    blocks: _Stored
    scales: _Stored
    held: threading.local = field(default_factory=threading.local, repr=False, compare=False)

    @property
    def shape(self) -> tuple[int, ...]:
        *stack, height, groups, _ = self.blocks.info.shape
        return (*stack, groups * _GROUP, height)

    def rows(self, start: int, stop: int) -> Tensor:
        width = self.shape[-2]
        parts = []
        while start < stop:
            number, first = divmod(start, width)
            last = min(width, first + stop - start)
            parts.append(self._columns(number, first, last).mT)
            start += last - first
        return torch.cat(parts)

    def _columns(self, number: int, first: int, last: int) -> Tensor:
        """Return columns of one stored matrix, (d_out, last − first)."""
        low, high = first // _GROUP, -(-last // _GROUP)
        packed, exponents = self._matrix(number)
        packed, exponents = packed[:, low:high], exponents[:, low:high]
        table = torch.tensor([*_E2M1, *(-x for x in _E2M1)])
        values = torch.stack([table[(packed & 15).int()], table[(packed >> 4).int()]], dim=-1).flatten(2)
        scaled = torch.ldexp(values, exponents.int().unsqueeze(-1) - 127).flatten(1)
        return scaled[:, first - low * _GROUP : last - low * _GROUP]

    def _matrix(self, number: int) -> tuple[Tensor, Tensor]:
        """Return codes and exponents of one stored matrix; the last one is held, for its next columns."""
        if getattr(self.held, "number", None) != number:
            height, groups, size = self.blocks.info.shape[-3:]
            count = height * groups
            self.held.codes = self.blocks.read(number * count * size, count * size).view(height, groups, size)
            self.held.exponents = self.scales.read(number * count, count).view(height, groups)
            self.held.number = number
        return self.held.codes, self.held.exponents


class PlainFile(SafetensorsFile):
    """A file of a quantized checkpoint, described and read as if it were plain.

    Args:
        file: the file.
        computed: tensor → what it is made of, of those that are stored quantized.
        parts: tensors of the file that are scales or codes, and no tensor of a plain checkpoint.
        dtype: of the computed tensors, safetensors' name.
    """

    def __init__(self, file: SafetensorsFile, computed: Mapping[str, ComputedTensor], parts: set[str], dtype: str) -> None:
        self.path, self.state = file.path, file.state
        self.computed = dict(computed)
        size = BITS[dtype] // 8
        tensors = {n: i for n, i in file.tensors.items() if n not in parts}
        for name, made in computed.items():
            at = file.tensors[name if name in file.tensors else f"{name}_blocks"].start  # keeps the order of the file
            tensors[name] = TensorInfo(made.shape, dtype, math.prod(made.shape) * size, at)
        self.tensors = tensors

    def is_in_order(self, name: str) -> bool:
        """Return whether a tensor's bytes can be copied: those of a computed one are another's."""
        return name not in self.computed

    def values(self, name: str, first: int, count: int) -> Tensor:
        """Return `count` values of a tensor from the value `first` on, flat; computed ones in float32, not rounded yet."""
        if name not in self.computed:
            return super().values(name, first, count)
        made = self.computed[name]
        width = made.shape[-1]
        start, stop = first // width, -(-(first + count) // width)
        return made.rows(start, stop).reshape(-1)[first - start * width :][:count]

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        if name not in self.computed:
            return super().read(name)
        info = self.tensors[name]
        return self.values(name, 0, math.prod(info.shape)).to(torch_dtype(info.dtype)).reshape(info.shape)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return the rows [start, stop) of a tensor along its first dimension."""
        if name not in self.computed:
            return super().read_rows(name, start, stop)
        info = self.tensors[name]
        size = math.prod(info.shape[1:])
        return self.values(name, start * size, (stop - start) * size).to(torch_dtype(info.dtype)).reshape(-1, *info.shape[1:])


@dataclass
class DequantizedFiles:
    """The files of a checkpoint as plain ones.

    Attributes:
        files: in the order given.
        problems: quantized tensors that have no plain form here.
    """

    files: list[SafetensorsFile] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def dequantized(files: Sequence[SafetensorsFile], config: Mapping[str, Any]) -> DequantizedFiles:
    """Describe a quantized checkpoint as plain; reads no tensor.

    Args:
        files: of the checkpoint.
        config: its `config.json`, with a `quantization_config` of a method in `QUANTIZED_FORMATS`, there or in `text_config`.
    """
    stored = {name: _Stored(file, name) for file in files for name in file.tensors}
    settings = config.get("quantization_config") or config["text_config"]["quantization_config"]
    dtype = _plain_dtype(config)
    found = DequantizedFiles()
    for file in files:
        computed: dict[str, ComputedTensor] = {}
        parts = {n for n in file.tensors if n.endswith(_DROPPED)}
        for name in file.tensors:
            try:
                computed |= dict(_made_of(name, stored, settings))
            except ValueError as error:
                found.problems.append(f"{name!r} ({error})")
        parts |= {n for n in file.tensors if n.endswith(("_blocks", "_scales")) and _is_mxfp4(n, stored)}
        found.files.append(PlainFile(file, computed, parts, dtype) if computed or parts else file)
    return found


def _made_of(name: str, stored: Mapping[str, _Stored], settings: Mapping[str, Any]) -> Iterator[tuple[str, ComputedTensor]]:
    """Yield the plain tensor that a stored one holds the codes of.

    Raises:
        ValueError: it has none here; the text says why.
    """
    info = stored[name].info
    if name.endswith("_blocks") and _is_mxfp4(name, stored):
        plain = name.removesuffix("_blocks")
        yield plain, _Mxfp4(stored[name], stored[f"{plain}_scales"])
    elif info.dtype in _FP8:
        scale = stored.get(f"{name}_scale_inv")
        if scale is None:
            raise ValueError("8-bit floats without a weight_scale_inv")
        single = math.prod(scale.info.shape) == 1
        block = None if single else _block(info.shape, scale.info.shape, settings)
        yield name, _Fp8(stored[name], scale, block)
    elif f"{name}_scale_inv" in stored or info.dtype.startswith(("F8", "F4", "F6")):
        raise ValueError(f"stored as {info.dtype}")


def _is_mxfp4(name: str, stored: Mapping[str, _Stored]) -> bool:
    plain = name.removesuffix("_blocks").removesuffix("_scales")
    pair = [stored.get(f"{plain}{end}") for end in ("_blocks", "_scales")]
    return all(p is not None and p.info.dtype == "U8" for p in pair)


def _block(shape: tuple[int, ...], scales: tuple[int, ...], settings: Mapping[str, Any]) -> tuple[int, int]:
    tall, wide = settings.get("weight_block_size") or (128, 128)
    if scales != (*shape[:-2], -(-shape[-2] // tall), -(-shape[-1] // wide)):
        raise ValueError(f"{list(shape)} with scales {list(scales)} for blocks of {tall} × {wide}")
    return int(tall), int(wide)


def _scales(stored: _Stored) -> Tensor:
    """Return scales in float32."""
    values = stored.read()
    if stored.info.dtype in _EXPONENTS:
        return torch.ldexp(torch.ones(values.shape), values.int() - 127)
    return values.view(torch_dtype(stored.info.dtype)).to(torch.float32)


def _plain_dtype(config: Mapping[str, Any]) -> str:
    """Return safetensors' name of the dtype that the model computes in; bfloat16 where its configuration names none."""
    for holder in sections(config):
        name = str(holder.get("dtype") or holder.get("torch_dtype") or "").removeprefix("torch.")
        if name in SHORT:
            return SHORT[name]
    return "BF16"
