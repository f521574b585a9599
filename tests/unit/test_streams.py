"""Streams that are closed, full or without Unicode, signals, and reprs: no traceback, the right exit code, a few lines."""

from __future__ import annotations

import errno
import io
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest

import plait
from plait.cli import main as command
from plait.cli.console import ProgressBars, err, out
from plait.cli.stopping import Stopped, noting_on_stop, stoppable
from plait.cli.streams import guarded
from plait.errors import PlaitError
from plait.results.staging import staged
from tests.command_line import exit_code

DEMO = Path(__file__).parents[2] / "examples" / "demo" / "adapters"
PAIR = [f"sentiment={DEMO / 'sentiment'}", f"langid={DEMO / 'langid'}"]


class Full(io.TextIOWrapper):
    """A stream that cannot be written."""

    def __init__(self, number: int) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8")
        self.number = number

    def write(self, text: str) -> int:
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize(
    ("number", "code", "message"), [(errno.ENOSPC, 1, "are complete"), (errno.EPIPE, 141, ""), (errno.EBADF, 1, "complete")]
)
def test_a_result_stays_when_stdout_cannot_be_written(monkeypatch, capsys, tmp_path, number, code, message):
    monkeypatch.setattr(sys, "stdout", Full(number))
    assert exit_code("compress", DEMO / "langid", "--rank", 2, "-o", tmp_path / "out") == code
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown
    assert (tmp_path / "out" / "plait.lock").is_file()


def test_a_closed_stdout_is_silence(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stdout", None)
    assert exit_code("compress", DEMO / "langid", "--rank", 2, "-o", tmp_path / "out") == 0
    assert (tmp_path / "out" / "plait.lock").is_file()


def test_a_full_stderr_ends_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stderr", Full(errno.ENOSPC))
    assert exit_code("compress", DEMO / "langid", "--rank", 2, "-o", tmp_path / "out") == 0


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["methods"], ["methods", "ties"], ["methods", "dc_merge"], ["--help"], ["merge", "--help"], ["compress", "--help"],
        ["eval", "--help"], ["sft", "--help"], ["train", "--help"], ["inspect", *PAIR], ["inspect", *PAIR, "--json"],
        ["merge", *PAIR, "--method", "ties", "--dry-run"], ["merge", "nothing-here-γ", "-o", "x"],
    ],
)  # fmt: skip
def test_no_terminal_is_too_simple(monkeypatch, encoding, arguments):
    raw = io.BytesIO(), io.BytesIO()
    for name, stream in zip(("stdout", "stderr"), raw, strict=True):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(stream, encoding=encoding, errors="strict", write_through=True))
    assert exit_code(*arguments) == (2 if "-o" in arguments else 0)
    shown = raw[0].getvalue().decode(encoding) + raw[1].getvalue().decode(encoding)
    assert shown
    assert "Traceback" not in shown


def test_symbols_in_plain_letters(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    with guarded():
        out().print("γ → ‖ΔW‖² é \udcff 模", markup=False)
    assert raw.getvalue().decode("ascii").strip() == "gamma -> ||delta W||2 e \\udcff \\u6a21"


def test_a_terminal_is_not_commanded(capsys):
    with guarded():
        err().print("\x1b[2J\x1b]0;title\x07 \u202eevil \x9b", markup=False)
        err().print("[/no] [bold")
    shown = capsys.readouterr().err
    assert not set(shown) & set("\x1b\x07\u202e\x9b")
    assert "[/no] [bold" in shown


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_clears_away_and_says_what_is_left(monkeypatch, capsys, tmp_path, name, code):
    asked = getattr(signal, name)

    def work(arguments: list[str]) -> None:
        with staged(tmp_path / "out", force=False) as place:
            (place / "half").write_text("")
            os.kill(os.getpid(), asked)
            time.sleep(30)
            pytest.fail("the signal did not end the work")

    monkeypatch.setattr(command, "command_tree", lambda: work)
    monkeypatch.setattr(command, "_translated", list)
    # a job in the background, or under nohup, begins with some of them ignored
    before = signal.signal(asked, signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL)
    try:
        assert exit_code("merge") == code
    finally:
        signal.signal(asked, before)
    assert list(tmp_path.iterdir()) == []
    message = " ".join(capsys.readouterr().err.split())
    assert message.startswith("stopped" if name == "SIGINT" else f"stopped by {name}")
    assert message.endswith("out was not written. The same command starts from the beginning.")


def test_a_command_that_is_stopped_after_it_has_written_says_so(monkeypatch, capsys, tmp_path):
    def work(arguments: list[str]) -> None:
        with staged(tmp_path / "out", force=False) as place:
            (place / "weights").touch()
        raise Stopped(signal.SIGTERM)

    monkeypatch.setattr(command, "command_tree", lambda: work)
    monkeypatch.setattr(command, "_translated", list)
    assert exit_code("merge") == 143
    assert capsys.readouterr().err == f"stopped by SIGTERM\nWritten completely: {tmp_path / 'out'}.\n"


def test_a_command_that_continues_does_not_start_from_the_beginning(monkeypatch, capsys, tmp_path):
    def work(arguments: list[str]) -> None:
        with noting_on_stop(lambda: "Steps are kept; the same command continues."), staged(tmp_path / "out", force=False):
            raise Stopped(signal.SIGTERM)

    monkeypatch.setattr(command, "command_tree", lambda: work)
    monkeypatch.setattr(command, "_translated", list)
    assert exit_code("tune") == 143
    message = " ".join(capsys.readouterr().err.split())
    assert message.endswith("out was not written. Steps are kept; the same command continues.")


@pytest.mark.parametrize("wrapper", [ValueError, PlaitError])
def test_a_signal_stays_one_whatever_a_library_makes_of_it(wrapper):
    """pydantic and the tokenizers turn everything that is raised inside of them into errors of their own."""

    def load() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)
        except BaseException as error:
            raise wrapper("the model cannot be loaded") from error

    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(Stopped) as caught, stoppable():
            load()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert caught.value.code == 143


def test_signals_that_the_caller_ignores_stay_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stoppable():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_is_kept_is_said():
    with pytest.raises(Stopped) as caught, noting_on_stop(lambda: "three are kept"):
        raise Stopped(signal.SIGTERM)
    assert caught.value.__notes__ == ["three are kept"]


def test_reprs_are_a_few_lines(tmp_path):
    merged = plait.merge(dict(pair.split("=") for pair in PAIR), out=tmp_path / "out")
    for value in (merged, merged.plan, merged.record, plait.inspect([str(DEMO / "langid")])):
        assert len(repr(value)) < 1500
        assert repr(value).count("\n") < 15
        assert repr(value).startswith(f"{type(value).__name__}(")
    assert "210 × ModuleRecord" in repr(merged.record)
    assert "method='linear'" in str(merged.plan)


def test_a_stage_that_ends_early_says_how_much_was_done(capsys) -> None:
    progress = ProgressBars()
    for done in (600, 75):
        progress.start("trial 5", 600, "examples")
        progress.advance(done)
        progress.finish()
    lines = capsys.readouterr().err.splitlines()
    assert [re.sub(r"[\d.]+ s$", "0 s", line) for line in lines] == [
        "trial 5: 600 examples in 0 s",
        "trial 5: 75 of 600 examples in 0 s",
    ]
