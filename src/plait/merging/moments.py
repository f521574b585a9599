"""Second moments of modules' inputs, E[x xᵀ]: what methods that solve a least-squares problem need of the data.

A file holds one adapter's, taken on that adapter's own inputs, averaged over tokens, so that a task with more text does not
weigh more. Per target module it has one (d_in, d_in) matrix under the module's name, or, since that does not scale, some of the
inputs themselves: (k, d_in) under the name and `:rows`, whose mean of x xᵀ it is. A module of several matrices (experts, groups
of a convolution) has as many inputs: (stack, d_in, d_in). Modules that read the same tensor (q, k and v) share one entry:
`plait.shared` in the header's metadata lists them, and `plait.origin` names what the moments were taken of. Independent of how
they are used.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from plait.adapters.adapter import Adapter
from plait.adapters.layouts import Layout
from plait.deferred import Tensor, torch
from plait.errors import AdapterError, OutputError, listed
from plait.linalg.inputs import InputRows
from plait.parsing import as_record, parse_json
from plait.records import Record
from plait.results.disk import writing
from plait.tensorfiles.reader import SafetensorsFile
from plait.tensorfiles.writer import write_tensors

Found = Tensor | InputRows
MomentsOf = Callable[[str, str], Found | None]  # (adapter, target module) → E[x xᵀ]; None where the adapter lacks the module
_ASYMMETRY = 1e-3  # of the largest entry: sums in bfloat16 stay below it
_ROWS = ":rows"
_DTYPES = ("F16", "BF16", "F32", "F64")
_PREFIX = "plait."  # of what is plait's in the metadata of a header
_MAKE_AGAIN = "Make them with `plait calibrate`, or plait.save_moments."


class MomentsOrigin(Record):
    """What second moments were taken of, as recorded in their file.

    Attributes:
        adapter: sha256 of the adapter's tensor file.
        base: digest of the base model's files.
        texts: task → digest of its texts.
        tokens: that were read.
        sampled: modules that keep some of their inputs only.
        key: digest of everything that the file depends on.
        plait: version that made it.
        sequential: taken with the layers below already merged, by a merge that is among what `key` is of.
    """

    adapter: str
    base: str
    texts: dict[str, str]
    tokens: int = Field(ge=0)
    sampled: int = Field(ge=0)
    key: str
    plait: str
    sequential: bool = False


class _Metadata(Record):
    """What a file's header holds besides tensors: module → module whose entry is also its own, and where all are from."""

    shared: dict[str, str] = Field(default_factory=dict)
    origin: MomentsOrigin | None = None


class MomentsFile:
    """One adapter's second moments on disk; its header was read.

    Args:
        path: of the file.

    Attributes:
        path: of the file.
        origin: what they were taken of; None where the file does not record it.

    Raises:
        AdapterError: the file is missing, damaged, or its metadata is not that of moments.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = SafetensorsFile(path)
        for name, info in self._file.tensors.items():
            if info.dtype not in _DTYPES:
                raise AdapterError(f"{path}: {name!r} is of dtype {info.dtype}, must be of {', '.join(_DTYPES)}. {_MAKE_AGAIN}")
        written = {name: self._file.metadata.get(_PREFIX + name) for name in _Metadata.model_fields}
        found = {k: parse_json(v, f"{path}: {_PREFIX}{k}", AdapterError) for k, v in written.items() if v is not None}
        metadata = as_record(_Metadata, found, str(path), AdapterError, what="metadata of moments", advice=_MAKE_AGAIN)
        self._shared, self.origin = metadata.shared, metadata.origin

    @property
    def entries(self) -> dict[str, tuple[tuple[int, ...], bool]]:
        """Module → shape, and whether it is rows, of everything that is stored."""
        names = (name.removesuffix(_ROWS) for name in self._file.tensors)
        return {name: found for name in names if (found := self.shape(name)) is not None}

    def shape(self, module: str) -> tuple[tuple[int, ...], bool] | None:
        """Return the shape of a module's entry, and whether it holds rows; None where there is none."""
        name = self._shared.get(module, module)
        for key, is_rows in ((name, False), (name + _ROWS, True)):
            if key in self._file.tensors:
                return self._file.tensors[key].shape, is_rows
        return None

    def problem(self, module: str, layout: Layout) -> str | None:
        """Return why a module's entry does not fit its matrix."""
        wanted = f"needs {list(_shape(layout))}"
        found = self.shape(module)
        if found is None:
            return f"missing, {wanted}"
        shape, is_rows = found
        if is_rows and (layout.stack > 1 or len(shape) != 2 or shape[0] < 1 or shape[1] != layout.d_in):
            return f"{list(shape)} rows, {wanted} or rows of {layout.d_in}"
        return None if is_rows or shape == _shape(layout) else f"{list(shape)}, {wanted}"

    def read(self, module: str, matrix: int | None) -> Found | None:
        """Return a module's entry: (d_in, d_in), or rows (k, d_in); None where there is none."""
        found, name = self.shape(module), self._shared.get(module, module)
        if found is None:
            return None
        if found[1]:
            return InputRows(self._file.read(name + _ROWS))
        return self._file.read(name) if matrix is None else self._file.read_rows(name, matrix, matrix + 1)[0]

    def check(self) -> None:
        """Read everything, and make sure that it can be second moments.

        Raises:
            AdapterError: an entry is not a square, symmetric, finite matrix, or finite rows.
        """
        for module in self.entries:
            found = self.read(module, None)
            if found is not None:
                _check_entry(found, f"{self.path}: moments of {module}")

    def read_all(self) -> dict[str, Found]:
        """Return module → its entry; modules that share one have the same object."""
        found = {name: entry for name in self.entries if (entry := self.read(name, None)) is not None}
        return found | {module: found[owner] for module, owner in self._shared.items()}


