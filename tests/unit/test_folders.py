"""Only what lies in a folder is opened: no link out of it, no pipe, no name that climbs."""

from __future__ import annotations

import os

import pytest

from plait.errors import AdapterError, OutputError, ReportError
from plait.evaluation.card import put_results
from plait.folders import OutsideError, entries, file_in, file_name_problem, open_in
from plait.reports.reading import read_report
from plait.results.checks import check_files
from plait.results.lock import read_lock
from plait.verification.public import public_copy
from tests.locks import write_lock


@pytest.fixture
def secret(tmp_path):
    file = tmp_path / "elsewhere" / "secret"
    file.parent.mkdir()
    file.write_text("TOPSECRET")
    return file


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "here" / "heads").mkdir(parents=True)
    (tmp_path / "here" / "a.json").write_text("{}")
    (tmp_path / "here" / "heads" / "b.json").write_text("{}")
    return tmp_path / "here"


@pytest.mark.parametrize(
    "name",
    ["", "/etc/passwd", "../x", "a/../../x", "a\\b", "C:x", "c:/x", "a//b", "a/", ".", "./a", "a\0b", "..\\x", "a" * 256],
)
def test_names_that_are_not_of_a_file_in_a_folder(folder, name):
    assert file_name_problem(name)
    with pytest.raises(OutsideError):
        file_in(folder, name)
    given = {"path": "./a", "repo": None, "commit": None, "files": {name: "0" * 64}}
    for changes in ({"outputs": {name: "0" * 64}}, {"inputs": {"a": given}}):
        write_lock(folder, **changes)
        with pytest.raises(AdapterError, match=r"not a lock that can be read|NUL"):
            read_lock(folder)


def test_names_of_files():
    assert [file_name_problem(n) for n in ("a", "heads/a/heads.safetensors", "..a", "a..b", "模型.json", "a b")] == [None] * 6


def _links(folder, secret):
    """Every way out of a folder, by the name that it has there."""
    (folder / "straight").symlink_to(secret)
    (folder / "relative").symlink_to(os.path.relpath(secret, folder))
    (folder / "first").symlink_to("straight")  # a link to a link
    (folder / "sub").symlink_to(secret.parent)  # a folder
    (folder / "circle").symlink_to("circle")
    os.mkfifo(folder / "pipe")
    return ["straight", "relative", "first", "sub/secret", "circle", "pipe", "heads"]


def test_what_is_not_a_file_of_the_folder_is_never_opened(folder, secret):
    for name in _links(folder, secret):
        with pytest.raises(OutsideError):
            open_in(folder, name)
    with pytest.raises(FileNotFoundError):
        open_in(folder, "nothing")
    (folder / "inner").symlink_to("heads/b.json")
    with open_in(folder, "inner") as file:
        assert file.read() == b"{}"
    assert {"sub", "pipe", "heads/b.json"} <= set(entries(folder))
    assert "sub/secret" not in set(entries(folder))


def test_a_folder_that_is_a_link_is_as_its_user_named_it(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    assert file_in(tmp_path / "link", "a.json") == folder / "a.json"


def test_a_snapshot_of_the_hub_has_its_files_among_the_blobs(tmp_path, secret):
    snapshot = tmp_path / "models--org--name" / "snapshots" / ("0" * 40)
    blobs = tmp_path / "models--org--name" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "abc").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    (snapshot / "out").symlink_to(secret)
    assert file_in(snapshot, "config.json") == blobs / "abc"
    with pytest.raises(OutsideError):
        file_in(snapshot, "out")
    (blobs / "abc").unlink()
    blobs.rmdir()
    blobs.symlink_to(secret.parent)  # blobs that are a way out themselves
    (snapshot / "secret").symlink_to("../../blobs/secret")
    with pytest.raises(OutsideError):
        file_in(snapshot, "secret")


def test_a_result_with_ways_out_is_not_hashed_through_them(folder, secret):
    names = [n for n in _links(folder, secret) if n != "heads"]
    lock = read_lock(write_lock(folder, outputs=dict.fromkeys(names, "0" * 64)))
    states = {f.name: f.state for f in check_files(folder, lock)}
    assert {states[n] for n in names} == {"outside"}


@pytest.mark.parametrize("name", ["README.md", "summary.json", "merge_metadata.json"])
def test_what_a_lock_does_not_hash_is_not_published_through_a_link(folder, secret, name):
    lock = read_lock(write_lock(folder))
    (folder / name).symlink_to(secret)
    with pytest.raises(OutputError, match=f"{name} cannot be read"), public_copy(folder, lock):
        pass


def test_a_lock_that_is_a_link_is_refused(folder, tmp_path, secret):
    write_lock(folder)
    (folder / "plait.lock").rename(secret)
    (folder / "plait.lock").symlink_to(secret)
    with pytest.raises(AdapterError, match="outside the folder"):
        read_lock(folder)
    with pytest.raises(ReportError, match="outside the folder"):
        read_report([folder])


def test_results_are_not_put_into_a_card_elsewhere(folder, secret):
    (folder / "README.md").symlink_to(secret)
    with pytest.raises(OutputError, match="outside the folder"):
        put_results(folder, None)  # type: ignore[arg-type]
    assert secret.read_text() == "TOPSECRET"
