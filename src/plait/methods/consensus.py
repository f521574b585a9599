"""Methods that ask, entry by entry, how many adapters want it or which wants it most: SCE, Consensus TA, PCB, RAM, MagMax."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field

from plait.linalg.sparsify import Count
from plait.methods.base import MethodParams, NoParams, Preset, Scope, Source, register
from plait.stages.competition import Compete, Reading
from plait.stages.consensus import AverageShared, Consensus, ElectByEnergy, Largest, Threshold
from plait.stages.pipeline import Pipeline
from plait.stages.select import KeepVaried
from plait.stages.sparsify import Trim


class SceParams(MethodParams):
    """Parameters of `sce`."""

    density: Annotated[
        float, Field(gt=0, le=1, description="Share of a module's entries kept: those in which the adapters differ most.")
    ] = 0.1
    divisor: Annotated[
        Literal["share", "none"], Field(description="Divide by the agreeing adapters' summed share, or not at all.")
    ] = "share"
    zero_sign: Annotated[Literal["drop", "plus"], Field(description="A perfect tie drops the entry, or counts as plus.")] = (
        "drop"
    )


register(
    Preset(
        name="sce",
        summary="Keep the entries in which the adapters differ most, weigh adapters by energy, erase the minority sign.",
        equation="ΔW = Σ_{t: sgn x̂ₜ = γ} ηₜ x̂ₜ / Σ_{t: sgn x̂ₜ = γ} ηₜ,  γ = sgn(Σ x̂ₜ),  ηₜ = ‖x̂ₜ‖² / Σ ‖x̂ₛ‖²",
        params=SceParams,
        source=Source("Wan et al. 2024, FuseChat, §3.3 (SCE)", "https://arxiv.org/abs/2408.07990"),
        deviation=(
            "Weights multiply the deltas first. Divided by the shares of those that agree, as the authors' code does "
            "(`divisor: none` is the formula). A perfect tie drops the entry; in their code it counts as plus. `density` "
            "counts all entries of a module (their code those that vary), and where none varies all are kept. Entries that tie "
            "with the threshold are all kept."
        ),
        stages=lambda params: Pipeline(pre=(KeepVaried.of(params),), combine=ElectByEnergy.of(params)),
    )
)


class ConsensusParams(MethodParams):
    """Parameters of `consensus`."""

    threshold: Annotated[
        Threshold | tuple[Threshold, ...],
        Field(description="λ: the lower, the more entries an adapter wants. One number, or one per adapter in their order."),
    ] = 0.4
    wanted_by: Annotated[
        int, Field(ge=0, le=4096, description="Adapters that must want an entry; at most all of them. 0 keeps every entry.")
    ] = 2


register(
    Preset(
        name="consensus",
        summary="Sum, and keep the entries that at least two adapters want.",
        equation="ΔW = [Σₜ mₜ ≥ k] Σ wₜ xₜ,  mₜ = [|τₜ| > λₜ |Σₛ τₛ − τₜ|],  τₜ = wₜ xₜ",
        params=ConsensusParams,
        source=Source("Wang et al. 2024, Consensus TA (TALL-masks), §4", "https://arxiv.org/abs/2405.07813"),
        deviation=(
            "Weights multiply the deltas first (the paper has none). The paper picks λₜ from 0.2 … 0.6 per task on validation "
            "data; the default is the middle. Fewer adapters than k must all want an entry. The paper's α is `scale`."
        ),
        stages=lambda params: Pipeline(Consensus.of(params)),
    )
)


class PcbParams(MethodParams):
    """Parameters of `pcb`."""

    reading: Annotated[Reading, Field(description="The paper's softmax, or the authors' products and clamps.")] = "paper"
    density: Annotated[float, Field(gt=0, le=1, description="Share of entries that an adapter keeps (the paper's r).")] = 0.1
    scope: Annotated[Scope, Field(description="Normalise and rank over the whole model, or within each module.")] = "model"


register(
    Preset(
        name="pcb",
        summary="Entries compete within their adapter and with the others'; the winners are averaged by how well they did.",
        equation="ΔW = Σ β̂ₜ wₜ xₜ / Σ β̂ₜ,  β̂ₜ = the `density` largest of exp(T·norm(xₜ²)) ⊙ Σₛ softmax(norm(xₜ xₛ))",
        params=PcbParams,
        source=Source("Du et al. 2024, PCB-Merging, eq. 2–5", "https://arxiv.org/abs/2410.02396"),
        deviation=(
            "`reading: code` is what the authors' code does: products instead of softmaxes, clamped outliers; without its "
            "tanh, which changes nothing on entries below 0.03 and would make the result depend on their unit. Entries that "
            "are zero, or of negative β, have no say. In the paper's reading β̂ = β / max β, which is its norm wherever an "
            "entry is dropped. λ is `scale` (the paper's 1.2) or the weights."
        ),
        stages=lambda params: Pipeline(Compete.of(params)),
    )
)


class RamParams(MethodParams):
    """Parameters of `ram`."""

    density: Annotated[float, Field(gt=0, le=1, description="Share of an adapter's entries that count as changed.")] = 0.2
    scope: Annotated[Scope, Field(description="Rank and count over the whole model, or within each module.")] = "model"
    kept: Annotated[Count, Field(description="How density · entries becomes a count.")] = "floor"


class RamPlusParams(RamParams):
    """Parameters of `ram_plus`."""

    boost: Annotated[float, Field(ge=0, le=100, description="r: how much an adapter's own entries are enlarged.")] = 0.1
    cap: Annotated[float, Field(ge=0, le=1e6, description="α: the largest ratio of shared to own entries.")] = 0.2


RAM = Preset(
    name="ram",
    summary="Average the entries that several adapters changed, keep whole those that only one did.",
    equation="ΔW = Σ wₜ x̂ₜ / max(1, #{t: x̂ₜ ≠ 0}),  x̂ₜ = the `density` largest of |xₜ|",
    params=RamParams,
    source=Source("Yuan et al. 2026, Reinforced Agent Merging, §4", "https://arxiv.org/abs/2601.13572"),
    deviation=(
        "Changed are an adapter's largest entries, not those above 1e-5: LoRA changes every entry, and an absolute threshold "
        "would depend on the unit (the stages `cutoff` and `average_shared` are the authors' rule). Weights multiply the "
        "deltas."
    ),
    stages=lambda params: Pipeline(pre=(Trim.of(params),), combine=AverageShared.of(params)),
)
register(RAM)
register(
    replace(
        RAM,
        name="ram_plus",
        summary="RAM, with the entries that only one adapter changed enlarged by how many it shares.",
        equation="as `ram`, own entries times 1 + r · min(#shared / #own, α)",
        params=RamPlusParams,
    )
)


register(
    Preset(
        name="magmax",
        summary="Per entry, the adapter with the largest magnitude.",
        equation="ΔW[i] = wₜ xₜ[i],  t = argmax |wₜ xₜ[i]|",
        params=NoParams,
        source=Source("Marczak et al. 2024, MagMax, eq. 4", "https://arxiv.org/abs/2407.06322"),
        deviation="Weights multiply the deltas first. Equal magnitudes are averaged. The paper's λ is `scale`.",
        stages=lambda params: Pipeline(Largest()),
    )
)
