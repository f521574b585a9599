"""The files of a base model: which hold its tensors, its index, and its configuration."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from plait.errors import AdapterError, collect
from plait.parsing import is_there, read_object, shown
from plait.tensorfiles.formats import TENSOR_FORMATS, open_tensors
from plait.tensorfiles.reader import SafetensorsFile

SINGLE = SafetensorsFile.model_name
INDEX = f"{SINGLE}.index.json"
MODEL_CONFIG = "config.json"
# the input embedding, and the head that reads its values where a model ties the two
INPUT_EMBEDDING = re.compile(r"(.*\.)?(embed_tokens|wte|shared|embed_in|word_embeddings)\.weight")
OUTPUT_HEAD = re.compile(r"(.*\.)?(lm_head|embed_out)\.weight")
_FETCH_AGAIN = "Fetch the base model again."


class WeightFiles(NamedTuple):
    """Which files of a base model hold its tensors.

    Attributes:
        names: of the files, sorted.
        index_name: of the index; None for a single file.
        listing: the index as it is; None for a single file.
        home: tensor name → file, as the index says.
    """

    names: tuple[str, ...]
    index_name: str | None
    listing: Mapping[str, Any] | None
    home: Mapping[str, str]


def find_weights(folder: Path) -> WeightFiles | None:
    """Return the files that hold a model's tensors, in the first format that is there, as transformers chooses; None without.

    Raises:
        AdapterError: an index that is none, or something else in a file's place.
    """
    for kind in TENSOR_FORMATS:
        if is_there(folder / kind.model_name, AdapterError):
            return WeightFiles((kind.model_name,), None, None, {})
        name = index_name(kind.model_name)
        if is_there(folder / name, AdapterError):
            index, home = read_index(folder / name)
            return WeightFiles(tuple(sorted(set(home.values()))), name, index, home)
    return None


def check_headers(folder: Path, weights: WeightFiles) -> None:
    """Read the headers of a model's files.

    Raises:
        AdapterError: files that are missing, damaged or cut off, all at once.
    """
    problems = []
    for name in weights.names:
        try:
            open_tensors(folder / name)
        except AdapterError as error:
            problems.append(str(error))
        except OSError as error:
            problems.append(f"{folder / name}: {error.strerror or error}. {_FETCH_AGAIN}")
    collect(AdapterError, problems, f"{folder}: the base model is not complete")


def index_name(single: str) -> str:
    """Return the name of the index next to shards, in the format of a single file of this name."""
    return f"{single}.index.json"


def read_index(path: Path) -> tuple[Mapping[str, Any], Mapping[str, str]]:
    """Return an index as it is, and its map: tensor name → the file in the same folder that holds it.

    Raises:
        AdapterError: it is not an index, names no tensor, or names a file in another folder.
    """
    index = read_object(path, AdapterError, advice=_FETCH_AGAIN, constants=True)
    found = index.get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise AdapterError(f"{path}: 'weight_map' must map names of tensors to names of files. {_FETCH_AGAIN}")
    if not found:
        raise AdapterError(f"{path}: names no tensor. {_FETCH_AGAIN}")
    outside = next((name for name in found.values() if Path(name).name != name or name in ("", ".", "..")), None)
    if outside is not None:
        raise AdapterError(f"{path}: names {shown(outside)}, which is not a file in the same folder.")
    if not isinstance(index.get("metadata") or {}, dict):
        raise AdapterError(f"{path}: 'metadata' must be a mapping. {_FETCH_AGAIN}")
    return index, found


def read_config(folder: Path) -> Mapping[str, Any]:
    """Return a base model's `config.json`; nothing where there is none.

    Raises:
        AdapterError: it is not a file, or not a JSON object.
    """
    path = folder / MODEL_CONFIG
    return read_object(path, AdapterError, constants=True) if is_there(path, AdapterError) else {}


def architectures(config: Mapping[str, Any]) -> list[str]:
    """Return the names of transformers' classes that a configuration gives; none where it gives no list of names."""
    found = config.get("architectures")
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []


def sections(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield a configuration and the text model's part of it, where it has one."""
    yield config
    text = config.get("text_config")
    if isinstance(text, dict):
        yield text
