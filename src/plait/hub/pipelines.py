"""Files of diffusers' pipelines by their names: which hold a component's weights, and which are fetched."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

PIPELINE_INDEX = "model_index.json"
#: What a component has besides weights.
_COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "*.py", "LICENSE*", "NOTICE*")
_WEIGHT = re.compile(
    r"(?P<stem>(?:diffusion_pytorch_)?model)(?:\.(?P<variant>[^.]+?))?(?P<number>-\d{5}-of-\d{5})?\.safetensors"
)


class WeightName(NamedTuple):
    """The name of a file of a component's weights, taken apart."""

    stem: str
    variant: str | None

    @classmethod
    def of(cls, name: str) -> WeightName:
        """Take a name apart that `chosen_weights` has returned."""
        found = _WEIGHT.fullmatch(name)
        if found is None:
            raise AssertionError(f"{name!r} is not a file of weights")
        return cls(found["stem"], found["variant"])

    @property
    def index_name(self) -> str:
        """The name of the index of numbered files."""
        return f"{self.stem}.safetensors.index{f'.{self.variant}' if self.variant else ''}.json"


def chosen_weights(names: Iterable[str]) -> list[str]:
    """Return the files of a component that hold its weights: those without a variant (`fp16`) where it has some."""
    found = {name: (match["variant"] or "", match["stem"]) for name in sorted(names) if (match := _WEIGHT.fullmatch(name))}
    first = min(found.values(), default=None)
    return [name for name, kind in found.items() if kind == first]


def pipeline_files(names: Sequence[str]) -> list[str]:
    """Return what is fetched of a pipeline: of every component its weights in one copy, and what is small.

    Args:
        names: of the repository's files, from the pipeline's folder.
    """
    folders: dict[str, list[str]] = {}
    for name in names:
        folder, _, file = name.rpartition("/")
        if folder.count("/") == 0 and not folder.startswith("."):
            folders.setdefault(folder, []).append(file)
    wanted = []
    for folder, files in folders.items():
        kept = {f for pattern in _COMPANIONS for f in fnmatch.filter(files, pattern)}
        kept |= {"README.md"} & set(files) if not folder else set(chosen_weights(files))
        wanted += [f"{folder}/{file}" if folder else file for file in sorted(kept)]
    return wanted
