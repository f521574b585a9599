"""Where results may be written, and what `--force` may take away."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from plait.errors import OutputError
from plait.evaluation.workspace import check_workspace
from plait.reports.figures import write_figures
from plait.reports.pipeline import page_problem
from plait.reports.reading import read_report
from plait.results import staging
from plait.results.disk import check_not_an_input, write_failure
from plait.results.staging import held, output_problem, scratch, staged
from plait.results.writing import write_text_atomic
from plait.search.pipeline import _study_folder
from plait.search.request import check_place
from plait.training.folder import folder_problem
from plait.training.preflight import check_output, resolve_phases
from tests.evaluated import evaluation, run_folder, task
from tests.every import every
from tests.locks import write_lock


def result(folder: Path, text: str = "old") -> Path:
    (folder / "heads" / "a").mkdir(parents=True)
    (folder / "weights").write_text(text)
    (folder / "heads" / "a" / "h").write_text(text)
    return write_lock(folder)


def write(folder: Path, *, force: bool) -> None:
    with staged(folder, force=force) as place:
        result(place / "x", "new")
        for path in (place / "x").iterdir():
            path.rename(place / path.name)
        (place / "x").rmdir()


def files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()}


RESULT = {"weights", "heads/a/h", "plait.lock"}


@pytest.mark.parametrize("name", ["notes.txt", "heads/a/notes.txt", "deep/er/notes.txt", ".git/HEAD", ".env"])
def test_force_keeps_what_no_lock_names(tmp_path, name):
    out = result(tmp_path / "out")
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).write_text("mine")
    with pytest.raises(OutputError, match=f"also holds what plait did not write: '{name}'"):
        write(out, force=True)
    assert (out / name).read_text() == "mine"
    assert (out / "weights").read_text() == "old"


def test_a_link_to_a_folder_in_a_result_is_its_users(tmp_path):
    out = result(tmp_path / "out")
    (tmp_path / "data").mkdir()
    (out / "data").symlink_to(tmp_path / "data")
    assert "'data'" in (output_problem(out, force=True) or "")


@pytest.mark.parametrize("lock", ["", "{}", "[]", "null", '{"version": 1}', "\0", "[" * 5000])
def test_a_lock_that_says_nothing_makes_no_folder_plaits(tmp_path, lock):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "plait.lock").write_text(lock)
    (tmp_path / "out" / "thesis").write_text("mine")
    with pytest.raises(OutputError, match="is not replaced, since what plait wrote there is not known"):
        write(tmp_path / "out", force=True)
    assert files(tmp_path / "out") == {"plait.lock", "thesis"}


def test_a_result_is_replaced(tmp_path):
    out = result(tmp_path / "out")
    (out / ".cache" / "huggingface").mkdir(parents=True)
    (out / ".cache" / "huggingface" / "note").write_text("of a download")
    write(out, force=True)
    assert files(out) == RESULT
    assert (out / "weights").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_many_others_are_counted(tmp_path):
    out = result(tmp_path / "out")
    for i in range(9):
        (out / f"n{i}").write_text("")
    assert "'n0', 'n1', 'n2', 'n3', 'n4', 'n5' and 3 more" in (output_problem(out, force=True) or "")


def test_places_that_cannot_be(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path)
    for place in (
        "/",
        "~/out",
        "~",
        tmp_path / "file",
        tmp_path / "link",
        tmp_path / "file" / "out",
        tmp_path / ("x" * 300),
        "a\0b",
    ):
        for force in (True, False):
            assert output_problem(Path(place), force=force), place
    monkeypatch.chdir(tmp_path)
    assert "exists already" in (output_problem(Path(), force=False) or "")


def test_odd_names_are_names(tmp_path):
    for name in ("with\nnewline", "[*]", "x" * 250, "模" * 80):
        write(tmp_path / name, force=False)
        write(tmp_path / name, force=True)
        assert files(tmp_path / name) == RESULT
    assert len(list(tmp_path.iterdir())) == 4


@pytest.fixture(params=["mount", "working directory", "parent without permission"])
def fixed(request, tmp_path, monkeypatch):
    """A folder that cannot be exchanged for another."""
    out = tmp_path / "volume"
    out.mkdir()
    if request.param == "mount":
        mounts = tmp_path / "mountinfo"
        mounts.write_text(f"36 35 98:0 / {str(out).replace('v', chr(92) + '166')} rw - ext4 none rw\n")
        monkeypatch.setattr(staging, "_MOUNTS", mounts)
    elif request.param == "working directory":
        monkeypatch.chdir(out)
    else:
        access = os.access
        monkeypatch.setattr(os, "access", lambda p, mode: Path(p) != tmp_path and access(p, mode))
    return out


def test_a_folder_that_stays_is_filled(fixed):
    number = fixed.stat().st_ino
    (fixed / "lost+found").mkdir()
    write(fixed, force=False)
    assert files(fixed) == RESULT
    with pytest.raises(OutputError, match="exists already"):
        write(fixed, force=False)
    (fixed / "notes").write_text("mine")
    with pytest.raises(OutputError, match="'notes'"):
        write(fixed, force=True)
    (fixed / "notes").unlink()
    write(fixed, force=True)
    assert (fixed / "weights").read_text() == "new"
    assert files(fixed) == RESULT
    assert fixed.stat().st_ino == number


@pytest.mark.parametrize(("number", "advice"), [(errno.ENOSPC, "Free some space, or choose"), (errno.EROFS, "Choose")])
def test_a_file_system_that_fails_while_an_output_is_made(tmp_path, monkeypatch, number, advice):
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    why = rf"{os.strerror(number)}( \(.*weights\))?"
    with pytest.raises(OutputError, match=rf"out cannot be written: {why}\. Nothing was left there\. {advice} another place\."):
        write(tmp_path / "out", force=False)
    assert list(tmp_path.iterdir()) == []
    result(tmp_path / "old")
    with pytest.raises(OutputError, match=rf"old cannot be written: {why}\. What was there is as it was\. {advice}"):
        write(tmp_path / "old", force=True)
    assert (tmp_path / "old" / "weights").read_text() == "old"


@pytest.mark.parametrize("name", ["in/adapter", "out.txt", "in"])
def test_an_input_that_fails_meanwhile_is_not_the_output(tmp_path, name):
    """It may be next to the output, and may not be read for reasons of its own."""
    error = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / name))
    with pytest.raises(PermissionError), staged(tmp_path / "out", force=False):
        raise error
    assert list(tmp_path.iterdir()) == []
    for own in ("out/x", ".out.staging-1/x"):
        error = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / own))
        assert write_failure(error, tmp_path / "out", tmp_path / ".out.staging-1")


def test_what_is_in_a_folder_that_cannot_be_listed_is_not_nothing(tmp_path, monkeypatch):
    out, scandir = result(tmp_path / "out"), os.scandir
    (out / "heads" / "b").mkdir()

    def fail(place: object) -> object:
        if Path(str(place)).name == "b":
            raise PermissionError(errno.EACCES, "Permission denied", str(place))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", fail)
    with pytest.raises(OutputError, match=r"out cannot be written: Permission denied"):
        write(out, force=True)
    assert (out / "weights").read_text() == "old"


def test_a_study_that_could_not_begin_leaves_no_folder(tmp_path):
    with pytest.raises(OutputError, match="full"), _study_folder(tmp_path / "study"):
        raise OutputError("the disk is full.")
    assert list(tmp_path.iterdir()) == []
    with _study_folder(tmp_path / "study"):
        (tmp_path / "study" / "study.db").touch()
    assert (tmp_path / "study" / "study.db").exists()


def test_such_a_folder_is_filled_by_one_process_at_a_time(fixed):
    with held(fixed), pytest.raises(OutputError, match="volume was written by another process in the meantime"):
        write(fixed, force=True)
    assert list(fixed.iterdir()) == []
    write(fixed, force=False)


@pytest.mark.parametrize("moment", ["before it is moved aside", "before the new one has its name"])
def test_two_that_replace_one_result(tmp_path, monkeypatch, moment):
    """The other one's stays complete, and nothing of the old one."""
    out, rename = result(tmp_path / "out"), Path.rename

    def late(self, target):
        if self == out and moment.startswith("before it"):
            rename(out, tmp_path / "gone")
        if Path(target) == out and self.name.endswith(tuple("0123456789abcdef")) and moment.endswith("name"):
            result(out, "other")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", late)
    with pytest.raises(OutputError, match="out was written by another process in the meantime"):
        write(out, force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["gone" if moment.startswith("before it") else "out"]
    assert moment.startswith("before it") or (out / "weights").read_text() == "other"


def test_a_file_that_another_process_has_written_is_not_replaced(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.EPERM, "no links here")

    for links in (True, False):
        file = tmp_path / f"{links}.html"
        with monkeypatch.context() as patch:
            if not links:
                patch.setattr(os, "link", none)
            write_text_atomic(file, "first", replace=False)
            with pytest.raises(OutputError, match=r"html was written by another process in the meantime"):
                write_text_atomic(file, "second", replace=False)
        assert file.read_text() == "first"
        write_text_atomic(file, "third")
        assert file.read_text() == "third"
    assert len(list(tmp_path.iterdir())) == 2


def test_figures_appear_together_or_not_at_all(tmp_path, monkeypatch):
    report = read_report([run_folder(tmp_path / "run", evaluation(task("a", 0.5)))])
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, path, **_: Path(path).write_text("drawn"))
    with held(make(tmp_path / "figures")), pytest.raises(OutputError, match="figures is being written by another process"):
        write_figures(report, tmp_path / "figures", force=False)
    drawn = write_figures(report, tmp_path / "figures", force=False)
    assert sorted(drawn) == sorted((tmp_path / "figures").iterdir())
    with pytest.raises(OutputError, match=r"figures has .* already"):
        write_figures(report, tmp_path / "figures", force=False)

    def full(self, path, **_):
        if Path(path).suffix == ".png":
            raise OSError(errno.ENOSPC, "No space left on device")
        Path(path).write_text("half")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    with pytest.raises(OutputError, match="figures cannot be written: No space left on device"):
        write_figures(report, tmp_path / "figures", force=True)
    assert {p.read_text() for p in (tmp_path / "figures").iterdir()} == {"drawn"}


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_an_output_in_the_folder_of_an_input(tmp_path):
    read = {"adapter 'a'": make(tmp_path / "a"), "adapter 'b'": tmp_path / "b.safetensors"}
    check_not_an_input(tmp_path / "b", read, command="merge")
    (tmp_path / "link").symlink_to("a")
    for place in ("a/out", "a/deep/out", "link/out"):
        message = rf"{place} is in the folder of an input of this merge \(adapter 'a'\)"
        with pytest.raises(OutputError, match=message):
            check_not_an_input(tmp_path / place, read, command="merge")


