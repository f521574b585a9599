"""Whatever happens while writing, the final name holds a whole adapter or nothing."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import plait
from plait.errors import OutputError
from plait.merging.staging import staged
from plait.testing.cohorts import cohort

MERGE = "import sys, plait; plait.merge(sys.argv[2:], method='ties', out=sys.argv[1], workers=1)"
# says when it has begun to write, and then writes slowly, so that a signal finds it in the middle
SLOW = """
import signal, sys, time, plait
from plait.adapters.tensorwriter import TensorWriter
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin without it
write = TensorWriter.write
def slowly(self, *rest, **more):
    print("writing", flush=True)
    time.sleep(0.05)
    write(self, *rest, **more)
TensorWriter.write = slowly
plait.merge(sys.argv[2:], out=sys.argv[1], workers=1)
"""


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    cohort([(48, 32)] * 40, [4, 4], dtype=torch.float32).save(tmp_path)
    return [tmp_path / "adapter0", tmp_path / "adapter1"]


def start(code: str, out: Path, pair: list[Path], **more: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, str(out), *map(str, pair)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)  # type: ignore[call-overload]


def test_kill_in_the_middle_leaves_nothing_under_the_name(pair, tmp_path):
    out = tmp_path / "out"
    process = start(SLOW, out, pair)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    left = list(tmp_path.glob(".out.staging-*"))
    assert left, "the test is about a process killed while its staging folder stood"
    result = plait.merge(pair, out=out)
    assert result.folder == out
    assert not list(tmp_path.glob(".out.staging-*")), "the next merge sweeps up"


def test_kill_while_replacing_leaves_the_old_adapter(pair, tmp_path):
    out = tmp_path / "out"
    before = plait.merge(pair, out=out).record
    process = start(SLOW.replace("workers=1", "workers=1, force=True"), out, pair)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert plait.Adapter.open(out, "old").sha256()
    assert before.seconds >= 0


def test_interrupt_removes_the_staging_folder(pair, tmp_path):
    out = tmp_path / "out"
    process = start(SLOW, out, pair)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert not out.exists()
    assert not list(tmp_path.glob(".out.staging-*"))


def test_full_disk(pair, tmp_path):
    """A limit on file sizes makes the kernel refuse to write on, as a full disk does."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    out = tmp_path / "out"
    process = start(MERGE, out, pair, preexec_fn=limit)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "OutputError" in stderr
    assert "cannot be written" in stderr
    assert not out.exists()
    assert not list(tmp_path.glob(".out.staging-*"))


def test_too_little_space_is_said_before_any_work(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OutputError, match=r"needs .* MB, .* MB free"):
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
