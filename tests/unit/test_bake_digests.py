"""sha256 of what a bake reads and writes: true, in any order of writing, and never of the same bytes twice."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import threading
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import plait
from plait.baking import digests
from plait.baking.digests import GrowingDigest
from plait.cli.main import main
from plait.libraries.huggingface_hub import fetched_sha256
from tests.adapters_on_disk import Linear, write_adapter


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_pieces_in_any_order_from_several_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "_CHUNK", 100)
    data = random.Random(0).randbytes(20_000)
    cuts = sorted({0, len(data), *random.Random(1).sample(range(len(data)), 60)})
    pieces = list(pairwise(cuts))
    for seed in range(5):
        random.Random(seed).shuffle(pieces)
        path = tmp_path / f"{seed}"
        handle = os.open(path, os.O_RDWR | os.O_CREAT)
        digest = GrowingDigest(handle)

        def work(mine: list[tuple[int, int]], digest: GrowingDigest = digest, handle: int = handle) -> None:
            for start, stop in mine:
                os.pwrite(handle, data[start:stop], start)
                digest.written(start, stop - start)
                digest.catch_up()

        threads = [threading.Thread(target=work, args=(pieces[i::3],)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert digest.finish(len(data)) == hashlib.sha256(data).hexdigest()
        os.close(handle)


def test_only_what_is_whole_from_the_start_is_hashed(tmp_path):
    """A hash that ran ahead of the writing would take the holes for data."""
    handle = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.posix_fallocate(handle, 0, 30)
    digest = GrowingDigest(handle)
    for start in (20, 0, 10):
        digest.catch_up()
        os.pwrite(handle, bytes([start + 1]) * 10, start)
        digest.written(start, 10)
    assert digest.finish(30) == hashlib.sha256(bytes([1]) * 10 + bytes([11]) * 10 + bytes([21]) * 10).hexdigest()
    os.close(handle)


def test_what_passes_in_order_is_not_read_again(tmp_path, monkeypatch):
    """Pieces that come too early are read when it is their turn; one that was hashed in passing is not."""
    data = random.Random(0).randbytes(40)
    handle = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    digest, read = GrowingDigest(handle), []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda h, buffers, at: (read.append((at, len(buffers[0]))), preadv(h, buffers, at))[1])
    for start in (0, 20, 10, 30):
        os.pwrite(handle, data[start : start + 10], start)
        digest.passing(start, memoryview(data)[start : start + 10])
        digest.written(start, 10)
    assert not read
    assert digest.finish(40) == hashlib.sha256(data).hexdigest()
    assert read == [(20, 20)]
    os.close(handle)


def test_hashing_keeps_up_with_the_writing(tmp_path):
    """What is left for the end is no second pass over the file."""
    path = tmp_path / "file"
    handle = os.open(path, os.O_RDWR | os.O_CREAT)
    digest = GrowingDigest(handle)
    os.pwrite(handle, b"x" * 1000, 0)
    digest.written(0, 1000)
    digest.catch_up()
    os.pwrite(handle, b"y" * 1000, 0)  # is not looked at again
    assert digest.finish(1000) == hashlib.sha256(b"x" * 1000).hexdigest()
    os.close(handle)


def test_a_file_of_the_hubs_cache_is_named_by_its_hash(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshots").mkdir()
    blob = tmp_path / "blobs" / ("ab" * 32)
    blob.write_bytes(b"x")
    (tmp_path / "snapshots" / "model.safetensors").symlink_to(blob)
    assert fetched_sha256(tmp_path / "snapshots" / "model.safetensors") == "ab" * 32
    small = tmp_path / "blobs" / ("ab" * 20)  # of a file that git holds
    small.write_bytes(b"x")
    assert fetched_sha256(small) is None
    elsewhere = tmp_path / ("ab" * 32)
    elsewhere.write_bytes(b"x")
    assert fetched_sha256(elsewhere) is None


@pytest.mark.parametrize(
    ("etag", "age", "known"),
    [("cd" * 32, 0, True), ("cd" * 32, -3600, True), ("cd" * 32, 3600, False), ("cd" * 20, 0, False), ("", 0, False)],
)
def test_a_download_into_a_folder_is_noted_beside_it(etag, age, known, tmp_path):
    """The note counts while the file is not younger than it."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"x")
    os.utime(path, (1_700_000_000 + age,) * 2)
    notes = tmp_path / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    assert fetched_sha256(path) is None
    (notes / "model.safetensors.metadata").write_text(f"{'0' * 40}\n{etag}\n1700000000.5\n")
    assert fetched_sha256(path) == (etag if known else None)