@dataclass(frozen=True)
class Moments:
    """The second moments that a merge has.

    Attributes:
        targets: adapter → its target modules, in the recipe's order.
        read: (adapter, target module, which of its matrices) → E[x xᵀ], (d_in, d_in) or as rows; None where there are none.
        files: adapter → file; empty when they come from a function.
    """

    targets: Mapping[str, Collection[str]]
    read: Callable[[str, str, int | None], Found | None]
    files: Mapping[str, MomentsFile]

    def of(self, module: str, d_in: int, matrix: int | None = None) -> Callable[[int], Found | None]:
        """Return a function of the adapter's index that reads a module's moments: a new (d_in, d_in) float64, rows, or None.

        An adapter that lacks the module may have none. It has when its texts went through the module all the same: then its
        zero delta is one to keep.

        Args:
            module: path.
            d_in: columns of its matrix.
            matrix: which of its matrices; None for the only one.

        Raises:
            AdapterError: what is read is not a second moment; by the function that is returned.
        """
        names = list(self.targets)

        def read(index: int) -> Found | None:
            file = self.files.get(names[index])
            where = f"{f'{file.path}: ' if file else ''}moments of {names[index]!r}, {module}"
            found = self.read(names[index], module, matrix)
            if found is None and module in self.targets[names[index]]:
                raise AdapterError(
                    f"{where}: there are none, and the adapter has the module. Texts that do not reach it tell nothing of it: "
                    "give a task whose texts do, or take a method without moments."
                )
            if found is None or isinstance(found, InputRows):
                return None if found is None else _checked_rows(found, d_in, where)
            return _checked(found, d_in, where).to(torch.float64, copy=True)

        return read

    def indefinite_files(self, module: str, d_in: int, matrix: int | None) -> list[Path]:
        """Return the files whose matrix of a module is not positive semidefinite; arguments as `of` has them."""
        read, found = self.of(module, d_in, matrix), []
        for index, name in enumerate(self.targets):
            gram = read(index)
            if isinstance(gram, torch.Tensor) and name in self.files:
                values = torch.linalg.eigvalsh(gram)
                if float(values[0]) < -_ASYMMETRY * float(values.abs().max()):
                    found.append(self.files[name].path)
        return found

    def working(self, module: str, d_in: int) -> int:
        """Return how many float32 numbers solving with a module's moments takes at most."""
        shapes = [file.shape(module) for file in self.files.values()]
        rows = sum(shape[0] for shape, is_rows in filter(None, shapes) if is_rows)
        if rows and rows < d_in and all(found is None or found[1] for found in shapes):
            return 6 * rows * d_in + 4 * rows**2  # in float64: the rows, the same scaled, and their products
        return 6 * d_in**2  # in float64: the sum of the moments, and an adapter's or the factors of the sum


def _open(adapter: str, path: Path) -> MomentsFile:
    try:
        return MomentsFile(path)
    except OSError as error:
        raise AdapterError(f"moments of {adapter!r}: {path} cannot be read ({error.strerror or error})") from None
    except AdapterError as error:
        raise AdapterError(f"moments of {adapter!r}: {str(error).removesuffix('.')}") from None


def from_files(
    paths: Mapping[str, Path],
    adapters: Sequence[Adapter],
    naming: Callable[[str], AbstractContextManager[None]] = lambda _: nullcontext(),
) -> Moments:
    """Open one file per adapter; headers only.

    Args:
        paths: adapter → file.
        adapters: that they are of.
        naming: adapter → what names the place of its path in what is refused of the file.

    Raises:
        AdapterError: a file is missing or broken, or was taken of another adapter; all of them at once.
    """
    files, problems = {}, []
    for name, path in paths.items():
        try:
            with naming(name):
                files[name] = _open(name, path)
        except AdapterError as error:
            problems.append(str(error))
    problems += [
        f"moments of {a.name!r}: {files[a.name].path} was taken of another adapter, or of other contents of this one"
        for a in adapters
        if a.name in files and (origin := files[a.name].origin) is not None and origin.adapter != a.sha256()
    ]
    if problems:
        raise AdapterError("; ".join(problems) + f". {_MAKE_AGAIN}")

    def read(adapter: str, module: str, matrix: int | None) -> Found | None:
        return files[adapter].read(module, matrix)

    return Moments({a.name: a.targets for a in adapters}, read, files)


