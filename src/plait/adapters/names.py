"""Tensor names ↔ target modules, and which layer of which tower a module belongs to."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

PREFIX = "base_model.model."

# the modules that transformers builds as Conv1D, whose weight is stored as (d_in, d_out)
_CONV1D = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})
_LORA = re.compile(
    r"^(?P<module>.+)\.(?P<part>"
    r"lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|lora_diag|lora_velora_embed)"
    r"(?:\.(?P<rest>.+))?$"
)
_TRAINING_ONLY = re.compile(r"\.lora_(?:velora_embed|monteclora_sampler)(?:\.|$)")
_FIRST_INDEX = re.compile(r"^(?P<tower>(?:[^.]+\.)*?[^.\d][^.]*)\.(?P<index>\d+)(?:\.|$)")


class LoraName(NamedTuple):
    """A tensor's name, taken apart: the module path in the base model and which part of the adapter it is."""

    module: str
    part: str  # lora_A, lora_B, lora_B.bias, lora_embedding_A, lora_embedding_B, lora_magnitude_vector, lora_diag


def strip_prefix(name: str) -> str:
    """Return a tensor's name as a path in the base model; wrappers of torch.compile, FSDP, DDP and PEFT are removed."""
    for wrapper in ("_orig_mod.", "_fsdp_wrapped_module."):
        name = name.replace(wrapper, "")
    if name.startswith(f"module.{PREFIX}"):
        name = name.removeprefix("module.")
    while name.startswith(PREFIX):
        name = name.removeprefix(PREFIX)
    return name


def parse_lora_name(name: str) -> LoraName | None:
    """Take a LoRA tensor's name apart; None for any other tensor (a head, a token table, a bias).

    Accepts names with and without PEFT's prefix, and with an adapter name left in (`lora_A.default.weight`).
    """
    found = _LORA.match(strip_prefix(name))
    if found is None:
        return None
    rest = found["rest"] or ""
    part = found["part"] + (".bias" if rest == "bias" or rest.endswith(".bias") else "")
    return LoraName(found["module"], part)


def is_conv1d(module: str, *, fan_in_fan_out: bool) -> bool:
    """Say whether a base layer stores its weight transposed.

    The flag alone does not tell: PEFT writes that of the layer it wrapped last, and Linear layers may carry these names too.
    """
    return fan_in_fan_out and module.rpartition(".")[2] in _CONV1D


def is_training_only(name: str) -> bool:
    """Say whether a tensor steers training alone (VeLoRA, MonteCLoRA) and has no part in the delta."""
    return _TRAINING_ONLY.search(name) is not None


@dataclass(frozen=True, order=True)
class LayerKey:
    """A layer: the container it stands in (the tower) and its index there.

    An audio encoder and a language model both have a layer 3; their towers tell them apart.
    """

    tower: str
    index: int

    def __str__(self) -> str:
        return f"{self.tower}.{self.index}"

    def matches(self, name: str) -> bool:
        """Say whether a recipe's name means this layer: `3`, or any tail of the tower with it (`encoder.layers.3`)."""
        tower, _, index = name.rpartition(".")
        return index == str(self.index) and (not tower or f".{self.tower}".endswith(f".{tower}"))


def layer_key(module: str) -> LayerKey | None:
    """Return the layer of a module path: the first numbered component and what stands before it; None for embeddings, heads.

    Holds for `model.layers.3.…` (Llama), `transformer.h.3.…` (GPT-2), `bert.encoder.layer.3.…`, `vit.encoder.layer.3.…`,
    `blocks.3.…`, `model.encoder.layers.3.…` (Whisper) and `encoder.block.3.layer.1.…` (T5, whose inner index is not a layer).
    """
    found = _FIRST_INDEX.match(module)
    return LayerKey(found["tower"], int(found["index"])) if found else None
