"""What a recipe of the older framework asks of its optimizer, in the present form: the part `tune`.

Every parameter that it had is in one of three tables: what it is called now, what it means here (nothing: a note says why), or
a function. What is in none of them is not known. Its defaults are written out, since they are others now.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from plait.recipes.paths import KeyPath, Plain
from plait.recipes.problems import Problem, show_value, spell_value
from plait.recipes.validation import unknown_key

TYPES = ("none", "bayes", "adamerging", "gradient", "supermerge", "regret_smoothmax")
_METHOD = "weighted_delta_n"  # the one whose coefficients were learned
_DEFAULTS: dict[str, Any] = {
    "steps": 500,
    "generic_lines": 0,
    "learning_rate": 1e-3,
    "betas": [0.9, 0.999],
    "prompts": 2,
    "initial": 0.3,
    "schedule": "constant",
    "warmup": 0,
    "clip": None,
    "restore_best": False,
    "tolerance": 0.0,
    "granularity": "task",
}
_OWN_DEFAULTS: dict[str, dict[str, Any]] = {
    "adamerging": {"link": "projected", "entropy_over": "vocabulary"},
    "gradient": {"link": "projected", "task_weights": "baseline_normalized", "baseline_batches": 32},
    "supermerge": {"link": "tanh", "task_weights": "equal", "baseline_batches": 32},
    "regret_smoothmax": {"link": "softmax", "learning_rate": 3e-4, "prompts": 1, "restore_best": True},
}
#: Old name → the name now; the value is checked where `tune` is.
_SAME = {
    "steps": "steps",
    "lr": "learning_rate",
    "betas": "betas",
    "batch_size": "prompts",
    "gradient_accumulation_steps": "accumulate",
    "grad_accum_steps": "accumulate",
    "init_lambda": "initial",
    "normalize_coefficients": "normalize",
    "coefficient_min": "lowest",
    "coefficient_max": "highest",
    "magnitude_scope": "magnitude",
    "magnitude_init": "magnitude_initial",
    "learn_magnitude": "learn_magnitude",
    "gradient_checkpointing": "checkpointing",
    "logging_steps": "log_every",
    "log_every": "log_every",
    "seed": "seed",
    "early_stopping_threshold": "threshold",
    "early_stopping_min_delta": "threshold",
    "min_optimizer_steps_before_early_stop": "min_steps",
    "early_stopping_warmup_steps": "stop_warmup",
    "restore_best_checkpoint": "restore_best",
    "ce_baseline_floor": "baseline_floor",
    "ce_multiplier_cap": "weight_cap",
    "ce_baseline_batches": "baseline_batches",
    "ce_label_smoothing": "label_smoothing",
    "entropy_temperature": "entropy_temperature",
    "tau": "tau",
    "regret_eps": "regret_eps",
    "baseline_batches": "baseline_batches",
}
#: Old name → {allowed value: the value now}, under the name now.
_WORDS: dict[str, tuple[str, dict[str, str]]] = {
    "coefficient_parameterization": (
        "link",
        {
            "projected_lambda": "projected",
            "sigmoid_alpha": "sigmoid",
            "tanh_alpha": "tanh",
            "simplex_softmax_scaled": "simplex_scaled",
        },
    ),
    "dtype_compute": (
        "compute_dtype",
        {"auto": "auto", "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"},
    ),
}
#: Old name → (allowed values, or None for any; what it means here).
_NOTED: dict[str, tuple[tuple[Any, ...] | None, str]] = {
    "merge_impl": (
        ("streaming_parametrize", "functional_clone_legacy", "fused_linear", "fused_lora_linear"),
        "there is one implementation, on the factors themselves, with exact gradients for every kind of layer",
    ),
    "delta_residency": (("cpu_stream", "gpu_cache"), "factors stay on the device of the weight they act on"),
    "task_vector_dtype": (None, "factors act in the dtype of the base"),
    "model_dtype": (None, "the command line has it: --load-dtype (load_dtype= in Python)"),
    "force_cpu": ((True, False), "the command line has it: --device-map cpu --load-dtype float32"),
    "use_autocast": ((True, False), "products are in the base's dtype; compute_dtype chooses another"),
    "allow_tf32": ((True, False), "it is a setting of torch: torch.backends.cuda.matmul.allow_tf32"),
    "zero_dropout": ((True,), "dropout is always off"),
    "empty_cache_interval": (None, "nothing is cached that would have to be emptied"),
    "entropy_rolling_window": (None, "looks at held-out texts decide, not a rolling mean of the entropy"),
    "entropy_chunk_size": (None, "only the positions of answers get scores, which are few"),
    "require_valid_label_mask": ((True, False), "no label is needed to know where answers begin"),
    "progress_bar": ((True, False), "progress is shown where the output is a terminal"),
    "dataloader_num_workers": (None, "texts are tokenized once, before the first step"),
    "dataloader_pin_memory": ((True, False), "texts are tokens in memory; a step moves a few kilobytes"),
    "pin_memory": ((True, False), "texts are tokens in memory; a step moves a few kilobytes"),
    "non_blocking_transfer": ((True, False), "texts are tokens in memory; a step moves a few kilobytes"),
    "project_coefficients": ((True, False), "given by the link: projected, or raw"),
    "plus_plus_k": (None, "it belonged to plus_plus"),
    "ties_k": (None, "it belonged to plus_plus"),
    "plus_plus_lambda": (None, "it belonged to plus_plus"),
    "ce_baseline_source": (("single_task_eval",), "the losses are of each task's own adapter, by its name"),
    "ce_use_model_loss": ((True, False), "the loss is always that of the tokens of the answer, from the positions before them"),
    "ce_reduction": (("mean",), "a mean over the answers' tokens"),
    "ce_ignore_index": ((-100,), "only the tokens of answers count"),
    "magnitude_parameterization": (("linear",), "a magnitude is learned as it is"),
    "enforce_validation_only_selection": (
        (True, False),
        "the texts that choose the step are held out from those learned from, and the split test is refused",
    ),
    "save_metadata_pre_eval": ((True, False), "tuning.json is always written"),
    "print_coefficients_pre_eval": ((True, False), "tuning.json and recipe.yaml hold the coefficients"),
    "checkpoint_dir": (None, "the state is kept next to the output, and removed at the end"),
    "label_column": (None, "labels are those of the tasks' files"),
}
_NOTHING: tuple[Any, ...] = (None, False, 0, "", [], {})
#: Old name → (values that ask for nothing, why any other is refused).
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "init_lambda_values": ((), "first coefficients of each adapter are adapters[].weight now; leave 'initial' out."),
    "from_lambda": (_NOTHING, "first coefficients of each adapter are adapters[].weight now; leave it out."),
    "resume_checkpoint": ((None,), "a checkpoint of another framework cannot be continued; plait's own are found."),
}
_LOGS = "log_"  # log_memory and the like
_HELD = {
    "batch_size": "texts are looked at 16 at a time",
    "subset": "held-out texts are a share of those learned from (held_out)",
    "compute_missing_interference_baselines": "base and own adapters are always looked at",
}
_CRITERIA = {
    "pareto_hypervolume": "hypervolume",
    "l2_shortfall": "l2_shortfall",
    "min_interference_delta": "worst",
    "arithmetic_mean": "mean",
    "geometric_mean": "geometric",
    "arithmetic_mean_interference_delta": "mean",
    "geometric_mean_interference_delta": "geometric",
}


@dataclass
class OlderTuning:
    """An older recipe's optimizer.

    Attributes:
        tune: the part of a recipe; empty where nothing is learned.
        tasks: names of tasks, where the optimizer named them.
        notes: what was found, what it is now, and what to know of it.
        moved: path in the recipe → the path where its user wrote it.
        problems: what cannot be carried over.
    """

    tune: dict[str, Any] = field(default_factory=dict)
    tasks: list[Any] | None = None
    notes: list[tuple[str, str, str]] = field(default_factory=list)
    moved: dict[KeyPath, KeyPath] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def take_tuning(optimizer: Plain, method: str | None) -> OlderTuning:
    """Return what `optimizer: {type, params}` asks for.

    Args:
        optimizer: as it was written.
        method: of the recipe.
    """
    found = OlderTuning()
    if not isinstance(optimizer, Mapping):
        found.problems.append(
            Problem(("optimizer",), f"optimizer is {show_value(optimizer)}; it must be a mapping of type and params.")
        )
        return found
    found.problems += [
        Problem(("optimizer", key), unknown_key(str(key), ("type", "params"))) for key in optimizer.keys() - {"type", "params"}
    ]
    kind, params = optimizer.get("type"), optimizer.get("params") or {}
    if kind not in TYPES:
        found.problems.append(
            Problem(("optimizer", "type"), f"type is {show_value(kind)}; it must be one of {', '.join(TYPES)}.")
        )
    elif kind == "bayes":
        more = " It changed nothing of a merge: its sweeps searched by `search`, which `plait sweep` does."
        found.notes.append((f"optimizer: {spell_value(dict(optimizer))}", "", more))
    elif method != _METHOD:
        text = f"{kind} learned coefficients of method {_METHOD!r}, and the method is {method!r}; write method: {_METHOD}."
        found.problems.append(Problem(("optimizer", "type"), text))
    elif not isinstance(params, Mapping):
        found.problems.append(Problem(("optimizer", "params"), f"params is {show_value(params)}; it must be a mapping."))
    else:
        _ParameterReader(str(kind), params, found).run()
    return found


class _ParameterReader:
    """One optimizer's parameters."""

    def __init__(self, kind: str, params: Mapping[str, Plain], found: OlderTuning) -> None:
        self._kind = kind
        self._params = params
        self._found = found
        self._tune: dict[str, Any] = {"objective": kind, **_DEFAULTS, **_OWN_DEFAULTS[kind]}
        self._remarks: list[str] = []
        if kind == "supermerge":
            self._tune["lowest"] = -1.0

    def run(self) -> None:
        """Take every parameter."""
        special: dict[str, Callable[[Plain], None]] = {
            "split": self._split,
            "variant": self._variant,
            "plus_plus": self._plus_plus,
            "tasks": self._tasks,
            "project_coefficients": self._project,
            "zero_dropout": self._dropout,
            "early_stopping_patience": self._patience,
            "ce_task_weighting": self._weighting,
            "ce_manual_task_weights": self._manual,
            "sampling": self._sampling,
            "heldout_eval": self._heldout,
            "eval_subset": self._subset,
            "hierarchical": self._hierarchical,
        }
        for key, value in self._params.items():
            if key in special:
                special[key](value)
            elif key in _SAME:
                self._same(key, value)
            elif key in _REFUSED:
                if value not in _REFUSED[key][0]:
                    self._problem(key, _REFUSED[key][1])
            elif key in _WORDS:
                name, words = _WORDS[key]
                if self._is_one_of(key, value, tuple(words)):
                    self._set(name, words[str(value)], key)
            elif key in _NOTED:
                allowed, why = _NOTED[key]
                if allowed is None or self._is_one_of(key, value, allowed):
                    self._remarks.append(f"{key}: {why}")
            elif key.startswith(_LOGS):
                self._remarks.append(f"{key}: {_NOTED['save_metadata_pre_eval'][1]}")
            else:
                known = sorted({*special, *_SAME, *_REFUSED, *_WORDS, *_NOTED})
                self._problem(key, unknown_key(str(key), known))
        self._found.tune = self._tune
        new = f"tune: {spell_value(self._tune)}"
        more = " It is learned by `plait tune`, which writes a plain recipe; `plait merge` does not read it."
        if self._remarks:
            more += f" Not carried over: {'; '.join(self._remarks)}."
        more += " Losses are those of the positions before an answer's tokens now; they were one position late."
        self._found.notes.append((f"optimizer: {spell_value({'type': self._kind, 'params': dict(self._params)})}", new, more))

    def _problem(self, key: str, text: str, *more: str) -> None:
        self._found.problems.append(Problem(("optimizer", "params", key, *more), text))

    def _is_one_of(self, key: str, value: Plain, allowed: tuple[Any, ...]) -> bool:
        if any(type(value) is type(a) and value == a for a in allowed):
            return True
        self._problem(key, f"{key} is {show_value(value)}; it must be {' or '.join(show_value(a) for a in allowed)}.")
        return False

    def _section(self, key: str, value: Plain, known: Sequence[str], of: str = "") -> Mapping[str, Plain] | None:
        """Return a parameter that must be a mapping; its keys that are not known are problems."""
        if not isinstance(value, Mapping):
            self._problem(key, f"{key} is {show_value(value)}; it must be a mapping{of}.")
            return None
        for other in value.keys() - set(known):
            self._problem(key, unknown_key(str(other), known), str(other))
        return value

    def _set(self, name: str, value: Any, *key: str) -> None:
        self._tune[name] = value
        self._found.moved["tune", name] = ("optimizer", "params", *key)

    def _same(self, key: str, value: Plain) -> None:
        aliases = [k for k in self._params if _SAME.get(k) == _SAME[key]]
        if len(aliases) > 1 and key != aliases[0]:
            self._problem(key, f"{key} and {aliases[0]} mean the same; keep one.")
            return
        if value is not None:
            self._set(_SAME[key], value, key)

    def _split(self, value: Plain) -> None:
        if value == "test":
            self._problem(
                "split",
                "split is 'test', on which results are evaluated; learn from 'validation' or 'train', or write a recipe with "
                "tune: {split: test, allow_test: true}.",
            )
        else:
            self._set("split", value, "split")

    def _variant(self, value: Plain) -> None:
        words = {"task_wise": "task", "layer_wise": "layer"}
        text = str(value)
        if text.endswith("_plus_plus"):
            self._plus_plus(True)  # noqa: FBT003 (as the parameter has it)
            text = text.removesuffix("_plus_plus")
        if self._is_one_of("variant", text, tuple(words)):
            self._set("granularity", words[text], "variant")

    def _plus_plus(self, value: Plain) -> None:
        if value:
            self._problem(
                "plus_plus" if "plus_plus" in self._params else "variant",
                "plus_plus trimmed the adapters while learning, and not in the merge that was written, which was another one "
                "than was learned. Leave it out, or start from method: ties with plait tune --granularity layer.",
            )

    def _tasks(self, value: Plain) -> None:
        if isinstance(value, list):
            self._found.tasks = value
        elif value is not None:
            self._problem("tasks", f"tasks is {show_value(value)}; it must be a list.")

    def _project(self, value: Plain) -> None:
        if self._is_one_of("project_coefficients", value, (True, False)) and value is False:
            self._set("link", "raw", "project_coefficients")

    def _dropout(self, value: Plain) -> None:
        if value is False:
            self._problem(
                "zero_dropout", "zero_dropout is false; a merge is learned as it will act, without dropout. Leave it out."
            )
        elif self._is_one_of("zero_dropout", value, (True,)):
            self._remarks.append(f"zero_dropout: {_NOTED['zero_dropout'][1]}")

    def _patience(self, value: Plain) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            self._problem(
                "early_stopping_patience", f"early_stopping_patience is {show_value(value)}; it must be a number of steps."
            )
        elif value and "patience" not in self._tune:
            every = min(12, value)
            self._set("look_every", every, "early_stopping_patience")
            self._set("patience", -(-value // every), "early_stopping_patience")
            self._remarks.append(
                f"early_stopping_patience: {value} steps are {-(-value // every)} looks, one every {every} steps"
            )

    def _weighting(self, value: Plain) -> None:
        if self._is_one_of("ce_task_weighting", value, ("equal", "manual", "baseline_normalized")):
            if value != "manual":
                self._set("task_weights", value, "ce_task_weighting")
            elif not isinstance(self._params.get("ce_manual_task_weights"), Mapping):
                self._problem(
                    "ce_task_weighting", "ce_task_weighting is 'manual', and ce_manual_task_weights gives no numbers."
                )

    def _manual(self, value: Plain) -> None:
        if self._params.get("ce_task_weighting") != "manual":
            self._remarks.append("ce_manual_task_weights: ce_task_weighting is not manual")
        elif isinstance(value, Mapping):
            self._set("task_weights", dict(value), "ce_manual_task_weights")

    def _sampling(self, value: Plain) -> None:
        if (value := self._section("sampling", value, ("default", "per_task"), " of default and per_task")) is None:
            return
        if (default := self._strategy(value.get("default"), "default")) is not None:
            self._set("sampler", default, "sampling", "default")
        per_task = value.get("per_task") or {}
        if not isinstance(per_task, Mapping):
            self._problem("sampling", f"per_task is {show_value(per_task)}; it must map tasks to strategies.", "per_task")
            return
        own = {
            name: found for name, one in per_task.items() if (found := self._strategy(one, "per_task", str(name))) is not None
        }
        if own:
            self._set("samplers", own, "sampling", "per_task")

    def _strategy(self, value: Plain, *where: str) -> str | None:
        if value is None:
            return None
        if not isinstance(value, Mapping) or value.keys() - {"enabled", "strategy"}:
            self._problem(
                "sampling", f"{where[-1]} is {show_value(value)}; it must be a mapping of enabled and strategy.", *where
            )
            return None
        strategy = value.get("strategy", "uniform")
        if strategy not in ("uniform", "inverse", "sqrt_inverse", "balanced", "none"):
            text = f"strategy is {show_value(strategy)}; it must be uniform, inverse, sqrt_inverse, balanced or none."
            self._problem("sampling", text, *where, "strategy")
            return None
        return str(strategy) if value.get("enabled", True) else "uniform"

    def _heldout(self, value: Plain) -> None:
        known = ("enabled", "split", "frequency_updates", *_HELD, "restore_best_checkpoint", "pareto")
        if (value := self._section("heldout_eval", value, known)) is None:
            return
        if not value.get("enabled", False):
            self._remarks.append(
                "heldout_eval: it is not enabled; held-out texts choose the step only where restore_best is true"
            )
            return
        if value.get("split", "test") == "test":
            self._problem(
                "heldout_eval",
                "split is 'test' (the default); results are evaluated on it, so it does not choose them. Held-out texts are a "
                "share of those learned from (tune.held_out); give another split, which is noted.",
                "split",
            )
        else:
            self._remarks.append("heldout_eval.split: held-out texts are a share of those learned from (held_out)")
        self._remarks += [f"heldout_eval.{key}: {why}" for key, why in _HELD.items() if key in value]
        self._remarks.append("heldout_eval: what is kept is of the divergence from the own adapter, not of a metric (judge)")
        every = value.get("frequency_updates", 100)
        self._set("look_every", every, "heldout_eval", "frequency_updates")
        self._set("criterion", "hypervolume", "heldout_eval")
        if (best := value.get("restore_best_checkpoint")) is not None:
            self._set("restore_best", best, "heldout_eval", "restore_best_checkpoint")
        pareto = value.get("pareto") or {}
        if isinstance(pareto, Mapping):
            self._pareto(pareto, every)
        else:
            self._problem("heldout_eval", f"pareto is {show_value(pareto)}; it must be a mapping.", "pareto")

    def _pareto(self, value: Mapping[str, Plain], every: Plain) -> None:
        at = ("heldout_eval", "pareto")
        for key, one in value.items():
            match key:
                case "patience_evals" | "hypervolume_min_delta" | "selection_min_delta":
                    self._set("patience" if key == "patience_evals" else "threshold", one, *at, key)
                case "min_evals_before_stop":
                    if isinstance(one, int) and isinstance(every, int):
                        self._set("min_steps", one * every, *at, key)
                    else:
                        self._problem(at[0], f"{key} is {show_value(one)}; it must be a number of looks.", at[1], key)
                case "selection_criterion" if one in _CRITERIA:
                    self._set("criterion", _CRITERIA[str(one)], *at, key)
                case "selection_criterion":
                    known = ", ".join(_CRITERIA)
                    text = (
                        f"{key} is {show_value(one)}; a maximum over the tasks does not measure the others. Allowed: {known}."
                    )
                    self._problem(at[0], text, at[1], key)
                case "dominance_epsilon" if one in (0, None):
                    self._remarks.append("dominance_epsilon: dominance is exact")
                case "reference_point" if one is None or (isinstance(one, list) and not any(one)):
                    self._remarks.append("reference_point: it is the base, 0")
                case "dominance_epsilon" | "reference_point":
                    self._problem(
                        at[0], f"{key} is {show_value(one)}; the reference is the base, 0, and dominance exact.", at[1], key
                    )
                case _:
                    known_keys = ("patience_evals", "min_evals_before_stop", "hypervolume_min_delta", "selection_min_delta")
                    rest = ("selection_criterion", "dominance_epsilon", "reference_point")
                    self._problem(at[0], unknown_key(str(key), (*known_keys, *rest)), at[1], str(key))

    def _subset(self, value: Plain) -> None:
        known = ("enabled", "max_samples", "shuffle", "seed", "stratified", "stratify_by", "per_task")
        if (value := self._section("eval_subset", value, known)) is None:
            return
        if not value.get("enabled", True):
            return
        if value.get("per_task"):
            self._problem("eval_subset", "per_task: a number of texts per task is not possible; give max_samples.", "per_task")
        if value.get("max_samples") is not None:
            self._set("count", value["max_samples"], "eval_subset", "max_samples")
        left = [key for key in ("shuffle", "seed", "stratified", "stratify_by") if key in value]
        if left:
            self._remarks.append(f"eval_subset.{', '.join(left)}: texts are chosen by tune.seed")

    def _hierarchical(self, value: Plain) -> None:
        known = ("enabled", "strategy", "grouping", "group_size", "max_group_size", "polish_steps")
        if (value := self._section("hierarchical", value, known)) is None:
            return
        for key, only in (("strategy", "breadth_first"), ("grouping", "task_similarity")):
            if value.get(key, only) != only:
                self._problem("hierarchical", f"{key} is {show_value(value[key])}; it must be {only!r}.", key)
        if not value.get("enabled", False):
            self._remarks.append("hierarchical: it is not enabled")
        elif self._kind != "supermerge":
            self._problem("hierarchical", f"hierarchical belongs to supermerge, not to {self._kind}.")
        else:
            self._set("group_size", value.get("group_size", value.get("max_group_size", 4)), "hierarchical")
            if "polish_steps" in value:
                self._set("polish_steps", value["polish_steps"], "hierarchical", "polish_steps")
