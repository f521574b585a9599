"""mergekit's words: its methods with their defaults, its models, its settings, its filters.

Written from what mergekit 0.1 does. Independent of plait's recipes beyond the names of methods and parameters.
"""

from __future__ import annotations

import glob
from collections.abc import Mapping
from dataclasses import dataclass, field

from plait.recipes.paths import KeyPath, Plain

_SUFFIX = ".weight"  # mergekit's filters see tensor names, plait's patterns see modules


@dataclass(frozen=True)
class MergekitMethod:
    """A mergekit method that plait has.

    Attributes:
        normalize: mergekit's default for dividing by the sum of the weights.
        rescale: mergekit's default for rescaling what survives a mask.
        params: the parameters besides `weight`, with mergekit's defaults.
        fixed: parameters that plait's method always gets.
        elects: whether signs are elected.
        notes: where numbers differ.
        name: what plait calls it; mergekit's own name when empty.
        places: where in plait's method a parameter is; under its own name when it is not listed.
        weighted: whether it needs a weight per model; one without takes none.
        arithmetic: whether it is one of those on task vectors, with `lambda`, `normalize` and `rescale`.
        only: parameters that must have this value, and why.
        base: why it needs a base model of its own; empty when it does not.
    """

    normalize: bool
    rescale: bool = False
    params: Mapping[str, Plain] = field(default_factory=dict)
    fixed: Mapping[str, Plain] = field(default_factory=dict)
    elects: bool = False
    notes: tuple[str, ...] = ()
    name: str = ""
    places: Mapping[str, KeyPath] = field(default_factory=dict)
    weighted: bool = True
    arithmetic: bool = True
    only: Mapping[str, tuple[Plain, str]] = field(default_factory=dict)
    base: str = ""