def test_a_failure_leaves_such_a_folder_as_it_was(fixed):
    def fail() -> None:
        with staged(fixed, force=False) as place:
            assert place.parent == fixed
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert list(fixed.iterdir()) == []


def test_a_kill_while_such_a_folder_is_filled_is_cleared_away(fixed, monkeypatch):
    """The process ends between two of its files: no lock is there, and the next run needs no --force."""
    moved = []

    def move_one(source, target, *, draft=None):
        if moved:
            raise SystemExit  # and nothing is cleared away
        target.parent.mkdir(exist_ok=True)
        moved.append(source.replace(target))

    with monkeypatch.context() as patch:
        patch.setattr(staging, "_move", move_one)
        patch.setattr(staging, "_remove", lambda folder, names: None)
        patch.setattr(Path, "unlink", lambda self, **_: None)
        with pytest.raises(SystemExit):
            write(fixed, force=False)
    assert len(files(fixed) & RESULT) == 1
    assert "plait.lock" not in files(fixed)
    write(fixed, force=False)
    assert files(fixed) == RESULT


def test_a_mount_point_that_nothing_told_of(tmp_path, monkeypatch):
    """The system refuses the rename: the files go up one by one."""
    (tmp_path / "out").mkdir()
    rename = Path.rename

    def busy(self, target):
        if Path(target) == tmp_path / "out":
            raise OSError(16, "Device or resource busy")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", busy)
    write(tmp_path / "out", force=False)
    assert files(tmp_path / "out") == RESULT
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_scratch_of_the_dead_goes_and_of_the_living_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(staging.tempfile, "tempdir", str(tmp_path))
    code = (
        "import os, sys, tempfile\nfrom plait.results.staging import scratch\n"
        f"tempfile.tempdir = {str(tmp_path)!r}\n"
        "with scratch('push') as place:\n    print(place.name, flush=True)\n    sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        held = process.stdout.readline().strip()
        (tmp_path / "plait-push-theirs").mkdir()
        with scratch("push") as place:
            assert {p.name for p in tmp_path.iterdir()} == {held, place.name, "plait-push-theirs"}
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (tmp_path / held).exists()
    with scratch("push") as place:
        assert {p.name for p in tmp_path.iterdir()} == {place.name, "plait-push-theirs"}


def _workspace(place: Path) -> str:
    with pytest.raises(OutputError) as caught:
        check_workspace(place)
    return str(caught.value)


#: What every command asks of the place that it is to write to: a folder, a study, a training, a run, a page, a workspace.
ASKED = {
    "merge": lambda place: output_problem(place, force=True),
    "sweep": lambda place: _refused(lambda: check_place(place)),
    "train": lambda place: _refused(lambda: check_output(place)),
    "sft": lambda place: folder_problem(place, None, force=True),
    "report": lambda place: page_problem(place, force=True),
    "eval": _workspace,
}


def _refused(check: Callable[[], object]) -> str:
    with pytest.raises(OutputError) as caught:
        check()
    return str(caught.value)


@pytest.fixture
def links(tmp_path, monkeypatch):
    """A link to itself, and one to the root of the file system, in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "link").symlink_to("/")


@every("command", ASKED)
@every(
    "place, message",
    [
        ("x" * 300, "File name too long"),
        ("/", "is the root of the file system"),
        ("link", "is the root of the file system"),
        ("~/x", "'~' is not expanded here"),
        ("~nobody", "'~' is not expanded here"),
        ("a\0b", "NUL"),
        ("loop/x", "Too many levels of symbolic links"),
    ],
)
def test_no_command_writes_to_what_is_no_place(links, command, place, message):
    assert message in (ASKED[command](Path(place)) or "")


def test_a_training_does_not_go_into_its_base(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    plan = SimpleNamespace(out=tmp_path, base=str(tmp_path), origins=SimpleNamespace(at=lambda *_: nullcontext()))
    with pytest.raises(OutputError, match="is the base model's folder"):
        resolve_phases(plan)


def test_a_folder_that_was_there_stays_and_the_error_is_the_blocks(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    with pytest.raises(OutputError, match="full"), _study_folder(mine):
        raise OutputError("full")
    assert list(mine.iterdir()) == []


def test_a_folder_that_is_gone_hides_no_error(tmp_path):
    def lose() -> None:
        with _study_folder(tmp_path / "lost"):
            shutil.rmtree(tmp_path / "lost")
            raise OutputError("full")

    with pytest.raises(OutputError, match="full"):
        lose()


def test_a_link_is_called_one(tmp_path):
    """A result takes the place of what is there: that of the link would be taken, and the folder left as it is."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "to-folder").symlink_to(tmp_path / "folder")
    (tmp_path / "to-file").symlink_to(tmp_path / "file")
    (tmp_path / "to-nothing").symlink_to(tmp_path / "nothing")
    for problem in (
        output_problem(tmp_path / "to-folder", force=True),
        folder_problem(tmp_path / "to-folder", None, force=True),
    ):
        assert (
            f"is a symbolic link, and a result takes the place of what is there: give the folder itself, {tmp_path}" in problem
        )
    for name, words in {
        "to-file": f"to {tmp_path}/file, which is not a folder",
        "to-nothing": "nothing, where nothing is",
    }.items():
        assert words in output_problem(tmp_path / name, force=True)
        with pytest.raises(OutputError, match=f"{name} is a symbolic link to .*{words.split()[-1]}"):
            check_output(tmp_path / name)


def test_a_folder_below_a_link_to_a_folder_is_written(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    write(tmp_path / "link" / "out", force=False)
    assert files(tmp_path / "folder" / "out") == RESULT
