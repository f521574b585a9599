"""Second moments of modules' inputs, E[x xᵀ]: what methods that solve a least-squares problem need of the data.

A file holds one adapter's, taken on that adapter's own inputs: per target module one (d_in, d_in) matrix, averaged over tokens,
so that a task with more text does not weigh more. Knows nothing of how they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from plait.adapters.adapter import Adapter
from plait.adapters.layouts import Layout
from plait.adapters.tensorfile import SafetensorsFile
from plait.adapters.tensorwriter import write_tensors
from plait.errors import AdapterError

MomentsOf = Callable[[str, str], Tensor]  # (adapter, target module) → E[x xᵀ], (d_in, d_in)


@dataclass(frozen=True)
class Moments:
    """The second moments that a merge has.

    Attributes:
        adapters: names, in the recipe's order.
        read: (adapter, target module) → E[x xᵀ], (d_in, d_in).
        files: adapter → file; empty when they come from a function.
    """

    adapters: tuple[str, ...]
    read: MomentsOf
    files: Mapping[str, SafetensorsFile]

    def of(self, module: str) -> Callable[[int], Tensor]:
        """Return a function of the adapter's index that reads a module's moments, (d_in, d_in) float64."""
        return lambda index: self.read(self.adapters[index], module).double()


def from_files(paths: Mapping[str, Path]) -> Moments:
    """Open one file per adapter; headers only.

    Raises:
        AdapterError: a file is missing or broken; all of them at once.
    """
    files, problems = {}, []
    for name, path in paths.items():
        try:
            files[name] = SafetensorsFile(path)
        except OSError as error:
            problems.append(f"moments of {name!r}: {path} cannot be read ({error.strerror or error})")
        except AdapterError as error:
            problems.append(f"moments of {name!r}: {error}")
    if problems:
        raise AdapterError("; ".join(problems) + ". Make them with plait.save_moments.")
    return Moments(tuple(paths), lambda adapter, module: files[adapter].read(module), files)


def moments_problems(moments: Moments, adapters: Sequence[Adapter], layouts: Mapping[str, Layout]) -> list[str]:
    """Return the target modules whose moments are missing or have another shape; a function is asked when it is used."""
    problems = []
    for adapter in adapters:
        file = moments.files.get(adapter.name)
        if file is None:
            continue
        wrong = [
            f"{path} ({_found(file, path)}, needs [{layout.d_in}, {layout.d_in}])"
            for path, layout in layouts.items()
            if path not in file.tensors or file.tensors[path].shape != (layout.d_in, layout.d_in)
        ]
        if wrong:
            more = f", and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            problems.append(f"{file.path}: moments of {len(wrong)} target modules do not fit: {', '.join(wrong[:5])}{more}")
    return problems


def save_moments(path: str | Path, moments: Mapping[str, Tensor]) -> None:
    """Write one adapter's second moments, as `regmean` and its like read them.

    Args:
        path: of the new file (.safetensors); it must not exist.
        moments: target module → E[x xᵀ] over the tokens that enter the module, (d_in, d_in); stored as float32.

    Raises:
        ValueError: a matrix is not square, or has values that are not finite.
    """
    for module, matrix in moments.items():
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not bool(torch.isfinite(matrix).all()):
            raise ValueError(f"{module}: moments are {tuple(matrix.shape)}; a square matrix of finite values is needed")
    write_tensors(Path(path), {module: matrix.float() for module, matrix in moments.items()})


def _found(file: SafetensorsFile, path: str) -> str:
    return str(list(file.tensors[path].shape)) if path in file.tensors else "missing"
