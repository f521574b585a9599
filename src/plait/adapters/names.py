"""Tensor names ↔ target modules, and which layer of which tower a module belongs to."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from plait.adapters.layouts import factor_parts

PREFIX = "base_model.model."

# what torch puts into names for torch.compile, activation checkpointing, FSDP (old and new); Lightning; Opacus
_WRAPPERS = (
    "_orig_mod",
    "_checkpoint_wrapped_module",
    "_fsdp_wrapped_module",
    "_fpw_module",
    "_forward_module",
    "_module",
)
_DEFAULT = "default"  # what PEFT calls an adapter that was given no name
_PARALLEL = "module"  # of DDP, DataParallel and DeepSpeed; models have modules of this name too, within their layers
_FACTORS = factor_parts()
_LORA = re.compile(
    r"^(?P<module>.+)\.(?P<part>"
    rf"{'|'.join(_FACTORS)}|lora_magnitude_vector|lora_diag|lora_velora_embed)"
    r"(?:\.(?P<owner>(?!weight$|bias$)[^.]+))?(?:\.(?P<leaf>weight|bias))?$"
)
_FULL = re.compile(
    r"^(?P<module>.+)\.(?:(?P<saved>modules_to_save)|(?P<original>original_module))\.(?P<leaf>.+)$"
    r"|^(?P<table>.+\.token_adapter)\.trainable_tokens_(?P<rows>delta|original)(?:\.(?P<owner>[^.]+))?$"
)
_TRAINING_ONLY = re.compile(r"\.lora_(?:velora_embed|monteclora_sampler)(?:\.|$)")
_FIRST_INDEX = re.compile(r"^(?P<tower>(?:[^.]+\.)*?[^.\d][^.]*)\.(?P<index>\d+)(?:\.|$)")
# Tensors of other methods and other programs. None of them may pass for a head.
_FOREIGN = {
    "LoRA as kohya's scripts write it (lora_down, lora_up)": r"(?:^|\.)lora_(?:down|up|mid)(?:\.|$)|\.dora_scale$",
    "LoRA as mlx writes it (lora_a, lora_b; transposed)": r"(?:^|\.)lora_[ab]$",
    "LoRA as torchtune writes it (lora_a.weight, lora_b.weight)": r"(?:^|\.)lora_[ab]\.",
    "LoRA as diffusers writes it (lora.down, lora.up)": r"lora\.(?:down|up)(?:\.|$)|\.lora_(?:linear|conv2d)_layer\.",
    "LoHa, LoKr or OFT as LyCORIS and PEFT write them": r"\.(?:hada_|lokr_|b?oft_|glora_)\w+(?:\.|$)",
    "AdaLoRA (lora_E)": r"\.(?:lora_E|ranknum)(?:\.|$)",
    "IA3": r"\.ia3_l(?:\.|$)",
    "VeRA, RandLoRA or VB-LoRA, whose matrices are shared": r"(?:^|\.)(?:vera|pvera|randlora|vblora)_\w+(?:\.|$)",
    "prompt tuning or prefix tuning": r"(?:^|\.)(?:prompt_embeddings|prompt_encoder|adaption_(?:prompt|gate))(?:\.|$)",
    "another method of PEFT": r"\.(?:fourierft|hra|bone|miss|shira|c3a|road|waveft|delora|gralora|randlora|ln_tuning|poly_lora"
    r"|internal_xlora|vblora)_\w+(?:\.|$)",
    "quantized weights": r"\.(?:nested_)?(?:absmax|quant_map)$|\.quant_state\."
    r"|\.(?:SCB|qweight|qzeros|g_idx|weight_scale_inv)$",
    "FSDP's flattened parameters": r"(?:^|\.)_?flat_param(?:_\d+)?(?:\.|$)",
    "LoRA as NeMo and Megatron write it (linear_in, linear_out)": r"\.adapters?\.(?:[^.]+\.)*linear_(?:in|out)\.",
    "a LoRA of a kind that is not known": r"(?:^|\.)(?:lora_[A-Z]\w*|loras?)(?:\.|$)|\.lora_(?:embedding|magnitude|diag)\w*\."
    r"|(?i:(?:^|[./:])(?:kernel_)?lora_(?:a|b|down|up|left|right|in|out)(?:[./:]|$))",
}
_FOREIGN_PATTERNS = {what: re.compile(pattern) for what, pattern in _FOREIGN.items()}


class LoraName(NamedTuple):
    """A tensor's name, taken apart: the module path in the base model and which part of the adapter it is."""

    module: str
    part: str  # lora_A, lora_B, lora_B.bias, lora_embedding_A, lora_embedding_B, lora_magnitude_vector, lora_diag
    owner: str | None = None  # the adapter's name in memory, where it was left in


