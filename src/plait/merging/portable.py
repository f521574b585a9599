"""The portable form of an adapter: scaling baked in, alpha = rank, plain names; what PEFT, vLLM and Unsloth load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from plait.adapters.adapter import Adapter
from plait.adapters.experts import expert_keys
from plait.adapters.layouts import Layout, uniform_rank
from plait.adapters.names import PREFIX, pattern_of
from plait.merging.emit import rounded
from plait.merging.engine import MergedModule
from plait.merging.inventory import Inventory
from plait.merging.selection import full_paths, joined_selection
from plait.recipes.schema import Output
from plait.tensorfiles.writer import Entry

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SELECTORS = ("target_modules", "layers_to_transform", "layers_pattern", "exclude_modules", "target_parameters")


class PortableAdapter:
    """Names, shapes and configuration of a merged adapter; turns merged modules into its tensors.

    Args:
        inventory: the sources.
        ranks: target → its own rank.
        output: dtype and layout asked for.
    """

    def __init__(self, inventory: Inventory, ranks: Mapping[str, int], output: Output) -> None:
        self._inventory = inventory
        self._dtype = DTYPES[output.dtype]
        self._layouts: dict[str, Layout] = {t: inventory.layouts[t] for t in ranks}
        own = {t: r * self._layouts[t].rank_unit for t, r in ranks.items()}  # PEFT's r of every target
        self.rank = uniform_rank(ranks, self._layouts)
        uniform = output.layout == "uniform" or len(set(own.values())) == 1
        self._ranks = dict.fromkeys(own, self.rank) if uniform else own
        experts = [t for t, layout in self._layouts.items() if layout.kind == "experts"]
        self._modules = {t: t for t in ranks} | expert_keys(experts)
        targets = [a.targets[t] for a in inventory.adapters for t in ranks if t in a.targets]
        self.has_bias = any(t.has_bias for t in targets)
        self.is_dora = any(t.is_dora for t in targets)

    def entries(self) -> list[Entry]:
        """Return every tensor of the file."""
        entries = []
        for target, layout in self._layouts.items():
            a, b, bias, magnitude = self._names(target)
            shape_a, shape_b = layout.packed_shapes(self._slice_rank(target))
            entries += [Entry(a, self._dtype, shape_a), Entry(b, self._dtype, shape_b)]
            d_out = layout.stack * layout.d_out
            if self.has_bias:
                entries.append(Entry(bias, self._dtype, (d_out,)))
            if self.is_dora:
                ones = (1,) * len(layout.kernel)
                entries.append(Entry(magnitude, self._dtype, (1, d_out, *ones[1:]) if layout.kind == "conv" else (d_out,)))
        return entries

    def tensors(self, merged: MergedModule) -> dict[str, Tensor]:
        """Return one merged module's tensors by their names, in the output's dtype.

        Raises:
            PlanError: a value overflows there, or all of them vanish.
        """
        if merged.factors is None:
            raise AssertionError(f"{merged.target!r} has no factors")
        layout = self._layouts[merged.target]
        names = self._names(merged.target)
        a, b = layout.pack([s.padded(self._slice_rank(merged.target)) for s in merged.factors.slices])
        found = {names[0]: a, names[1]: b}
        if merged.bias is not None:
            found[names[2]] = merged.bias
        if merged.magnitude is not None:
            ones = (1,) * len(layout.kernel)
            found[names[3]] = merged.magnitude.reshape((1, -1, *ones[1:]) if layout.kind == "conv" else (-1,))
        return {name: rounded(merged.target, tensor, self._dtype) for name, tensor in found.items()}

    def config(self, declared_heads: Mapping[str, object]) -> dict[str, Any]:
        """Return `adapter_config.json`."""
        adapters = self._inventory.adapters
        patterned = {pattern_of(t): r for t, r in self._ranks.items() if r != self.rank}
        task_types = [a.config.raw.get("task_type") for a in adapters if a.config.raw.get("task_type")]
        config: dict[str, Any] = {
            "peft_type": "LORA",
            "task_type": task_types[0] if task_types else None,
            "base_model_name_or_path": self._inventory.base_model,
            "revision": next((a.config.revision for a in adapters if a.config.revision), None),
            "r": self.rank,
            "lora_alpha": self.rank,
            "lora_dropout": 0.0,
            "use_rslora": False,
            "use_dora": self.is_dora,
            "lora_bias": self.has_bias,
            "rank_pattern": patterned,
            "alpha_pattern": patterned,
            "bias": "none",
            "fan_in_fan_out": any(a.config.flag("fan_in_fan_out") for a in adapters),
            "init_lora_weights": True,
            "inference_mode": True,
            "modules_to_save": None,
            **self._selectors(),
            **self._carried(adapters),
            **declared_heads,
        }
        return dict(sorted(config.items()))

    def _slice_rank(self, target: str) -> int:
        return self._ranks[target] // self._layouts[target].rank_unit

    def _names(self, target: str) -> tuple[str, str, str, str]:
        path = PREFIX + self._modules[target]
        if self._layouts[target].kind == "embedding":
            return (
                f"{path}.lora_embedding_A",
                f"{path}.lora_embedding_B",
                f"{path}.lora_B.bias",
                f"{path}.lora_magnitude_vector",
            )
        return f"{path}.lora_A.weight", f"{path}.lora_B.weight", f"{path}.lora_B.bias", f"{path}.lora_magnitude_vector"

    def _selectors(self) -> dict[str, Any]:
        """Return what makes PEFT wrap exactly these modules.

        An adapter with the same targets got them by its own selection, which is short and known to be right (modules that it
        saved whole are exempt from it, and would be wrapped now). So did all adapters together: their selections side by side
        mean the union, whatever the modules are called in the version of the model that it is loaded into. Where neither
        holds, full paths say it.
        """
        for adapter in self._inventory.adapters:
            raw = adapter.config.raw
            selected = (raw.get("target_modules") or raw.get("target_parameters")) and not raw.get("modules_to_save")
            if selected and set(adapter.targets) == set(self._layouts):
                return {
                    k: sorted(v) if isinstance(v := raw.get(k), list) and k != "layers_to_transform" else v for k in _SELECTORS
                }
        joined = joined_selection(self._inventory.adapters, set(self._layouts))
        if joined is not None:
            return {k: None for k in _SELECTORS} | {"target_modules": joined}
        plain = [t for t, layout in self._layouts.items() if layout.kind != "experts"]
        experts = [t for t, layout in self._layouts.items() if layout.kind == "experts"]
        return {
            "target_modules": full_paths(plain),
            "target_parameters": experts or None,
            "layers_to_transform": None,
            "layers_pattern": None,
            "exclude_modules": None,
        }

    @staticmethod
    def _carried(adapters: Sequence[Adapter]) -> dict[str, Any]:
        """Return keys that change what the base model is or when the adapter acts; the sources agree on them (`inventory`)."""
        keys = ("layer_replication", "alora_invocation_tokens")
        return {k: adapters[0].config.raw[k] for k in keys if adapters[0].config.raw.get(k) is not None}
