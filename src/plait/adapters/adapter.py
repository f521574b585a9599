"""An adapter on disk, opened: its targets known from headers, its tensors read when asked for."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from plait.adapters.config import AdapterConfig, subfolders_with
from plait.adapters.contents import complete_names, other_files, sort_tensors
from plait.adapters.layouts import Layout, layout_type
from plait.adapters.layouts.parameter import WRAPPED, ParameterNaming
from plait.adapters.lowrank import LowRank
from plait.adapters.names import clean_settings
from plait.errors import AdapterError, collect, listed
from plait.linalg.finite import all_finite
from plait.parsing import is_there
from plait.tensorfiles.formats import TENSOR_FORMATS
from plait.tensorfiles.reader import FLOATS, SafetensorsFile, TensorFile

ADAPTER_WEIGHTS = SafetensorsFile.adapter_name
ADAPTER_CONFIG = "adapter_config.json"
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
    """

    path: str
    layout: Layout
    rank: int
    scaling: float
    dtype: str
    tensors: Mapping[str, str] = field(repr=False)

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
    """One trained LoRA, opened.

    Attributes:
        name: unique within a merge.
        folder: of its files.
        config: its configuration.
        targets: path → target, sorted by path.
        full_tensors: tensors that are not low-rank deltas: heads (`modules_to_save`), trainable token rows, trained biases;
            path in the base model → tensor name in the file.
        file: the tensor file.
    """

    name: str
    folder: Path
    config: AdapterConfig
    targets: Mapping[str, Target]
    full_tensors: Mapping[str, str]
    file: TensorFile = field(repr=False)

    @staticmethod
    def open(folder: str | Path, name: str) -> Adapter:
        """Open an adapter: read its configuration and the header of its tensor file.

        Raises:
            AdapterError: with everything that is wrong with it.
        """
        folder = Path(folder)
        config = AdapterConfig.read(folder / ADAPTER_CONFIG)
        config = replace(config, raw=clean_settings(config.raw))
        file = _open_file(folder)
        targets, full, problems = _read_targets(config, file)
        collect(AdapterError, [f"{file.path}: {p}" for p in problems], f"{folder}: not an adapter that plait can merge")
        if not targets and not full:
            held = listed(map(repr, file.tensors), 3) or "nothing"
            raise AdapterError(f"{file.path}: no LoRA tensors found; it holds {held}.")
        return Adapter(name, folder, config, targets, full, file)

    def read(self, path: str, dtype: torch.dtype = torch.float32) -> list[LowRank]:
        """Read one target's factors, scaling not yet folded in; one `LowRank` per matrix of its stack.

        Raises:
            AdapterError: a value is NaN or infinite.
        """
        target = self.targets[path]
        names = target.tensors
        a, b = (self._tensor(names[part], dtype) for part in (target.layout.a_part, target.layout.b_part))
        return target.layout.unpack(a, b)

    def read_part(self, path: str, part: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Read another part of a target as a vector: `lora_B.bias` (d_out,) or `lora_magnitude_vector` (d_out,)."""
        return self._tensor(self.targets[path].tensors[part], dtype).flatten()

    def read_full(self, path: str) -> Tensor:
        """Read one of `full_tensors`, as stored; errors as `read`."""
        name = self.full_tensors[path]
        return self.finite(name, self.file.read(name))

    def _tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        return self.finite(name, self.file.read(name).to(dtype))

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
        """Return the hex digest of the tensor file."""
        with self.file.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def _open_file(folder: Path) -> TensorFile:
    for kind in TENSOR_FORMATS:
        if is_there(folder / kind.adapter_name, AdapterError):
            return kind(folder / kind.adapter_name)
    below = dict.fromkeys(place for kind in TENSOR_FORMATS for place in subfolders_with(folder, kind.adapter_name))
    elsewhere = f"It has them in {listed(below, 8)}: name one of these subfolders." if below else ""
    instead = other_files(folder) or elsewhere or "Was the download cut short?"
    others = " or ".join(kind.adapter_name for kind in TENSOR_FORMATS[1:])
    raise AdapterError(f"{folder / ADAPTER_WEIGHTS}: no such file, and no {others} either. {instead}")


def _read_targets(config: AdapterConfig, file: TensorFile) -> tuple[dict[str, Target], dict[str, str], list[str]]:
    """Sort a file's tensors into targets and full tensors; return them with what is wrong."""
    contents = sort_tensors(file)
    naming = ParameterNaming(config.target_parameters, contents.modules)
    biases = config.raw.get("bias") not in (None, "none")
    full, incomplete = complete_names(contents.full, config.raw.get("modules_to_save") or (), trained_biases=biases)
    problems = [*contents.problems, *naming.problems, *incomplete, *_wrong_full(file, full)]
    targets: dict[str, Target] = {}
    for module, parts in contents.modules.items():
        try:
            target = _target(config, file, module, naming.parameter(module), parts)
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


def _target(config: AdapterConfig, file: TensorFile, module: str, parameter: str | None, parts: Mapping[str, str]) -> Target:
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
    layout, rank = kind.of(info_a.shape, info_b.shape, config.rank(path))
    if rank == 0:
        raise ValueError("has rank 0")
    if ALPHA in parts:
        scaling = _own_scaling(config, file, parts[ALPHA], rank * layout.rank_unit)
        configured = config.scaling(path, rank * layout.rank_unit)
        if f".{kind.a_part}" in parts[kind.a_part] and not math.isclose(scaling, configured, rel_tol=1e-2):
            raise ValueError(
                f"{parts[ALPHA]!r} gives {scaling:g} as scaling, the configuration {configured:g}; PEFT reads the latter. "
                "Delete the tensor, or put its value into alpha_pattern"
            )
    else:
        scaling = config.scaling(path, rank * layout.rank_unit)
    return Target(path, layout, rank, scaling, info_b.dtype, dict(parts))


def _own_scaling(config: AdapterConfig, file: TensorFile, name: str, rank: int) -> float:
    """Return the scaling that a module's own alpha in the file gives, as kohya's scripts do."""
    if math.prod(file.tensors[name].shape) != 1:
        raise ValueError(f"{name!r} is {list(file.tensors[name].shape)}; an alpha is one number")
    if config.flag("use_rslora"):
        raise ValueError(f"{name!r} is an alpha for alpha / rank, and the configuration asks for alpha / sqrt(rank)")
    alpha = float(file.read(name))
    if not math.isfinite(alpha):
        raise ValueError(f"{name!r} is {alpha}; an alpha is a finite number")
    return alpha / rank