def from_function(given: MomentsOf, targets: Mapping[str, Collection[str]]) -> Moments:
    """Take moments from a function; it is asked when a module is merged.

    Args:
        given: (adapter, target module) → E[x xᵀ].
        targets: adapter → its target modules.
    """

    def read(adapter: str, module: str, matrix: int | None) -> Found | None:
        found = given(adapter, module)
        return found if matrix is None or not isinstance(found, torch.Tensor) else found[matrix]

    return Moments(targets, read, {})


def not_taken_yet(adapter: str, module: str) -> Found | None:
    """Take the place of moments that a merge takes first, in a plan of it."""
    raise AssertionError(f"a plan asked for the moments of {adapter}, {module}")


def moments_problems(moments: Moments, layouts: Mapping[str, Layout]) -> list[str]:
    """Return what does not fit: no moments of a module that an adapter has, another shape, inputs that are not vectors."""
    problems = []
    if embeddings := [path for path, layout in layouts.items() if layout.reads_tokens]:
        having = [name for name, targets in moments.targets.items() if {*targets} & {*embeddings}]
        problems.append(
            f"{', '.join(having)}: {', '.join(embeddings)}: the inputs of an embedding are tokens, with as many second moments "
            "as the vocabulary has pairs. Give a method that needs no moments (--method dc_merge)"
        )
    for name, file in moments.files.items():
        wrong = [
            f"{path} ({problem})"
            for path, layout in layouts.items()
            if (file.shape(path) is not None or path in moments.targets[name]) and not layout.reads_tokens
            if (problem := file.problem(path, layout))
        ]
        if wrong:
            problems.append(f"{file.path}: moments of {len(wrong)} target modules do not fit: {listed(wrong, 5)}")
    return problems


def save_moments(path: str | Path, moments: Mapping[str, Found]) -> None:
    """Write one adapter's second moments, as `regmean` and its like read them.

    `plait calibrate` takes them and writes the same; this is for moments that come from elsewhere.

    >>> import torch
    >>> x = torch.randn(1000, 576)
    >>> plait.save_moments("moments/maths.safetensors", {"model.layers.0.mlp.up_proj": x.T @ x / len(x)})

    Args:
        path: of the new file (.safetensors); it must not exist.
        moments: target module → E[x xᵀ] over the tokens that enter the module, (d_in, d_in), stored as float32;
            (stack, d_in, d_in) for fused experts and grouped convolutions, by expert or group. Inputs of a convolution are
            its unfolded patches.

    Raises:
        AdapterError: a matrix is not square, not symmetric, or has values that are not finite.
        OutputError: there is a file of that name.
    """
    for module, found in moments.items():
        _check_entry(found, f"moments of {module}")
    target = Path(path)
    if target.exists():
        raise OutputError(f"{target} exists. Remove it, or choose another name.")
    write_moments(target, moments)


def write_moments(path: Path, moments: Mapping[str, Found], origin: MomentsOrigin | None = None) -> None:
    """Write one adapter's second moments, complete or not at all; what several modules share is stored once.

    Args:
        path: of the file; one of this name is replaced.
        moments: target module → E[x xᵀ]; modules with the same object share it. Rows keep their dtype.
        origin: what they were taken of.

    Raises:
        OutputError: it cannot be written.
    """
    first: dict[int, str] = {}
    owners = {module: first.setdefault(id(found), module) for module, found in moments.items()}
    tensors: dict[str, Tensor] = {}
    for module in dict.fromkeys(owners.values()):
        found = moments[module]
        tensors |= {module + _ROWS: found.x} if isinstance(found, InputRows) else {module: found.float()}
    metadata = {_PREFIX + "origin": origin.model_dump_json()} if origin is not None else {}
    if shared := {module: owner for module, owner in owners.items() if owner != module}:
        metadata[_PREFIX + "shared"] = json.dumps(shared, separators=(",", ":"))
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path, path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_tensors(fresh, tensors, metadata)
            fresh.replace(path)
        finally:
            fresh.unlink(missing_ok=True)


def _check_entry(found: Found, where: str) -> None:
    """Refuse what cannot be moments of any module: a matrix, a stack of them, or rows."""
    if isinstance(found, InputRows):
        _checked_rows(found, found.x.shape[-1] if found.x.ndim else 0, where)
        return
    for part in found if found.ndim == 3 else (found,):
        _checked(part, part.shape[-1] if part.ndim else 0, where)


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


def _checked_rows(found: InputRows, d_in: int, where: str) -> InputRows:
    """Return rows that can be inputs."""
    x = found.x
    if x.ndim != 2 or len(x) < 1 or x.shape[1] != d_in:
        raise AdapterError(f"{where}: the inputs have shape {list(x.shape)}, expected (tokens, {d_in}).")
    if not bool(torch.isfinite(x.sum(dtype=torch.float64))):
        raise AdapterError(f"{where}: there are values that are not finite.")
    return found


def _shape(layout: Layout) -> tuple[int, ...]:
    matrix = (layout.d_in, layout.d_in)
    return matrix if layout.stack == 1 else (layout.stack, *matrix)
