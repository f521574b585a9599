"""Second moments of a layer with the layers below it already merged (RegMean++), and the merge that comes of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from plait.adapters.adapter import Adapter
from plait.adapters.names import layer_key
from plait.calibration.moments import take_moments
from plait.calibration.passages import Passage, Reader
from plait.deferred import torch
from plait.errors import AdapterError
from plait.merging.engine import Engine, MergedModule
from plait.merging.inventory import Inventory
from plait.merging.moments import Found, MomentsFile, MomentsOrigin, from_function, write_moments
from plait.merging.plan import make_plan
from plait.merging.truncation import OutputFactors
from plait.mixture import Mixture
from plait.mixture.deltas import AdapterDelta
from plait.notices import announce
from plait.results.progress import Progress, SilentProgress
from plait.version import __version__


def merge_layer_by_layer(
    inventory: Inventory,
    mixture: Mixture,
    passages: Mapping[str, Sequence[Passage]],
    heads: Mapping[str, bool],
    *,
    tokens: int,
    seed: int,
    workers: int,
    progress: Progress,
    parts: Path,
) -> Iterator[MergedModule]:
    """Yield every merged module, layer by layer: what a layer reads comes from the merged layers below it.

    Within the layer each adapter acts itself, on its own passages. One forward pass per layer and adapter, up to that layer;
    only one layer's moments are in memory. Layers below act at the scale of `inventory`. Every adapter's moments of a layer are
    written when they are taken; what a run that was killed has written is read instead of being taken again.

    Args:
        inventory: of the merge; its moments are not looked at.
        mixture: the base with the adapters.
        passages: adapter → what it reads.
        heads: adapter → whether its passages are answered by a classification head.
        tokens: inputs kept per module at most.
        seed: of the choice of tokens.
        workers: modules merged at a time.
        progress: receives stages and steps.
        parts: the folder in which moments are kept, `<layer>-<adapter>.safetensors`: of this merge alone, and not removed here.

    Raises:
        PlaitError: it cannot be merged; or a module whose inputs cannot be collected.
    """
    current: dict[str, dict[str, Found]] = {}
    targets = {a.name: a.targets for a in inventory.adapters}
    inventory = replace(inventory, moments=from_function(lambda name, module: current[name].get(module), targets))
    plan = make_plan(inventory, workers=workers)
    combiner = Engine(inventory, plan, workers=workers, progress=progress).prepare()
    modules = {m.target: mixture.module(m.target) for m in plan.modules}
    name, passage = max(((n, p) for n, some in passages.items() for p in some), key=lambda pair: pair[1].size)  # sees and hears
    layers = _layers(mixture, modules, passage, head=heads[name])
    merged: list[MergedModule] = []
    progress.start("layers", len(layers) * len(inventory.adapters), "passes")
    try:
        for at, layer in enumerate(layers):
            above = [modules[path] for later in layers[at + 1 :] for path in later]
            for adapter in inventory.adapters:
                name, file = adapter.name, parts / f"{at}-{adapter.name}.safetensors"
                if (known := _kept(file)) is None:
                    with mixture.attached([*merged, *_own(adapter, layer)], heads=name) as model:
                        moments = take_moments(
                            model,
                            {path: modules[path] for path in layer},
                            passages[name],
                            head=heads[name],
                            most_rows=tokens,
                            seed=seed,
                            until=above,
                        )
                    known = moments.found()
                    about = MomentsOrigin(
                        adapter=name,
                        base="",
                        texts={},
                        tokens=moments.seen,
                        sampled=len(moments.sampled),
                        key="",
                        plait=__version__,
                        sequential=True,
                    )
                    write_moments(file, known, about)
                current[name] = known
                progress.advance()
            part = plan.model_copy(update={"modules": tuple(m for m in plan.modules if m.target in set(layer))})
            engine = Engine(inventory, part, workers=workers, progress=SilentProgress())
            found = list(engine.run(combiner, engine.ranks(combiner)))
            merged += found
            yield from found
    finally:
        progress.finish()


def _kept(file: Path) -> dict[str, Found] | None:
    if not file.is_file():
        return None
    try:
        return MomentsFile(file).read_all()
    except AdapterError as error:
        announce(f"{file} is made again: {error}")
        return None


def _layers(mixture: Mixture, modules: Mapping[str, torch.nn.Module], passage: Passage, *, head: bool) -> list[list[str]]:
    """Return the modules by layer, in the order in which a model runs them; what is in no layer is one of its own."""
    order: dict[str, None] = {}
    hooks = [m.register_forward_pre_hook(lambda *_, p=path: order.setdefault(p)) for path, m in modules.items()]
    try:
        with torch.inference_mode(), mixture.active(None) as model:
            Reader(model, head=head).read([passage])
    finally:
        for hook in hooks:
            hook.remove()
    ran = [*order, *(path for path in modules if path not in order)]
    first = {layer_key(path) or path: i for i, path in reversed([*enumerate(ran)])}
    ran.sort(key=lambda path: first[layer_key(path) or path])
    return [list(group) for _, group in groupby(ran, key=lambda path: layer_key(path) or path)]


def _own(adapter: Adapter, layer: Sequence[str]) -> Iterator[MergedModule]:
    """Yield an adapter's own modules of a layer as merged ones."""
    for path in layer:
        if path in adapter.targets:
            delta = AdapterDelta.read(adapter, path, torch.float32)
            yield MergedModule(path, OutputFactors(delta.slices), None, delta.bias, delta.magnitude)
