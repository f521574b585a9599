"""An adapter on disk, opened: its targets known from headers, its tensors read when asked for."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from plait.adapters.config import AdapterConfig
from plait.adapters.contents import complete_names, sort_tensors
from plait.adapters.formats import Origin, StoredAdapter, read_adapter
from plait.adapters.formats.scalings import one_number
from plait.adapters.layouts import Layout, factor_parts, layout_type
from plait.adapters.layouts.parameter import WRAPPED, ParameterNaming
from plait.adapters.lowrank import LowRank
from plait.deferred import Tensor, torch
from plait.errors import AdapterError, collect, listed
from plait.linalg.finite import all_finite
from plait.results.digests import sha256
from plait.tensorfiles.reader import FLOATS, TensorFile

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")  # no module of a model has one, and no configuration holds NUL
_FACTORS = frozenset(factor_parts())
ALPHA = "alpha"  # the part of a module whose file brings its own


@dataclass(frozen=True)
class Target:
    """One target module of one adapter, as the headers describe it.

    Attributes:
        path: dotted path in the base model (for fused experts: of the parameter).
        layout: how the factors are stored.
        rank: of one matrix; PEFT's r is `rank · layout.rank_unit`.
        scaling: s in ΔW = s · B A.
        dtype: of the stored factors (safetensors' names).
        tensors: part (`lora_A`, `lora_B`, `lora_B.bias`, `lora_magnitude_vector`, …; `alpha` where the file has its own) →
            tensor name in the file.
        own_scaling: the scaling is the file's own, so that the configuration's rank and alpha say nothing of this module.
    """

    path: str
    layout: Layout
    rank: int
    scaling: float
    dtype: str
    tensors: Mapping[str, str] = field(repr=False)
    own_scaling: bool = False

    @property
    def stored_rank(self) -> int:
        """The rank as PEFT counts it: a grouped convolution's is spread over its groups."""
        return self.rank * self.layout.rank_unit

    @property
    def is_dora(self) -> bool:
        """Whether it has a magnitude vector."""
        return "lora_magnitude_vector" in self.tensors

    @property
    def has_bias(self) -> bool:
        """Whether it has a `lora_bias`."""
        return "lora_B.bias" in self.tensors


@dataclass(frozen=True)
class Adapter:
    """One trained LoRA, opened; tensors are read when they are asked for.

    >>> adapter = plait.Adapter.open("./a", "maths")
    >>> path, target = next(iter(adapter.targets.items()))
    >>> adapter.read(path)[0].scaled(target.scaling).dense().shape

    Attributes:
        name: unique within a merge.
        folder: of its files.
        config: its configuration, in PEFT's terms.
        targets: path → target, sorted by path.
        full_tensors: tensors that are not low-rank deltas: heads (`modules_to_save`), trainable token rows, trained biases;
            path in the base model → tensor name in the file.
        file: the tensor file, in PEFT's terms.
        origin: what its files are.
        files: that were read; the tensor file first.
        is_one_file: it is a single file, so that what else is in the folder is not its own.
        towers: components of a pipeline that the paths begin with (`unet`, …); none where they are of one model.
    """

    name: str
    folder: Path
    config: AdapterConfig
    targets: Mapping[str, Target]
    full_tensors: Mapping[str, str]
    file: TensorFile = field(repr=False)
    origin: Origin = field(default=Origin(format="peft"), repr=False)
    files: tuple[Path, ...] = field(default=(), repr=False)
    is_one_file: bool = False
    towers: tuple[str, ...] = ()

    @property
    def place(self) -> Path:
        """Its file where it is a single one, else its folder."""
        return self.files[0] if self.is_one_file else self.folder

    @staticmethod
    def open(place: str | Path, name: str, modules: Callable[[], Collection[str]] | None = None) -> Adapter:
        """Open an adapter of any format: read its configuration and the header of its tensor file.

        Args:
            place: a folder, or a single file.
            name: unique within a merge.
            modules: gives the paths of the base model's modules, where it is at hand.

        Raises:
            AdapterError: with everything that is wrong with it.
        """
        place = Path(place)
        stored = read_adapter(place, modules)
        file = stored.file
        targets, full, problems = _read_targets(stored)
        collect(AdapterError, [f"{file.path}: {p}" for p in problems], f"{place}: not an adapter that plait can merge")
        if not targets and not full:
            held = listed(map(repr, file.tensors), 3) or "nothing"
            raise AdapterError(f"{file.path}: no LoRA tensors found; it holds {held}.")
        alone = place.is_file()
        folder = place.parent if alone else place
        return Adapter(name, folder, stored.config, targets, full, file, stored.origin, stored.files, alone, stored.towers)

    def read(self, path: str, dtype: torch.dtype | None = None) -> list[LowRank]:
        """Read one target's factors, in float32 where no dtype is given, scaling not yet folded in: a `LowRank` per matrix.

        Raises:
            AdapterError: a value is NaN or infinite.
        """
        target = self.targets[path]
        names = target.tensors
        a, b = (self._tensor(names[part], dtype) for part in (target.layout.a_part, target.layout.b_part))
        return target.layout.unpack(a, b)

    def read_part(self, path: str, part: str, dtype: torch.dtype | None = None) -> Tensor:
        """Read another part of a target as a vector: `lora_B.bias` (d_out,) or `lora_magnitude_vector` (d_out,)."""
        return self._tensor(self.targets[path].tensors[part], dtype).flatten()

    def read_full(self, path: str) -> Tensor:
        """Read one of `full_tensors`, as stored; errors as `read`."""
        name = self.full_tensors[path]
        return self.finite(name, self.file.read(name))

    def _tensor(self, name: str, dtype: torch.dtype | None) -> Tensor:
        return self.finite(name, self.file.read(name).to(dtype or torch.float32))

    def finite(self, name: str, tensor: Tensor) -> Tensor:
        """Return values of one of the file's tensors as they are.

        Raises:
            AdapterError: one is NaN or infinite.
        """
        if tensor.is_floating_point() and not all_finite(tensor):
            bad = int((~torch.isfinite(tensor)).sum())
            raise AdapterError(
                f"adapter {self.name!r}: tensor {name!r} in {self.file.path} holds {bad} NaN or infinite values. "
                "The training run diverged or the file is damaged; use an earlier checkpoint."
            )
        return tensor

    @property
    def ranks(self) -> tuple[int, ...]:
        """The distinct ranks, ascending."""
        return tuple(sorted({t.rank for t in self.targets.values()}))

    @property
    def parameters(self) -> int:
        """Number of stored values."""
        return sum(math.prod(info.shape) for info in self.file.tensors.values())

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The distinct dtypes of the stored tensors."""
        return tuple(sorted({info.dtype for info in self.file.tensors.values()}))

    def sha256(self) -> str:
        """Return the hex digest of the tensor file; of numbered files that of their digests, in order.

        Raises:
            AdapterError: a file cannot be read.
        """
        paths = [p for p in self.files if p.suffix != ".json"] or [self.file.path]
        try:
            digests = [sha256(path) for path in paths]
        except OSError as error:
            raise AdapterError(f"{error.filename}: cannot be read ({error.strerror or error}).") from None
        return digests[0] if len(digests) == 1 else hashlib.sha256(bytes.fromhex("".join(digests))).hexdigest()


def _read_targets(stored: StoredAdapter) -> tuple[dict[str, Target], dict[str, str], list[str]]:
    """Sort a file's tensors into targets and full tensors; return them with what is wrong."""
    config, file = stored.config, stored.file
    contents = sort_tensors(file)
    naming = ParameterNaming(config.target_parameters, contents.modules)
    biases = config.raw.get("bias") not in (None, "none")
    full, incomplete = complete_names(contents.full, config.raw.get("modules_to_save") or (), trained_biases=biases)
    problems = [*contents.problems, *naming.problems, *incomplete, *_wrong_full(file, full)]
    if odd := [path for path in (*contents.modules, *full) if _CONTROL.search(path)]:
        problems.append(f"{len(odd)} names hold a control character: {listed(map(repr, odd), 3)}. Fetch or save the file again")
    targets: dict[str, Target] = {}
    for module, parts in contents.modules.items():
        try:
            target = _target(stored, module, naming.parameter(module), parts)
        except ValueError as error:
            problems.append(f"{module!r}: {error}")
        else:
            targets[target.path] = target
    if config.flag("use_dora") and (plain := [t.path for t in targets.values() if not t.is_dora]):
        problems.append(
            f"use_dora is set, but {len(plain)} of {len(targets)} modules have no lora_magnitude_vector: "
            f"{listed(map(repr, sorted(plain)), 3)}. "
            "Without it their delta is not known. Fetch or save the adapter again"
        )
    return dict(sorted(targets.items())), full, problems


def _wrong_full(file: TensorFile, full: Mapping[str, str]) -> list[str]:
    """Return what is wrong with the shapes of full tensors."""
    shapes = {name: (path, file.tensors[name].shape) for path, name in full.items()}
    empty = [name for name, (_, shape) in shapes.items() if 0 in shape]
    rows = [n for n, (path, shape) in shapes.items() if path.endswith(".trainable_tokens_delta") and len(shape) != 2]
    problems = [f"{name!r} is {list(shapes[name][1])}; token rows are (tokens, width)" for name in rows if name not in empty]
    if empty:
        problems.append(
            f"{len(empty)} tensors have no values: {listed(map(repr, empty), 3)}. DeepSpeed's ZeRO-3 leaves such where it "
            "saves without gathering. Save the adapter again (stage3_gather_16bit_weights_on_model_save, or zero_to_fp32.py)"
        )
    return problems


def _target(stored: StoredAdapter, module: str, parameter: str | None, parts: Mapping[str, str]) -> Target:
    config, file = stored.config, stored.file
    if "lora_diag" in parts:
        raise ValueError("has lora_diag (KaSA), which also changes the base model; it has no exact form here")
    if parameter is None and module.endswith(WRAPPED):
        raise ValueError(
            "is inside a wrapper of PEFT's: a LoRA below another LoRA, or on a parameter (target_parameters) that the "
            "configuration does not name"
        )
    if parameter is None and module.rpartition(".")[2] == "experts":
        raise ValueError("is a container of experts: its LoRA is on a parameter, which the configuration does not name")
    kind = layout_type({part: file.tensors[name].shape for part, name in parts.items()}, is_parameter=parameter is not None)
    path = parameter if parameter is not None and kind.names_parameter else module
    pair = kind.a_part, kind.b_part
    missing = [p for p in pair if p not in parts]
    if missing:
        raise ValueError(f"{' and '.join(missing)} missing; found {', '.join(sorted(parts))}")
    info_a, info_b = (file.tensors[parts[p]] for p in pair)
    for part, info in zip(pair, (info_a, info_b), strict=True):
        if info.dtype not in FLOATS:
            raise ValueError(f"{part} is stored as {info.dtype}; factors are read as {', '.join(FLOATS)}")
    if others := sorted(parts.keys() & _FACTORS - {*pair}):
        raise ValueError(
            f"has factors of two kinds of layer: {listed(map(repr, (parts[p] for p in others)))} besides {' and '.join(pair)}. "
            "Take out those that do not count"
        )
    layout, rank = kind.of(info_a.shape, info_b.shape, config.rank(path))
    if rank == 0:
        raise ValueError("has rank 0")
    if 0 in info_a.shape or 0 in info_b.shape:
        raise ValueError(f"has no values: A is {list(info_a.shape)} and B is {list(info_b.shape)}")
    sizes = {"lora_B.bias": layout.outputs, "lora_magnitude_vector": math.prod(layout.magnitude_shape)}
    for part, size in sizes.items():
        if part in parts and math.prod(shape := file.tensors[parts[part]].shape) != size:
            raise ValueError(f"{part} is {list(shape)}; it must have {size} values, since B is {list(info_b.shape)}")
    scaling = _scaling(stored, module, path, parts, rank * layout.rank_unit)
    own = stored.scalings is not None or ALPHA in parts
    return Target(path, layout, rank, scaling, info_b.dtype, dict(parts), own)


def _scaling(stored: StoredAdapter, module: str, path: str, parts: Mapping[str, str], rank: int) -> float:
    """Return s in ΔW = s · B A: the format's, the module's own alpha's, or that of PEFT's rules."""
    if stored.scalings is not None:
        if module not in stored.scalings:
            of = stored.origin.format
            raise ValueError(f"its name in the file has a prefix or a wrapper of PEFT's, which no file of {of} has")
        scaling = stored.scalings[module]
    elif ALPHA in parts:
        scaling = _own_scaling(stored.config, stored.file, parts[ALPHA], rank)
        configured = stored.config.scaling(path, rank)
        if any(f".{part}" in name for part, name in parts.items() if part.endswith("_A")) and not math.isclose(
            scaling, configured, rel_tol=1e-2
        ):
            raise ValueError(
                f"{parts[ALPHA]!r} gives {scaling:g} as scaling, the configuration {configured:g}; PEFT reads the latter. "
                "Delete the tensor, or put its value into alpha_pattern"
            )
    else:
        scaling = stored.config.scaling(path, rank)
    if not math.isfinite(scaling * rank):
        raise ValueError(f"its scaling is {scaling:g} at rank {rank}: no number holds their product, the alpha")
    return scaling


def _own_scaling(config: AdapterConfig, file: TensorFile, name: str, rank: int) -> float:
    """Return the scaling that a module's own alpha in the file gives, as kohya's scripts do."""
    if config.flag("use_rslora"):
        raise ValueError(f"{name!r} is an alpha for alpha / rank, and the configuration asks for alpha / sqrt(rank)")
    return one_number(file, name) / rank


def with_folder(name: str, adapters: Iterable[Adapter]) -> str:
    """Return a name, and where the adapter of that name is; the name alone where none has it."""
    folder = next((adapter.folder for adapter in adapters if adapter.name == name), None)
    return name if folder is None else f"{name} ({folder})"
