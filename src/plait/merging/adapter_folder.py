"""A merged adapter's files: tensors, streamed, and configuration."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from plait.adapters.adapter import CONFIG, WEIGHTS
from plait.merging.portable import PortableAdapter
from plait.tensorfiles.writer import Entry, TensorWriter


def write_adapter(
    portable: PortableAdapter,
    heads: Mapping[str, Tensor],
    declared: Mapping[str, Any],
    modules: Iterable[dict[str, Tensor]],
    place: Path,
) -> dict[str, str]:
    """Write the tensor file and `adapter_config.json`.

    Args:
        portable: names, shapes and configuration.
        heads: full tensors that the adapter itself holds, by their names in the file.
        declared: what the configuration says of them.
        modules: every module's tensors (`PortableAdapter.tensors`), in any order; emptied as they are written.
        place: an existing folder.

    Returns:
        The sha256 of the tensor file by its name.
    """
    extra = [Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in heads.items()]
    with TensorWriter(place / WEIGHTS, [*portable.entries(), *extra]) as writer:
        for name, tensor in heads.items():
            writer.write(name, tensor)
        for tensors in modules:
            for name in list(tensors):
                writer.write(name, tensors.pop(name))  # let go of at once
    text = json.dumps(portable.config(declared), indent=2, ensure_ascii=False)
    (place / CONFIG).write_text(text + "\n", encoding="utf-8")
    return {WEIGHTS: writer.sha256}
