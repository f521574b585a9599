"""Types of the keywords that recipes take, for editors and type checkers; written by `make docs`.

Parameters of methods that other packages register are taken too, and are in no type.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

MethodName = Literal[
    "linear",
    "cat",
    "task_arithmetic",
    "svd",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_ties",
    "dare_linear_svd",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
    "breadcrumbs",
    "della",
    "sce",
    "consensus",
    "pcb",
    "ram",
    "ram_plus",
    "magmax",
    "slerp",
    "multislerp",
    "karcher",
    "metagpt",
    "model_stock",
    "norm_match",
    "uniform",
    "uniform_delta",
    "task_vector",
    "uniform_scalar_delta",
    "weighted",
    "weighted_delta",
    "weighted_delta_n",
    "dare",
    "tsv",
    "iso_c",
    "iso_cts",
    "svc",
    "pico",
    "ctm",
    "dc_merge",
    "cart",
    "star",
    "regmean",
    "regmean_sequential",
    "ssr",
    "wudi",
    "pipeline",
]


class RecipeSettings(TypedDict, total=False):
    """Keywords of all that makes a merge."""

    method: MethodName | str | Mapping[str, Any]
    """Merge method, with its parameters; `plait methods` lists them."""
    weights: Sequence[float] | Mapping[str, Any]
    """Weights: a policy per adapter, layer or module; in a command or a call also one number per adapter."""
    heads: Mapping[str, Any]
    """Keys of a recipe's `heads`."""
    eval: Mapping[str, Any]
    """Keys of a recipe's `eval`."""
    calibration: Mapping[str, Any]
    """Keys of a recipe's `calibration`."""
    tune: Mapping[str, Any]
    """Keys of a recipe's `tune`."""
    search: Mapping[str, Any]
    """Keys of a recipe's `search`."""
    base_model: str | None
    """Base model, in place of the adapters' own; needed to bake, evaluate, tune, and for DoRA, not to merge."""
    merge_mode: Literal["union", "common", "strict"]
    """What a module that an adapter lacks is: a zero delta, left out of the merge, or an error."""
    transforms: Sequence[Any]
    """Transforms of every adapter's deltas before the merge, in this order."""
    scale: Literal["auto"] | float
    """Factor on the merged delta (the papers' λ); `auto`: the one nearest to the adapters on tasks' texts."""
    seed: int
    """Seed of randomized methods."""
    space: Literal["delta", "core", "knots", "factors"]
    """Coordinates in which the merge happens."""
    flavor: Literal["paper", "peft", "mergekit", "fusion_bench", "core_space"] | None
    """ties: One implementation's `scope`, `kept`, `weighted_vote`, `zero_sign` and `divisor`; those given explicitly win.
    By default `paper`, in `factors` space `peft`. ties_svd: As in `ties`; PEFT's when not given.
    """
    density: Literal["auto"] | float | None
    """ties, ties_svd, magnitude_prune, …: Share of entries kept per adapter. dare_linear, dare_ties, dare_linear_svd, …:
    Probability with which an entry is kept (1 − drop rate). breadcrumbs: Share of entries kept: 1 − the shares dropped
    at both ends. della: Mean probability with which an entry is kept (1 − p). sce: Share of entries kept: those in
    which the adapters differ most. 1 keeps all. pcb: Share of entries that an adapter keeps (the paper's r). dare: In
    place of drop_rate: 1 − drop_rate. dc_merge: Share of entries kept per adapter; None keeps as many as the adapter
    has directions.
    """
    scope: Literal["model", "module"]
    """ties, ties_svd, magnitude_prune, …: Rank entries over the complete task vector (`model`), or within each module.
    pcb: Normalize and rank over the complete model, or within each module. ram_plus: Rank and count entries over the
    complete task vector (`model`), or within each module. slerp, multislerp, karcher, …: Lengths and angles of each
    module's delta, or of the complete task vector. metagpt: Energies of the complete task vectors, or of each module.
    """
    kept: Literal["floor", "ceil", "inclusive"]
    """ties, ties_svd, magnitude_prune, …: How density · entries becomes a count."""
    sign: Literal["total", "frequency"]
    """ties, ties_svd, dare_ties, …: Vote by magnitude (`total`) or by head (`frequency`)."""
    weighted_vote: bool
    """ties, ties_svd, dare_ties, …: Multiply by the adapters' weights before the vote."""
    zero_sign: Literal["drop", "plus", "majority"]
    """ties, ties_svd, dare_ties, …: A perfect tie drops the entry, counts as plus, or takes the majority sign of the
    scope. sce: A perfect tie drops the entry, or counts as plus.
    """
    divisor: Literal["count", "weight", "none", "share"]
    """ties, ties_svd, dare_ties, …: Divide by the agreeing adapters' count, summed weight, or not at all. sce: Divide by
    the agreeing adapters' summed share, or not at all.
    """
    gamma: float
    """breadcrumbs: Share of the largest entries that is dropped."""
    epsilon: float
    """della: The smallest entry of a row is kept with density − ε, the largest with + ε."""
    threshold: float | Sequence[float]
    """consensus: λ: the lower, the more entries an adapter wants. One number, or one per adapter in their order."""
    wanted_by: int
    """consensus: Adapters that must want an entry; at most all of them. 0 keeps every entry."""
    reading: Literal["paper", "code"]
    """pcb: The paper's softmax, or the authors' products and clamps."""
    boost: float
    """ram_plus: r of RAM+: how much an adapter's own entries are enlarged."""
    cap: float
    """ram_plus: α of RAM+: the largest ratio of shared to own entries."""
    t: float
    """slerp: How far: 0 is the first adapter, 1 the second."""
    norm: Literal["raw", "interpolate"]
    """slerp: Put the deltas as they are into the formula, or turn the direction and interpolate the norm."""
    normalize: bool
    """multislerp: Divide the weights by the sum of their magnitudes."""
    iterations: int
    """karcher: Steps that are made, at most."""
    tolerance: float
    """karcher: Stop when a step turns by less, in radians. iso_c: Singular values up to this share of the largest are
    round-off and dropped.
    """
    to: Literal["mean", "median", "max"]
    """norm_match: Which of the adapters' norms the merge is given."""
    task_coefficients: Sequence[float] | None
    """weighted_delta_n: Coefficients, one per adapter; 1/T each when not given."""
    default_task_coefficients: Sequence[float] | None
    """weighted_delta_n: Coefficients of layers that `layer_task_coefficients` does not name."""
    layer_task_coefficients: Mapping[str, Any]
    """weighted_delta_n: Coefficients per layer, by index or by tower and index (`model.layers.3`)."""
    normalize_coefficients: bool
    """weighted_delta_n: Divide the coefficients by their sum."""
    allow_negative_coefficients: bool
    """weighted_delta_n: Allow coefficients in [−1, 1] instead of [0, 1]."""
    allow_unbounded_coefficients: bool
    """weighted_delta_n: Allow any finite coefficient."""
    drop_rate: float
    """dare: Probability with which an entry is dropped."""
    keep: float
    """tsv: Share of each adapter's singular directions that is kept, the strongest first."""
    directions: Literal["all", "effective"]
    """iso_c: All directions that are not round-off, or as many as the effective rank exp(−Σ p ln p), p = σ / Σ σ."""
    common: float
    """iso_cts: Share of all directions that is taken from the sum."""
    alpha: float
    """svc: Least contribution; 1 / alpha is the most a direction can grow."""
    beta: float
    """ctm: 1 leaves norms as they are while spaces are sought, 0 makes them all equal."""
    rho: float | None
    """dc_merge: Largest singular value over the smallest after smoothing; 1: all equal, None: unchanged. cart: Directions
    added per adapter, as a share of the sum of all ranks.
    """
    factor: float
    """cart: Factor on what is added; the paper's λ."""
    eta: float
    """star: Share of the nuclear norm that the kept values must hold."""
    ridge: Literal["auto"] | float
    """regmean, regmean_sequential, ssr, …: Ridge, as a share of the mean eigenvalue of the summed Gram matrices."""
    off_diagonal: float
    """regmean, regmean_sequential: Factor on the off-diagonal entries of every Gram matrix (the paper's α)."""
    pre: Sequence[Any]
    """pipeline: Stages before the merge: on deltas, then on entries."""
    combine: Any
    """pipeline: The stage by which many deltas become one."""
    post: Sequence[Any]
    """pipeline: Stages after the merge, on the merged delta."""


