"""Methods that ask, entry by entry, how many adapters want it or which wants it most: SCE, Consensus TA, PCB, RAM, MagMax."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from pydantic import Field

from plait.methods.base import NoParams, Preset, Source, register
from plait.stages.competition import Compete, CompeteFields
from plait.stages.consensus import (
    AverageShared,
    AverageSharedFields,
    Boost,
    Consensus,
    ConsensusFields,
    ElectByEnergy,
    ElectByEnergyFields,
    Largest,
)
from plait.stages.pipeline import Pipeline
from plait.stages.select import KeepVaried, KeepVariedFields
from plait.stages.sparsify import RankScope, Trim, TrimFields


class SceParams(ElectByEnergyFields, KeepVariedFields):
    """Parameters of `sce`."""


register(
    Preset(
        name="sce",
        summary="Keep the entries in which the adapters differ most, weigh adapters by energy, erase the minority sign.",
        equation="ΔW = Σ_{t: sgn x̂ₜ = γ} ηₜ x̂ₜ / Σ_{t: sgn x̂ₜ = γ} ηₜ,  γ = sgn(Σ x̂ₜ),  ηₜ = ‖x̂ₜ‖² / Σ ‖x̂ₛ‖²",
        params=SceParams,
        source=Source("Wan et al. 2024, FuseChat, §3.3 (SCE)", "https://arxiv.org/abs/2408.07990"),
        deviation=(
            "Weights multiply the deltas first. Divided by the shares of those that agree, as the authors' code does "
            "(`divisor: none` is the formula). A perfect tie drops the entry; in their code it counts as plus. `density` is "
            "that of their runs (mergekit's default is 1); it counts all entries of a module (their code those that vary), and "
            "where none varies all are kept. Entries that tie with the threshold are all kept. What is not selected is not "
            "merged, as in the paper and in mergekit; the code of their runs selects for the shares η alone and merges all."
        ),
        stages=lambda params: Pipeline(pre=(KeepVaried.of(params),), combine=ElectByEnergy.of(params)),
    )
)


register(
    Preset(
        name="consensus",
        summary="Sum, and keep the entries that at least two adapters want.",
        equation="ΔW = [Σₜ mₜ ≥ k] Σ wₜ xₜ,  mₜ = [|τₜ| > λₜ |Σₛ τₛ − τₜ|],  τₜ = wₜ xₜ",
        params=ConsensusFields,
        source=Source("Wang et al. 2024, Consensus TA (TALL-masks), §4", "https://arxiv.org/abs/2405.07813"),
        deviation=(
            "Weights multiply the deltas first (the paper has none). The paper picks λₜ from 0.2 … 0.6 per task on validation "
            "data; the default is the middle. Fewer adapters than k must all want an entry. The paper's α is `scale`."
        ),
        stages=lambda params: Pipeline(Consensus.of(params)),
    )
)


register(
    Preset(
        name="pcb",
        summary="Entries compete within their adapter and with the others'; the winners are averaged by how well they did.",
        equation="ΔW = Σ β̂ₜ wₜ xₜ / Σ β̂ₜ,  β̂ₜ = the `density` largest of exp(T·norm(xₜ²)) ⊙ Σₛ softmax(norm(xₜ xₛ))",
        params=CompeteFields,
        source=Source("Du et al. 2024, PCB-Merging, eq. 2–5", "https://arxiv.org/abs/2410.02396"),
        deviation=(
            "`reading: code` is what the authors' `pcb-merging.py` does: products instead of softmaxes, 0.01 % of outliers "
            "clamped at both ends; without its tanh, which changes nothing on entries below 0.03 and would make the result "
            "depend on their unit. (Their scripts for vision clamp 1 %, take products of normed entries, and keep .05.) "
            "Entries that are zero, or of negative β, do not count. In the paper's reading β̂ = β / max β, which is its norm "
            "wherever an entry is dropped. λ is `scale` (theirs is 1.2) or the weights; `density` is their code's."
        ),
        stages=lambda params: Pipeline(Compete.of(params)),
    )
)


class RamPlusParams(AverageSharedFields, TrimFields):
    """Parameters of `ram_plus`."""

    scope: Annotated[
        RankScope, Field(description="Rank and count entries over the complete task vector (`model`), or within each module.")
    ] = "model"
    boost: Boost = 0.1


RAM = Preset(
    name="ram",
    summary="Average the entries that several adapters changed, keep in full those that only one did.",
    equation="ΔW = Σ wₜ x̂ₜ / max(1, #{t: x̂ₜ ≠ 0}),  x̂ₜ = the `density` largest of |xₜ|",
    params=TrimFields,
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
