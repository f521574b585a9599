"""A process that ends while a result takes its place leaves the old one or the new one complete, at every moment of it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from plait.baking.journal import open_journal
from plait.errors import OutputError
from plait.results import staging
from plait.results.lock import LOCK
from plait.results.staging import output_problem, recover, staged
from tests.locks import write_lock

NAMES = {"weights", "heads/a", LOCK}


class Ended(BaseException):
    """What a signal raises, or what nothing is done after."""


def result(folder: Path, text: str) -> Path:
    (folder / "heads").mkdir(parents=True)
    (folder / "weights").write_text(text)
    (folder / "heads" / "a").write_text(text)
    return write_lock(folder)


def contents(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()}


def text_of(folder: Path) -> set[str]:
    """What the files of a complete result hold."""
    assert contents(folder).keys() == NAMES
    return {text for name, text in contents(folder).items() if name != LOCK}


@contextmanager
def ending(at: int, *, after: bool, killed: bool) -> Iterator[list[Path]]:
    """End the process before or after a file or folder gets another name for the n-th time; offer those that got one.

    One that is killed changes no file from then on.
    """
    renamed: list[Path] = []

    def end(*_: object, **__: object) -> None:
        raise Ended

    with pytest.MonkeyPatch.context() as patch:

        def count(name: str) -> None:
            original = getattr(Path, name)

            def rename(self: Path, target: Path) -> None:
                renamed.append(self)
                number = len(renamed)
                if number != at or after:
                    original(self, target)
                if number == at:
                    for other in ("rename", "replace", "unlink", "rmdir", "mkdir", "write_text") if killed else ():
                        patch.setattr(Path, other, end)
                    if killed:
                        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
                    raise Ended

            patch.setattr(Path, name, rename)

        count("rename")
        count("replace")
        with suppress(Ended):
            yield renamed


@pytest.fixture(params=["next to it", "in it"])
def out(request, monkeypatch, tmp_path):
    """Where results are made in either way; a number follows, as there are many."""
    if request.param == "in it":
        monkeypatch.setattr(staging, "_is_fixed", lambda folder: folder.is_dir() and folder.parent.parent == tmp_path)
    return tmp_path


def places(root: Path, *, old: bool) -> Iterator[tuple[int, bool, Path]]:
    for at in range(1, 12):
        for after in (False, True):
            place = root / f"{at} {after}" / "out"
            result(place, "old") if old else place.mkdir(parents=True)
            yield at, after, place


def hidden(place: Path) -> list[str]:
    return [p.name for folder in (place.parent, place) for p in folder.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("old", [False, True])
def test_a_signal_at_any_rename(out, old):
    for at, after, place in places(out, old=old):
        before = contents(place)
        with ending(at, after=after, killed=False) as renamed, staged(place, force=old) as made:
            result(made, "new")
        assert hidden(place) == [], (at, after)
        assert contents(place) == before or text_of(place) == {"new"}, (at, after)
    assert 0 < len(renamed) < at


@pytest.mark.parametrize("old", [False, True])
def test_a_kill_at_any_rename(out, monkeypatch, old):
    monkeypatch.setattr(staging, "_alive", lambda pid: False)
    for at, after, place in places(out, old=old):
        with ending(at, after=after, killed=True) as renamed, staged(place, force=old) as made:
            result(made, "new")
        recover(place, force=True)
        finished = old or (place / LOCK).exists()
        assert hidden(place) == [staging._MARK] * (not finished and bool(contents(place))), (at, after)
        if finished:
            assert text_of(place) in ({"old"}, {"new"}), (at, after)
        if old and text_of(place) == {"old"}:
            assert "exists already" in (output_problem(place, force=False) or ""), (at, after)
            assert output_problem(place, force=True) is None
        with staged(place, force=(place / LOCK).exists()) as made:
            result(made, "newer")
        assert text_of(place) == {"newer"}
        assert hidden(place) == []
    assert 0 < len(renamed) < at


def test_an_old_result_that_came_back_is_not_replaced_without_force(out, monkeypatch):
    monkeypatch.setattr(staging, "_alive", lambda pid: False)
    place = result(out / "1" / "out", "old")
    at = 2 if staging._is_fixed(place) else 1  # the mark is renamed first
    with ending(at, after=True, killed=True), staged(place, force=True) as made:
        result(made, "new")
    assert not (place / LOCK).exists()
    with pytest.raises(OutputError, match="out exists already"), staged(place, force=False):
        pytest.fail("it is offered")
    assert text_of(place) == {"old"}


def test_a_bake_that_was_killed_while_it_replaced_a_model(out, monkeypatch):
    monkeypatch.setattr(staging, "_alive", lambda pid: False)
    for at, after, place in places(out, old=True):
        with ending(at, after=after, killed=True) as renamed, open_journal(place, force=True) as journal:
            result(journal.model, "new")
            journal.finished["weights"] = (3, "0" * 64)  # kept when it fails
            journal.publish(force=True)
        with suppress(OutputError), open_journal(place, force=True):
            pass
        assert text_of(place) in ({"old"}, {"new"}), (at, after)
    assert 0 < len(renamed) < at


def test_an_old_result_that_cannot_be_put_back_is_named(tmp_path, monkeypatch):
    place, rename = result(tmp_path / "out", "old"), Path.rename

    def once(self: Path, target: Path) -> Path:
        if Path(target) == place:
            raise PermissionError(13, "Permission denied", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", once)
    with pytest.raises(OutputError, match=r"What was there is in .*\.old\. Rename that"), staged(place, force=True) as made:
        result(made, "new")
    (aside,) = tmp_path.iterdir()
    assert text_of(aside) == {"old"}
