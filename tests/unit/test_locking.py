"""One process at a time in a folder; and everything but that without `flock`."""

from __future__ import annotations

import ast
import errno
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from plait.errors import OutputError
from plait.notices import PlaitWarning
from plait.results import locking
from plait.results.locking import lock_holder, locked
from plait.results.staging import held
from tests.adapters_on_disk import layers, write_adapter
from tests.every import every

SOURCE = Path(locking.__file__).parent


@pytest.fixture
def file(tmp_path):
    return tmp_path / "made" / "lock"


def test_one_at_a_time(file):
    assert lock_holder(file, "work is done there") is None
    message = rf"made is in use by process {os.getpid()} on \S+ since .*: work is done there. Wait for it, stop it, or choose"
    with locked(file, "mine"):
        with pytest.raises(OutputError, match=message), locked(file, "work is done there"):
            pass
        assert (lock_holder(file, "work is done there") or "").startswith(f"{file.parent} is in use by process")
    assert lock_holder(file, "work is done there") is None
    with locked(file, "mine"):
        pass


def test_on_a_full_disk_it_holds_without_a_name(file, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, ExitStack() as mine:
        patch.setattr(os, "write", full)
        mine.enter_context(locked(file, "mine"))
        with pytest.raises(OutputError, match="made is in use by another process: work"), locked(file, "work"):
            pass


def test_it_is_waited_for(file, monkeypatch):
    with ExitStack() as other:
        other.enter_context(locked(file, "mine"))
        monkeypatch.setattr(locking.time, "sleep", lambda _: other.close())
        with locked(file, "mine", patience=1000):
            assert lock_holder(file, "mine")


def test_a_file_that_was_removed_meanwhile_is_no_lock(file, monkeypatch):
    """The one who held it takes it away at the end; who had it open by then holds nothing."""
    lock = locking._lock
    removed = []

    def late(handle):
        if not removed:
            removed.append(file.unlink())
            file.touch()
        return lock(handle)

    monkeypatch.setattr(locking, "_lock", late)
    with locked(file, "mine") as handle:
        assert os.fstat(handle).st_ino == file.stat().st_ino


def test_a_child_that_inherits_it_holds_it_too(file):
    with locked(file, "mine") as handle:
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(handle,))
    assert lock_holder(file, "mine")
    child.communicate(b"\n")
    assert lock_holder(file, "mine") is None


def test_a_folder_that_cannot_be_made(file):
    file.parent.write_text("")
    with pytest.raises(OutputError, match="made cannot be written: File exists"), locked(file, "mine"):
        pass


def test_a_file_system_without_locks_is_announced(file, monkeypatch):
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    file.parent.mkdir()
    monkeypatch.setattr("fcntl.flock", none)
    with pytest.warns(PlaitWarning, match=r"file system without locks \(No locks available\)"), held(file.parent):
        pass
    with pytest.raises(OutputError, match="No locks available"), locked(file, "mine"):
        pass
    with pytest.raises(OutputError, match="No locks available"):
        lock_holder(file, "mine")


def test_without_flock_nobody_is_kept_out(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with pytest.warns(PlaitWarning, match="no file locks"):
        assert lock_holder(file, "mine") is None
    with locked(file, "mine") as handle, locked(file, "mine"):  # announced once
        assert handle is None
        assert lock_holder(file, "mine") is None
        assert file.parent.is_dir()


def test_merging_needs_no_flock(tmp_path):
    for name in ("a", "b"):
        write_adapter(tmp_path / name, layers(1, {"q_proj": (4, 6)}), seed=ord(name))
    code = "import sys; sys.modules['fcntl'] = None; import plait; plait.merge({'a': './a', 'b': './b'}, out='m')"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert (tmp_path / "m" / "adapter_model.safetensors").is_file()


@every("path", sorted(SOURCE.rglob("*.py")))
def test_modules_of_one_system_are_imported_where_they_are_used(path):
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    assert not found & {"fcntl", "grp", "msvcrt", "pwd", "resource", "termios", "winreg"}
