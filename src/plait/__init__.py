"""Many LoRA adapters in; one adapter out, merged exactly, without the base model.

    plait.merge({"maths": "./a", "code": "./b"}, method="ties", density=0.3, out="merged")

Names are loaded when first used: importing plait costs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from plait.version import __version__ as __version__

_HOME = {
    "METHODS": "plait.methods",
    "SPACES": "plait.spaces",
    "Adapter": "plait.adapters",
    "AdapterError": "plait.errors",
    "AddressError": "plait.errors",
    "Evaluation": "plait.evaluation.record",
    "Inspection": "plait.inspection.report",
    "LowRank": "plait.adapters",
    "MergePlan": "plait.merging.plan",
    "MergeResult": "plait.merging.pipeline",
    "MissingPackageError": "plait.errors",
    "NotebookProgress": "plait.results.notebook_progress",
    "OutputError": "plait.errors",
    "PlaitError": "plait.errors",
    "PlanError": "plait.errors",
    "Recipe": "plait.recipes.schema",
    "RecipeError": "plait.errors",
    "ReportError": "plait.errors",
    "Session": "plait.api.session",
    "TaskError": "plait.errors",
    "ask": "plait.api.models",
    "bake": "plait.api.files",
    "calibrate": "plait.api.models",
    "check_tasks": "plait.api.models",
    "compress": "plait.api.files",
    "convert": "plait.api.files",
    "evaluate": "plait.api.models",
    "evaluator": "plait.api.models",
    "extract": "plait.api.files",
    "inspect": "plait.api.files",
    "load_recipe": "plait.recipes.loading",
    "merge": "plait.api.files",
    "migrate_recipe": "plait.api.files",
    "mix": "plait.api.models",
    "plan": "plait.api.files",
    "plan_bake": "plait.api.files",
    "push": "plait.api.files",
    "report": "plait.api.models",
    "sft": "plait.api.training",
    "sweep": "plait.api.models",
    "sweep_status": "plait.api.models",
    "train": "plait.api.training",
    "tune": "plait.api.models",
    "unbake": "plait.api.files",
    "save_moments": "plait.merging.moments",
    "verify": "plait.api.files",
}

__all__ = [  # noqa: RUF022 (names by the alphabet, then the version)
    "METHODS",
    "SPACES",
    "Adapter",
    "AdapterError",
    "AddressError",
    "Evaluation",
    "Inspection",
    "LowRank",
    "MergePlan",
    "MergeResult",
    "MissingPackageError",
    "NotebookProgress",
    "OutputError",
    "PlaitError",
    "PlanError",
    "Recipe",
    "RecipeError",
    "ReportError",
    "Session",
    "TaskError",
    "ask",
    "bake",
    "calibrate",
    "check_tasks",
    "compress",
    "convert",
    "evaluate",
    "evaluator",
    "extract",
    "inspect",
    "load_recipe",
    "merge",
    "migrate_recipe",
    "mix",
    "plan",
    "plan_bake",
    "push",
    "report",
    "save_moments",
    "sft",
    "sweep",
    "sweep_status",
    "train",
    "tune",
    "unbake",
    "verify",
    "__version__",
]

if TYPE_CHECKING:
    from plait import mixture as mixture
    from plait.adapters import Adapter, LowRank
    from plait.api.files import (
        bake,
        compress,
        convert,
        extract,
        inspect,
        merge,
        migrate_recipe,
        plan,
        plan_bake,
        push,
        unbake,
        verify,
    )
    from plait.api.models import ask, calibrate, check_tasks, evaluate, evaluator, mix, report, sweep, sweep_status, tune
    from plait.api.session import Session
    from plait.api.training import sft, train
    from plait.errors import (
        AdapterError,
        AddressError,
        MissingPackageError,
        OutputError,
        PlaitError,
        PlanError,
        RecipeError,
        ReportError,
        TaskError,
    )
    from plait.evaluation.record import Evaluation
    from plait.inspection.report import Inspection
    from plait.merging.moments import save_moments
    from plait.merging.pipeline import MergeResult
    from plait.merging.plan import MergePlan
    from plait.methods import METHODS
    from plait.recipes.loading import load_recipe
    from plait.recipes.schema import Recipe
    from plait.results.notebook_progress import NotebookProgress
    from plait.spaces import SPACES


def __getattr__(name: str) -> Any:
    if name == "mixture":  # imported on first use: it needs torch
        return import_module("plait.mixture")
    if name not in _HOME:
        raise AttributeError(f"module 'plait' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
