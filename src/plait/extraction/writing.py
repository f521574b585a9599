"""The files of an extracted adapter: factors under PEFT's names, and the configuration that makes PEFT find them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plait.adapters.adapter import CONFIG, WEIGHTS
from plait.adapters.experts import expert_keys
from plait.adapters.lowrank import LowRank
from plait.adapters.names import PREFIX
from plait.errors import PlanError
from plait.extraction.pairing import Pair, Pairing
from plait.extraction.plan import ExtractPlan, key_of
from plait.extraction.request import ExtractRequest
from plait.linalg.blocks import block_ranges
from plait.merging.emit import Emitted, emit
from plait.merging.portable import DTYPES
from plait.results.progress import Progress
from plait.results.records import ModuleRecord
from plait.results.threads import in_order
from plait.tensorfiles.reader import DTYPES as STORED
from plait.tensorfiles.writer import Entry, TensorWriter


class ExtractWriter:
    """Writes one adapter.

    Args:
        pairing: the models.
        plan: what is written.
        request: dtype and layout.
    """

    def __init__(self, pairing: Pairing, plan: ExtractPlan, request: ExtractRequest) -> None:
        self._pairing, self._plan, self._request = pairing, plan, request
        self._dtype = DTYPES[request.dtype]
        self._layouts = plan.layouts
        self._experts = [m for m, layout in self._layouts.items() if layout.kind == "experts"]
        self._keys = {m: m for m in self._layouts} | expert_keys(self._experts)

    def write(self, place: Path, base: tuple[str, str | None], workers: int, progress: Progress) -> tuple[ModuleRecord, ...]:
        """Write tensors and configuration; return what happened to every layer.

        Args:
            place: the folder.
            base: name and revision of the base model.
            workers: layers worked on at a time.
            progress: who listens.
        """
        done, plan = [], self._plan
        with TensorWriter(place / WEIGHTS, self._entries()) as writer:
            for pair in plan.whole:
                _copy(pair, writer)
            for pair, emitted in zip(
                plan.targets, in_order("extract", self._factors, plan.targets, workers, progress), strict=True
            ):
                for name, tensor in self._tensors(pair, emitted).items():
                    writer.write(name, self._cast(pair, tensor))
                done.append(_module_record(pair, emitted))
        config = self._config(base)
        if [p.kind for p in (*plan.targets, *plan.whole) if p.shares] == ["linear"]:
            config["ensure_weight_tying"] = True  # a key of PEFT since 0.18; 0.21 fails on more uses than embedding and head
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (place / CONFIG).write_text(text + "\n", encoding="utf-8")
        return tuple(done)

    def _factors(self, pair: Pair) -> Emitted:
        """Return the factors of every matrix; one difference is held at a time."""
        if pair.name not in self._plan.energies:  # its bias alone has changed
            return Emitted((LowRank.zero(pair.matrix_shape, rank=1),), 0.0, 0.0)
        rank = self._plan.ranks[pair.module]
        parts = [emit([pair.delta(i)], rank, key_of(pair, i)) for i in range(len(pair.matrices))]
        slices = tuple(s for part in parts for s in part.slices)
        return Emitted(slices, math.fsum(p.energy or 0.0 for p in parts), math.fsum(p.kept or 0.0 for p in parts))

    def _tensors(self, pair: Pair, emitted: Emitted) -> dict[str, Tensor]:
        slices = [s.padded(self._rank(pair.module)) for s in emitted.slices]
        if pair.is_transposed:
            slices = [LowRank(s.b.mT, s.a.mT) for s in slices]
        if pair.kind == "conv":
            slices = [_among_all_channels(s, group, len(slices)) for group, s in enumerate(slices)]
        a, b = self._layouts[pair.module].pack(slices)
        name_a, name_b, name_bias = self._names(pair)
        return {name_a: a, name_b: b} | ({name_bias: self._bias(pair)} if self._plan.biases else {})

    def _bias(self, pair: Pair) -> Tensor:
        bias = self._plan.biases.get(pair.module)
        return torch.zeros(self._bias_size(pair)) if bias is None else bias.delta().dense().flatten()

    def _bias_size(self, pair: Pair) -> int:
        layout = self._layouts[pair.module]
        return layout.d_out * (layout.stack if layout.kind == "conv" else 1)

    def _entries(self) -> list[Entry]:
        entries = [Entry(PREFIX + p.name, getattr(torch, STORED[p.info.dtype]), p.shape) for p in self._plan.whole]
        for pair in self._plan.targets:
            layout = self._layouts[pair.module]
            shape_a, shape_b = layout.packed_shapes(self._rank(pair.module))
            name_a, name_b, bias = self._names(pair)
            entries += [Entry(name_a, self._dtype, shape_a), Entry(name_b, self._dtype, shape_b)]
            entries += [Entry(bias, self._dtype, (self._bias_size(pair),))] * bool(self._plan.biases)
        return entries

    def _rank(self, module: str) -> int:
        """Return the rank that every matrix of a layer has in the file."""
        is_uniform = self._request.layout == "uniform"
        return self._plan.rank // self._layouts[module].rank_unit if is_uniform else self._plan.ranks[module]

    def _names(self, pair: Pair) -> tuple[str, str, str]:
        path = PREFIX + self._keys[pair.module]
        if pair.kind == "embedding":
            return f"{path}.lora_embedding_A", f"{path}.lora_embedding_B", f"{path}.lora_B.bias"
        return f"{path}.lora_A.weight", f"{path}.lora_B.weight", f"{path}.lora_B.bias"

    def _cast(self, pair: Pair, tensor: Tensor) -> Tensor:
        """Return a tensor in the dtype asked for.

        Raises:
            PlanError: it overflows there, or vanishes.
        """
        cast = tensor.to(self._dtype)
        wider = f"in {self._request.dtype}; write --dtype bfloat16 or float32"
        if not bool(torch.isfinite(cast).all()):
            raise PlanError(f"{pair.name!r}: the factors overflow {wider}.")
        if bool(tensor.any()) and not bool(cast.any()):
            raise PlanError(f"{pair.name!r}: the factors are too small and vanish {wider}.")
        return cast

    def _config(self, base: tuple[str, str | None]) -> dict[str, Any]:
        plan = self._plan
        uniform = self._request.layout == "uniform"
        own = {m: r * self._layouts[m].rank_unit for m, r in sorted(plan.ranks.items())}  # PEFT's r of every layer
        patterned = {} if uniform else {m: r for m, r in own.items() if r != plan.rank}
        plain = {p.module for p in plan.targets if not p.is_parameter}
        return {
            "alpha_pattern": patterned,
            "base_model_name_or_path": base[0],
            "bias": "none",
            "fan_in_fan_out": any(p.kind == "conv1d" for p in plan.targets),
            "inference_mode": True,
            "init_lora_weights": True,
            "lora_alpha": plan.rank,
            "lora_bias": bool(plan.biases),
            "lora_dropout": 0.0,
            "modules_to_save": list(plan.saved) or None,
            "peft_type": "LORA",
            "r": plan.rank,
            "rank_pattern": patterned,
            "revision": base[1],
            "target_modules": _target_modules(self._pairing, plain),
            "target_parameters": self._experts or None,
            "task_type": self._pairing.task,
            "use_dora": False,
            "use_rslora": False,
        }


def _copy(pair: Pair, writer: TensorWriter) -> None:
    """Write a tensor of the fine-tune as it is, by rows: an embedding is large."""
    file, name = pair.tuned
    shape = pair.info.shape
    if not shape:
        writer.write(PREFIX + pair.name, file.read(name))
        return
    for start, stop in block_ranges(shape[0], math.prod(shape[1:])):
        writer.write(PREFIX + pair.name, file.read_rows(name, start, stop), row=start)


def _target_modules(pairing: Pairing, targets: set[str]) -> list[str]:
    """Return the names of the layers where they mean exactly these, else full paths."""
    names = {t.rpartition(".")[2] for t in targets}
    modules: set[str] = set()  # with those that only hold others
    for pair in (*pairing.pairs, *pairing.copies):
        words = pair.layer.split(".")
        modules |= {".".join(words[: i + 1]) for i in range(len(words))}
    meant = {m for m in modules if m.rpartition(".")[2] in names}
    return sorted(names if meant == targets else targets)


def _among_all_channels(delta: LowRank, group: int, groups: int) -> LowRank:
    """Return the delta of one group of a convolution as PEFT stores it: reading all channels, those of others times zero."""
    a = delta.a.new_zeros(delta.rank, groups, delta.a.shape[1])
    a[:, group] = delta.a
    return LowRank(a.flatten(1), delta.b)


def _module_record(pair: Pair, emitted: Emitted) -> ModuleRecord:
    energy, held = emitted.energy or 0.0, emitted.kept or 0.0
    kept = min(1.0, held / energy) if energy else 1.0
    is_whole = emitted.rank >= min(pair.matrix_shape) or not energy
    return ModuleRecord(
        target=pair.module,
        rank=emitted.rank,
        result="exact" if is_whole else "truncated",
        energy=None if is_whole else energy,
        kept=1.0 if is_whole else kept,
    )
