"""A folder, a pipe, a device or a broken link in place of a file: refused by name, not waited for, not taken for missing."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from plait.adapters.adapter import Adapter
from plait.checkpoints.checkpoint import BaseCheckpoint
from plait.checkpoints.files import find_weights, read_config
from plait.errors import AdapterError, PlaitError, PlanError
from plait.hub.pretrained import refuse_failures
from plait.parsing import is_there
from tests.bad_input import adapter, merge
from tests.command_line import exit_code


def _folder(path: Path) -> None:
    path.mkdir()


def _broken(path: Path) -> None:
    path.symlink_to("nowhere")


def _circle(path: Path) -> None:
    path.symlink_to(path.name)


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


THINGS = [_folder, os.mkfifo, _broken, _circle, _device]


def _bin(folder: Path, stem: str) -> None:
    torch.save({}, folder / f"{stem}.bin")  # what would be read if the other file counted as missing


def _adapter_config(folder: Path) -> None:
    Adapter.open(folder, "a")


def _adapter_tensors(folder: Path) -> None:
    adapter(folder / "made")
    (folder / "made" / "adapter_config.json").rename(folder / "adapter_config.json")
    _bin(folder, "adapter_model")
    Adapter.open(folder, "a")


def _weights(folder: Path) -> None:
    _bin(folder, "pytorch_model")
    find_weights(folder)


def _library(folder: Path) -> None:
    def reached() -> None:
        raise AssertionError("the library is asked")

    with refuse_failures(folder, "it cannot be loaded", PlanError):
        reached()


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("config.json", read_config),
        ("model.safetensors", _weights),
        ("model.safetensors.index.json", _weights),
        ("adapter_config.json", _adapter_config),
        ("adapter_model.safetensors", _adapter_tensors),
        ("generation_config.json", _library),
        ("tokenizer.json", _library),
        ("special_tokens_map.json", _library),
    ],
)
@pytest.mark.parametrize("thing", THINGS)
def test_what_is_not_a_file_is_refused_by_name(tmp_path, name, read, thing):
    thing(tmp_path / name)
    signal.alarm(20)  # a pipe that is opened waits for ever
    try:
        with pytest.raises(PlaitError, match=name):
            read(tmp_path)
    finally:
        signal.alarm(0)


@pytest.mark.parametrize("thing", [thing for thing in THINGS if thing is not _folder])
def test_a_shard_that_is_not_a_file_is_refused_by_name(tmp_path, thing):
    """A folder may be called so: transformers reads none."""
    name = "model-00001-of-00002.safetensors"
    test_what_is_not_a_file_is_refused_by_name(tmp_path, name, _library, thing)


def test_a_file_that_is_missing_is_missing(tmp_path):
    assert not is_there(tmp_path / "a", AdapterError)
    (tmp_path / "a").touch()
    assert is_there(tmp_path / "a", AdapterError)
    assert read_config(tmp_path) == {}
    assert find_weights(tmp_path) is None


@pytest.mark.parametrize("text", ["{", "[]", None])
def test_every_command_refuses_a_base_with_a_damaged_configuration(tmp_path, text):
    """Whether it carries the file or not."""
    save_file({"layers.0.q_proj.weight": torch.randn(8, 6)}, tmp_path / "model.safetensors")
    file = tmp_path / "generation_config.json"
    file.mkdir() if text is None else file.write_text(text)
    with pytest.raises(AdapterError, match=r"generation_config\.json.*Fetch it again, or delete it\."):
        BaseCheckpoint.open(str(tmp_path))


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "config.json"])
def test_a_bake_does_not_leave_out_a_folder_called_as_a_file(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    adapter(tmp_path / "a")
    (tmp_path / "base" / name).mkdir(parents=True)
    save_file({f"layers.{i}.q_proj.weight": torch.randn(8, 6) for i in range(2)}, tmp_path / "base" / "model.safetensors")
    assert exit_code("bake", "a", "--base-id", "./base", "-o", "out") == 2
    assert name in capsys.readouterr().err


def test_a_pipe_in_place_of_an_adapters_tensors_ends_a_merge(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    adapter(tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    os.mkfifo(tmp_path / "a" / "adapter_model.safetensors")
    assert "adapter_model.safetensors" in merge(capsys, "a")