class FullName(NamedTuple):
    """The name of a tensor that is not part of a LoRA."""

    path: str  # of the parameter in the base model; with `.base_layer.` for the table below a LoRA or trained rows
    owner: str | None = None  # the adapter's name in memory, where it was left in
    is_copy: bool = False  # the live model's own second copy, `modules_to_save.…`
    is_untrained: bool = False  # the value before training


def strip_prefix(name: str) -> str:
    """Return a tensor's name as a path in the base model, without wrappers.

    Removed are, at any depth, PEFT's own prefix and what torch.compile, activation checkpointing, FSDP and Lightning put into
    names; the `module` of DDP and DeepSpeed before the first numbered layer or next to another wrapper.
    """
    kept: list[str] = []
    words = name.split(".")
    numbered = wrapped = False
    for i, word in enumerate(words):
        last = i == len(words) - 1
        following = words[i + 1] if not last else ""
        if not last and (word in _WRAPPERS or (word == _PARALLEL and (not numbered or wrapped or following in _WRAPPERS))):
            wrapped = True
            continue
        wrapped = False
        numbered = numbered or word.isdigit()
        kept.append(word)
    path = ".".join(kept)
    return re.sub(r"(?:^|(?<=\.))base_model\.model\.", "", path)


def parse_lora_name(name: str) -> LoraName | None:
    """Take a LoRA tensor's name apart; None for any other tensor (a head, a token table, a bias).

    Accepts names with and without PEFT's prefix, and with an adapter name left in (`lora_A.default.weight`).
    """
    found = _LORA.match(strip_prefix(name))
    if found is None:
        return None
    if found["leaf"] == "bias" and _FACTORS.get(found["part"]) is False:  # a parameter of an adapter called `bias`
        return LoraName(found["module"], found["part"], "bias")
    if found["leaf"] == "bias" and found["part"] != "lora_B":
        return None
    if found["owner"] and not found["leaf"] and _FACTORS.get(found["part"]):
        return None  # these are layers, and have weights; other parts are parameters, and end in the adapter's name
    return LoraName(found["module"], found["part"] + (".bias" if found["leaf"] == "bias" else ""), found["owner"])


def parse_full_name(name: str, owners: Collection[str] = (), untrained: Collection[str] = ()) -> FullName:
    """Take the name of a tensor apart that is not part of a LoRA.

    Args:
        name: as in the file.
        owners: adapters' names that the factors of the file have (`lora_A.default.weight`).
        untrained: cleaned names of untrained copies in the file (`….original_module.…`). Both show the adapter's name in
            `head.modules_to_save.default.weight` from a module's in `head.modules_to_save.dense.weight`.
    """
    path = strip_prefix(name)
    found = _FULL.match(path)
    if found is None:
        return FullName(path.replace(".token_adapter.base_layer.", ".base_layer."))
    if found["table"]:
        return FullName(f"{found['table']}.trainable_tokens_delta", found["owner"], is_untrained=found["rows"] == "original")
    module, leaf = found["module"], found["leaf"]
    if found["original"]:
        return FullName(f"{module}.{leaf}", is_untrained=True)
    owner, _, rest = leaf.partition(".")
    before = f"{module}.original_module"
    named = owner in owners or owner == _DEFAULT or f"{before}.{rest}" in untrained
    if rest and named and f"{before}.{leaf}" not in untrained:
        return FullName(f"{module}.{rest}", owner, is_copy=True)
    return FullName(f"{module}.{leaf}", is_copy=True)


