"""What adapters are, one by one and side by side: everything `plait inspect` reports, as numbers and words.

Every statistic is a function of the deltas ΔW = s·B·A, so it is the same for any factors of them (B G, G⁻¹ A). Between two
adapters almost all of it comes from the two Gram matrices A Aᵀ and Bᵀ B of their joined factors, in float64; only the signs
need the entries of ΔW, which pass by in blocks of rows. Knows nothing of how it is shown.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import accumulate, combinations, pairwise
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from plait.adapters.adapter import Adapter
from plait.adapters.lowrank import LowRank
from plait.adapters.names import layer_key
from plait.linalg.blocks import block_ranges
from plait.linalg.factored import rank_for_energy
from plait.merging.compatibility import Compatibility, Serving, check_compatibility, serving, short_name
from plait.records import Record

if TYPE_CHECKING:
    from plait.merging.progress import Progress

Matrix = tuple[tuple[float | None, ...], ...]  # (T, T); None where a value is not defined
COLLAPSED = 0.9  # overlap of the A row spaces above which adapters count as one initialisation
SEPARATE = 0.5  # and below which as independent ones
_NULL = 1e-5  # directions of a factor below this share of its largest singular value are round-off


class ModuleKind(Record):
    """Target modules of one name.

    Attributes:
        name: the last part of the path (`q_proj`).
        kind: how the factors are stored: `linear`, `embedding`, `conv`, `experts`.
        count: how many.
    """

    name: str
    kind: str
    count: int


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


class FullTensor(Record):
    """A tensor that is no low-rank delta.

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
        folder: where it lies.
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
        towers: the layers they stand in.
        outside: paths of target modules that stand in no layer.
        dtypes: of the stored tensors.
        parameters: number of stored values.
        bytes: size of the tensor file.
        norm: ‖ΔW‖_F over all modules. For DoRA, ΔW is s·B·A without the magnitudes, here and everywhere below.
        layers: the same per layer, in the order of the model.
        stable_rank: mean over matrices of ‖ΔW‖_F² / ‖ΔW‖₂², in [1, rank]: how many directions matter; None if all are 0.
        rank_for_99: mean over matrices of the rank that holds 99 % of ‖ΔW‖_F²; None if all are 0.
        full_tensors: heads and other tensors outside the LoRA.
        warnings: what deserves a look.
    """

    name: str
    folder: str
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
    full_tensors: tuple[FullTensor, ...]
    warnings: tuple[str, ...]


class LayerComparison(Record):
    """The adapters side by side in one layer; see `Comparison` for the measures.

    Attributes:
        layer: `tower.index`, or the path of a module that is in no layer.
        tower: None for a module that is in no layer.
        index: within the tower.
        norms: ‖ΔWₜ‖_F per adapter.
        scale_ratio: the largest of them over the smallest; None when one is 0.
        cosine: (T, T).
        conflict: (T, T).
        weighted_conflict: (T, T).
    """

    layer: str
    tower: str | None
    index: int | None
    norms: tuple[float, ...]
    scale_ratio: float | None
    cosine: Matrix
    conflict: Matrix
    weighted_conflict: Matrix


class SharedInit(Record):
    """Whether adapters started from the same random A, which PEFT draws anew only when the seed changes.

    Attributes:
        status: `shared` when some pair's overlap of A is above 0.9, `separate` when all are below 0.5, else `partial`.
        overlap: the largest overlap of A between two adapters.
        chance: what unrelated subspaces of these sizes would show.
        pairs: the pairs of names above 0.9.
        words: what that means for merging.
    """

    status: Literal["shared", "partial", "separate"]
    overlap: float
    chance: float
    pairs: tuple[tuple[str, str], ...]
    words: str


class Comparison(Record):
    """The adapters side by side, over all target modules whose shapes agree; a module an adapter lacks is a zero delta.

    Attributes:
        names: of the adapters, in the order of rows and columns.
        norms: ‖ΔWₜ‖_F per adapter.
        scale_ratio: the largest of them over the smallest; None when one is 0.
        cosine: (T, T) ⟨ΔW_i, ΔW_j⟩ / (‖ΔW_i‖ ‖ΔW_j‖) of the whole task vectors; None beside a zero.
        overlap_a: (T, T) overlap of the row spaces of A. Of one matrix it is the median cosine of the principal angles,
            σ_med(V_iᵀ V_j) with orthonormal bases V, of a module the median over its matrices, and here the median over the
            modules that both have; None if there is none. 1 for equal spaces.
        overlap_b: (T, T) the same of the column spaces of B.
        overlap_a_chance: √(max(r_i, r_j) / d_in), the root mean square cosine between random subspaces, as a median over
            modules and pairs: what "unrelated" looks like. None if no two adapters share a module.
        overlap_b_chance: the same of B with d_out.
        conflict: (T, T) share of the entries non-zero in both ΔW_i and ΔW_j whose signs differ: 0 for equal signs, 0.5 for
            unrelated adapters, 1 for opposite ones; None if there are no such entries.
        weighted_conflict: (T, T) the same with every entry counting |x·y|, so that entries that matter to neither, or to one
            alone, hardly count. It is (1 − ⟨x, y⟩ / ⟨|x|, |y|⟩) / 2.
        layers: the same per layer, in the order of the model.
        shared_init: the audit of A; None if no two adapters share a module.
        findings: the above in sentences.
    """

    names: tuple[str, ...]
    norms: tuple[float, ...]
    scale_ratio: float | None
    cosine: Matrix
    overlap_a: Matrix
    overlap_b: Matrix
    overlap_a_chance: float | None
    overlap_b_chance: float | None
    conflict: Matrix
    weighted_conflict: Matrix
    layers: tuple[LayerComparison, ...]
    shared_init: SharedInit | None
    findings: tuple[str, ...]


class Inspection(Record):
    """Everything known of some adapters.

    Attributes:
        adapters: one report each.
        comparison: side by side; None for a single adapter.
        compatibility: whether they can be merged.
        serving: what vLLM needs.
    """

    adapters: tuple[AdapterReport, ...]
    comparison: Comparison | None
    compatibility: Compatibility
    serving: Serving


def inspect_adapters(
    adapters: Sequence[Adapter], *, base_model: str | None = None, progress: Progress | None = None
) -> Inspection:
    """Measure adapters, compare them, and judge whether they can be merged.

    Every tensor is read once. Memory: the factors of one target module of all adapters and one block of rows each.

    Args:
        adapters: opened; at least one.
        base_model: the base model that the user names, as for a merge (see `check_compatibility`).
        progress: told of one step per target module.

    Raises:
        AdapterError: a value is NaN or infinite.
    """
    paths = sorted({path for a in adapters for path in a.targets}, key=_model_order)
    spectra = [_Spectra() for _ in adapters]
    pairs = _Pairs(len(adapters))
    if progress:
        progress.start("comparing target modules" if len(adapters) > 1 else "measuring target modules", len(paths))
    for path in paths:
        layouts = {a.targets[path].layout for a in adapters if path in a.targets}
        stacks = [_read(a, path) for a in adapters]
        for spectrum, stack in zip(spectra, stacks, strict=True):
            spectrum.add(path, stack)
        if len(adapters) > 1 and len(layouts) == 1:
            pairs.add(path, stacks)
        if progress:
            progress.advance()
    if progress:
        progress.finish()
    return Inspection(
        adapters=tuple(_report(a, s) for a, s in zip(adapters, spectra, strict=True)),
        comparison=_compare([a.name for a in adapters], pairs) if len(adapters) > 1 else None,
        compatibility=check_compatibility(adapters, base_model=base_model),
        serving=serving(adapters),
    )


class _Spectra:
    """What the singular values of one adapter's matrices say."""

    def __init__(self) -> None:
        self.energies: dict[str, float] = {}  # path → ‖ΔW‖²
        self.stable_ranks: list[float] = []
        self.ranks_for_99: list[int] = []

    def add(self, path: str, stack: Sequence[LowRank]) -> None:
        if not stack:
            return
        self.energies[path] = 0.0
        for delta in stack:
            power = delta.singular_values().square()
            self.energies[path] += float(power.sum())
            if float(power[0]) > 0:
                self.stable_ranks.append(float(power.sum() / power[0]))
                self.ranks_for_99.append(rank_for_energy(power.sqrt(), 0.99))


