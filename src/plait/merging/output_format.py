"""In which format a merge is written, and what of the sources goes into its files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plait.adapters.adapter import Adapter
from plait.adapters.formats import FORMATS, AdapterFormat, OutgoingAdapter, OutgoingTarget
from plait.adapters.layouts import Layout
from plait.adapters.selection import selection_of
from plait.adapters.writing import output_dtype
from plait.checkpoints.files import read_config
from plait.hub.download import resolve_model
from plait.inspection.compatibility import max_lora_rank, other_kind
from plait.merging.inventory import Inventory


def output_format(inventory: Inventory) -> AdapterFormat:
    """Return the format of a merged adapter: the recipe's, or the sources' own; where these differ, one that they all have."""
    wanted = inventory.recipe.output.format
    if wanted != "auto":
        return FORMATS[wanted]
    found = {a.origin.format for a in inventory.adapters}
    if len(found) == 1:
        return FORMATS[found.pop()]
    return FORMATS["diffusers" if any(a.towers for a in inventory.adapters) else "peft"]


def writes_peft(inventory: Inventory) -> bool:
    """Return whether a merge is a folder of PEFT's for one model, with all that such a folder can hold."""
    return output_format(inventory).name == "peft" and not any(a.towers for a in inventory.adapters)


def served_rank(inventory: Inventory, rank: int | None) -> int | None:
    """Return the smallest value of vLLM's max_lora_rank for a merge of a rank; None where it is not known to serve it."""
    adapters, targets = inventory.adapters, [t for a in inventory.adapters for t in a.targets.values()]
    if rank is None or not writes_peft(inventory) or any(map(other_kind, adapters)):
        return None
    if any(not t.layout.served_by_vllm or t.is_dora or t.has_bias for t in targets):
        return None
    has_heads = inventory.recipe.heads.policy != "separate" and any(a.full_tensors for a in adapters)
    return None if has_heads else max_lora_rank(rank)


def base_config(wanted: AdapterFormat, base_model: str | None, folder: Path | None = None) -> Mapping[str, Any]:
    """Return the base model's `config.json` where a format needs it and there is a base; else nothing.

    Raises:
        AddressError: the base is nowhere.
    """
    if not wanted.reads_base or base_model is None:
        return {}
    return read_config(resolve_model(base_model, base=folder, files=("config.json",)).folder)


def merged_metadata(adapters: Sequence[Adapter]) -> dict[str, str]:
    """Return the texts of the sources' headers for their merge: those that all have as they are, others under their adapter."""
    texts = [a.origin.metadata for a in adapters]
    shared = {k: v for k, v in texts[0].items() if all(t.get(k) == v for t in texts)}
    return shared | {f"{a.name}.{k}": v for a in adapters for k, v in a.origin.metadata.items() if k not in shared}


def outgoing_merge(inventory: Inventory, ranks: Mapping[str, int]) -> OutgoingAdapter:
    """Describe a merged adapter for a format that is not PEFT's; scalings are in the factors.

    Args:
        inventory: the sources.
        ranks: target → rank of one of its matrices.
    """
    adapters, recipe = inventory.adapters, inventory.recipe
    towers = list(dict.fromkeys(t for a in adapters for t in a.towers))
    alone = len(towers) == 1 and output_format(inventory).of_one_model
    of = {path: [a.targets[path] for a in adapters if path in a.targets] for path in ranks}
    targets = {
        path.removeprefix(f"{towers[0]}.") if alone else path: OutgoingTarget(
            inventory.layouts[path], rank, 1.0, output_dtype(recipe.output.dtype),
            any(t.has_bias for t in of[path]), any(t.is_dora for t in of[path]),
        )
        for path, rank in ranks.items()
    }  # fmt: skip
    heads = [] if recipe.heads.policy == "separate" else [p for a in adapters for p in a.full_tensors]
    keys = ("alora_invocation_tokens", "layer_replication")
    layouts = {path: t.layout for path, t in targets.items()}
    return OutgoingAdapter(
        targets=targets,
        settings=settings_of(adapters, layouts, inventory.base_model),
        metadata=merged_metadata(adapters),
        towers=towers,
        base_config=base_config(output_format(inventory), inventory.base_model, recipe.folder),
        others=(*dict.fromkeys(heads), *(key for key in keys if any(a.config.raw.get(key) for a in adapters))),
    )


def settings_of(adapters: Sequence[Adapter], layouts: Mapping[str, Layout], base_model: str | None) -> dict[str, Any]:
    """Return the keys of `adapter_config.json` that a merge of adapters on these targets has from them."""
    # keys that change what the base model is or when the adapter acts; the sources agree on them (`inventory`)
    keys = ("layer_replication", "alora_invocation_tokens")
    return {
        "task_type": next((t for a in adapters if (t := a.config.raw.get("task_type"))), None),
        "base_model_name_or_path": base_model,
        "revision": next((a.config.revision for a in adapters if a.config.revision), None),
        "fan_in_fan_out": any(a.config.flag("fan_in_fan_out") for a in adapters),
        **_noted(adapters),
        **selection_of(adapters, layouts),
        **{key: value for key in keys if (value := adapters[0].config.raw.get(key)) is not None},
    }


def _noted(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """Return PEFT's note of the class of the base, which it has in place of a task type, where all adapters' is the same."""
    noted = {a.config.noted_class for a in adapters}
    if None in noted or len(noted) > 1:
        return {}
    ((module, name),) = (n for n in noted if n is not None)
    return {"auto_mapping": {"base_model_class": name, "parent_library": module}}
