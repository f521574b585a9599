"""State of a tuning: a folder next to the output, from which a killed tuning continues to the same result."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from plait.errors import OutputError
from plait.notices import announce
from plait.parsing import parse_json, read_text
from plait.results.locking import locked

T = TypeVar("T")
_KEY, _LOCK = "tuning", "lock"


@contextmanager
def alone(folder: Path, out: Path) -> Iterator[None]:
    """Hold the folder of a tuning's state, so that no other process works there; where nothing was saved it goes again.

    Args:
        folder: of the state.
        out: what is tuned, for messages.

    Raises:
        OutputError: another process works there, it cannot be written, or it is a link.
    """
    if folder.is_symlink():
        raise OutputError(f"{folder} is a link, and a tuning's state is kept there. Delete it, or choose another output.")
    with locked(folder / _LOCK, "this merge is being tuned", out=out):
        try:
            yield
        except BaseException as error:
            if not isinstance(error, Exception) and (folder / _KEY).is_file():  # stopped by its user
                error.add_note(f"What was finished is kept in {folder}; the same command continues from there.")
            raise
        finally:
            if not (folder / _KEY).is_file():
                shutil.rmtree(folder, ignore_errors=True)


class WorkingState:
    """Named states in a folder; each appears complete or not at all.

    Args:
        folder: made when something is saved.
        digest: of everything that the states depend on. What another digest has left is removed.
    """

    def __init__(self, folder: Path, digest: str) -> None:
        self.folder = folder
        self._digest = digest
        try:
            found = read_text(folder / _KEY, OutputError) if (folder / _KEY).is_file() else None
        except OutputError:  # not text, or larger than any key
            found = None
        self.resumed = found == digest
        if folder.is_dir() and not self.resumed:
            left = [path for path in folder.iterdir() if path.name != _LOCK]
            if left:
                announce(
                    f"{folder} holds what is finished of another tuning (other settings, texts, files, library versions or "
                    "number of threads); it is removed, and this one starts from the beginning."
                )
            for path in left:
                path.unlink() if path.is_symlink() or not path.is_dir() else shutil.rmtree(path, ignore_errors=True)

    def load(self, name: str, use: Callable[[dict[str, Tensor], dict[str, Any]], T]) -> T | None:
        """Return what a saved state means; None where there is none, or what there is is not what this tuning saved.

        Args:
            name: of the state.
            use: makes something of its tensors and of what else was saved; where it fails, it has changed nothing.
        """
        file = self.folder / f"{name}.safetensors"
        if not file.is_file():
            return None
        try:
            with safe_open(file, framework="pt") as held:
                about = held.metadata() or {}
                tensors = {key: held.get_tensor(key) for key in held.keys()}  # noqa: SIM118 (it is not a mapping)
            if about.get("sha256") == self._content_digest(tensors, about.get("info", "")):
                return use(tensors, parse_json(about["info"], str(file), OutputError, constants=True))
        except (OSError, SafetensorError, OutputError, LookupError, TypeError, ValueError, AttributeError, RuntimeError):
            pass
        announce(f"{file} has changed since it was saved, or is another tuning's; what it held is computed again.")
        return None

    def save(self, name: str, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
        """Save a state, in place of what the name had.

        Raises:
            OutputError: it cannot be written.
        """
        draft = self.place / f".{name}-{os.getpid()}"
        try:
            held, text = {k: t.detach().cpu().contiguous() for k, t in tensors.items()}, json.dumps(info)
            draft.write_bytes(save(held, {"info": text, "sha256": self._content_digest(held, text)}))
            draft.replace(self.folder / f"{name}.safetensors")
        except OSError as error:
            raise OutputError(f"{self.folder} cannot be written: {error.strerror or error}.") from None
        finally:
            draft.unlink(missing_ok=True)

    @property
    def place(self) -> Path:
        """The folder, which is made when it is missing.

        Raises:
            OutputError: it cannot be made.
        """
        try:
            if not (self.folder / _KEY).is_file():
                self.folder.mkdir(parents=True, exist_ok=True)
                (self.folder / _KEY).write_text(self._digest)
        except OSError as error:
            raise OutputError(f"{self.folder} cannot be written: {error.strerror or error}.") from None
        return self.folder

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _content_digest(self, tensors: Mapping[str, Tensor], info: str) -> str:
        """Return a hash of tensors, of what else is saved with them, and of what all of it depends on."""
        found = hashlib.sha256(f"{self._digest} {info}".encode())
        for name, tensor in sorted(tensors.items()):
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        return found.hexdigest()
