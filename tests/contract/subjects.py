"""Every registered method, and the variants of its parameters that take other paths, with what each promises.

A new method needs no line here: without one it is held to what every method promises.
"""

from __future__ import annotations

from plait.methods import METHODS
from plait.testing import Subject, subject_of

# A method that is not listed promises what every method must; the list says what more.
# What one adapter of weight 1, or T copies of it, come out unchanged under; `sum`: copies of weight 1/T, `mean`: of weight 1.
PROMISES = {
    "linear": {"identity": {}, "copies": "sum"},
    "ties": {"identity": {"density": 1}, "copies": "mean"},
    "dare_linear": {"identity": {"density": 1}, "copies": "sum"},
    "dare_ties": {"identity": {"density": 1}, "copies": "mean"},
    "magnitude_prune": {"identity": {"density": 1}, "copies": "sum"},
    "breadcrumbs": {"identity": {"density": 1, "gamma": 0}, "copies": "sum"},
    "della": {"identity": {"density": 1, "epsilon": 0}, "copies": "mean"},
    "sce": {"identity": {"density": 1}, "copies": "mean"},
    "consensus": {"identity": {"wanted_by": 1, "threshold": 0.0}, "copies": "sum"},
    "pcb": {"identity": {"density": 1}, "copies": "mean"},
    "ram": {"identity": {"density": 1}, "copies": "mean"},
    "ram_plus": {"identity": {"density": 1}, "copies": "mean"},
    "magmax": {"identity": {}, "copies": "mean"},
    "slerp": {"identity": {}, "copies": "mean"},
    "multislerp": {"identity": {}, "copies": "mean"},
    "karcher": {"identity": {}, "copies": "mean"},
    "metagpt": {"identity": {}, "copies": "mean"},
    "model_stock": {"identity": {}, "copies": "mean"},
    "norm_match": {"identity": {}, "copies": "mean"},
    "tsv": {"identity": {}, "copies": "mean"},
    "iso_c": {},
    "iso_cts": {},
    "svc": {"identity": {}, "copies": "mean"},
    "pico": {"identity": {}},
    "ctm": {"identity": {"density": 1}, "copies": "mean"},
    "dc_merge": {"identity": {"rho": None, "density": 1}},
    "cart": {"identity": {}, "copies": "mean"},
    "star": {"identity": {"eta": 1}, "copies": "mean"},
    "regmean": {"identity": {}, "copies": "mean"},
    "ssr": {"identity": {}, "copies": "mean"},
    "wudi": {"identity": {}, "copies": "mean"},
    "uniform": {"identity": {}, "copies": "mean"},
    "uniform_scalar_delta": {"identity": {}, "copies": "sum"},
    "weighted": {"identity": {}, "copies": "mean", "by_position": True},
    "weighted_delta_n": {"identity": {}, "copies": "mean"},
    "dare": {"identity": {"drop_rate": 0}, "copies": "mean"},
}

# Method → the subject whose stages it has, under another name: it is compared with that, not held to the contract again.
ALIASES = {
    "cat": "linear",
    "task_arithmetic": "linear",
    "svd": "linear",
    "ties_svd": "ties-peft",
    "dare_linear_svd": "dare_linear",
    "dare_ties_svd": "dare_ties",
    "magnitude_prune_svd": "magnitude_prune",
    "uniform_delta": "uniform",
    "task_vector": "uniform",
    "weighted_delta": "weighted",
    "regmean_sequential": "regmean",  # what differs is how its moments are taken: tests/e2e/test_regmean_sequential.py
}

# id → (method, parameters, promises other than the method's own)
VARIANTS = {
    "regmean-plain": ("regmean", {"off_diagonal": 1.0, "ridge": 0.0}, {}),
    "wudi-weak": ("wudi", {"ridge": 1e-6}, {}),
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
    "sce-plus": ("sce", {"zero_sign": "plus", "divisor": "none", "density": 0.4}, {}),
    "consensus-all": ("consensus", {"wanted_by": 3, "threshold": 0.1}, {}),
    # the smallest entry that is kept counts nothing, and outliers are clamped
    "pcb-code": ("pcb", {"reading": "code", "density": 0.4}, {"identity": None, "copies": None}),
    "pcb-module": ("pcb", {"scope": "module"}, {}),
    "ram_plus-module": ("ram_plus", {"scope": "module", "density": 0.6, "boost": 0.5}, {}),
    "slerp-norms": ("slerp", {"norm": "interpolate", "scope": "model"}, {}),
    "multislerp-model": ("multislerp", {"scope": "model"}, {}),
    "karcher-model": ("karcher", {"scope": "model"}, {}),
    "metagpt-module": ("metagpt", {"scope": "module"}, {}),
    "norm_match-max": ("norm_match", {"to": "max"}, {}),
    "tsv-half": ("tsv", {"keep": 0.5}, {"identity": None, "copies": None}),
    "iso_c-effective": ("iso_c", {"directions": "effective"}, {}),
    "iso_cts-specific": ("iso_cts", {"common": 0.3}, {}),
    "svc-alpha": ("svc", {"alpha": 1.0}, {}),
    "ctm-rank": ("ctm", {"rank": 2, "beta": 0.0}, {}),
    "dc_merge-share": ("dc_merge", {"rho": 1.0, "density": 0.3}, {}),
    "cart-half": ("cart", {"rho": 0.5, "factor": 1.0}, {}),
    "star-most": ("star", {"eta": 0.9}, {}),
    "weighted_delta_n-layers": (
        "weighted_delta_n",
        {"task_coefficients": [0.2, 0.3, 0.9], "layer_task_coefficients": {"0": [1.0, 0.5, 0.25]}},
        {"by_position": True},
    ),
    # stages that no method above is made of, and the order pre → combine → post
    "pipeline-smooth": ("pipeline", {"pre": ["smooth"], "combine": "polar", "post": ["iso"]}, {}),
    "pipeline-truncate": (
        "pipeline",
        {
            "pre": ["pico", {"name": "trim", "density": 0.5}],
            "combine": "elect",
            "post": ["svc", {"name": "truncate", "to": 2}, "norm_match"],
        },
        {},
    ),
}


def subjects() -> dict[str, Subject]:
    own = {name: subject_of(name, **PROMISES.get(name, {})) for name in METHODS if name not in ALIASES}
    variants = {
        label: subject_of(name, params, **{**PROMISES.get(name, {}), **promises})
        for label, (name, params, promises) in VARIANTS.items()
    }
    return {**own, **variants}


SUBJECTS = subjects()
