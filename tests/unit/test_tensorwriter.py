"""Tensors written piece by piece."""

from __future__ import annotations

import errno
import hashlib
import os
import threading

import pytest
import torch
from safetensors.torch import load_file

from plait.tensorfiles import flushing
from plait.tensorfiles.writer import TensorEntry, TensorWriter, write_tensors


@pytest.mark.parametrize("order", ["abc", "cab", "bca"])
@pytest.mark.parametrize("rows", [1, 3, 7])
def test_the_digest_is_that_of_the_file_in_whatever_order_it_was_written(tmp_path, order, rows) -> None:
    tensors = {n: torch.randn(7, 5, generator=torch.Generator().manual_seed(ord(n))) for n in order}
    path = tmp_path / "x.safetensors"
    with TensorWriter(path, [TensorEntry(n, t.dtype, (7, 5)) for n, t in tensors.items()]) as written:
        for name, tensor in tensors.items():
            for start in range(0, 7, rows):
                written.write(name, tensor[start : start + rows], row=start)
    assert written.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert all(torch.equal(found, tensors[name]) for name, found in load_file(path).items())


def test_what_cannot_be_flushed_in_between_is_an_error(tmp_path, monkeypatch):
    """The system tells whoever flushes next, and nobody after that."""
    monkeypatch.setattr(flushing, "_STEP", 64)
    failures = [OSError(errno.EIO, "Input/output error")]

    def fsync(handle: int) -> None:
        if failures:
            raise failures.pop()

    monkeypatch.setattr(os, "fsync", fsync)
    tensors = {f"t{i}": torch.ones(4, 4) for i in range(9)}
    with pytest.raises(OSError, match="Input/output error"):
        write_tensors(tmp_path / "t.safetensors", tensors)
    write_tensors(tmp_path / "again.safetensors", tensors)
    assert load_file(tmp_path / "again.safetensors").keys() == tensors.keys()


def test_all_that_was_written_is_flushed_at_the_end_and_no_more_often_than_the_disk_can(tmp_path, monkeypatch):
    """While one flush waits, what is written meanwhile is left to the next."""
    monkeypatch.setattr(flushing, "_STEP", 10)
    began, waiting = [], threading.Event()

    def fsync(handle: int) -> None:
        began.append(written)
        waiting.wait(30)

    monkeypatch.setattr(os, "fsync", fsync)
    with (tmp_path / "file").open("wb") as file:
        flusher = flushing.Flusher(file.fileno())
        for written in range(5, 50, 5):  # noqa: B007 (fsync notes it)
            flusher.wrote(5)
        waiting.set()
        flusher.finish()
        flusher.close()
    assert len(began) == 2, "one while it was written, one at the end"
    assert began[-1] == 45
