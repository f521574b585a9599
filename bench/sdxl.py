"""The modules of SDXL that kohya's scripts adapt, under their names, with the shapes of their weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

RANK = 64
CONTEXT = 2048  # width of what cross-attention reads
Shape = tuple[int, int]  # rows, columns
# attention blocks of the UNet under the names of its original code → width, transformer blocks in each
_ATTENTIONS = {
    **{f"input_blocks_{i}_1": (640, 2) for i in (4, 5)}, **{f"input_blocks_{i}_1": (1280, 10) for i in (7, 8)},
    "middle_block_1": (1280, 10),
    **{f"output_blocks_{i}_1": (1280, 10) for i in (0, 1, 2)}, **{f"output_blocks_{i}_1": (640, 2) for i in (3, 4, 5)},
}  # fmt: skip
_TEXT = {"te1": (768, 12), "te2": (1280, 32)}  # width, layers


def modules() -> dict[str, Shape]:
    """Return module → shape of its weight."""
    return dict(_modules())


def counts(of: Mapping[str, Shape]) -> Counter[Shape]:
    """Return how many modules have each shape."""
    return Counter(of.values())


def _modules() -> Iterator[tuple[str, Shape]]:
    for block, (width, depth) in _ATTENTIONS.items():
        yield from ((f"lora_unet_{block}_{end}", (width, width)) for end in ("proj_in", "proj_out"))
        for i in range(depth):
            place = f"lora_unet_{block}_transformer_blocks_{i}"
            for attention, read in (("attn1", width), ("attn2", CONTEXT)):
                yield f"{place}_{attention}_to_q", (width, width)
                yield from ((f"{place}_{attention}_to_{x}", (width, read)) for x in "kv")
                yield f"{place}_{attention}_to_out_0", (width, width)
            yield f"{place}_ff_net_0_proj", (8 * width, width)
            yield f"{place}_ff_net_2", (width, 4 * width)
    for tower, (width, layers) in _TEXT.items():
        for i in range(layers):
            place = f"lora_{tower}_text_model_encoder_layers_{i}"
            yield from ((f"{place}_self_attn_{x}_proj", (width, width)) for x in ("q", "k", "v", "out"))
            yield f"{place}_mlp_fc1", (4 * width, width)
            yield f"{place}_mlp_fc2", (width, 4 * width)
