"""Whatever happens while writing, the final name holds a whole adapter or nothing."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import plait
from plait.calibration.pipeline import _work
from plait.errors import OutputError
from plait.merging import moments
from plait.results.staging import staged
from plait.testing.cohorts import cohort
from tests.warm import run_forked

# Writes one tensor and waits: a signal finds it in the middle.
HELD = """
import signal, sys, plait
from plait.tensorfiles.writer import TensorWriter
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin without it
write = TensorWriter.write
def write_and_wait(self, *rest, **more):
    write(self, *rest, **more)
    hold()
TensorWriter.write = write_and_wait
plait.merge(sys.argv[2:], out=sys.argv[1], workers=1)
"""
# The kernel refuses to write files on, as on a full disk.
LIMITED = """
import resource, signal, sys, plait.api.files
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
plait.merge(sys.argv[2:], method="ties", out=sys.argv[1], workers=1)
"""


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    cohort([(48, 32)] * 40, [4, 4], dtype=torch.float32).save(tmp_path)
    return [tmp_path / "adapter0", tmp_path / "adapter1"]


def send_in_the_middle(number: signal.Signals, code: str, out: Path, pair: list[Path]) -> int:
    """Send a signal to a merge that has written one of its tensors; return its exit code when it has ended."""
    staging: list[Path] = []

    def send(pid: int) -> None:
        staging.extend(out.parent.glob(f".{out.name}.staging-*"))
        os.kill(pid, number)

    done = run_forked(code, str(out), *map(str, pair), when_held=send)
    assert staging, f"the tests are about a signal while the staging folder is there\n{done.stderr}"
    return done.returncode


def test_kill_in_the_middle_leaves_nothing_under_the_name(pair, tmp_path):
    out = tmp_path / "out"
    assert send_in_the_middle(signal.SIGKILL, HELD, out, pair) == -signal.SIGKILL
    assert not out.exists()
    assert list(tmp_path.glob(".out.staging-*"))
    result = plait.merge(pair, out=out)
    assert result.folder == out
    assert not list(tmp_path.glob(".out.staging-*")), "the next merge sweeps up"


def test_kill_while_replacing_leaves_the_old_adapter(pair, tmp_path):
    out = tmp_path / "out"
    plait.merge(pair, out=out, scale=2)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    forced = HELD.replace("workers=1", "workers=1, force=True")
    assert send_in_the_middle(signal.SIGKILL, forced, out, pair) == -signal.SIGKILL
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_interrupt_removes_the_staging_folder(pair, tmp_path):
    out = tmp_path / "out"
    assert send_in_the_middle(signal.SIGINT, HELD, out, pair) != 0
    assert not out.exists()
    assert not list(tmp_path.glob(".out.staging-*"))


def test_full_disk(pair, tmp_path):
    out = tmp_path / "out"
    done = run_forked(LIMITED, str(out), *map(str, pair))
    assert done.returncode != 0
    assert "OutputError" in done.stderr
    assert "cannot be written" in done.stderr
    assert not out.exists()
    assert not list(tmp_path.glob(".out.staging-*"))


def test_a_disk_that_fills_while_moments_are_written(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(moments, "write_tensors", full)
    with pytest.raises(OutputError, match=r"a\.safetensors cannot be written: No space left on device"):
        plait.save_moments(tmp_path / "a.safetensors", {"m": torch.eye(2)})
    with (
        pytest.raises(OutputError, match="out cannot be written: No space left on device"),
        _work(tmp_path / "out", force=False),
    ):
        full()
    with pytest.raises(FileNotFoundError), _work(tmp_path / "out", force=False):  # of something that is read
        raise FileNotFoundError(errno.ENOENT, "No such file", str(tmp_path / "rows.jsonl"))
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_said_before_any_work(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000, total=2000))
    with pytest.raises(OutputError, match=r"needs .* kB, .* 1.0 kB free"):
        plait.merge(pair, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_failure_removes_the_staging_folder(tmp_path):
    def write_half() -> None:
        with staged(tmp_path / "out", force=False) as place:
            (place / "half").write_text("x")
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        write_half()
    assert list(tmp_path.iterdir()) == []


def test_files_are_readable_as_the_umask_says(pair, tmp_path):
    before = os.umask(0o022)
    try:
        result = plait.merge(pair, out=tmp_path / "out")
    finally:
        os.umask(before)
    for path in result.folder.rglob("*"):
        assert path.stat().st_mode & 0o444 == 0o444, path
