"""Names of modules in pipelines of image models: their components, and paths with underscores in place of dots.

A path begins with the component of diffusers' pipelines that it is in (`unet.down_blocks.0.…`); `diffusion_model` is the main
model under the names of its original code, which only diffusers has others for. Files of kohya's scripts and of LyCORIS write
`_` for every dot, so that the words that hold one themselves must be known.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

#: The main model of a pipeline, of which a merge has one kind.
MAIN = ("unet", "transformer", "diffusion_model", "prior")
#: All components that a path may begin with.
COMPONENTS = (*MAIN, "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3")

_UNET = """
down_blocks up_blocks mid_block transformer_blocks attentions resnets downsamplers upsamplers to_q to_k to_v to_out proj_in
proj_out conv_in conv_out conv_shortcut time_emb_proj time_embedding linear_1 linear_2 add_embedding class_embedding conv conv1
conv2 norm norm1 norm2 norm3 attn1 attn2 ff net proj add_k_proj add_v_proj add_q_proj to_add_out
"""
_SGM = """
input_blocks middle_block output_blocks time_embed label_emb in_layers out_layers emb_layers skip_connection op out
"""
_DIT = """
double_blocks single_blocks img_attn txt_attn img_mlp txt_mlp img_mod txt_mod img_in txt_in time_in vector_in guidance_in
final_layer adaLN_modulation in_layer out_layer linear linear1 linear2 modulation lin qkv proj joint_blocks context_block
x_block attn mlp fc1 fc2 x_embedder t_embedder y_embedder context_embedder
blocks self_attn cross_attn q k v o k_img v_img ffn head text_embedding time_embedding time_projection patch_embedding img_emb
"""
_TRANSFORMER = """
transformer_blocks single_transformer_blocks blocks attn attn1 attn2 to_q to_k to_v to_out add_q_proj add_k_proj add_v_proj
to_add_out ff ff_context ffn net proj norm1 norm1_context norm norm_out linear proj_mlp proj_out proj_in img_mlp txt_mlp img_mod
txt_mod img_in txt_in x_embedder context_embedder time_text_embed timestep_embedder text_embedder guidance_embedder linear_1
linear_2 condition_embedder time_embedder time_proj patch_embedding norm2 norm3
"""
_TEXT = """
text_model encoder layers self_attn q_proj k_proj v_proj out_proj mlp fc1 fc2 text_projection embeddings token_embedding
position_embedding block layer SelfAttention EncDecAttention DenseReluDense q k v o wi wi_0 wi_1 wo shared embed_tokens
"""
_WORDS = {
    "unet": frozenset((_UNET + _SGM).split()),
    "diffusion_model": frozenset(_DIT.split()),
    "transformer": frozenset(_TRANSFORMER.split()),
    "text_encoder": frozenset(_TEXT.split()),
}
_SGM_NAMES = (
    ("in_layers.2", "conv1"), ("out_layers.3", "conv2"), ("emb_layers.1", "time_emb_proj"),
    ("skip_connection", "conv_shortcut"),
)  # fmt: skip
_SGM_TOP = (
    ("input_blocks.0.0", "conv_in"), ("out.2", "conv_out"), ("time_embed.0", "time_embedding.linear_1"),
    ("time_embed.2", "time_embedding.linear_2"), ("label_emb.0.0", "add_embedding.linear_1"),
    ("label_emb.0.2", "add_embedding.linear_2"),
)  # fmt: skip
_MIDDLE = (
    ("middle_block.0", "mid_block.resnets.0"), ("middle_block.1", "mid_block.attentions.0"),
    ("middle_block.2", "mid_block.resnets.1"),
)  # fmt: skip
_PER_BLOCK = 3  # layers of SD's and SDXL's blocks with what changes the size; on the way up three layers


def dotted(flat: str, component: str) -> str | None:
    """Return a path whose dots were written as underscores; None where a word is not known.

    Args:
        flat: such as `down_blocks_0_attentions_0_proj_in`.
        component: that it is in.
    """
    words = _WORDS["text_encoder" if component.startswith("text_encoder") else component]
    parts, found = flat.split("_"), list[str]()
    at = 0
    while at < len(parts):
        ends = (end for end in range(min(len(parts), at + 4), at, -1) if "_".join(parts[at:end]) in words)
        end = next(ends, at + 1 if parts[at].isascii() and parts[at].isdecimal() else None)
        if end is None:
            return None
        found.append("_".join(parts[at:end]))
        at = end
    return ".".join(found)


def from_sgm(path: str) -> str | None:
    """Return diffusers' path for one of the original code of SD and SDXL; None where there is none of that name."""
    for old, new in (*_SGM_TOP, *_MIDDLE):
        if path == old or path.startswith(f"{old}."):
            return _inner(new + path[len(old) :])
    found = re.fullmatch(r"(input|output)_blocks\.([0-9]{1,4})\.([0-9])\.(.+)", path)
    if found is None:
        return None
    number, part, rest = int(found[2]), int(found[3]), found[4]
    down = found[1] == "input"
    if number < down:
        return None
    block, layer = divmod(number - down, _PER_BLOCK)
    side = "down_blocks" if down else "up_blocks"
    if down and rest == "op":
        return f"{side}.{block}.downsamplers.0.conv" if layer == _PER_BLOCK - 1 else None
    if not down and rest == "conv":
        return f"{side}.{block}.upsamplers.0.conv"
    if down and layer == _PER_BLOCK - 1:
        return None
    kind = {0: "resnets", 1: "attentions"}.get(part)
    return None if kind is None else _inner(f"{side}.{block}.{kind}.{layer}.{rest}")