_WHOLE = "without one mergekit turns full models, and plait merges what adapters changed"
_VOTE = {"weighted_vote": True, "zero_sign": "plus"}
_GAMMA = "where gamma times a matrix's entries is below 1, mergekit drops all of them and plait none of the top."
_KEYED = "each adapter's mask comes from (seed, adapter, module); mergekit draws all masks from one generator"
MERGEKIT_METHODS = {
    "linear": MergekitMethod(normalize=True),
    "task_arithmetic": MergekitMethod(normalize=False),
    "ties": MergekitMethod(
        normalize=True,
        rescale=False,
        params={"density": 1.0},
        fixed={"flavor": "mergekit", "space": "delta"},
        elects=True,
    ),
    "dare_linear": MergekitMethod(
        normalize=False,
        rescale=True,
        params={"density": 1.0},
        fixed={"space": "delta"},
        notes=(f"{_KEYED}, and rescales survivors to the tensor's L1 norm, where plait divides them by density.",),
    ),
    "dare_ties": MergekitMethod(
        normalize=False,
        rescale=True,
        params={"density": 1.0},
        fixed={**_VOTE, "space": "delta"},
        elects=True,
        notes=(f"{_KEYED}, and rescales survivors to the tensor's L1 norm, where plait divides them by density.",),
    ),
    "della": MergekitMethod(
        normalize=True,
        rescale=True,
        params={"density": 1.0, "epsilon": 0.15},
        fixed={**_VOTE, "space": "delta"},
        elects=True,
        notes=(f"{_KEYED}, and rescales survivors to the tensor's L1 norm, where plait divides each by its probability.",),
    ),
    "breadcrumbs": MergekitMethod(
        normalize=False,
        rescale=False,
        params={"density": 1.0, "gamma": 0.01},
        fixed={"space": "delta"},
        notes=(_GAMMA,),
    ),
    "breadcrumbs_ties": MergekitMethod(
        normalize=False,
        params={"density": 1.0, "gamma": 0.01},
        fixed={"pre": [{"name": "band"}], "combine": {"name": "elect", **_VOTE}, "space": "delta"},
        elects=True,
        notes=(_GAMMA,),
        name="pipeline",
        places={"density": ("pre", 0, "density"), "gamma": ("pre", 0, "gamma"), "divisor": ("combine", "divisor")},
    ),
    "della_linear": MergekitMethod(
        normalize=False,
        rescale=True,
        params={"density": 1.0, "epsilon": 0.15},
        fixed={"pre": [{"name": "drop_by_rank"}], "combine": {"name": "sum"}, "space": "delta"},
        notes=(f"{_KEYED}, and rescales survivors to the tensor's L1 norm, where plait divides each by its probability.",),
        name="pipeline",
        places={"density": ("pre", 0, "density"), "epsilon": ("pre", 0, "epsilon")},
    ),
    "sce": MergekitMethod(
        normalize=False,
        params={"select_topk": 1.0},
        fixed={"zero_sign": "plus", "space": "delta"},
        notes=("mergekit selects a share of the entries that vary, plait of all entries; in LoRA deltas all vary.",),
        places={"select_topk": ("density",)},
        weighted=False,
        arithmetic=False,
    ),
    "ram": MergekitMethod(
        normalize=False,
        params={"epsilon": 1e-5},
        fixed={"pre": [{"name": "cutoff"}], "combine": {"name": "average_shared"}, "space": "delta"},
        name="pipeline",
        places={"epsilon": ("pre", 0, "above")},
        weighted=False,
        arithmetic=False,
    ),
    "ramplus_tl": MergekitMethod(
        normalize=False,
        params={"r": 0.1, "alpha": 0.2, "epsilon": 1e-5},
        fixed={"pre": [{"name": "cutoff"}], "combine": {"name": "average_shared", "scope": "module"}, "space": "delta"},
        name="pipeline",
        places={"r": ("combine", "boost"), "alpha": ("combine", "cap"), "epsilon": ("pre", 0, "above")},
        weighted=False,
        arithmetic=False,
    ),
    "model_stock": MergekitMethod(
        normalize=False,
        weighted=False,
        arithmetic=False,
        only={"filter_wise": (False, "plait takes one angle per module, not one per row")},
    ),
    "multislerp": MergekitMethod(
        normalize=False,
        params={"normalize_weights": True},
        places={"normalize_weights": ("normalize",)},
        arithmetic=False,
        base=_WHOLE,
    ),
    "nuslerp": MergekitMethod(
        normalize=False,
        name="slerp",
        arithmetic=False,
        only={
            "nuslerp_row_wise": (False, "plait turns each module as one vector"),
            "nuslerp_flatten": (True, "plait turns each module as one vector"),
        },
        base=_WHOLE,
    ),
}
#: What has no counterpart, and why.
WHOLE_MODELS = {
    "slerp": "it turns full models; 'nuslerp' with a base_model, and plait's 'slerp', turn what the adapters changed",
    "karcher": "it averages full models on the sphere; plait's 'karcher' does so with what the adapters changed",
}


@dataclass(frozen=True)
class ModelEntry:
    """An entry of `models`: an adapter, or the base model itself when `adapter` is None."""

    index: int
    base: str | None
    adapter: str | None
    parameters: Mapping[str, Plain]

    @property
    def path(self) -> KeyPath:
        """Where it is written."""
        return ("models", self.index)


@dataclass(frozen=True)
class FilteredParameter:
    """A parameter of one model: values by filter, the first that matches counts; the filter None matches everything."""

    values: tuple[tuple[str | None, Plain], ...]
    path: KeyPath

    @property
    def filters(self) -> tuple[str | None, ...]:
        """The filters, in their order."""
        return tuple(f for f, _ in self.values)


def pattern(part: str) -> str:
    """Return the pattern over modules that matches where `part` is in the name of the module's tensor."""
    if part in _SUFFIX:
        return "*"
    return f"*{glob.escape(part.removesuffix(_SUFFIX))}" if part.endswith(_SUFFIX) else f"*{glob.escape(part)}*"


def is_loose(part: str) -> bool:
    """Return whether `part` may end within `.weight`, so that `pattern` misses a module whose path ends where it does."""
    return any(part.endswith(_SUFFIX[:n]) for n in range(1, len(_SUFFIX))) and part not in _SUFFIX
