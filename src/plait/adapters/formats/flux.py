"""Flux's modules under the names of its original code and of diffusers, which cuts fused matrices into several layers.

Source: diffusers' conversion of original checkpoints (`convert_flux_transformer_checkpoint_to_diffusers`).
"""

from __future__ import annotations

import re
from typing import NamedTuple

_DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",), "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",), "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",), "txt_mlp.2": ("ff_context.net.2",),
    "img_mod.lin": ("norm1.linear",), "txt_mod.lin": ("norm1_context.linear",),
}  # fmt: skip
_SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}  # fmt: skip
_TOP = {
    "img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
}  # fmt: skip
_BLOCKS = {"double_blocks": ("transformer_blocks", _DOUBLE), "single_blocks": ("single_transformer_blocks", _SINGLE)}
_OF_DIFFUSERS = {
    blocks: (original, {path: (name, i) for name, paths in table.items() for i, path in enumerate(paths)}, table)
    for original, (blocks, table) in _BLOCKS.items()
}
#: Modules whose rows are two halves in one order there and in the other here: shift and scale.
SWAPPED = ("final_layer.adaLN_modulation.1", "norm_out.linear")
_BLOCK = re.compile(r"(?P<blocks>\w+)\.(?P<number>[0-9]{1,4})\.(?P<rest>.+)")


class OriginalPlace(NamedTuple):
    """Where a layer of diffusers is in the original code: a module, and which of its fused pieces."""

    module: str
    piece: int
    pieces: int


def original_place(path: str) -> OriginalPlace | None:
    """Return where one of diffusers' modules is in the original code; None where there is none of its name."""
    found = _BLOCK.fullmatch(path)
    if found is not None and found["blocks"] in _OF_DIFFUSERS:
        original, places, table = _OF_DIFFUSERS[found["blocks"]]
        if found["rest"] not in places:
            return None
        name, piece = places[found["rest"]]
        return OriginalPlace(f"{original}.{found['number']}.{name}", piece, len(table[name]))
    top = next((old for old, new in _TOP.items() if new == path), None)
    return None if top is None else OriginalPlace(top, 0, 1)


def diffusers_paths(module: str) -> tuple[str, ...]:
    """Return diffusers' layers for a module of the original code, in the order of its rows; none where it has none."""
    found = _BLOCK.fullmatch(module)
    if found is not None and found["blocks"] in _BLOCKS:
        blocks, table = _BLOCKS[found["blocks"]]
        return tuple(f"{blocks}.{found['number']}.{path}" for path in table.get(found["rest"], ()))
    return (_TOP[module],) if module in _TOP else ()


def piece_rows(pieces: int, rows: int, columns: int) -> list[int]:
    """Return the rows of every fused piece: query, key and value are as wide as the model, an MLP after them has the rest."""
    if pieces == 4:
        return [columns, columns, columns, max(0, rows - 3 * columns)]
    return [rows // pieces] * pieces
