"""The files of an extracted adapter: factors under PEFT's names, and the configuration that makes PEFT find them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plait.adapters.adapter import CONFIG, WEIGHTS
from plait.adapters.experts import expert_keys
from plait.adapters.layouts import Layout
from plait.adapters.lowrank import LowRank
from plait.adapters.names import PREFIX
from plait.adapters.tensorfile import DTYPES as STORED
from plait.adapters.tensorwriter import Entry, TensorWriter
from plait.baking.extract_plan import ExtractPlan, key_of
from plait.baking.extract_request import ExtractRequest
from plait.baking.pairing import Pair, Pairing
from plait.baking.threads import in_order
from plait.errors import PlanError
from plait.merging.emit import Emitted, emit
from plait.merging.portable import DTYPES
from plait.merging.progress import Progress
from plait.merging.record import ModuleRecord

_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


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
        self._layouts: dict[str, Layout] = {p.module: p.layout for p in plan.targets}
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
                file, name = pair.tuned
                writer.write(PREFIX + pair.name, file.read(name))
            for pair, emitted in zip(
                plan.targets, in_order("extract", self._factors, plan.targets, workers, progress), strict=True
            ):
                for name, tensor in self._tensors(pair, emitted).items():
                    writer.write(name, self._cast(pair, tensor))
                done.append(_module_record(pair, emitted))
        text = json.dumps(self._config(base), indent=2, ensure_ascii=False)
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
        a, b = self._layouts[pair.module].pack(slices)
        name_a, name_b, name_bias = self._names(pair)
        return {name_a: a, name_b: b} | ({name_bias: self._bias(pair)} if self._plan.biases else {})

    def _bias(self, pair: Pair) -> Tensor:
        bias = self._plan.biases.get(pair.module)
        return torch.zeros(self._layouts[pair.module].d_out) if bias is None else bias.delta().dense().flatten()

    def _entries(self) -> list[Entry]:
        entries = [Entry(PREFIX + p.name, getattr(torch, STORED[p.info.dtype]), p.shape) for p in self._plan.whole]
        for pair in self._plan.targets:
            layout = self._layouts[pair.module]
            shape_a, shape_b = layout.packed_shapes(self._rank(pair.module))
            name_a, name_b, bias = self._names(pair)
            entries += [Entry(name_a, self._dtype, shape_a), Entry(name_b, self._dtype, shape_b)]
            entries += [Entry(bias, self._dtype, (layout.d_out,))] * bool(self._plan.biases)
        return entries

    def _rank(self, module: str) -> int:
        return self._plan.rank if self._request.layout == "uniform" else self._plan.ranks[module]

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
        patterned = {} if uniform else {m: r for m, r in sorted(plan.ranks.items()) if r != plan.rank}
        plain = {p.module for p in plan.targets if p.kind != "experts"}
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
            "modules_to_save": sorted({p.module for p in plan.whole}) or None,
            "peft_type": "LORA",
            "r": plan.rank,
            "rank_pattern": patterned,
            "revision": base[1],
            "target_modules": _target_modules(self._pairing.pairs, plain),
            "target_parameters": self._experts or None,
            "task_type": task_type(self._pairing),
            "use_dora": False,
            "use_rslora": False,
        }


def _target_modules(pairs: Sequence[Pair], targets: set[str]) -> list[str]:
    """Return the names of the layers where they mean exactly these, else full paths."""
    names = {t.rpartition(".")[2] for t in targets}
    meant = {p.module for p in pairs if p.module.rpartition(".")[2] in names}
    return sorted(names if meant == targets else targets)


def task_type(pairing: Pairing) -> str | None:
    """Return PEFT's task type, as the base model's architecture says; None where it says nothing."""
    architectures = pairing.base.config.get("architectures") or [""]
    if pairing.base.config.get("is_encoder_decoder") and "ForConditionalGeneration" in architectures[0]:
        return "SEQ_2_SEQ_LM"
    return next((task for end, task in _TASKS.items() if architectures[0].endswith(end)), None)


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
