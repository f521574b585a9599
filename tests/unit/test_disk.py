"""Disks that are full, file systems that take no files, and what the system or a library says of them."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError

from plait.errors import OutputError
from plait.evaluation.workspace import check_workspace
from plait.results.disk import check_space, full_disk, write_failure
from plait.results.staging import output_problem
from plait.training.running import _error_context
from tests.every import every

FULL = [
    (OSError(errno.ENOSPC, "x"), "No space left on device"),
    (OSError(errno.EDQUOT, "x"), "Disk quota exceeded"),
    (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "No space left on device"),
    (Exception("Disk quota exceeded (os error 122)"), "Disk quota exceeded"),
    (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"), "torch could not write a file to"),
    (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), "torch could not write a file to"),
]


@pytest.mark.parametrize(("error", "why"), FULL)
def test_what_libraries_raise_on_a_full_disk(tmp_path, error, why):
    assert (full_disk(error) or "").startswith(why)
    with pytest.raises(OutputError, match=rf"cannot be written: {why}.* No checkpoint was saved yet"), _error_context(tmp_path):
        raise ValueError from error


def test_what_is_not_a_full_disk(tmp_path):
    for error in (ValueError("x"), OSError(errno.EIO, "x"), RuntimeError("x (os error 2)"), RuntimeError("shape")):
        assert full_disk(error) is None
        with pytest.raises(type(error)), _error_context(tmp_path):
            raise error


def test_a_failure_that_names_no_file_and_is_not_a_disks_is_not_the_outputs(tmp_path):
    reset = ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
    assert write_failure(reset, tmp_path / "out", tmp_path / ".out.staging-1") is None
    assert write_failure(OSError(errno.EIO, "Input/output error"), tmp_path / "out", tmp_path / ".out.staging-1")


@every("place", [Path("/proc/x"), Path("/proc/x/y"), Path("/sys/x")])
def test_a_file_system_that_takes_no_files(place):
    if not place.parent.exists() and not Path("/proc/self").exists():
        pytest.skip("this system has no such file systems")
    problem = output_problem(place, force=False)
    assert problem is not None
    assert problem.startswith(f"{place} cannot be written: ")


def test_names_that_are_too_long_below_folders_that_are_not_there(tmp_path):
    assert "a name in it has more than 255 bytes" in output_problem(tmp_path / "new" / ("x" * 256) / "out", force=False)
    with pytest.raises(OutputError, match="a name in it has more than 255 bytes"):
        check_workspace(tmp_path / "new" / ("x" * 256))


def test_a_file_system_of_no_size_that_takes_files(tmp_path, monkeypatch):
    """As one in memory without a bound: what is free there is not known, and not nothing."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=0, free=0))
    assert output_problem(tmp_path / "out", force=False) is None
    check_space(tmp_path / "out", 10**12, what="the result", advice="none")
    assert not list(tmp_path.iterdir()), "nothing is left of the trial"


def test_little_space_is_written_in_small_units(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=2000, free=1500))
    with pytest.raises(OutputError, match=r"the result needs 2.0 kB, .* has 1.5 kB free"):
        check_space(tmp_path / "out", 2000, what="the result", advice="none")
    with pytest.raises(
        OutputError, match=r"needs 1510 bytes, .* has 1500 bytes free\. Free some space, or choose another place\."
    ):
        check_space(tmp_path / "out", 1510, what="the result")