def to_sgm(path: str, paths: Iterable[str] = ()) -> str | None:
    """Return the original code's path for one of diffusers; None where there is none.

    Args:
        path: in the UNet.
        paths: of the UNet's other modules, which show whether an upsampler follows an attention in its block.
    """
    for new, old in (*_SGM_TOP, *_MIDDLE):
        if path == old or path.startswith(f"{old}."):
            return new + _outer(path[len(old) :])
    found = re.fullmatch(
        r"(down|up)_blocks\.([0-9]{1,4})\.(resnets|attentions|downsamplers|upsamplers)\.([0-9]{1,4})\.(.+)", path
    )
    if found is None:
        return None
    block, kind, layer, rest = int(found[2]), found[3], int(found[4]), found[5]
    if kind == "downsamplers":
        return f"input_blocks.{_PER_BLOCK * (block + 1)}.0.op"
    if kind == "upsamplers":
        attends = any(p.startswith(f"up_blocks.{block}.attentions.") for p in paths)
        return f"output_blocks.{_PER_BLOCK * block + 2}.{1 + attends}.conv"
    part = 0 if kind == "resnets" else 1
    number = _PER_BLOCK * block + layer + (found[1] == "down")
    side = "input_blocks" if found[1] == "down" else "output_blocks"
    return f"{side}.{number}.{part}{_outer(f'.{rest}')}"


def is_sdxl(paths: Iterable[str]) -> bool:
    """Return whether paths are of SDXL's pipeline: a second text encoder, or several transformer blocks in one attention."""
    return any(p.startswith("text_encoder_2.") or re.search(r"attentions\.\d+\.transformer_blocks\.[1-9]", p) for p in paths)


def with_text_model(path: str) -> str:
    """Return a path of a CLIP text encoder as files have it: transformers 5 has taken `text_model` out of the models."""
    return re.sub(r"^(text_encoder(?:_\d)?)\.(?=encoder\.layers\.|embeddings\.|final_layer_norm)", r"\1.text_model.", path)


def kernel_of(path: str, *, linear_projections: bool | None) -> tuple[int, ...] | None:
    """Return the kernel of a module of a UNet or text encoder by its name: () of a matrix; None where that does not tell.

    Args:
        path: with its component.
        linear_projections: whether `proj_in` and `proj_out` of attentions are matrices, as in SD 2 and SDXL; None: not known.
    """
    component, _, rest = path.partition(".")
    name = rest.rpartition(".")[2]
    if component != "unet":
        return ()
    if name in ("conv1", "conv2", "conv", "conv_in", "conv_out"):
        return (3, 3)
    if name == "conv_shortcut":
        return (1, 1)
    if name in ("proj_in", "proj_out") and "transformer_blocks" not in rest:
        return None if linear_projections is None else () if linear_projections else (1, 1)
    return ()


def _inner(path: str) -> str:
    for old, new in _SGM_NAMES:
        path = re.sub(rf"(?<=\.){re.escape(old)}$", new, path)
    return path


def _outer(path: str) -> str:
    for new, old in _SGM_NAMES:
        path = re.sub(rf"(?<=\.){re.escape(old)}$", new, path)
    return path
