"""What adapters are: everything `plait inspect` reports, as numbers and words; side by side in `comparison`.

The numbers come from `geometry`. Independent of how they are shown.
"""

from __future__ import annotations

import math
import os
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Literal

from plait.adapters.adapter import Adapter, Target
from plait.adapters.config import alpha_of
from plait.adapters.layouts import Linear
from plait.adapters.names import layer_key
from plait.errors import PlanError
from plait.inspection.comparison import AdapterComparison, compare_adapters
from plait.inspection.compatibility import Compatibility, Serving, check_compatibility, serving, short_name
from plait.inspection.doubts import config_problems, other_file
from plait.inspection.geometry import PairwiseMeasures, Spectra, layer_name, measure_all
from plait.records import Record
from plait.results.progress import Progress, SilentProgress
from plait.results.threads import worker_count
from plait.views import Viewed

_LONGEST_TEXT = 200  # letters of a text of a header


class ModuleKind(Record):
    """Target modules of one name.

    Attributes:
        name: the last part of the path (`q_proj`).
        kind: how the factors are stored, as `plait.adapters.layouts` calls it.
        count: how many.
    """

    name: str
    kind: str
    count: int

    @property
    def label(self) -> str:
        """The name, with the kind where it is not a linear layer."""
        return self.name if self.kind == Linear.kind else f"{self.name} ({self.kind})"


class Tower(Record):
    """A stack of numbered layers.

    Attributes:
        name: path of the container (`model.layers`).
        layers: number of layers that have target modules.
        modules: number of target modules.
    """

    name: str
    layers: int
    modules: int


class LayerNorm(Record):
    """The size of one adapter's delta in one layer.

    Attributes:
        layer: `tower.index`, or the path of a module that is in no layer.
        norm: ‖ΔW‖_F over the layer's modules.
    """

    layer: str
    norm: float


class FullTensorSummary(Record):
    """A tensor that is not a low-rank delta.

    Attributes:
        path: in the base model.
        role: a `head` or other module trained in full, an `embedding`, trained `tokens` (rows of one), or a `bias`.
        shape: as stored.
        dtype: as stored (safetensors' names).
    """

    path: str
    role: Literal["head", "embedding", "tokens", "bias"]
    shape: tuple[int, ...]
    dtype: str


class AdapterReport(Record):
    """One adapter.

    Attributes:
        name: what it is called here.
        folder: of its files.
        format: of its files, as docs/formats.md lists them.
        writer: the program that wrote them, as far as they say.
        components: of a pipeline that it adapts (`unet`, `text_encoder`); none where it is of one model.
        metadata: texts of the file's header, at most the first 200 letters of each.
        base_model: as its configuration names it.
        revision: of the base model.
        kind: `LoRA`, `rsLoRA`, `DoRA` or `rsLoRA + DoRA`.
        lora_bias: whether any module has one.
        peft_version: that wrote the configuration.
        config_rank: `r` of the configuration; the tensors decide (`ranks`).
        ranks: the distinct ranks of the tensors, ascending.
        alphas: the distinct values of lora_alpha over the modules, ascending.
        scaling_rule: `alpha/r` or `alpha/sqrt(r)`.
        scalings: the distinct s in ΔW = s·B·A, ascending.
        modules: number of target modules.
        module_kinds: what they are, the most frequent first.
        towers: the layers that they are in.
        outside: paths of target modules outside numbered layers.
        dtypes: of the stored tensors.
        parameters: number of stored values.
        bytes: size of the tensor file.
        norm: ‖ΔW‖_F over all modules. For DoRA, ΔW is s·B·A without the magnitudes, here and everywhere below.
        layers: the same per layer, in the order of the model.
        stable_rank: mean over matrices of ‖ΔW‖_F² / ‖ΔW‖₂², in [1, rank]: how many directions matter; None if all
            are 0.
        rank_for_99: mean over matrices of the rank that holds 99 % of ‖ΔW‖_F²; None if all are 0.
        full_tensors: heads and other tensors outside the LoRA.
        warnings: what deserves a look.
    """

    name: str
    folder: str
    format: str
    writer: str | None
    components: tuple[str, ...]
    metadata: dict[str, str]
    base_model: str | None
    revision: str | None
    kind: str
    lora_bias: bool
    peft_version: str | None
    config_rank: int
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    scaling_rule: str
    scalings: tuple[float, ...]
    modules: int
    module_kinds: tuple[ModuleKind, ...]
    towers: tuple[Tower, ...]
    outside: tuple[str, ...]
    dtypes: tuple[str, ...]
    parameters: int
    bytes: int
    norm: float
    layers: tuple[LayerNorm, ...]
    stable_rank: float | None
    rank_for_99: float | None
    full_tensors: tuple[FullTensorSummary, ...]
    warnings: tuple[str, ...]


