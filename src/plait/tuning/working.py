"""State of a tuning: a folder next to the output, from which a killed tuning continues to the same result."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from plait.errors import OutputError

_KEY = "tuning"


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
            found = (folder / _KEY).read_text() if folder.is_dir() else None
        except (OSError, ValueError):  # a folder, or not text
            found = None
        self.resumed = found == digest
        if folder.is_dir() and not self.resumed:
            shutil.rmtree(folder, ignore_errors=True)

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return tensors and what else was saved under a name; None where nothing was, or what there is cannot be read."""
        file = self.folder / f"{name}.safetensors"
        if not file.is_file():
            return None
        try:
            with safe_open(file, framework="pt") as held:
                info = json.loads((held.metadata() or {})["info"])
                return {key: held.get_tensor(key) for key in held.keys()}, info  # noqa: SIM118 (it is not a mapping)
        except (OSError, KeyError, ValueError):
            return None

    def save(self, name: str, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
        """Save a state, in place of what the name had.

        Raises:
            OutputError: it cannot be written.
        """
        draft = self.place / f".{name}-{os.getpid()}"
        try:
            save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, draft, {"info": json.dumps(info)})
            draft.replace(self.folder / f"{name}.safetensors")
        except OSError as error:
            raise OutputError(f"{self.folder} cannot be written: {error.strerror or error}.") from None

    @property
    def place(self) -> Path:
        """The folder, which is made when it is missing.

        Raises:
            OutputError: it cannot be made.
        """
        try:
            if not self.folder.is_dir():
                self.folder.mkdir(parents=True)
                (self.folder / _KEY).write_text(self._digest)
        except OSError as error:
            raise OutputError(f"{self.folder} cannot be written: {error.strerror or error}.") from None
        return self.folder

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
