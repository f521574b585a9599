"""Tensors in files that `torch.save` wrote (`.bin`): described without running anything, read from their place in the file.

The pickle inside says which function makes each entry of which bytes. `plait.tensorfiles.opcodes` reads it as text; what is not
plain tensor is refused by name. No storage is larger than its bytes in the file, and none is unpacked: `torch.save` compresses
nothing.
"""

from __future__ import annotations

import io
import math
import mmap
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from plait.deferred import Tensor, torch
from plait.errors import AdapterError, collect
from plait.parsing import kind_of, open_bytes, pointer_problem, shown
from plait.tensorfiles.header import BITS, TensorInfo, is_countable, state_of
from plait.tensorfiles.opcodes import FunctionCall, GlobalName, PersistentReference, Pickle, PickleError, read_pickle
from plait.tensorfiles.reader import TensorFile

_MAGIC = 0x1950A86A20F9469CFC6C  # at the beginning of files from before torch 1.6
_PROTOCOL = 1001
_LONGEST = 100_000_000  # bytes of the pickle, as of a safetensors header
_MOST_TIMES = 100  # that a file's bytes may be used by tensors that share them
_MOST_DIMENSIONS = 64
_ADVICE = "Load it where you trust it, and save it as safetensors."
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_STORAGE = re.compile(r"torch\.(?:storage\.)?([A-Z][A-Za-z0-9]*)Storage")
_DTYPES = {
    "double": "F64", "float": "F32", "half": "F16", "bfloat16": "BF16", "long": "I64", "int": "I32", "short": "I16",
    "char": "I8", "byte": "U8", "bool": "BOOL", "complexfloat": "C64", "untyped": "U8",
    "float64": "F64", "float32": "F32", "float16": "F16", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint8": "U8", "uint16": "U16", "uint32": "U32", "uint64": "U64", "complex64": "C64", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip
_WHAT = {
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_qtensor": "a quantized tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor on the meta device, which has no values",
}
_PARAMETER = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
_TENSOR = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3")
_KNOWN = frozenset({*_PARAMETER, *_TENSOR, "torch._tensor._rebuild_from_type_v2", "torch.Size", "collections.OrderedDict"})
_TYPED = ("torch.Tensor", "torch.nn.parameter.Parameter")


class PickleFile(TensorFile):
    """A file of `torch.save`, of any age: names → tensors or parameters. Nothing in it is run; values are read when asked for.

    This is the one reader of `.bin` files, of adapters and of shards of base models alike. A tensor whose values are in order
    (`is_in_order`; nearly all do) has its place in the file, `tensors[name].start`, and is read by rows and bytes as one of
    safetensors is. Of the others `start` is 0: `read` and `read_rows` put their values in order.

    Attributes:
        path: of the file.
        tensors: name → shape, dtype and place.

    Raises:
        AdapterError: there is no such file, it is damaged or cut off, its parts give wrong sizes, or an entry is not a plain
            tensor under a text: code, sparse, quantized and meta tensors, nested mappings.
    """

    suffix = ".bin"
    adapter_name = "adapter_model.bin"
    model_name = "pytorch_model.bin"
    model_files = "pytorch_model*.bin"

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open_bytes(path) as file:
                self.state = state_of(file.fileno())
                pointer = pointer_problem(file.read(64))
                file.seek(0)
                found = _ZipFile(file, self.state.size) if file.read(2) == b"PK" else _LegacyFile(file)
        except PickleError as error:
            if pointer is not None:
                raise AdapterError(f"{path}: {pointer}") from None
            raise AdapterError(f"{path}: not a file of tensors that plait can read: {error}. {_ADVICE}") from None
        except (OSError, ValueError) as error:
            raise AdapterError(f"{path}: it cannot be read ({getattr(error, 'strerror', None) or error}).") from None
        self._views = _views(path, found.pickle, found.places, self.state.size)
        self.tensors: Mapping[str, TensorInfo] = {name: view.info for name, view in self._views.items()}

    def is_in_order(self, name: str) -> bool:
        """Return whether a tensor's values follow each other in the file, row by row, so that its bytes can be copied."""
        return self._views[name].is_in_order

    def read(self, name: str) -> Tensor:
        """Return one tensor, in memory of its own."""
        if self.is_in_order(name):
            return super().read(name)
        view = self._views[name]
        values = self._values(name, view.place, view.extent * (BITS[view.info.dtype] // 8))
        return values.as_strided(view.info.shape, view.stride).clone(memory_format=torch.contiguous_format)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return the rows [start, stop) of a tensor along its first dimension."""
        return super().read_rows(name, start, stop) if self.is_in_order(name) else self.read(name)[start:stop]

    def values(self, name: str, first: int, count: int) -> Tensor:
        """Return `count` values of a tensor from the value `first` on, flat."""
        if self.is_in_order(name):
            return super().values(name, first, count)
        return self.read(name).reshape(-1)[first : first + count]


@dataclass(frozen=True)
class _View:
    """A tensor in its storage.

    Attributes:
        info: as others see it.
        stride: in values.
        place: in the file, of the first value.
        extent: values from the first to the last.
    """

    info: TensorInfo
    stride: tuple[int, ...]
    place: int
    extent: int

    @property
    def is_in_order(self) -> bool:
        expected = 1
        for length, step in zip(reversed(self.info.shape), reversed(self.stride), strict=True):
            if length > 1 and step != expected:
                return False
            expected *= length
        return True


class _ZipFile:
    """The form since torch 1.6: an archive without compression."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        try:
            archive = zipfile.ZipFile(file)
            entries = archive.infolist()
        except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, struct.error, RuntimeError) as error:
            raise PickleError(f"the archive is damaged ({error})") from None
        odd = next((e for e in entries if e.compress_type or e.file_size != e.compress_size or e.flag_bits & 1), None)
        if odd is not None:
            raise PickleError(f"{shown(odd.filename)} in it is packed to {odd.compress_size} of {odd.file_size} bytes")
        if sum(e.file_size for e in entries) > size:
            raise PickleError("its parts are larger than it is")
        self._file, self._size = file, size
        pickles = [e for e in entries if e.filename.endswith("/data.pkl") and e.filename.count("/") == 1]
        if len(pickles) != 1 or pickles[0].file_size > _LONGEST:
            raise PickleError("it has no data.pkl, or one that is too large")
        root = pickles[0].filename.removesuffix("data.pkl")
        by_name = {e.filename.removeprefix(root): e for e in entries}
        if len(by_name) != len(entries):
            raise PickleError("it has two parts of one name")
        order = by_name.get("byteorder")
        if order is not None and self._bytes(order) != b"little":
            raise PickleError("its numbers are stored with the highest byte first")
        self.pickle = read_pickle(io.BytesIO(self._bytes(pickles[0])))
        keys = {n.removeprefix("data/"): e for n, e in by_name.items() if n.startswith("data/")}
        self.places = {key: (self._start(e), e.file_size) for key, e in keys.items()}

    def _start(self, entry: zipfile.ZipInfo) -> int:
        self._file.seek(entry.header_offset)
        lead = self._file.read(_LOCAL_HEADER.size)
        if len(lead) < _LOCAL_HEADER.size or lead[:4] != b"PK\3\4":
            raise PickleError(f"{shown(entry.filename)} is not where it should be")
        _, name, extra = _LOCAL_HEADER.unpack(lead)
        start: int = entry.header_offset + _LOCAL_HEADER.size + name + extra
        if start + entry.file_size > self._size:
            raise PickleError(f"{shown(entry.filename)} is cut off")
        return start

    def _bytes(self, entry: zipfile.ZipInfo) -> bytes:
        self._file.seek(self._start(entry))
        return self._file.read(entry.file_size)


class _LegacyFile:
    """The form before torch 1.6: pickles, and after them the storages with their lengths."""

    def __init__(self, file: IO[bytes]) -> None:
        try:
            data: Any = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # which hands out no more than there is
        except ValueError:
            raise PickleError("it is empty") from None
        with data:
            if read_pickle(data).content != _MAGIC or read_pickle(data).content != _PROTOCOL:
                raise PickleError("it was not written by torch.save")
            system = read_pickle(data).content
            if not isinstance(system, dict) or system.get("little_endian") is not True:
                raise PickleError("its numbers are stored with the highest byte first")
            self.pickle = read_pickle(data)
            keys = read_pickle(data).content
            if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
                raise PickleError("it is damaged")
            self.places = self._places(data, keys, self.pickle.references)

    @staticmethod
    def _places(data: Any, keys: list[str], references: list[PersistentReference]) -> dict[str, tuple[int, int]]:
        """Walk along the storages; it ends at one whose values have an unknown size, which an entry is then refused for."""
        items, places = _item_sizes(references), {}
        for key in keys:
            if key not in items:
                break
            length, position = data.read(8), data.tell()
            count = int.from_bytes(length, "little") * items[key]
            if len(length) < 8 or position + count > len(data):
                raise PickleError("it is cut off")
            places[key] = (position, count)
            data.seek(position + count)
        return places


def _item_sizes(references: list[PersistentReference]) -> dict[str, int]:
    """Return key → bytes per value of the storages that are known."""
    sizes = {}
    for reference in references:
        try:
            key, dtype, _ = _storage(reference)
        except PickleError:
            continue
        sizes[key] = BITS[dtype] // 8
    return sizes


def _views(path: Path, pickle: Pickle, places: Mapping[str, tuple[int, int]], size: int) -> dict[str, _View]:
    content = pickle.content
    if not isinstance(content, dict):
        raise AdapterError(f"{path}: expected a mapping of names to tensors, found {_kind(content)}.")
    found: dict[str, _View] = {}
    problems: list[str] = []
    for name, value in content.items():
        if not isinstance(name, str):
            problems.append(f"the entry {shown(name)} has no text for a name")
            continue
        try:
            found[name] = _view(value, places)
            name.encode()
        except UnicodeEncodeError:
            problems.append(f"the name {shown(name)} holds half a character")
        except PickleError as error:
            problems.append(f"{shown(name)} {error}")
    unknown = sorted(pickle.functions - _KNOWN)
    if unknown and not problems:  # not part of an entry, where it would change nothing
        problems.append(f"it calls {shown(unknown[0])}, which is not run")
    if sum(view.info.nbytes for view in found.values()) > _MOST_TIMES * size:
        problems.append(f"its tensors have more than {_MOST_TIMES} times the bytes of the file")
    more = [f"and {len(problems) - 5} more"] if len(problems) > 5 else []
    lines = [f"{path}: this pickle holds more than tensors: {p}. {_ADVICE}" for p in problems[:5]]
    collect(AdapterError, lines + more, f"{path}: not a file of tensors that plait can read")
    return found


def _tensor_call(value: Any) -> Any:
    """Return the call behind a parameter, or behind a tensor with attributes."""
    for _ in range(4):
        if not isinstance(value, FunctionCall) or not value.arguments:
            break
        if value.function in _PARAMETER:
            value = value.arguments[0]
        elif value.function == "torch._tensor._rebuild_from_type_v2" and len(value.arguments) > 2:
            function, kind, arguments = value.arguments[:3]
            if not isinstance(function, GlobalName) or not isinstance(kind, GlobalName) or kind.path not in _TYPED:
                break
            value = FunctionCall(function.path, arguments if isinstance(arguments, tuple) else ())
    return value


def _view(value: Any, places: Mapping[str, tuple[int, int]]) -> _View:
    """Return the tensor that an entry is.

    Raises:
        PickleError: it is not one; the text continues a sentence that begins with its name.
    """
    call = _tensor_call(value)
    if not isinstance(call, FunctionCall) or call.function not in _TENSOR:
        raise PickleError(f"is {_kind(call)}")
    if len(call.arguments) < 4 or not isinstance(call.arguments[0], PersistentReference):
        raise PickleError("is made of no storage")
    key, dtype, nbytes = _storage(call.arguments[0])
    offset, shape, stride = call.arguments[1:4]
    if call.function.endswith("_v3") and len(call.arguments) > 6:
        dtype = _dtype(call.arguments[6])
    elif len(call.arguments) > 6 and call.arguments[6]:
        raise PickleError("is a conjugate or a negative that was not computed")
    shape, stride = (s.arguments[0] if isinstance(s, FunctionCall) and s.arguments else s for s in (shape, stride))
    if not _are_counts((offset,)) or not _are_counts(shape) or not _are_counts(stride) or len(shape) != len(stride):
        raise PickleError("has a shape, strides or an offset that it cannot have")
    if key not in places or places[key][1] != nbytes:
        what = "gives a wrong size of its storage" if key in places else "has a storage that is not in the file"
        raise PickleError(what)
    size, values = BITS[dtype] // 8, math.prod(shape)
    extent = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) if values else 0
    if (offset + extent) * size > nbytes or not is_countable(shape):
        raise PickleError("reaches beyond its storage")
    if values * size > nbytes:
        raise PickleError("repeats the values of a smaller storage: it was expanded")
    place = places[key][0] + offset * size
    view = _View(TensorInfo(tuple(shape), dtype, values * size, place), tuple(stride), place, extent)
    return view if view.is_in_order else _View(view.info._replace(start=0), view.stride, place, extent)


def _storage(reference: PersistentReference) -> tuple[str, str, int]:
    """Return key, dtype and bytes of a storage, as the pickle has them."""
    parts = reference.parts
    if (
        not isinstance(parts, tuple)
        or len(parts) not in (5, 6)
        or parts[0] != "storage"
        or not isinstance(parts[1], GlobalName)
    ):
        raise PickleError("is made of something that is not a storage")
    _, kind, key, location, count = parts[:5]
    if location == "meta":
        raise PickleError(f"is {_WHAT['torch._utils._rebuild_meta_tensor_no_storage']}")
    named = _STORAGE.fullmatch(kind.path)
    dtype = _DTYPES.get(named[1].lower()) if named else None
    if dtype is None:
        raise PickleError(f"has values of {shown(kind.path)}, which have no place in safetensors")
    if not isinstance(key, str) or not _are_counts((count,)) or (len(parts) == 6 and parts[5] is not None):
        raise PickleError("is made of a storage that cannot be read")
    return key, dtype, count * BITS[dtype] // 8


def _dtype(name: Any) -> str:
    found = _DTYPES.get(name.path.removeprefix("torch.")) if isinstance(name, GlobalName) else None
    if found is None:
        raise PickleError("has a dtype that has no place in safetensors")
    return found


def _are_counts(numbers: Any) -> bool:
    few = isinstance(numbers, (tuple, list)) and len(numbers) <= _MOST_DIMENSIONS
    return few and all(type(n) is int and n >= 0 for n in numbers)


def _kind(value: Any) -> str:
    if isinstance(value, FunctionCall):
        return _WHAT.get(value.function, f"made by {shown(value.function)}, which is not run")
    return "a mapping, not a tensor" if isinstance(value, dict) else kind_of(value)
