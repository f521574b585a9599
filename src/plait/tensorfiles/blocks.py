"""Bytes of tensors in files: the blocks of rows in which they are made, and ranges copied by the kernel."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

from plait.deferred import Tensor, torch
from plait.errors import DISK_FAULTS
from plait.notices import announce
from plait.tensorfiles.reader import DTYPES, FLOATS

SHORT = {DTYPES[name]: name for name in FLOATS}
_THROUGH_HERE = "unchanged tensors are copied the slower way, through this process"
_CHUNK = 1 << 25  # bytes handed to the kernel at a time: progress stays alive, a kill waits for no more
_BUFFER = 1 << 20
TENSOR_BLOCK_ELEMENTS = 1 << 20  # rows per block × columns: few calls per tensor, a few MB of memory


class CopySourceError(Exception):
    """Bytes to be copied cannot be had; the text says why, as the end of a sentence."""


def tensor_block_ranges(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Yield the row ranges in which a tensor is made; a function of the shape alone, so that its bytes are too."""
    step = max(1, TENSOR_BLOCK_ELEMENTS // max(1, columns))
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def bytes_of(tensor: Tensor) -> memoryview:
    """Return a tensor's bytes, in its own memory where that is in order."""
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")


def write_at(handle: int, position: int, view: memoryview) -> None:
    """Write bytes at a place in an open file."""
    while view:
        done = os.pwrite(handle, view, position)
        view, position = view[done:], position + done


def copy_range(source: int, start: int, target: int, position: int, count: int, advance: Callable[[int], None]) -> None:
    """Copy bytes from one open file into another, without taking them into this process where the system can.

    Args:
        source: descriptor to read from.
        start: place there.
        target: descriptor to write to.
        position: place there.
        count: bytes.
        advance: called with the size of every chunk.

    Raises:
        CopySourceError: the source ends early or cannot be read.
    """
    kernel = hasattr(os, "copy_file_range")
    if not kernel:
        announce(f"{_THROUGH_HERE}: this system has no copy_file_range.", once=_THROUGH_HERE)
    while count:
        if kernel:
            try:
                done = os.copy_file_range(source, target, min(count, _CHUNK), start, position)
            except OSError as error:  # other file systems, old kernels; a real fault comes again below
                kernel = False
                if error.errno not in DISK_FAULTS:
                    announce(f"{_THROUGH_HERE}: copy_file_range fails ({error.strerror or error}).", once=_THROUGH_HERE)
                continue
        else:
            data = _read(source, min(count, _BUFFER), start)
            done = os.pwrite(target, data, position) if data else 0
        if not done:
            raise CopySourceError("ends early; did the file change while it was read?")
        start, position, count = start + done, position + done, count - done
        advance(done)


def _read(source: int, count: int, start: int) -> bytes:
    try:
        return os.pread(source, count, start)
    except OSError as error:
        raise CopySourceError(f"cannot be read ({error.strerror or error})") from None