class Inspection(Viewed, Record):
    """Everything known of some adapters.

    >>> found = plait.inspect(["./a", "./b"])
    >>> found.adapters[0].ranks, found.comparison.findings, len(found.to_pandas())

    Attributes:
        adapters: one report each.
        comparison: side by side; None for a single adapter.
        compatibility: whether they can be merged.
        serving: what vLLM needs.
    """

    adapters: tuple[AdapterReport, ...]
    comparison: AdapterComparison | None
    compatibility: Compatibility
    serving: Serving


def inspect_adapters(
    adapters: Sequence[Adapter],
    *,
    base_model: str | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Inspection:
    """Measure adapters, compare them, and judge whether they can be merged.

    Every tensor is read once. Memory, per worker: the factors of one target module of all adapters, their Gram matrices in
    float64, and 11 MiB.

    Args:
        adapters: opened; at least one.
        base_model: the base model that the user names, as for a merge (see `check_compatibility`).
        workers: target modules looked at at the same time; as many as there are processors when None. The numbers do
            not depend on it.
        progress: receives one step per target module.

    Raises:
        AdapterError: a value is NaN or infinite.
        PlanError: there are no adapters.
    """
    if not adapters:
        raise PlanError("there is no adapter to inspect; name at least one.")
    count = worker_count(workers) if workers is not None else os.cpu_count() or 1
    paths = sorted({path for a in adapters for path in a.targets}, key=_model_order)
    spectra = [Spectra() for _ in adapters]
    pairs = PairwiseMeasures(len(adapters))
    listener = progress or SilentProgress()
    listener.start("compare" if len(adapters) > 1 else "measure", len(paths))
    try:
        for measured in measure_all(adapters, paths, count):
            for t, powers in measured.powers.items():
                spectra[t].add(measured.path, powers)
            pairs.add(measured)
            listener.advance()
    finally:
        listener.finish()
    return Inspection(
        adapters=tuple(_report(a, s) for a, s in zip(adapters, spectra, strict=True)),
        comparison=compare_adapters([a.name for a in adapters], pairs) if len(adapters) > 1 else None,
        compatibility=check_compatibility(adapters, base_model=base_model),
        serving=serving(adapters),
    )


def _report(adapter: Adapter, spectra: Spectra) -> AdapterReport:
    config, targets = adapter.config, adapter.targets.values()
    kinds = Counter((short_name(t.path), t.layout.kind) for t in targets)
    energies: dict[str, float] = defaultdict(float)
    for path, energy in spectra.energies.items():
        energies[layer_name(path)] += energy
    version = config.raw.get("peft_version")
    variants = (("rsLoRA", config.flag("use_rslora")), ("DoRA", any(t.is_dora for t in targets)))
    keys = [key for path in adapter.targets if (key := layer_key(path))]
    modules, layers = Counter(key.tower for key in keys), Counter(key.tower for key in set(keys))
    return AdapterReport(
        name=adapter.name,
        folder=str(adapter.folder),
        format=adapter.origin.format,
        writer=adapter.origin.writer,
        components=adapter.towers,
        metadata={key: text[:_LONGEST_TEXT] for key, text in adapter.origin.metadata.items()},
        base_model=config.base_model,
        revision=config.revision,
        kind=" + ".join(word for word, has in variants if has) or "LoRA",
        lora_bias=any(t.has_bias for t in targets),
        peft_version=str(version) if version else None,
        config_rank=int(config.raw.get("r", 8)),
        ranks=adapter.ranks,
        alphas=tuple(sorted({_alpha(adapter, t) for t in targets})),
        scaling_rule=config.scaling_rule,
        scalings=tuple(sorted({t.scaling for t in targets})),
        modules=len(targets),
        module_kinds=tuple(ModuleKind(name=n, kind=k, count=c) for (n, k), c in kinds.most_common()),
        towers=tuple(Tower(name=name, layers=layers[name], modules=count) for name, count in modules.items()),
        outside=tuple(t.path for t in targets if layer_key(t.path) is None),
        dtypes=adapter.dtypes,
        parameters=adapter.parameters,
        bytes=adapter.file.path.stat().st_size,
        norm=math.sqrt(sum(energies.values())),
        layers=tuple(LayerNorm(layer=layer, norm=math.sqrt(energy)) for layer, energy in energies.items()),
        stable_rank=statistics.fmean(spectra.stable_ranks) if spectra.stable_ranks else None,
        rank_for_99=statistics.fmean(spectra.ranks_for_99) if spectra.ranks_for_99 else None,
        full_tensors=_full_tensors(adapter),
        warnings=tuple(_warnings(adapter, spectra)),
    )


def _alpha(adapter: Adapter, target: Target) -> float:
    """Return a target's alpha: the configuration's, or that of the scaling that its file gives."""
    return alpha_of(target.scaling, target.stored_rank) if target.own_scaling else adapter.config.alpha(target.path)


def _full_tensors(adapter: Adapter) -> tuple[FullTensorSummary, ...]:
    found = []
    for path, name in adapter.full_tensors.items():
        info = adapter.file.tensors[name]
        role: Literal["head", "embedding", "tokens", "bias"] = "head"
        if path.endswith(".trainable_tokens_delta"):
            role = "tokens"
        elif path.endswith(".bias") and f"{path.removesuffix('bias')}weight" not in adapter.full_tensors:
            role = "bias"
        elif "embed" in path or ".wte." in path:
            role = "embedding"
        found.append(FullTensorSummary(path=path, role=role, shape=info.shape, dtype=info.dtype))
    return tuple(found)


def _warnings(adapter: Adapter, spectra: Spectra) -> Iterator[str]:
    config, targets = adapter.config, adapter.targets
    if not targets:
        yield "It has no LoRA tensors, only tensors trained in full: there is no delta to merge."
    yield from adapter.origin.notes
    yield from (text[0].upper() + text[1:] for text in (*config_problems(adapter), *other_file(adapter)))
    zero = [path for path, energy in spectra.energies.items() if energy == 0]
    if zero:
        yield f"{len(zero)} of {len(targets)} modules have a zero delta (such as {zero[0]!r}): they were not trained."
    if any(t.is_dora for t in targets.values()):
        yield "DoRA: all numbers here are of s·B·A alone; the rescaling of the base model's rows comes on top."
    if any(path.endswith(".trainable_tokens_delta") for path in adapter.full_tensors):
        yield "It trained the embeddings of single tokens, which are kept like a head and not merged."
    if config.raw.get("alora_invocation_tokens"):
        yield "Activated LoRA (aLoRA): it acts only after its invocation tokens, and can be merged into an adapter alone."
    if config.raw.get("layer_replication"):
        yield "layer_replication: its layers are those of a base model with repeated layers, not of the published one."


def _model_order(path: str) -> tuple[bool, str, int, str]:
    """Sort key: layers by tower and number, then the modules outside layers."""
    key = layer_key(path)
    return (False, key.tower, key.index, path) if key else (True, "", 0, path)