class _Sums:
    """Sums over the modules of a layer, each (T, T), float64."""

    def __init__(self, count: int) -> None:
        self.inner = torch.zeros(count, count, dtype=torch.float64)  # ⟨x, y⟩
        self.magnitude = torch.zeros_like(self.inner)  # ⟨|x|, |y|⟩
        self.nonzero = torch.zeros_like(self.inner)  # entries non-zero in both
        self.signs = torch.zeros_like(self.inner)  # ⟨sign x, sign y⟩ = agreeing − opposed entries

    def __iadd__(self, other: _Sums) -> _Sums:
        self.inner += other.inner
        self.magnitude += other.magnitude
        self.nonzero += other.nonzero
        self.signs += other.signs
        return self

    def norms(self) -> tuple[float, ...]:
        return tuple(math.sqrt(max(0.0, x)) for x in self.inner.diagonal().tolist())

    def cosine(self) -> Matrix:
        norm = self.inner.diagonal().clamp_min(0).sqrt()
        return _matrix((self.inner / torch.outer(norm, norm)).clamp(-1, 1))

    def conflict(self) -> Matrix:
        return _matrix((1 - self.signs / self.nonzero) / 2)

    def weighted_conflict(self) -> Matrix:
        # The two sums round differently: equal adapters must not come out a hair below 0.
        return _matrix(((1 - self.inner / self.magnitude) / 2).clamp(0, 1))


