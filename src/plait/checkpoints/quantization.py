"""Is a checkpoint quantized, how, and what can be done about it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from plait.checkpoints.dequantize import QUANTIZED_FORMATS
from plait.checkpoints.files import sections
from plait.tensorfiles.header import TensorInfo
from plait.tensorfiles.reader import FLOATS

# names under which bitsandbytes, GPTQ, AWQ, compressed-tensors and fp8 checkpoints store what a float weight is not
_QUANTIZED = re.compile(
    r"\.(qweight|qzeros|g_idx|weight_packed|weight_scale|weight_scale_inv|absmax|quant_map|SCB|weight_format"
    r"|\w+_blocks|weight\.(absmax|quant_map|quant_state\.\S+))$"
)
_ORIGINAL = (
    "Rounding a merge to a few bits again would lose most of it. Give the 16- or 32-bit model that it was made from "
    "(--base-id), bake that, and quantize the result"
)
_REASONS = {
    "bitsandbytes": "bitsandbytes unpacks its weights with kernels of its own, which transformers does not come with",
    "compressed-tensors": "its packing is known to the compressed-tensors library alone",
    "gptq": "transformers has no way back from it",
    "awq": "transformers has no way back from it",
}
_OTHER = "transformers does not dequantize it on a processor"


class Quantization(NamedTuple):
    """How a checkpoint is quantized.

    Attributes:
        method: as `quantization_config` calls it; None where it names none.
        description: the same in words, with where it was found.
    """

    method: str | None
    description: str


def quantization(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Quantization | None:
    """Return how a checkpoint is quantized; None when it is plain.

    Args:
        config: its `config.json`.
        tensors: all of them; their names and dtypes decide where the configuration names no method.
    """
    for holder in sections(config):
        settings = holder.get("quantization_config")
        if settings:
            method = settings.get("quant_method") if isinstance(settings, dict) else str(settings)
            return Quantization(method, f"{method or 'a method that is not named'}, in config.json")
    for name, info in tensors.items():
        if _QUANTIZED.search(name) or (info.dtype not in FLOATS and info.dtype.startswith(("F8", "F4", "F6"))):
            return Quantization(None, f"{name!r} is stored as {info.dtype}")
    return None


def quantization_advice(method: str | None, *, requested: bool) -> str:
    """Return what to do about a quantized base.

    Args:
        method: how it is quantized, where that is known.
        requested: that it be dequantized.
    """
    if method in QUANTIZED_FORMATS:
        return f"{_ORIGINAL}; or bake the plain model that it encodes (bake --dequantize)."
    why = f"--dequantize knows {' and '.join(QUANTIZED_FORMATS)}: {_REASONS.get(method or '', _OTHER)}. " if requested else ""
    return (
        f"{why}{_ORIGINAL}; or load it where its library runs, dequantize it there (model.dequantize() or "
        "quantization_config=…(dequantize=True), then save_pretrained) and give that folder."
    )