def test_the_note_is_the_one_that_huggingface_hub_writes(tmp_path):
    from huggingface_hub._local_folder import write_download_metadata

    (tmp_path / "model.safetensors").write_bytes(b"x")
    write_download_metadata(tmp_path, "model.safetensors", "0" * 40, "ef" * 32)
    assert fetched_sha256(tmp_path / "model.safetensors") == "ef" * 32


@pytest.fixture
def materials(tmp_path):
    """A base of two files, one of which no adapter touches."""
    (tmp_path / "base").mkdir()
    halves = {
        "model-00001-of-00002.safetensors": {"embed.weight": torch.randn(9, 8)},
        "model-00002-of-00002.safetensors": {"up.weight": torch.randn(6, 8)},
    }
    for file, tensors in halves.items():
        save_file(tensors, tmp_path / "base" / file)
    index = {"metadata": {}, "weight_map": {n: file for file, tensors in halves.items() for n in tensors}}
    (tmp_path / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "base" / "config.json").write_text('{"tie_word_embeddings": false}')
    return tmp_path / "base", write_adapter(tmp_path / "a", {"up": Linear(6, 8)}).folder


def test_a_file_that_is_copied_whole_is_hashed_once(materials, tmp_path, monkeypatch):
    base, adapter = materials
    hashed = []
    monkeypatch.setattr(digests, "sha256", lambda path: hashed.append(path.name) or sha256(path))
    out = plait.bake([adapter], base=base, out=tmp_path / "out").folder
    assert hashed == ["model-00002-of-00002.safetensors"]
    lock = json.loads((out / "plait.lock").read_text())
    assert lock["base"]["files"] == {p.name: sha256(p) for p in sorted(base.glob("*.safetensors"))}
    assert {n: lock["outputs"][n] for n in lock["base"]["files"]} == {p.name: sha256(p) for p in out.glob("*.safetensors")}


def test_a_fetched_base_is_not_hashed(materials, tmp_path, monkeypatch):
    base, adapter = materials
    known = {p.name: sha256(p) for p in base.glob("*.safetensors")}
    (tmp_path / "blobs").mkdir()
    for name, digest in known.items():
        (base / name).rename(tmp_path / "blobs" / digest)
        (base / name).symlink_to(tmp_path / "blobs" / digest)
    monkeypatch.setattr(digests, "sha256", lambda path: pytest.fail(f"{path} is hashed"))
    out = plait.bake([adapter], base=base, out=tmp_path / "out").folder
    assert json.loads((out / "plait.lock").read_text())["base"]["files"] == known


def test_a_copied_file_with_another_header_has_a_hash_of_its_own(materials, tmp_path):
    base, adapter = materials
    out = plait.bake([adapter], base=base, shard_size="200B", out=tmp_path / "out").folder
    lock = json.loads((out / "plait.lock").read_text())
    assert lock["base"]["files"] == {p.name: sha256(p) for p in sorted(base.glob("*.safetensors"))}
    shards = {n: d for n, d in lock["outputs"].items() if n.endswith(".safetensors")}
    assert shards == {p.name: sha256(p) for p in out.glob("*.safetensors")}


def test_a_base_that_is_not_hashed_is_unknown_to_verify(materials, tmp_path, monkeypatch, capsys):
    base, adapter = materials
    with monkeypatch.context() as no_hash:
        no_hash.setattr(digests, "sha256", lambda path: pytest.fail(f"{path} is hashed"))
        out = plait.bake([adapter], base=base, out=tmp_path / "out", hash_base=False).folder
    copied, changed = sorted(p.name for p in base.glob("*.safetensors"))
    lock = json.loads((out / "plait.lock").read_text())
    assert (lock["base"]["files"], lock["base"]["not_hashed"]) == ({copied: sha256(base / copied)}, [changed])
    assert lock["outputs"][changed] == sha256(out / changed)
    assert "hash_base" not in lock["options"], "the bytes are the same"
    found = plait.verify(out)
    assert [(i.name, i.state, i.found) for i in found.inputs if i.state != "equal"] == [("base_model", "unknown", True)]
    assert found.ok
    with contextlib.suppress(SystemExit):
        main(["verify", str(out), "--no-rebuild"])
    shown = capsys.readouterr().out
    assert f"base_model: unknown: {changed} was not hashed" in shown
    assert "verified: files are what plait.lock says" in shown
    save_file({"up.weight": torch.zeros(6, 8)}, base / changed)
    found = plait.verify(out)
    assert not found.ok
    assert [r.name for r in found.rebuilt or () if r.state != "equal"] == [changed], "what was read shows in the result"
