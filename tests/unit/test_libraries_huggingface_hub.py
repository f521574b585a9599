"""What plait expects of huggingface_hub beyond its documented use. A test that fails names what a release has changed."""

from __future__ import annotations

from inspect import signature
from types import SimpleNamespace

import huggingface_hub
from huggingface_hub import errors
from huggingface_hub.utils import are_progress_bars_disabled

from plait.libraries.huggingface_hub import (
    cause_of,
    fetched_sha256,
    is_of_transport,
    status_of,
    without_progress_bars,
    words_of,
)


def test_the_cache_names_large_files_by_their_sha256(tmp_path):
    blob = tmp_path / "models--org--repo" / "blobs" / ("ab" * 32)
    blob.parent.mkdir(parents=True)
    blob.write_bytes(b"x")
    place = tmp_path / "models--org--repo" / "snapshots" / "c" / "model.safetensors"
    place.parent.mkdir(parents=True)
    place.symlink_to(blob)
    assert fetched_sha256(place) == "ab" * 32


def test_a_local_folder_notes_hash_and_time_as_the_library_writes_them(tmp_path):
    from huggingface_hub._local_folder import read_download_metadata, write_download_metadata

    (tmp_path / "model.safetensors").write_bytes(b"x")
    write_download_metadata(tmp_path, "model.safetensors", commit_hash="c" * 40, etag="cd" * 32)
    assert read_download_metadata(tmp_path, "model.safetensors").etag == "cd" * 32
    assert fetched_sha256(tmp_path / "model.safetensors") == "cd" * 32


def test_a_note_that_never_ends_is_not_read(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x")
    note = tmp_path / ".cache" / "huggingface" / "download" / "model.safetensors.metadata"
    note.parent.mkdir(parents=True)
    note.symlink_to("/dev/zero")
    assert fetched_sha256(tmp_path / "model.safetensors") is None
    note.unlink()
    with note.open("wb") as file:
        file.truncate(1 << 40)
    assert fetched_sha256(tmp_path / "model.safetensors") is None


def test_failures_say_their_status_and_the_hubs_own_words():
    refused = errors.HfHubHTTPError.__new__(errors.RepositoryNotFoundError)
    refused.response, refused.server_message = SimpleNamespace(status_code=404), "no such thing"
    assert status_of(refused) == 404
    assert words_of(refused) == "no such thing"
    assert {"response", "server_message"} <= set(signature(errors.HfHubHTTPError.__init__).parameters)
    assert status_of(ValueError()) is None
    assert words_of(ValueError()) is None


def test_what_the_cache_lacks_carries_why_the_hub_was_not_asked():
    lacking = errors.LocalEntryNotFoundError("not in the cache")
    assert cause_of(lacking) is lacking
    lacking.__cause__ = ConnectionError("no network")
    assert cause_of(lacking) is lacking.__cause__


def test_failures_of_the_transport_have_one_root():
    root = errors.HfHubHTTPError.__mro__[1]
    assert root.__name__ in ("HTTPError", "RequestException"), "another transport: what is the root of its errors?"
    assert not root.__module__.startswith("huggingface_hub")
    assert is_of_transport(root("no network"))
    assert is_of_transport(ConnectionError())
    assert not is_of_transport(ValueError())


def test_bars_are_put_away_and_brought_back():
    before = are_progress_bars_disabled()
    huggingface_hub.utils.enable_progress_bars()
    with without_progress_bars():
        assert are_progress_bars_disabled()
    assert not are_progress_bars_disabled()
    if before:
        huggingface_hub.utils.disable_progress_bars()
