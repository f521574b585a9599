"""Every registered method, and the variants of its parameters that take other paths, with what each promises."""

from __future__ import annotations

from plait.methods import METHODS
from plait.testing import Subject, subject_of

# A method that is not listed promises what every method must; the list says what more.
# What one adapter of weight 1, or T copies of it, come out unchanged under; `sum`: copies of weight 1/T, `mean`: of weight 1.
PROMISES = {
    "linear": {"identity": {}, "copies": "sum"},
    "cat": {"identity": {}, "copies": "sum"},
    "task_arithmetic": {"identity": {}, "copies": "sum"},
    "svd": {"identity": {}, "copies": "sum"},
    "ties": {"identity": {"density": 1}, "copies": "mean"},
    "ties_svd": {"identity": {"density": 1}, "copies": "mean"},
    "dare_linear": {"identity": {"density": 1}, "copies": "sum"},
    "dare_ties": {"identity": {"density": 1}, "copies": "mean"},
    "dare_linear_svd": {"identity": {"density": 1}, "copies": "sum"},
    "dare_ties_svd": {"identity": {"density": 1}, "copies": "mean"},
    "magnitude_prune": {"identity": {"density": 1}, "copies": "sum"},
    "magnitude_prune_svd": {"identity": {"density": 1}, "copies": "sum"},
    "breadcrumbs": {"identity": {"density": 1, "gamma": 0}, "copies": "sum"},
    "della": {"identity": {"density": 1, "epsilon": 0}, "copies": "mean"},
    "uniform": {"identity": {}, "copies": "mean"},
    "uniform_delta": {"identity": {}, "copies": "mean"},
    "task_vector": {"identity": {}, "copies": "mean"},
    "uniform_scalar_delta": {"identity": {}, "copies": "sum"},
    "weighted": {"identity": {}, "copies": "mean", "by_position": True},
    "weighted_delta": {"identity": {}, "copies": "mean", "by_position": True},
    "weighted_delta_n": {"identity": {}, "copies": "mean"},
    "dare": {"identity": {"drop_rate": 0}, "copies": "mean"},
}

# id → (method, parameters, promises other than the method's own)
VARIANTS = {
    "ties-peft": ("ties", {"flavor": "peft"}, {}),
    "ties-mergekit": ("ties", {"flavor": "mergekit"}, {}),
    "ties-fusion_bench": ("ties", {"flavor": "fusion_bench"}, {"copies": "sum"}),
    "ties-core_space": ("ties", {"flavor": "core_space"}, {}),
    "ties-heads": ("ties", {"sign": "frequency", "zero_sign": "drop", "density": 0.6}, {}),
    # a tie among heads counts as plus, whatever the signs of the adapters
    "ties-heads-plus": ("ties", {"sign": "frequency", "zero_sign": "plus", "density": 0.6}, {"odd": False}),
    "dare_ties-majority": ("dare_ties", {"zero_sign": "majority", "sign": "frequency"}, {}),
    "della-majority": ("della", {"zero_sign": "majority", "sign": "frequency"}, {}),
    "magnitude_prune-model": ("magnitude_prune", {"scope": "model", "kept": "ceil"}, {}),
    "breadcrumbs-model": ("breadcrumbs", {"scope": "model", "gamma": 0.05, "density": 0.5}, {}),
    "weighted_delta_n-layers": (
        "weighted_delta_n",
        {"task_coefficients": [0.2, 0.3, 0.9], "layer_task_coefficients": {"0": [1.0, 0.5, 0.25]}},
        {"by_position": True},
    ),
}


def subjects() -> dict[str, Subject]:
    own = {name: subject_of(name, **PROMISES.get(name, {})) for name in METHODS}
    variants = {
        label: subject_of(name, params, **{**PROMISES[name], **promises})
        for label, (name, params, promises) in VARIANTS.items()
    }
    return {**own, **variants}


SUBJECTS = subjects()