class _Pairs:
    """What adapters have in common, module by module."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.layers: dict[str, _Sums] = {}
        self.overlaps: dict[str, dict[tuple[int, int], list[float]]] = {"a": defaultdict(list), "b": defaultdict(list)}
        self.chances: dict[str, list[float]] = {"a": [], "b": []}

    def add(self, path: str, stacks: Sequence[Sequence[LowRank]]) -> None:
        """Take in one module; an adapter that lacks it has an empty stack."""
        present = [t for t, stack in enumerate(stacks) if stack]
        sums = self.layers.setdefault(_layer_name(path), _Sums(self.count))
        overlaps: dict[tuple[str, int, int], list[float]] = defaultdict(list)
        for parts in zip(*(stacks[t] for t in present), strict=True):
            grams = _Grams(parts)
            grid = torch.meshgrid(torch.tensor(present), torch.tensor(present), indexing="ij")
            sums.inner[grid] += grams.inner()
            if len(parts) > 1:
                for into, part in zip((sums.signs, sums.magnitude, sums.nonzero), _entry_sums(parts), strict=True):
                    into[grid] += part
                for factor, i, j, overlap, chance in grams.overlaps():
                    overlaps[factor, present[i], present[j]].append(overlap)
                    self.chances[factor].append(chance)
        for (factor, i, j), found in overlaps.items():
            self.overlaps[factor][i, j].append(statistics.median(found))

    def overlap(self, factor: str) -> Matrix:
        """Return the (T, T) median overlaps of one factor."""
        found = self.overlaps[factor]
        return tuple(
            tuple(1.0 if i == j else statistics.median(found[min(i, j), max(i, j)] or [math.nan]) for j in range(self.count))
            for i in range(self.count)
        )


class _Grams:
    """The Gram matrices of several deltas of one shape: A Aᵀ and Bᵀ B of all factors joined, (R, R), float64."""

    def __init__(self, parts: Sequence[LowRank]) -> None:
        ends = [0, *accumulate(p.rank for p in parts)]
        self._spans = [slice(start, stop) for start, stop in pairwise(ends)]
        a = torch.cat([p.a for p in parts]).double()
        b = torch.cat([p.b for p in parts], dim=1).double()
        self._dims = {"a": a.shape[1], "b": b.shape[0]}
        self._grams = {"a": a @ a.mT, "b": b.mT @ b}

    def inner(self) -> Tensor:
        """Return ⟨ΔW_i, ΔW_j⟩, (T, T)."""
        product = self._grams["a"] * self._grams["b"]
        return torch.stack([torch.stack([product[i, j].sum() for j in self._spans]) for i in self._spans])

    def overlaps(self) -> Iterator[tuple[str, int, int, float, float]]:
        """Yield (factor, i, j, median cosine of the principal angles, its chance level) for i < j."""
        for factor, gram in self._grams.items():
            whiteners = [_whitener(gram[span, span]) for span in self._spans]
            for (i, one), (j, two) in combinations(enumerate(whiteners), 2):
                if one.shape[1] and two.shape[1]:
                    cosines = torch.linalg.svdvals(one.mT @ gram[self._spans[i], self._spans[j]] @ two).clamp(0, 1)
                    chance = math.sqrt(max(one.shape[1], two.shape[1]) / self._dims[factor])
                    yield factor, i, j, statistics.median(cosines.tolist()), chance


def _whitener(gram: Tensor) -> Tensor:
    """Return W (r, k) with Wᵀ G W = I on the k directions of a Gram matrix G (r, r) that are not round-off."""
    values, vectors = torch.linalg.eigh(gram)
    kept = values > _NULL**2 * values[-1].clamp_min(torch.finfo(values.dtype).tiny)
    return vectors[:, kept] / values[kept].sqrt()


def _entry_sums(parts: Sequence[LowRank]) -> tuple[Tensor, Tensor, Tensor]:
    """Return ⟨sign x, sign y⟩, ⟨|x|, |y|⟩ and the number of entries non-zero in both, each (T, T), float64.

    The deltas pass by in blocks of rows. The sums of signs are integers below 2²⁴ per block, so they are exact.
    """
    m, n = parts[0].shape
    sums = [torch.zeros(len(parts), len(parts), dtype=torch.float64) for _ in range(3)]
    for start, stop in block_ranges(m, n):
        x = torch.stack([p.b[start:stop] @ p.a for p in parts]).flatten(1)
        s = x.sign()
        sums[0] += s @ s.mT
        x.abs_()
        sums[1] += x @ x.mT
        s.abs_()
        sums[2] += s @ s.mT
    return sums[0], sums[1], sums[2]


def _read(adapter: Adapter, path: str) -> list[LowRank]:
    target = adapter.targets.get(path)
    if target is None:
        return []
    dtype = torch.float64 if target.dtype == "F64" else torch.float32
    return [delta.scaled(target.scaling) for delta in adapter.read(path, dtype)]


def _report(adapter: Adapter, spectra: _Spectra) -> AdapterReport:
    config, targets = adapter.config, adapter.targets.values()
    kinds = Counter((short_name(t.path), t.layout.kind) for t in targets)
    energies: dict[str, float] = defaultdict(float)
    for path, energy in spectra.energies.items():
        energies[_layer_name(path)] += energy
    version = config.raw.get("peft_version")
    return AdapterReport(
        name=adapter.name,
        folder=str(adapter.folder),
        base_model=config.base_model,
        revision=config.revision,
        kind=_kind(adapter),
        lora_bias=any(t.has_bias for t in targets),
        peft_version=str(version) if version else None,
        config_rank=int(config.raw.get("r", 8)),
        ranks=adapter.ranks,
        alphas=tuple(sorted({config.alpha(t.path) for t in targets})),
        scaling_rule=config.scaling_rule,
        scalings=tuple(sorted({t.scaling for t in targets})),
        modules=len(targets),
        module_kinds=tuple(ModuleKind(name=n, kind=k, count=c) for (n, k), c in kinds.most_common()),
        towers=_towers(adapter),
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


def _kind(adapter: Adapter) -> str:
    kinds = ["rsLoRA"] if adapter.config.flag("use_rslora") else []
    if any(t.is_dora for t in adapter.targets.values()):
        kinds.append("DoRA")
    return " + ".join(kinds) or "LoRA"


def _towers(adapter: Adapter) -> tuple[Tower, ...]:
    keys = [key for path in adapter.targets if (key := layer_key(path))]
    modules = Counter(key.tower for key in keys)
    layers = Counter(key.tower for key in set(keys))
    return tuple(Tower(name=name, layers=layers[name], modules=count) for name, count in modules.items())


def _full_tensors(adapter: Adapter) -> tuple[FullTensor, ...]:
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
        found.append(FullTensor(path=path, role=role, shape=info.shape, dtype=info.dtype))
    return tuple(found)


def _warnings(adapter: Adapter, spectra: _Spectra) -> Iterator[str]:
    config, targets = adapter.config, adapter.targets
    if not targets:
        yield "It has no LoRA tensors, only tensors trained in full: there is no delta to merge."
    other = [t for t in targets.values() if t.rank != config.rank(t.path)]
    if other:
        yield (
            f"The configuration gives {len(other)} of {len(targets)} modules another rank than their tensors have (such as "
            f"{other[0].path!r}: {config.rank(other[0].path)}, in the file {other[0].rank}). The tensors count, for the scaling too."
        )
    zero = [path for path, energy in spectra.energies.items() if energy == 0]
    if zero:
        yield f"{len(zero)} of {len(targets)} modules have a zero delta (such as {zero[0]!r}): they were not trained."
    if any(t.is_dora for t in targets.values()):
        yield "DoRA: all numbers here are of s·B·A alone; the rescaling of the base model's rows comes on top."
    if any(path.endswith(".trainable_tokens_delta") for path in adapter.full_tensors):
        yield "It trained the embeddings of single tokens, which are kept like a head and not merged."
    if config.raw.get("alora_invocation_tokens"):
        yield "An activated LoRA (aLoRA): alone it acts only after its invocation tokens, merged it acts on every token."
    if config.raw.get("layer_replication"):
        yield "layer_replication: its layers are those of a base model with repeated layers, not of the published one."


def _compare(names: Sequence[str], pairs: _Pairs) -> Comparison:
    total = _Sums(pairs.count)
    for sums in pairs.layers.values():
        total += sums
    overlap_a = _no_nan(pairs.overlap("a"))
    chances = {factor: statistics.median(found) if found else None for factor, found in pairs.chances.items()}
    shared = _shared_init(names, overlap_a, chances["a"])
    norms, cosine, conflict, weighted = total.norms(), total.cosine(), total.conflict(), total.weighted_conflict()
    return Comparison(
        names=tuple(names),
        norms=norms,
        scale_ratio=_ratio(norms),
        cosine=cosine,
        overlap_a=overlap_a,
        overlap_b=_no_nan(pairs.overlap("b")),
        overlap_a_chance=chances["a"],
        overlap_b_chance=chances["b"],
        conflict=conflict,
        weighted_conflict=weighted,
        layers=tuple(_layer(name, sums) for name, sums in pairs.layers.items()),
        shared_init=shared,
        findings=tuple(_findings(names, norms, cosine, conflict, weighted, shared)),
    )


def _layer(name: str, sums: _Sums) -> LayerComparison:
    key = layer_key(name)
    norms = sums.norms()
    return LayerComparison(
        layer=name,
        tower=key.tower if key else None,
        index=key.index if key else None,
        norms=norms,
        scale_ratio=_ratio(norms),
        cosine=sums.cosine(),
        conflict=sums.conflict(),
        weighted_conflict=sums.weighted_conflict(),
    )