class MergeSettings(RecipeSettings, total=False):
    """Keywords of what merges: keys of a recipe, of its output, and parameters of methods."""

    kind: Literal["adapter", "delta"]
    """Write a LoRA adapter, or the dense deltas."""
    rank: int | str
    """Rank of the result: `auto` (exact where exactness exists), a number, or `energy:0.99`."""
    dtype: Literal["float32", "bfloat16", "float16"]
    """Dtype of the written tensors."""
    layout: Literal["uniform", "pattern"]
    """In PEFT's format, one rank for all modules (zero-padded; loads everywhere), or each its own."""
    format: str
    """Format of the adapter's files (docs/formats.md); auto: that of the sources where they have one."""


class BakeSettings(RecipeSettings, total=False):
    """The same, but for what shapes an adapter."""

    rank: int | None
    """ctm: Rank of both spaces; None is the largest rank of the adapters."""


class CalibrationSettings(TypedDict, total=False):
    """Keywords of `plait.calibrate`: keys of a recipe's `calibration`."""

    texts: Literal["split", "lines", "template"] | None
    """A split of each task, generic lines that plait ships, or the bare prompt; when not given: a file where `files` names
    one, else a split where the task has `calibration` or `train`, else lines.
    """
    files: Mapping[str, Any]
    """Files of single tasks' texts, in place of `texts`: task → file."""
    count: int
    """Texts per task that are read, at most."""
    split: Literal["train", "calibration", "validation", "test"] | None
    """Split that texts are taken from; `calibration` where there is one, else `train`, when not given."""
    tokens: int
    """Inputs kept per module at most, evenly spread; narrower modules keep their sum, over twice as many."""
    seed: int
    """Seed of the choice of texts and tokens."""


class CompressSettings(TypedDict, total=False):
    """Keywords of `plait.compress`."""

    dtype: Literal["float32", "bfloat16", "float16"]
    """Dtype of the written tensors."""
    layout: Literal["uniform", "pattern"]
    """In PEFT's format, one rank for all modules (zero-padded; loads everywhere), or each its own."""
    base_model: str | None
    """Base model, in place of the adapters' own; needed to bake, evaluate, tune, and for DoRA, not to merge."""
