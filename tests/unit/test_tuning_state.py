"""What a killed tuning leaves: taken up as it was saved, or computed again; by one process at a time."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from plait.errors import OutputError
from plait.notices import PlaitWarning
from plait.tuning.working import WorkingState, alone

STATE = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones((), dtype=torch.bfloat16), "c": torch.empty(0)}


def as_saved(tensors: dict[str, torch.Tensor], info: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    return tensors, info


def saved(folder: Path) -> bytes:
    WorkingState(folder, "key").save("x", STATE, {"step": 3})
    return (folder / "x.safetensors").read_bytes()


def test_a_state_comes_back(tmp_path):
    saved(tmp_path / "s")
    tensors, info = WorkingState(tmp_path / "s", "key").load("x", as_saved) or ({}, {})
    assert info == {"step": 3}
    assert all(torch.equal(tensors[name], STATE[name]) for name in STATE)
    with pytest.warns(PlaitWarning, match=r"s holds what is finished of another tuning \(.*number of threads\); it is removed"):
        assert WorkingState(tmp_path / "s", "another").load("x", as_saved) is None


def test_a_state_with_any_byte_changed_is_computed_again(tmp_path):
    data = saved(tmp_path / "s")
    damaged = [data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :] for at in (*range(0, len(data), 7), len(data) - 1)]

    def is_taken(part: bytes) -> bool:
        (tmp_path / "s" / "x.safetensors").write_bytes(part)
        return WorkingState(tmp_path / "s", "key").load("x", as_saved) is not None

    with pytest.warns(PlaitWarning, match="has changed since it was saved"):
        assert not any(map(is_taken, (b"", data[:100], *damaged)))
    assert is_taken(data)


def test_a_full_disk_is_a_refusal(tmp_path, monkeypatch):
    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match="s cannot be written: No space left on device"):
        saved(tmp_path / "s")


def test_one_process_at_a_time_and_nothing_stays_of_one_that_saved_nothing(tmp_path):
    pytest.importorskip("fcntl")
    with alone(tmp_path / "s", tmp_path / "out"):
        with (
            pytest.raises(OutputError, match=r"is in use by process .*: this merge is being tuned"),
            alone(tmp_path / "s", tmp_path / "out"),
        ):
            pass
        saved(tmp_path / "s")
        with pytest.warns(PlaitWarning, match="of another tuning"):
            WorkingState(tmp_path / "s", "another")
        assert [p.name for p in (tmp_path / "s").iterdir()] == ["lock"]
    assert not (tmp_path / "s").exists()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "s").symlink_to("elsewhere")
    with pytest.raises(OutputError, match="s is a link"), alone(tmp_path / "s", tmp_path / "out"):
        pass


def test_a_place_that_cannot_be_made_is_named_by_the_output_that_was_asked_for(tmp_path, monkeypatch):
    def refuse(*args: object, **others: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with (
        pytest.raises(OutputError, match=r"/out cannot be written: Read-only file system\. Choose another output\."),
        alone(tmp_path / ".out.tuning", tmp_path / "out"),
    ):
        pass


@pytest.mark.parametrize("what", ["/dev/zero", "/dev/full", "nowhere", "."])
def test_a_key_that_leads_elsewhere_is_not_followed(tmp_path, what):
    folder = tmp_path / "s"
    saved(folder)
    (folder / "tuning").unlink()
    (folder / "tuning").symlink_to(what)
    with pytest.warns(PlaitWarning, match="of another tuning"):
        assert not WorkingState(folder, "key").resumed
    assert [p.name for p in folder.iterdir() if p.name != "lock"] == []


def test_a_state_of_another_tuning_is_computed_again(tmp_path):
    saved(tmp_path / "s")
    (tmp_path / "s" / "tuning").write_text("another")
    with pytest.warns(PlaitWarning, match=r"x\.safetensors has changed since it was saved, or is another tuning's"):
        assert WorkingState(tmp_path / "s", "another").load("x", as_saved) is None


@pytest.mark.parametrize(
    "fails", [lambda t, i: t["none"], lambda t, i: i["step"] + "", lambda t, i: t["a"] @ t["a"], lambda t, i: t["a"].none]
)
def test_a_state_that_means_nothing_to_its_reader_is_computed_again(tmp_path, fails):
    saved(tmp_path / "s")
    with pytest.warns(PlaitWarning, match="has changed since it was saved"):
        assert WorkingState(tmp_path / "s", "key").load("x", fails) is None
