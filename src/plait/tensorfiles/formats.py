"""The formats of tensor files that plait reads. A new one is a subclass of `TensorFile` in this package, and its name here."""

from __future__ import annotations

from pathlib import Path

from plait.tensorfiles.pickled import PickleFile
from plait.tensorfiles.reader import SafetensorsFile, TensorFile

TENSOR_FORMATS: tuple[type[TensorFile], ...] = (SafetensorsFile, PickleFile)  # the first that is there is read


def open_tensors(path: Path) -> TensorFile:
    """Open a file of tensors by the end of its name; any other than a format's own is taken for one of `torch.save`.

    Raises:
        AdapterError: it is damaged, or holds more than tensors.
    """
    return next((format_ for format_ in TENSOR_FORMATS if path.suffix == format_.suffix), PickleFile)(path)
