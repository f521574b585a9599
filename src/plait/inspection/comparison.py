"""Adapters side by side, in numbers and sentences: angles, conflicts, and whether they began with one A.

The numbers come from `geometry`. Independent of how they are shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Literal

from plait.adapters.names import layer_key
from plait.errors import join_words
from plait.inspection.geometry import EntrySums, PairwiseMeasures, SymmetricMatrix
from plait.inspection.wording import below_diagonal, norm_text, span
from plait.records import Record
from plait.views import Viewed

COLLAPSED = 0.9  # overlap of the A row spaces above which adapters count as one initialization
SEPARATE = 0.5  # and below which as independent ones


class LayerComparison(Record):
    """The adapters side by side in one layer; see `AdapterComparison` for the measures.

    Attributes:
        layer: `tower.index`, or the path of a module that is in no layer.
        tower: None for a module that is in no layer.
        index: within the tower.
        norms: ‖ΔWₜ‖_F per adapter.
        scale_ratio: the largest of them over the smallest; None when one is 0.
        cosine: (T, T).
        conflict: (T, T).
        weighted_conflict: (T, T).
        overlap_a: (T, T).
        overlap_b: (T, T).
    """

    layer: str
    tower: str | None
    index: int | None
    norms: tuple[float, ...]
    scale_ratio: float | None
    cosine: SymmetricMatrix
    conflict: SymmetricMatrix
    weighted_conflict: SymmetricMatrix
    overlap_a: SymmetricMatrix = ()
    overlap_b: SymmetricMatrix = ()


class SharedInit(Record):
    """Whether adapters started from the same random A, which PEFT draws anew only when the seed changes.

    Attributes:
        status: `shared` when some pair's overlap of A is above 0.9, `separate` when all are below 0.5, else `partial`.
            What chance gives is never held against them: modules can be so small that any two spaces overlap.
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


class AdapterComparison(Viewed, Record):
    """The adapters side by side, over all target modules whose shapes agree; a module an adapter lacks is a zero delta.

    Attributes:
        names: of the adapters, in the order of rows and columns.
        norms: ‖ΔWₜ‖_F per adapter.
        scale_ratio: the largest of them over the smallest; None when one is 0.
        cosine: (T, T) ⟨ΔW_i, ΔW_j⟩ / (‖ΔW_i‖ ‖ΔW_j‖) of the complete task vectors; None where one is zero.
        overlap_a: (T, T) overlap of the row spaces of A. Of one matrix it is the median cosine of the principal angles,
            σ_med(V_iᵀ V_j) with orthonormal bases V, of a module the median over its matrices, and here the median over
            the modules that both have; None if there is none. 1 for equal spaces.
        overlap_b: (T, T) the same of the column spaces of B.
        overlap_a_chance: √(max(r_i, r_j) / d_in), the root mean square cosine between random subspaces, as a median
            over modules and pairs: what "unrelated" looks like, or a little more, for the median cosine is lower. None
            if no two adapters share a module.
        overlap_b_chance: the same of B with d_out.
        conflict: (T, T) share of the entries non-zero in both ΔW_i and ΔW_j whose signs differ: 0 for equal signs, 0.5
            for unrelated adapters, 1 for opposite ones; None if there are no such entries.
        weighted_conflict: (T, T) the same with every entry counting |x·y|, so that entries that matter to neither, or
            to one alone, hardly count. It is (1 − ⟨x, y⟩ / ⟨|x|, |y|⟩) / 2.
        layers: the same per layer, in the order of the model.
        shared_init: the audit of A; None if no two adapters share a module.
        findings: the above in sentences.
    """

    names: tuple[str, ...]
    norms: tuple[float, ...]
    scale_ratio: float | None
    cosine: SymmetricMatrix
    overlap_a: SymmetricMatrix
    overlap_b: SymmetricMatrix
    overlap_a_chance: float | None
    overlap_b_chance: float | None
    conflict: SymmetricMatrix
    weighted_conflict: SymmetricMatrix
    layers: tuple[LayerComparison, ...]
    shared_init: SharedInit | None
    findings: tuple[str, ...]


def compare_adapters(names: Sequence[str], pairs: PairwiseMeasures) -> AdapterComparison:
    """Return the measures of pairs of the adapters `names`, over all modules and per layer, with what they mean."""
    total = EntrySums(pairs.count)
    for sums in pairs.layers.values():
        total += sums
    overlap_a, chance_a = pairs.overlap("a"), pairs.chance("a")
    comparison = AdapterComparison(
        names=tuple(names),
        norms=total.norms(),
        scale_ratio=_ratio(total.norms()),
        cosine=total.cosine(),
        overlap_a=overlap_a,
        overlap_b=pairs.overlap("b"),
        overlap_a_chance=chance_a,
        overlap_b_chance=pairs.chance("b"),
        conflict=total.conflict(),
        weighted_conflict=total.weighted_conflict(),
        layers=tuple(_layer(name, sums, pairs) for name, sums in pairs.layers.items()),
        shared_init=_shared_init(names, overlap_a, chance_a),
        findings=(),
    )
    return comparison.model_copy(update={"findings": tuple(_findings(comparison))})


