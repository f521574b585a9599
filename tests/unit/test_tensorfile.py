"""Tensors read one at a time."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from plait.errors import AdapterError
from plait.tensorfiles.reader import SafetensorsFile


@pytest.fixture
def stored(tmp_path) -> dict[str, torch.Tensor]:
    """A file with tensors of several dtypes and shapes."""
    made = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    tensors = {"wide": made, "half": made[:7].bfloat16(), "one": made[3, 4].clone(), "none": made[:0].clone()}
    save_file(tensors, tmp_path / "x.safetensors")
    return tensors


def test_tensors_and_rows_are_those_of_the_file(stored, tmp_path):
    file = SafetensorsFile(tmp_path / "x.safetensors")
    for name, tensor in stored.items():
        assert torch.equal(file.read(name), tensor)
        assert file.read(name).dtype == tensor.dtype
    assert torch.equal(file.read_rows("half", 2, 5), stored["half"][2:5])
    assert torch.equal(file.read_rows("wide", 39, 40), stored["wide"][39:])


def test_a_read_that_comes_in_pieces_is_whole(stored, tmp_path, monkeypatch):
    """The system may return fewer bytes than were asked for: on network file systems, and above 2 GiB everywhere."""
    sizes = []

    class Slow(io.FileIO):
        def readinto(self, buffer):
            sizes.append(len(buffer))
            return super().readinto(memoryview(buffer)[:1000])

    file = SafetensorsFile(tmp_path / "x.safetensors")
    monkeypatch.setattr(Path, "open", lambda self, mode, buffering: Slow(self, mode))
    assert torch.equal(file.read("wide"), stored["wide"])
    assert sizes == [4800, 3800, 2800, 1800, 800]


def _grow(path):
    with path.open("ab") as file:
        file.write(bytes(8))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda path: os.truncate(path, path.stat().st_size - 1), id="shorter"),
        pytest.param(_grow, id="longer"),
        pytest.param(lambda path: save_file({"wide": torch.ones(1)}, path), id="another"),
        pytest.param(lambda path: os.utime(path, ns=(0, 0)), id="written again"),
    ],
)
def test_a_file_that_changes_after_its_header_was_read_is_refused(stored, tmp_path, change):
    path = tmp_path / "x.safetensors"
    file = SafetensorsFile(path)
    change(path)
    with pytest.raises(AdapterError, match=r"x\.safetensors: the file was changed while it was read"):
        file.read("wide")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_zeros_of_either_sign_are_zero_and_nothing_else_is(dtype, tmp_path):
    zeros = torch.tensor([[0.0, -0.0], [-0.0, 0.0]], dtype=dtype)
    smallest = torch.finfo(dtype).smallest_normal / 2 ** (3 if dtype == torch.bfloat16 else 5)
    tensors = {"zeros": zeros, "none": torch.zeros(0, 3, dtype=dtype)}
    tensors |= {f"{at} {value}": zeros.clone() for at in range(4) for value in (1.0, smallest, -smallest, 2.0)}
    for at in range(4):
        for value in (1.0, smallest, -smallest, 2.0):
            tensors[f"{at} {value}"].view(-1)[at] = value
    save_file(tensors, tmp_path / "z.safetensors")
    file = SafetensorsFile(tmp_path / "z.safetensors")
    assert {name for name in tensors if file.is_zero(name)} == {"zeros", "none"}
    assert all(file.is_zero(name) == (not bool(tensor.any())) for name, tensor in tensors.items())
