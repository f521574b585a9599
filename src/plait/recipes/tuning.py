"""The part of a recipe that describes how its result learns from texts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from plait.recipes.calibration import TextsSpec

ObjectiveName = Literal["distill", "hidden", "adamerging", "gradient", "supermerge", "regret_smoothmax"]
Granularity = Literal["task", "layer", "module", "direction"]
LinkName = Literal["raw", "projected", "sigmoid", "tanh", "softmax", "simplex_scaled"]
Sampler = Literal["uniform", "none", "inverse", "sqrt_inverse", "balanced"]
Criterion = Literal["mean", "worst", "geometric", "l2_shortfall", "hypervolume"]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]

LABELED: tuple[ObjectiveName, ...] = ("gradient", "supermerge", "regret_smoothmax")  # the objectives that read labels
DEFAULT_LINKS: dict[ObjectiveName, LinkName] = {
    "distill": "raw",
    "hidden": "raw",
    "adamerging": "projected",
    "gradient": "projected",
    "supermerge": "tanh",
    "regret_smoothmax": "raw",
}


class TuneSpec(TextsSpec):
    """How a merge is tuned: what it sees, what is learned, and how."""

    generic_lines: Annotated[
        int,
        Field(
            ge=0,
            description="Generic lines that are read besides the texts of a split or a file; 0 for none. Not where labels are "
            "learned from.",
        ),
    ] = 64
    allow_test: Annotated[bool, Field(description="Learn from the split `test`; the result cannot be judged on it.")] = False
    objective: Annotated[
        ObjectiveName,
        Field(description="What is minimized: divergence from the adapters' answers or hidden states, entropy, losses."),
    ] = "distill"
    soft_weight: Annotated[
        NotNegative | None,
        Field(
            description="Weight of the divergence at `soft_temperature` in `distill`; 1 for factors, 0 for coefficients, when "
            "not given."
        ),
    ] = None
    soft_temperature: Annotated[
        Positive, Field(description="Temperature at which `distill` compares the likeliest outcomes.")
    ] = 4.0
    train: Annotated[
        Literal["factors", "coefficients"] | None,
        Field(description="Learn the merge's factors, or coefficients of its columns; factors where no granularity is given."),
    ] = None
    granularity: Annotated[
        Granularity | None,
        Field(description="Learn one coefficient per column and model, layer, module or rank: a plain recipe."),
    ] = None
    link: Annotated[
        LinkName | None, Field(description="Function from parameters to coefficients; the objective's own when not given.")
    ] = None
    initial: Annotated[
        Finite | None,
        Field(description="First coefficient of every adapter; those of the recipe, at its scale, when not given."),
    ] = None
    lowest: Annotated[Finite, Field(description="Least coefficient, with link `projected`.")] = 0.0
    highest: Annotated[Finite, Field(description="Largest coefficient, with link `projected`.")] = 1.0
    normalize: Annotated[bool, Field(description="Divide an adapter's coefficients by their sum over the adapters.")] = False
    magnitude: Annotated[
        Literal["global", "per_layer", "per_task"],
        Field(description="Which coefficients share one magnitude, with link `simplex_scaled`."),
    ] = "per_layer"
    magnitude_initial: Annotated[
        Positive | None,
        Field(description="First magnitude, with link `simplex_scaled`; the sum of the first coefficients when not given."),
    ] = None
    learn_magnitude: Annotated[bool, Field(description="Learn the magnitude too, with link `simplex_scaled`.")] = True
    steps: Annotated[int, Field(ge=0, description="Updates that are made; 0 for the closed form at its best scale.")] = 64
    prompts: Annotated[int, Field(ge=1, description="Texts of every task that are read at a time.")] = 4
    accumulate: Annotated[int, Field(ge=1, description="Batches of `prompts` texts per task and update.")] = 1
    learning_rate: Annotated[
        float | None,
        Field(gt=0, le=1, description="Learning rate of AdamW; 2e-4 for factors, 0.02 for coefficients, when not given."),
    ] = None
    betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]],
        Field(description="Decay rates of AdamW's two moments."),
    ] = (0.9, 0.99)
    clip: Annotated[Positive | None, Field(description="Largest norm of a gradient; larger ones are scaled down to it.")] = 1.0
    schedule: Annotated[
        Literal["linear", "cosine", "constant"], Field(description="Schedule of the learning rate after the warm-up.")
    ] = "linear"
    warmup: Annotated[
        int | None,
        Field(ge=0, description="Updates over which the rate rises; a fifth of the steps, at most 5, when not given."),
    ] = None
    sampler: Annotated[
        Sampler, Field(description="How texts are drawn: in turn, or by the counts of their answers, with replacement.")
    ] = "uniform"
    samplers: Annotated[dict[str, Sampler], Field(description="Sampler of single tasks: task → sampler.")] = Field(
        default_factory=dict
    )
    task_weights: Annotated[
        Literal["equal", "manual", "baseline_normalized"] | dict[str, NotNegative],
        Field(description="Weights of the tasks' losses, for `gradient` and `supermerge`; or task → number."),
    ] = "equal"
    baseline_floor: Annotated[
        Positive, Field(description="Smallest loss that task weights `baseline_normalized` divide by.")
    ] = 1e-6
    weight_cap: Annotated[
        Positive | None, Field(description="Largest weight of a task with task weights `baseline_normalized`.")
    ] = None
    baseline_batches: Annotated[
        int, Field(ge=1, description="Batches per task on which the losses of base and own adapter are measured.")
    ] = 64
    label_smoothing: Annotated[float, Field(ge=0, lt=1, description="Label smoothing of the losses on labels.")] = 0.0
    entropy_over: Annotated[
        Literal["labels", "vocabulary"],
        Field(description="Words whose entropy `adamerging` lowers; always the vocabulary where answers are free."),
    ] = "labels"
    entropy_temperature: Annotated[Positive, Field(description="Temperature that divides the logits in `adamerging`.")] = 1.0
    tau: Annotated[
        Positive, Field(description="Temperature of the smooth maximum in `regret_smoothmax`: small is near the maximum.")
    ] = 0.1
    regret_eps: Annotated[
        Positive, Field(description="Least headroom of a task between base and own adapter, in `regret_smoothmax`.")
    ] = 1e-4
    group_size: Annotated[
        int | None, Field(ge=2, description="Learn `supermerge` in a tree of groups of at most so many adapters.")
    ] = None
    polish_steps: Annotated[int, Field(ge=0, description="Updates of all coefficients after the tree.")] = 50
    held_out: Annotated[
        float,
        Field(
            ge=0,
            lt=1,
            description="Share of a task's texts that is held out, and only measured on; where that is fewer than 4 texts, "
            "none is, and scale and step are chosen on the texts learned from.",
        ),
    ] = 0.2
    look_every: Annotated[int, Field(ge=1, description="Updates between two measurements on the held-out texts.")] = 16
    criterion: Annotated[
        Criterion, Field(description="Criterion over the tasks' kept shares; the step where it is largest is the best.")
    ] = "worst"
    judge: Annotated[
        Literal["divergence", "loss"],
        Field(
            description="Measure of a kept share: KL from the own adapter, or the loss on labels (objectives that read them)."
        ),
    ] = "divergence"
    patience: Annotated[int, Field(ge=0, description="Stop after so many measurements without a gain; 0 for never.")] = 0
    threshold: Annotated[NotNegative, Field(description="Smallest gain that counts, for `patience`.")] = 0.0
    min_steps: Annotated[int, Field(ge=0, description="Updates before which `patience` does not stop.")] = 20
    stop_warmup: Annotated[int, Field(ge=0, description="Updates before which a measurement costs no patience.")] = 20
    restore_best: Annotated[
        bool, Field(description="Keep the last measurement that is not clearly worse than the best, rather than the last.")
    ] = True
    tolerance: Annotated[
        NotNegative,
        Field(description="Standard errors of the difference beyond which a measurement is clearly worse; 0 keeps the best."),
    ] = 1.0
    log_every: Annotated[
        int, Field(ge=0, description="Updates between two lines on stderr, with objective and measurement; 0 for none.")
    ] = 0
    checkpointing: Annotated[bool, Field(description="Compute activations again in the backward pass, to save memory.")] = False
    compute_dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Field(description="Dtype of the products while learning; `auto`: that of the base in memory."),
    ] = "auto"
    seed: Annotated[int, Field(ge=0, lt=2**63, description="Seed of the choice of texts and of their order.")] = 0

    @model_validator(mode="after")
    def _fits(self) -> TuneSpec:
        problems = []
        if self.train == "factors":
            given = {"granularity", "link", "initial", "normalize", "group_size"} & self.model_fields_set
            problems += [f"{name!r} is of coefficients; train is 'factors'" for name in sorted(given)]
        elif self.learns_factors:
            given = {name for name in ("link", "initial", "normalize") if getattr(self, name) not in (None, False)}
            problems += [f"{name!r} is of coefficients; give a granularity" for name in sorted(given)]
        if self.learns_factors and self.objective == "adamerging":
            problems.append("'adamerging' learns coefficients: factors that only lower an entropy collapse; give a granularity")
        if self.granularity == "direction" and (self.used_link not in ("raw", "projected") or self.normalize):
            problems.append("coefficients per direction have no link but 'raw' and 'projected', and are not normalized")
        if self.group_size and (self.objective != "supermerge" or self.granularity not in ("task", "layer")):
            problems.append("'group_size' is of objective 'supermerge' with granularity 'task' or 'layer'")
        if self.group_size and self.used_link != "tanh":
            problems.append("'group_size' needs the link 'tanh', of which a product of levels is one again")
        if self.lowest > self.highest:
            problems.append(f"lowest is {self.lowest:g} and highest {self.highest:g}")
        if self.task_weights == "manual":
            problems.append("task_weights: 'manual' needs the numbers: task_weights: {task: number, …}")
        if self.judge == "loss" and self.objective not in LABELED:
            problems.append(f"judge 'loss' reads labels, and objective {self.objective!r} does not; use 'divergence'")
        if self.split == "test" and not self.allow_test:
            problems.append("split 'test' judges results and is not learned from; give another, or allow_test: true")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def learns_factors(self) -> bool:
        """Whether factors are learned, rather than coefficients."""
        return self.train == "factors" or (self.train is None and self.granularity is None)

    @property
    def used_granularity(self) -> Granularity:
        """The granularity, where coefficients are learned."""
        return self.granularity or "module"

    @property
    def used_link(self) -> LinkName:
        """The link, where coefficients are learned."""
        return self.link or DEFAULT_LINKS[self.objective]

    @property
    def unread(self) -> dict[str, str]:
        """Which keys have values that change nothing here: name → what reads it."""
        link = None if self.learns_factors else self.used_link
        normalized = self.task_weights == "baseline_normalized"
        labeled, weighted = self.objective in LABELED, self.objective in ("gradient", "supermerge")
        readers = {
            "objective gradient or supermerge": (weighted, ("task_weights",)),
            "task_weights: baseline_normalized": (normalized, ("baseline_floor", "weight_cap")),
            "an objective that reads labels": (labeled, ("label_smoothing", "baseline_batches")),
            "objective distill": (self.objective == "distill", ("soft_weight",)),
            "objective distill with a soft_weight": (
                self.objective == "distill" and bool(self.used_soft_weight),
                ("soft_temperature",),
            ),
            "objective adamerging": (self.objective == "adamerging", ("entropy_over", "entropy_temperature")),
            "objective regret_smoothmax": (self.objective == "regret_smoothmax", ("tau", "regret_eps")),
            "group_size": (self.group_size is not None, ("polish_steps",)),
            "link projected": (link in ("projected", "tanh"), ("lowest", "highest")),  # tanh has bounds of its own, −1 and 1
            "link simplex_scaled": (link == "simplex_scaled", ("magnitude", "magnitude_initial", "learn_magnitude")),
            "patience": (self.patience > 0, ("threshold", "min_steps", "stop_warmup")),
            "restore_best": (self.restore_best, ("tolerance",)),
        }
        fields = type(self).model_fields
        return {
            name: reader
            for reader, (reads, names) in readers.items()
            for name in names
            if not reads and getattr(self, name) != fields[name].default
        }

    @property
    def used_soft_weight(self) -> float:
        """The weight of the divergence at a temperature: coefficients cannot follow it without leaving the other."""
        return (1.0 if self.learns_factors else 0.0) if self.soft_weight is None else self.soft_weight

    @property
    def used_rate(self) -> float:
        """The learning rate."""
        return self.learning_rate or (2e-4 if self.learns_factors else 2e-2)
