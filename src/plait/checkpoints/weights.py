"""The base model's weights, read lazily: only what DoRA needs them for, one module at a time."""

from __future__ import annotations

from pathlib import Path

from plait.adapters.layouts import Layout
from plait.adapters.layouts.conv1d import has_conv1d
from plait.checkpoints.files import INPUT_EMBEDDING, OUTPUT_HEAD, find_weights, read_config
from plait.deferred import Tensor, torch
from plait.errors import AdapterError, listed
from plait.hub.pipelines import PIPELINE_INDEX
from plait.tensorfiles.formats import open_tensors
from plait.tensorfiles.reader import SafetensorsFile


class BaseWeights:
    """The tensors of a base model.

    Args:
        folder: with `model.safetensors` or `pytorch_model.bin`, or shards and their index.

    Raises:
        AdapterError: no such files there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if folder.is_file() or (folder / PIPELINE_INDEX).is_file():
            raise AdapterError(
                f"{folder}: DoRA scales rows by the norms of the base's weights, which are read from a folder of one model, "
                "not from a pipeline or a single file. Merge one component's adapters by themselves (plait convert --tower)."
            )
        found = find_weights(folder)
        other = sorted(p.name for p in folder.glob("*.safetensors") if p.name != SafetensorsFile.adapter_name)
        names = found.names if found else other
        if not names:
            raise AdapterError(f"{folder}: no weights of a base model here; DoRA needs them.")
        self._files = [open_tensors(folder / name) for name in names]
        self._home = {tensor: file for file in self._files for tensor in file.tensors}
        if not self._home:
            raise AdapterError(f"{folder}: {listed(names)} of the base model holds no tensors. Fetch it again.")
        config = read_config(folder)
        self._conv1d = has_conv1d(config, {n: f.tensors[n].shape for n, f in self._home.items()})
        parts = [config, *(part for part in config.values() if isinstance(part, dict))]
        self._ties = all(part.get("tie_word_embeddings", True) for part in parts)

    def matrix(self, module: str, layout: Layout, *, fan_in_fan_out: bool, dtype: torch.dtype) -> Tensor:
        """Return a module's weight as (d_out, d_in), the orientation of B @ A.

        Args:
            module: path as the adapter names it.
            layout: of its factors.
            fan_in_fan_out: the adapter's flag for bases that store weights transposed (see `Layout.is_transposed`).
            dtype: of the result.

        Raises:
            AdapterError: no such weight, or one of another shape.
        """
        name = self._name(module)
        weight = self._home[name].read(name).to(dtype)
        transposed = layout.is_transposed(module, stored=tuple(weight.shape), conv1d=self._conv1d, flag=fan_in_fan_out)
        (weight,) = layout.matrices(weight, transposed=bool(transposed))
        if tuple(weight.shape) != (layout.d_out, layout.d_in):
            raise AdapterError(
                f"{self.folder}: {name!r} is {list(weight.shape)}, the adapter's module {module!r} needs "
                f"{[layout.d_out, layout.d_in]}. Is this the base model that it was trained on?"
            )
        return weight

    def _name(self, module: str) -> str:
        wanted = f"{module}.weight"
        # Checkpoints are saved with or without the task head's prefix ("model.", "transformer.").
        found = [n for n in self._home if n == wanted] or [
            n for n in self._home if n.endswith("." + wanted) or wanted.endswith("." + n)
        ]
        if not found and self._ties and OUTPUT_HEAD.fullmatch(wanted):
            found = [n for n in self._home if INPUT_EMBEDDING.fullmatch(n)]
        if len(found) != 1:
            what = f"found {', '.join(map(repr, found))}" if found else f"it holds names such as {next(iter(self._home))!r}"
            raise AdapterError(f"{self.folder}: no single weight for module {module!r}; {what}.")
        return found[0]
