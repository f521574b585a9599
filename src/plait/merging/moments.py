"""Second moments of modules' inputs, E[x xᵀ]: what methods that solve a least-squares problem need of the data.

A file holds one adapter's, taken on that adapter's own inputs: per target module one (d_in, d_in) matrix, averaged over tokens,
so that a task with more text does not weigh more. A module of several matrices (experts, groups of a convolution) has as many
inputs: (stack, d_in, d_in). Knows nothing of how they are used.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from plait.adapters.layouts import Layout
from plait.errors import AdapterError, OutputError
from plait.tensorfiles.reader import SafetensorsFile
from plait.tensorfiles.writer import write_tensors

MomentsOf = Callable[[str, str], Tensor | None]  # (adapter, target module) → E[x xᵀ]; None where the adapter lacks the module
_ASYMMETRY = 1e-3  # of the largest entry: sums in bfloat16 stay below it


@dataclass(frozen=True)
class Moments:
    """The second moments that a merge has.

    Attributes:
        targets: adapter → its target modules, in the recipe's order.
        read: (adapter, target module, which of its matrices) → E[x xᵀ], (d_in, d_in); None where there are none.
        files: adapter → file; empty when they come from a function.
    """

    targets: Mapping[str, Collection[str]]
    read: Callable[[str, str, int | None], Tensor | None]
    files: Mapping[str, SafetensorsFile]

    def of(self, module: str, d_in: int, matrix: int | None = None) -> Callable[[int], Tensor | None]:
        """Return a function of the adapter's index that reads a module's moments: a new (d_in, d_in) float64, or None.

        An adapter that lacks the module may have none. It has when its texts went through the module all the same: then its
        zero delta is one to keep.

        Args:
            module: path.
            d_in: columns of its matrix.
            matrix: which of its matrices; None for the only one.

        Raises:
            AdapterError: what is read is no second moment; by the function that is returned.
        """
        names = list(self.targets)

        def read(index: int) -> Tensor | None:
            where = f"moments of {names[index]!r}, {module}"
            found = self.read(names[index], module, matrix)
            if found is None and module in self.targets[names[index]]:
                raise AdapterError(f"{where}: there are none, and the adapter has the module.")
            return None if found is None else _checked(found, d_in, where).to(torch.float64, copy=True)

        return read


def from_files(paths: Mapping[str, Path], targets: Mapping[str, Collection[str]]) -> Moments:
    """Open one file per adapter; headers only.

    Args:
        paths: adapter → file.
        targets: adapter → its target modules.

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

    def read(adapter: str, module: str, matrix: int | None) -> Tensor | None:
        file = files[adapter]
        if module not in file.tensors:
            return None
        return file.read(module) if matrix is None else file.read_rows(module, matrix, matrix + 1)[0]

    return Moments(targets, read, files)


def from_function(given: MomentsOf, targets: Mapping[str, Collection[str]]) -> Moments:
    """Take moments from a function; it is asked when a module is merged.

    Args:
        given: (adapter, target module) → E[x xᵀ].
        targets: adapter → its target modules.
    """

    def read(adapter: str, module: str, matrix: int | None) -> Tensor | None:
        found = given(adapter, module)
        return found if found is None or matrix is None else found[matrix]

    return Moments(targets, read, {})


def moments_problems(moments: Moments, layouts: Mapping[str, Layout]) -> list[str]:
    """Return what does not fit: no moments of a module that an adapter has, another shape, inputs that are no vectors."""
    problems = []
    if embeddings := [path for path, layout in layouts.items() if layout.reads_tokens]:
        problems.append(
            f"{', '.join(embeddings)}: the inputs of an embedding are tokens, with as many second moments as the vocabulary "
            "has pairs. Merge these adapters with a method that needs no moments"
        )
    for name, file in moments.files.items():
        wrong = [
            f"{path} ({_found(file, path)}, needs {list(_shape(layout))})"
            for path, layout in layouts.items()
            if (path in file.tensors or path in moments.targets[name]) and not layout.reads_tokens
            if path not in file.tensors or file.tensors[path].shape != _shape(layout)
        ]
        if wrong:
            more = f", and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            problems.append(f"{file.path}: moments of {len(wrong)} target modules do not fit: {', '.join(wrong[:5])}{more}")
    return problems


def save_moments(path: str | Path, moments: Mapping[str, Tensor]) -> None:
    """Write one adapter's second moments, as `regmean` and its like read them.

    >>> plait.save_moments("moments/maths.safetensors", {"model.layers.0.mlp.up_proj": x.T @ x / len(x), ...})

    Args:
        path: of the new file (.safetensors); it must not exist.
        moments: target module → E[x xᵀ] over the tokens that enter the module, (d_in, d_in), stored as float32;
            (stack, d_in, d_in) for fused experts and grouped convolutions, by expert or group. Inputs of a convolution are
            its unfolded patches.

    Raises:
        AdapterError: a matrix is not square, not symmetric, or has values that are not finite.
        OutputError: there is a file of that name.
    """
    for module, matrix in moments.items():
        for part in matrix if matrix.ndim == 3 else (matrix,):
            _checked(part, part.shape[-1] if part.ndim else 0, f"moments of {module}")
    target = Path(path)
    if target.exists():
        raise OutputError(f"{target} exists. Remove it, or choose another name.")
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        write_tensors(fresh, {module: matrix.float() for module, matrix in moments.items()})
        fresh.rename(target)
    finally:
        fresh.unlink(missing_ok=True)


def _checked(found: Tensor, d_in: int, where: str) -> Tensor:
    """Return a matrix that can be E[x xᵀ]."""
    wrong = None
    if found.shape != (d_in, d_in):
        wrong = f"the shape is {list(found.shape)}, needed is [{d_in}, {d_in}]"
    elif not bool(torch.isfinite(found).all()):
        wrong = "there are values that are not finite"
    elif bool((found.diagonal() < 0).any()):
        wrong = "there are negative values on the diagonal, which holds E[x²]"
    elif float((found - found.mT).abs().max()) > _ASYMMETRY * float(found.abs().max()):
        wrong = "the matrix is not symmetric"
    if wrong is not None:
        raise AdapterError(f"{where}: {wrong}. Second moments are X.T @ X / len(X) of the inputs X (tokens, d_in).")
    return found


def _shape(layout: Layout) -> tuple[int, ...]:
    matrix = (layout.d_in, layout.d_in)
    return matrix if layout.stack == 1 else (layout.stack, *matrix)


def _found(file: SafetensorsFile, path: str) -> str:
    return str(list(file.tensors[path].shape)) if path in file.tensors else "missing"
