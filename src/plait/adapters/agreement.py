"""Adapters of one model under names of different code: made to agree where that is exact, as they are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from plait.adapters.adapter import Adapter, Target
from plait.adapters.formats.flux import (
    DIFFUSERS_TOWER,
    ORIGINAL_TOWER,
    diffusers_pieces,
    has_diffusers_names,
    has_original_names,
)
from plait.adapters.formats.views import TranslatedFile, View, same
from plait.adapters.layouts import Linear
from plait.deferred import Tensor
from plait.tensorfiles.reader import TensorFile

_CUT = (
    "Flux's fused modules are read as diffusers' layers, as other adapters here name them: the same delta, with the whole A "
    "in each."
)


def in_one_naming(adapters: Sequence[Adapter]) -> list[Adapter]:
    """Return adapters of Flux under diffusers' names where some have those and others the original code's; else as they are."""
    cut = [a for a in adapters if ORIGINAL_TOWER in a.towers]
    others = [a for a in adapters if DIFFUSERS_TOWER in a.towers]
    is_flux = all(has_original_names(a.targets) for a in cut) and all(has_diffusers_names(a.targets) for a in others)
    return [_cut(a) if cut and others and is_flux and a in cut else a for a in adapters]


def _cut(adapter: Adapter) -> Adapter:
    targets: dict[str, Target] = {}
    views = {name: same(adapter.file, name) for name in adapter.full_tensors.values()}
    for path, target in adapter.targets.items():
        if not path.startswith(f"{ORIGINAL_TOWER}."):
            targets[path] = target
            views |= {name: same(adapter.file, name) for name in target.tensors.values()}
            continue
        for name, rows in diffusers_pieces(path, target.layout).items():
            parts = {part: f"{name}.{part}" for part in target.tensors}
            for part, own in target.tensors.items():
                views[parts[part]] = same(adapter.file, own) if part in ("lora_A", "alpha") else _rows(adapter.file, own, rows)
            layout = Linear(len(rows), target.layout.d_in)
            targets[name] = replace(target, path=name, layout=layout, tensors=parts)
    return replace(
        adapter,
        targets=dict(sorted(targets.items())),
        file=TranslatedFile(adapter.file.path, views),
        origin=adapter.origin.model_copy(update={"notes": (*adapter.origin.notes, _CUT)}),
        towers=tuple(DIFFUSERS_TOWER if tower == ORIGINAL_TOWER else tower for tower in adapter.towers),
    )


def _rows(file: TensorFile, name: str, rows: Tensor) -> View:
    """Return some rows of a tensor: of B, of a bias, or of DoRA's magnitudes, which are a norm per row."""
    info = file.tensors[name]
    return View((len(rows), *info.shape[1:]), info.dtype, lambda: file.read(name)[rows])
