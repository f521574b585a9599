"""Flux's modules under the names of its original code and of diffusers, which cuts fused matrices into several layers.

Rows of a fused module's B are those of the layers that it is cut into, and all of these read what its A reads: cutting copies
A. The other way, factors of several layers become one module's with the ranks side by side. Both are exact.
Source: diffusers' conversion of original checkpoints (`convert_flux_transformer_checkpoint_to_diffusers`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import reduce
from typing import NamedTuple, Protocol

from plait.adapters.formats.base import Factors, ModuleFactors, OutgoingAdapter, OutgoingTarget
from plait.adapters.formats.scalings import rescaled
from plait.adapters.layouts import Layout, Linear
from plait.adapters.lowrank import LowRank
from plait.deferred import torch

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
ORIGINAL_TOWER, DIFFUSERS_TOWER = "diffusion_model", "transformer"
_ORIGINAL, _DIFFUSERS = f"{ORIGINAL_TOWER}.", f"{DIFFUSERS_TOWER}."
_MLP_RATIO = 4
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


class HasLayout(Protocol):
    """A target of an adapter, read or to be written."""

    @property
    def layout(self) -> Layout:
        """How its factors are stored."""


def has_original_names(targets: Mapping[str, HasLayout]) -> bool:
    """Return whether the main model of an adapter is Flux under the names of its original code, every module known."""
    own = {p.removeprefix(_ORIGINAL): t.layout for p, t in targets.items() if p.startswith(_ORIGINAL)}
    return bool(own) and all(
        isinstance(layout, Linear) and (path == SWAPPED[0] or bool(diffusers_paths(path))) for path, layout in own.items()
    )


def has_diffusers_names(targets: Mapping[str, HasLayout]) -> bool:
    """Return whether the main model of an adapter is Flux under diffusers' names, every module known and of Flux's shape."""
    own = {p: t.layout for p, t in targets.items() if p.startswith(_DIFFUSERS)}
    # names of attention alone are those of other models too
    return any(".single_" in p or ".ff" in p for p in own) and all(
        isinstance(layout, Linear) and (p == _DIFFUSERS + SWAPPED[1] or _fits(p, layout)) for p, layout in own.items()
    )


def cut(outgoing: OutgoingAdapter, factors: Factors) -> tuple[OutgoingAdapter, Factors]:
    """Return an adapter under the original names under diffusers' names."""
    pieces = {p: diffusers_pieces(p, t.layout) for p, t in outgoing.targets.items() if p.startswith(_ORIGINAL)}
    targets: dict[str, OutgoingTarget] = {}
    for path, target in outgoing.targets.items():
        own = pieces.get(path)
        cut_targets = {n: target._replace(layout=Linear(len(rows), target.layout.d_in)) for n, rows in (own or {}).items()}
        targets |= {path: target} if own is None else cut_targets

    def cut_factors() -> Iterator[ModuleFactors]:
        for module in factors:
            if module.target not in pieces:
                yield module
                continue
            (delta,) = module.slices
            yield from (ModuleFactors(n, [LowRank(delta.a, delta.b[rows])]) for n, rows in pieces[module.target].items())

    towers = tuple(DIFFUSERS_TOWER if t == ORIGINAL_TOWER else t for t in outgoing.towers)
    return replace(outgoing, targets=targets, towers=towers), cut_factors()


def fuse(outgoing: OutgoingAdapter, factors: Factors) -> tuple[OutgoingAdapter, Factors]:
    """Return an adapter under diffusers' names under the original ones; the layers of a fused module have their ranks in it."""
    of = outgoing.targets
    members: dict[str, list[str]] = {}  # module → targets in it, in the order of its rows
    for path in sorted(of, key=lambda p: _original(p).piece):
        members.setdefault(_original(path).module, []).append(path)
    targets = {
        name: of[paths[0]] if paths == [name] else _fused_target([(p, of[p]) for p in paths]) for name, paths in members.items()
    }

    def fused_factors() -> Iterator[ModuleFactors]:
        waiting: dict[str, dict[str, LowRank]] = {}
        for module in factors:
            name = _original(module.target).module
            if name == module.target:
                yield module
                continue
            held = waiting.setdefault(name, {})
            held[module.target] = module.slices[0]
            if len(held) == len(members[name]):
                parts = [(p, rescaled(held[p], of[p].scaling / targets[name].scaling, p)) for p in members[name]]
                yield ModuleFactors(name, [_fused(parts, targets[name])])
                del waiting[name]

    towers = tuple(ORIGINAL_TOWER if t == DIFFUSERS_TOWER else t for t in outgoing.towers)
    return replace(outgoing, targets=targets, towers=towers), fused_factors()


def _original(path: str) -> OriginalPlace:
    """Return where a target is under the original names; itself where it is not of the main model."""
    module = path.removeprefix(_DIFFUSERS)
    place = original_place(module) if path.startswith(_DIFFUSERS) else None
    if path == _DIFFUSERS + SWAPPED[1]:
        place = OriginalPlace(SWAPPED[0], 0, 1)
    return OriginalPlace(path, 0, 1) if place is None else place._replace(module=_ORIGINAL + place.module)


def _fits(path: str, layout: Layout) -> bool:
    place = original_place(path.removeprefix(_DIFFUSERS))
    if place is None or place.pieces == 1:
        return place is not None
    return layout.d_out == piece_rows(place.pieces, _height(place, layout), layout.d_in)[place.piece]


def _height(place: OriginalPlace, layout: Layout) -> int:
    """Return the rows of the module that a layer is in; an MLP in it is four times as wide as the model."""
    return layout.d_out if place.pieces == 1 else layout.d_in * (3 + _MLP_RATIO * (place.pieces == 4))


def diffusers_pieces(path: str, layout: Layout) -> dict[str, torch.Tensor]:
    """Return diffusers' layers for a target under the original names, with the rows of its B that are theirs."""
    module, rows = path.removeprefix(_ORIGINAL), torch.arange(layout.d_out)
    if module == SWAPPED[0]:
        return {_DIFFUSERS + SWAPPED[1]: torch.cat(rows.chunk(2)[::-1])}
    names = diffusers_paths(module)
    sizes = piece_rows(len(names), layout.d_out, layout.d_in)
    return {_DIFFUSERS + name: own for name, own in zip(names, torch.split(rows, sizes), strict=True)}


def _fused_target(members: list[tuple[str, OutgoingTarget]]) -> OutgoingTarget:
    path, one = members[0]
    scalings, dtypes = {t.scaling for _, t in members}, [t.dtype for _, t in members]
    return one._replace(
        layout=Linear(_height(_original(path), one.layout), one.layout.d_in),
        rank=sum(t.rank for _, t in members),
        scaling=one.scaling if len(scalings) == 1 else 1.0,
        dtype=reduce(torch.promote_types, dtypes),
    )


def _fused(parts: list[tuple[str, LowRank]], target: OutgoingTarget) -> LowRank:
    """Return the delta of a fused module from those of its layers."""
    if parts[0][0] == _DIFFUSERS + SWAPPED[1]:
        ((_, delta),) = parts
        return LowRank(delta.a, torch.cat(delta.b.chunk(2)[::-1]))
    blocks = []
    for path, delta in parts:
        place = _original(path)
        sizes = piece_rows(place.pieces, target.layout.d_out, target.layout.d_in)
        block = torch.zeros(target.layout.d_out, delta.rank, dtype=target.dtype)
        block[sum(sizes[: place.piece]) :][: len(delta.b)] = delta.b
        blocks.append(block)
    return LowRank(torch.cat([delta.a.to(target.dtype) for _, delta in parts]), torch.cat(blocks, 1))