def _layer(name: str, sums: EntrySums, pairs: PairwiseMeasures) -> LayerComparison:
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
        overlap_a=pairs.overlap("a", name),
        overlap_b=pairs.overlap("b", name),
    )


def _shared_init(names: Sequence[str], overlap: SymmetricMatrix, chance: float | None) -> SharedInit | None:
    found = {(i, j): value for i, j in combinations(range(len(names)), 2) if (value := overlap[i][j]) is not None}
    if not found or chance is None:
        return None
    highest = max(found.values())
    pairs = tuple((names[i], names[j]) for (i, j), value in found.items() if value > max(COLLAPSED, chance))
    measured = f"overlap {_span(list(found.values()))}, by chance {chance:.2f}"
    who = "All A matrices" if len(pairs) == len(found) else f"The A matrices of {join_words([f'{i} + {j}' for i, j in pairs])}"
    status: Literal["shared", "partial", "separate"] = "shared"
    if pairs:
        words = (
            f"{who} span nearly the same space ({measured}): a shared initialization, as one seed for all training runs "
            "gives. Sums and sparsifying methods (linear, ties, dare) do not mind. Methods that solve or whiten "
            "(regmean, ssr, wudi; tsv, iso) are ill-conditioned on it: keep their ridge, and compare with linear."
        )
    elif highest >= max(SEPARATE, chance):
        status = "partial"
        words = (
            f"The A matrices span partly overlapping spaces ({measured}). Methods that solve or whiten (regmean, ssr, "
            "wudi; tsv, iso) need their ridge here; sums and sparsifying methods do not mind."
        )
    else:
        status = "separate"
        words = f"The A matrices span separate spaces ({measured}), which suits every method."
    return SharedInit(status=status, overlap=highest, chance=chance, pairs=pairs, words=words)


def _findings(comparison: AdapterComparison) -> Iterator[str]:
    names, norms, ratio = comparison.names, comparison.norms, comparison.scale_ratio
    cosines, conflicts = below_diagonal(comparison.cosine), below_diagonal(comparison.conflict)
    if not conflicts:
        yield "No two adapters change the same module, so there is nothing to compare and nothing in conflict."
        return
    if cosines:
        yield _alignment(min(cosines), max(cosines), f"cosine of the task vectors {_span(cosines)}")
    else:
        yield "Norms of these adapters, or products of them, are zero or overflow: no angle between them is known."
    weighted = _span(below_diagonal(comparison.weighted_conflict), percent=True)
    yield (
        f"Where {'both' if len(names) == 2 else 'two of them'} change an entry, the signs differ in "
        f"{_span(conflicts, percent=True)} of the cases, and in {weighted} when large entries count more (unrelated "
        "adapters: 50 %)."
    )
    if comparison.shared_init:
        yield comparison.shared_init.words
    if ratio is not None and ratio >= 1.5:
        large, small = names[norms.index(max(norms))], names[norms.index(min(norms))]
        yield (
            f"{large!r} is {ratio:.1f} times as large as {small!r} (‖ΔW‖ {norm_text(max(norms))} and {norm_text(min(norms))}) "
            "and outweighs it in an even sum. Weights, or the transform layer_l2_normalize, even that out."
        )
    elif ratio is not None:
        ends = span([norm_text(min(norms)), norm_text(max(norms))])
        yield f"They are of similar size (‖ΔW‖ {ends}), so equal weights are fair."


def _alignment(low: float, high: float, measured: str) -> str:
    if low < -0.1:
        return f"Some work against each other ({measured}): a sum cancels part of both."
    if high > 0.5:
        return f"Some do much the same ({measured}): their sum does it twice over."
    if high > 0.1:
        return f"They have a little in common ({measured})."
    return f"They do different things: their task vectors are nearly orthogonal ({measured})."


def _span(values: Sequence[float], *, percent: bool = False) -> str:
    """Write the range of some values: `0.02–0.08`, `46–49 %`."""
    ends = [f"{100 * v:.0f}" if percent else f"{round(v, 2) + 0.0:.2f}" for v in (min(values), max(values))]
    return ("–" if "-" not in "".join(ends) else " to ").join(dict.fromkeys(ends)) + (" %" if percent else "")


def _ratio(norms: Sequence[float]) -> float | None:
    return max(norms) / min(norms) if min(norms) > 0 else None
