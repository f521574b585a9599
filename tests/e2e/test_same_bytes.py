"""Same recipe, same bytes: from flags, YAML and Python, with any number of workers, in any process, in any order."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import plait
from plait.testing.cohorts import cohort

FILES = ("adapter_model.safetensors", "adapter_config.json", "README.md")


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> dict[str, Path]:
    """Two adapters of a dozen modules, with other ranks."""
    folder = tmp_path_factory.mktemp("adapters")
    cohort([(96, 64), (64, 96), (40, 64)] * 4, [8, 4], dtype=torch.float32).save(folder)
    return {
        "sentiment": (folder / "adapter0").rename(folder / "sentiment"),
        "langid": (folder / "adapter1").rename(folder / "langid"),
    }


def cli(*arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "plait", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env}, check=False)


def test_flags_yaml_and_python(tmp_path, pair):
    settings = {"method": "dare_ties", "space": "core", "density": 0.3, "sign": "total", "seed": 7, "weights": [0.7, 0.3]}
    plait.merge(pair, out=tmp_path / "python", **settings)
    references = [f"{name}={path}" for name, path in pair.items()]
    flags = ["--method", "dare_ties", "--space", "core", "--density", "0.3", "--sign", "total", "--seed", "7"]
    flags += ["--weights", "0.7", "0.3"]
    done = cli("merge", *references, *flags, "-o", tmp_path / "flags", PYTHONHASHSEED="1")
    assert done.returncode == 0, done.stderr
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "adapters:\n"
        + "".join(f"  - {{name: {n}, path: {p}, weight: {w}}}\n" for (n, p), w in zip(pair.items(), (0.7, 0.3), strict=True))
        + "method: {name: dare_ties, space: core, density: 0.3, sign: total}\nseed: 7\n"
    )
    done = cli("merge", recipe, "-o", tmp_path / "yaml", "--workers", 3, PYTHONHASHSEED="2")
    assert done.returncode == 0, done.stderr
    for name in FILES:
        contents = {folder: (tmp_path / folder / name).read_bytes() for folder in ("python", "flags", "yaml")}
        assert len(set(contents.values())) == 1, name
    locks = [json.loads((tmp_path / f / "plait.lock").read_text()) for f in ("python", "flags", "yaml")]
    assert locks[0] == locks[1] == locks[2]


def test_a_loaded_recipe_knows_its_folder(tmp_path, monkeypatch, pair):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "adapters").symlink_to(pair["sentiment"].parent)
    recipe = tmp_path / "recipes" / "recipe.yaml"
    recipe.write_text("adapters: [../adapters/sentiment, ../adapters/langid]\nmethod: ties\noutput: {rank: 4}\n")
    monkeypatch.chdir(tmp_path / "recipes")
    plait.merge("recipe.yaml", out=tmp_path / "file")
    loaded = plait.load_recipe("recipe.yaml")
    monkeypatch.chdir(tmp_path)
    assert [m.target for m in plait.plan(loaded).modules]
    plait.merge(loaded, out=tmp_path / "loaded")
    for name in (*FILES, "plait.lock"):
        assert (tmp_path / "file" / name).read_bytes() == (tmp_path / "loaded" / name).read_bytes()
    assert str(tmp_path) not in (tmp_path / "loaded" / "plait.lock").read_text()


@pytest.mark.parametrize("method", ["ties", "dare_linear", "linear"])
def test_workers_and_threads(method, tmp_path):
    cohort([(96, 64)] * 12, [8, 8], dtype=torch.float32).save(tmp_path)
    small = [tmp_path / "adapter0", tmp_path / "adapter1"]
    settings = {"method": method, "rank": 4}
    digests = set()
    before = torch.get_num_threads()
    for workers, threads in ((1, 1), (2, 2), (4, 1)):
        torch.set_num_threads(threads)
        result = plait.merge(small, out=tmp_path / f"{workers}-{threads}", workers=workers, **settings)
        assert torch.get_num_threads() == threads
        digests.add((result.folder / FILES[0]).read_bytes())
    torch.set_num_threads(before)
    assert len(digests) == 1


def test_the_lock_is_true(tmp_path, pair):
    import hashlib

    result = plait.merge(pair, out=tmp_path / "out")
    lock = json.loads((result.folder / "plait.lock").read_text())
    for name, digest in lock["outputs"].items():
        assert hashlib.sha256((result.folder / name).read_bytes()).hexdigest() == digest
    for name, source in lock["inputs"].items():
        for file, digest in source["files"].items():
            assert hashlib.sha256((pair[name] / file).read_bytes()).hexdigest() == digest
    again = plait.merge(plait.Recipe.model_validate(lock["recipe"]), out=tmp_path / "again")
    assert json.loads((again.folder / "plait.lock").read_text()) == lock


def test_the_workspace(tmp_path, monkeypatch, pair):
    monkeypatch.chdir(tmp_path)
    first, second = plait.merge(pair), plait.merge(pair)
    assert first.folder != second.folder
    for result in (first, second):
        assert result.folder.parts[:-1] == ("artifacts", "merged", "linear", "langid_sentiment", "runs")
        assert result.folder.name.startswith("run_2")
        names = {p.name for p in result.folder.iterdir()}
        assert names == {*FILES, "merge_metadata.json", "plait.lock", "summary.json"}


def test_a_refused_merge_leaves_no_workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(plait.AddressError):
        plait.merge(["./nowhere", "./neither"])
    assert not list(tmp_path.iterdir())
