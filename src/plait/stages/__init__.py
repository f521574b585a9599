"""The steps that merges are made of: public, so that a recipe can spell a pipeline of its own.

One file per family; importing this package registers them all.
"""

from plait.stages import (  # noqa: F401  (registration)
    calibrate,
    competition,
    consensus,
    elect,
    gram,
    norm,
    polar,
    select,
    solve,
    sparsify,
    subspace,
    sums,
)
from plait.stages.base import (
    STAGES,
    Block,
    DeltaCombine,
    DeltaStage,
    EntryCombine,
    EntryStage,
    GramCombine,
    LinearCombine,
    MergedStage,
    Site,
    Stage,
    StageParams,
    Survey,
    place_of,
    register_stage,
)
from plait.stages.pipeline import Pipeline

__all__ = [
    "STAGES",
    "Block",
    "DeltaCombine",
    "DeltaStage",
    "EntryCombine",
    "EntryStage",
    "GramCombine",
    "LinearCombine",
    "MergedStage",
    "Pipeline",
    "Site",
    "Stage",
    "StageParams",
    "Survey",
    "place_of",
    "register_stage",
]
