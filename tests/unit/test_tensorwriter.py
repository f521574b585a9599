"""Tensors written piece by piece."""

from __future__ import annotations

import hashlib

import pytest
import torch
from safetensors.torch import load_file

from plait.tensorfiles.writer import TensorEntry, TensorWriter


@pytest.mark.parametrize("order", ["abc", "cab", "bca"])
@pytest.mark.parametrize("rows", [1, 3, 7])
def test_the_digest_is_that_of_the_file_in_whatever_order_it_was_written(tmp_path, order, rows) -> None:
    tensors = {n: torch.randn(7, 5, generator=torch.Generator().manual_seed(ord(n))) for n in order}
    path = tmp_path / "x.safetensors"
    with TensorWriter(path, [TensorEntry(n, t.dtype, (7, 5)) for n, t in tensors.items()]) as writer:
        for name, tensor in tensors.items():
            for start in range(0, 7, rows):
                writer.write(name, tensor[start : start + rows], row=start)
    assert writer.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert all(torch.equal(found, tensors[name]) for name, found in load_file(path).items())