def foreign_tensors(names: Iterable[str]) -> dict[str, list[str]]:
    """Return what other methods and programs have left in a file: what it is → tensor names, in order."""
    found: dict[str, list[str]] = {}
    for name in names:
        path = strip_prefix(name)
        for what, pattern in _FOREIGN_PATTERNS.items():
            if pattern.search(path):
                found.setdefault(what, []).append(name)
                break
    return found


def kohya_part(name: str) -> LoraName | None:
    """Take a name of kohya's scripts apart that has the module's path: `….lora_down.weight`, `….lora_up.weight`, `….alpha`.

    None for all others.
    """
    found = re.match(r"^(?P<module>.+)\.(?P<part>lora_down\.weight|lora_up\.weight|alpha)$", strip_prefix(name))
    return LoraName(found["module"], _KOHYA[found["part"]]) if found else None


def is_flat(module: str) -> bool:
    """Return whether a module's path has underscores in place of dots (`lora_te_…`), which names alone do not resolve."""
    return re.match(r"(?:lora|lycoris)_[a-z]+\d*_[^.]*$|[^.\d]+_(?:layers?|h|blocks?)_\d+_[^.]+$", module) is not None


_KOHYA = {"lora_down.weight": "lora_A", "lora_up.weight": "lora_B", "alpha": "alpha"}


def clean_settings(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return an adapter's configuration with the names and patterns of modules in it cleaned as tensor names are."""
    return {key: _clean(value) if key in _NAMING else value for key, value in raw.items()}


_NAMING = frozenset({
    "target_modules", "target_parameters", "exclude_modules", "modules_to_save", "rank_pattern", "alpha_pattern",
    "trainable_token_indices", "layers_pattern",
})  # fmt: skip
_WRAPPER_IN_PATTERN = re.compile(rf"(?:{'|'.join(_WRAPPERS)})\\?\.")


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return _WRAPPER_IN_PATTERN.sub("", value)
    if isinstance(value, list):
        return [_clean(v) for v in value]
    if isinstance(value, Mapping):
        return {_clean(k): v for k, v in value.items()}
    return value


# Older and newer names of vision-language models differ by containers that transformers put into their paths, or took out.
_LANGUAGE = re.compile(r"^(?:model\.)?language_model\.(?:model\.)?(?=(?:layers|embed_tokens)\.|embed_tokens$)")
_VISION = re.compile(r"^(?:model\.)?vision_tower\.(?:vision_model\.)?")
_OLDER = ((_LANGUAGE, r"language_model\.(?:model\.)?"), (_VISION, r"vision_tower\.(?:vision_model\.)?"))


def pattern_of(path: str) -> str:
    """Return a pattern for PEFT's settings that a module has in all versions of a model; the path itself where they agree.

    PEFT matches it after any prefix (`rank_pattern`, `alpha_pattern`).
    """
    for older, pattern in _OLDER:
        found = older.match(path)
        if found is not None:
            return pattern + re.escape(path[found.end() :])
    return path


def is_training_only(name: str) -> bool:
    """Return whether a tensor steers training alone (VeLoRA, MonteCLoRA) and has no part in the delta."""
    return _TRAINING_ONLY.search(name) is not None


@dataclass(frozen=True, order=True)
class LayerKey:
    """A layer: the container that it is in (the tower) and its index there.

    An audio encoder and a language model both have a layer 3; their towers distinguish them.
    """

    tower: str
    index: int

    def __str__(self) -> str:
        return f"{self.tower}.{self.index}"

    def matches(self, name: str) -> bool:
        """Return whether a recipe's name means this layer: `3`, or any tail of the tower with it (`encoder.layers.3`)."""
        tower, _, index = name.rpartition(".")
        return index == str(self.index) and (not tower or f".{self.tower}".endswith(f".{tower}"))


def layer_key(module: str) -> LayerKey | None:
    """Return the layer of a module path: the first numbered component and what precedes it; None for embeddings, heads.

    Holds for `model.layers.3.…` (Llama), `transformer.h.3.…` (GPT-2), `bert.encoder.layer.3.…`, `vit.encoder.layer.3.…`,
    `blocks.3.…`, `model.encoder.layers.3.…` (Whisper) and `encoder.block.3.layer.1.…` (T5, whose inner index is not a layer).
    """
    found = _FIRST_INDEX.match(module)
    return LayerKey(found["tower"], int(found["index"])) if found else None
