"""Every parameter of the older framework's optimizers: what it becomes, what a note says of it, or why it is refused."""

from __future__ import annotations

from typing import Any

import pytest

from plait.errors import RecipeError
from plait.recipes.importers.migration import migrate
from plait.recipes.loading import build_recipe
from plait.recipes.tuning import TuneSpec
from tests.every import every

OLD: dict[str, Any] = {"adapters": ["./a", "./b"], "method": "weighted_delta_n"}


def migrated(kind: str, **params: Any) -> tuple[TuneSpec, str]:
    data, notes = migrate({**OLD, "optimizer": {"type": kind, "params": params}})
    return build_recipe(data, source="the migrated recipe").tune, "\n".join(notes)


def refused(kind: str, **params: Any) -> str:
    with pytest.raises(RecipeError) as error:
        migrated(kind, **params)
    return str(error.value)


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("adamerging", {"link": "projected", "learning_rate": 1e-3, "prompts": 2, "lowest": 0.0, "restore_best": False}),
        ("gradient", {"link": "projected", "task_weights": "baseline_normalized", "baseline_batches": 32}),
        ("supermerge", {"link": "tanh", "task_weights": "equal", "lowest": -1.0}),
        ("regret_smoothmax", {"link": "softmax", "learning_rate": 3e-4, "prompts": 1, "restore_best": True, "tau": 0.1}),
    ],
)
def test_defaults_are_those_that_it_had(kind: str, wanted: dict[str, Any]) -> None:
    spec, notes = migrated(kind)
    assert spec.objective == kind
    every = {"steps": 500, "initial": 0.3, "betas": (0.9, 0.999), "granularity": "task", "schedule": "constant", "clip": None}
    assert {key: getattr(spec, key) for key in {**every, **wanted}} == {**every, **wanted}
    assert "plait tune" in notes


@every(
    ("kind", "params", "wanted"),
    [
        ("gradient", {"steps": 7}, {"steps": 7}),
        ("gradient", {"lr": 0.01}, {"learning_rate": 0.01}),
        ("gradient", {"betas": [0.8, 0.9]}, {"betas": (0.8, 0.9)}),
        ("gradient", {"batch_size": 8}, {"prompts": 8}),
        ("gradient", {"gradient_accumulation_steps": 4}, {"accumulate": 4}),
        ("gradient", {"grad_accum_steps": 4}, {"accumulate": 4}),
        ("gradient", {"init_lambda": 0.5}, {"initial": 0.5}),
        ("gradient", {"normalize_coefficients": True}, {"normalize": True}),
        ("gradient", {"coefficient_min": -2, "coefficient_max": 2}, {"lowest": -2.0, "highest": 2.0}),
        ("gradient", {"coefficient_parameterization": "projected_lambda"}, {"link": "projected"}),
        ("gradient", {"coefficient_parameterization": "sigmoid_alpha"}, {"link": "sigmoid"}),
        ("supermerge", {"coefficient_parameterization": "tanh_alpha"}, {"link": "tanh"}),
        ("supermerge", {"coefficient_parameterization": "simplex_softmax_scaled"}, {"link": "simplex_scaled"}),
        ("gradient", {"project_coefficients": False}, {"link": "raw"}),
        ("supermerge", {"magnitude_scope": "per_task"}, {"magnitude": "per_task"}),
        ("supermerge", {"magnitude_init": 2.296}, {"magnitude_initial": 2.296}),
        ("supermerge", {"learn_magnitude": False}, {"learn_magnitude": False}),
        ("gradient", {"gradient_checkpointing": True}, {"checkpointing": True}),
        ("gradient", {"dtype_compute": "bf16"}, {"compute_dtype": "bfloat16"}),
        ("gradient", {"dtype_compute": "fp16"}, {"compute_dtype": "float16"}),
        ("gradient", {"dtype_compute": "fp32"}, {"compute_dtype": "float32"}),
        ("gradient", {"dtype_compute": "auto"}, {"compute_dtype": "auto"}),
        ("gradient", {"logging_steps": 10}, {"log_every": 10}),
        ("gradient", {"log_every": 10}, {"log_every": 10}),
        ("gradient", {"seed": 3}, {"seed": 3}),
        ("gradient", {"split": "validation"}, {"split": "validation"}),
        ("gradient", {"variant": "layer_wise"}, {"granularity": "layer"}),
        ("gradient", {"variant": "task_wise"}, {"granularity": "task"}),
        ("gradient", {"plus_plus": False}, {}),
        ("adamerging", {"early_stopping_patience": 30}, {"patience": 3, "look_every": 12}),
        ("adamerging", {"early_stopping_patience": 5}, {"patience": 1, "look_every": 5}),
        ("adamerging", {"early_stopping_patience": 0}, {"patience": 0}),
        ("adamerging", {"early_stopping_threshold": 0.1}, {"threshold": 0.1}),
        ("adamerging", {"early_stopping_min_delta": 0.1}, {"threshold": 0.1}),
        ("gradient", {"min_optimizer_steps_before_early_stop": 9}, {"min_steps": 9}),
        ("gradient", {"early_stopping_warmup_steps": 9}, {"stop_warmup": 9}),
        ("gradient", {"restore_best_checkpoint": True}, {"restore_best": True}),
        ("gradient", {"ce_task_weighting": "equal"}, {"task_weights": "equal"}),
        (
            "gradient",
            {"ce_task_weighting": "manual", "ce_manual_task_weights": {"a": 1, "b": 3}},
            {"task_weights": {"a": 1.0, "b": 3.0}},
        ),
        ("gradient", {"ce_baseline_floor": 0.1}, {"baseline_floor": 0.1}),
        ("gradient", {"ce_multiplier_cap": 2.0}, {"weight_cap": 2.0}),
        ("gradient", {"ce_baseline_batches": 5}, {"baseline_batches": 5}),
        ("gradient", {"ce_label_smoothing": 0.1}, {"label_smoothing": 0.1}),
        ("adamerging", {"entropy_temperature": 2.0}, {"entropy_temperature": 2.0}),
        ("regret_smoothmax", {"tau": 0.5}, {"tau": 0.5}),
        ("regret_smoothmax", {"regret_eps": 0.01}, {"regret_eps": 0.01}),
        ("regret_smoothmax", {"baseline_batches": 7}, {"baseline_batches": 7}),
        ("gradient", {"sampling": {"default": {"strategy": "inverse"}}}, {"sampler": "inverse"}),
        ("gradient", {"sampling": {"default": {"enabled": False, "strategy": "inverse"}}}, {"sampler": "uniform"}),
        ("gradient", {"sampling": {"per_task": {"a": {"strategy": "balanced"}}}}, {"samplers": {"a": "balanced"}}),
        ("gradient", {"sampling": {"default": {"strategy": "sqrt_inverse"}}}, {"sampler": "sqrt_inverse"}),
        ("gradient", {"sampling": {"default": {"strategy": "none"}}}, {"sampler": "none"}),
        ("gradient", {"eval_subset": {"max_samples": 64, "stratified": True}}, {"count": 64}),
        ("gradient", {"eval_subset": {"enabled": False, "max_samples": 64}}, {"count": None}),
        ("supermerge", {"variant": "layer_wise", "hierarchical": {"enabled": True}}, {"group_size": 4}),
        (
            "supermerge",
            {"hierarchical": {"enabled": True, "strategy": "breadth_first", "grouping": "task_similarity", "group_size": 3}},
            {"group_size": 3},
        ),
        ("supermerge", {"hierarchical": {"enabled": False}}, {"group_size": None}),
        (
            "supermerge",
            {"heldout_eval": {"enabled": True, "split": "train", "frequency_updates": 50, "restore_best_checkpoint": True}},
            {"look_every": 50, "restore_best": True, "criterion": "hypervolume"},
        ),
        (
            "supermerge",
            {
                "heldout_eval": {
                    "enabled": True,
                    "split": "train",
                    "pareto": {
                        "patience_evals": 2,
                        "min_evals_before_stop": 3,
                        "selection_min_delta": 0.01,
                        "selection_criterion": "min_interference_delta",
                        "dominance_epsilon": 0,
                        "reference_point": [0, 0],
                    },
                }
            },
            {"patience": 2, "min_steps": 300, "threshold": 0.01, "criterion": "worst", "look_every": 100},
        ),
    ],
)
def test_what_has_another_name_now(kind: str, params: dict[str, Any], wanted: dict[str, Any]) -> None:
    spec, _ = migrated(kind, **params)
    assert {key: getattr(spec, key) for key in wanted} == wanted


@every(
    "params",
    [
        {"merge_impl": "streaming_parametrize"},
        {"merge_impl": "functional_clone_legacy"},
        {"merge_impl": "fused_linear"},
        {"merge_impl": "fused_lora_linear"},
        {"delta_residency": "cpu_stream"},
        {"delta_residency": "gpu_cache"},
        {"task_vector_dtype": "bf16"},
        {"model_dtype": "bf16"},
        {"force_cpu": True},
        {"use_autocast": True},
        {"allow_tf32": True},
        {"zero_dropout": True},
        {"empty_cache_interval": 5},
        {"entropy_rolling_window": 10},
        {"entropy_chunk_size": 4096},
        {"require_valid_label_mask": True},
        {"progress_bar": False},
        {"log_memory": True},
        {"dataloader_num_workers": 4},
        {"dataloader_pin_memory": True},
        {"pin_memory": False},
        {"non_blocking_transfer": True},
        {"ce_baseline_source": "single_task_eval"},
        {"ce_use_model_loss": False},
        {"ce_reduction": "mean"},
        {"ce_ignore_index": -100},
        {"magnitude_parameterization": "linear"},
        {"enforce_validation_only_selection": True},
        {"save_metadata_pre_eval": True},
        {"print_coefficients_pre_eval": True},
        {"checkpoint_dir": "x"},
        {"plus_plus_k": 20},
        {"ce_manual_task_weights": {"a": 1}},
        {"heldout_eval": {"enabled": False}},
    ],
)
def test_what_means_nothing_here_is_noted_with_the_reason(params: dict[str, Any]) -> None:
    (key,) = params
    spec, notes = migrated("gradient", **params)
    assert spec == migrated("gradient")[0]
    assert f"{key}: " in notes.partition("Not carried over: ")[2]


@every(
    ("kind", "params", "words"),
    [
        ("gradient", {"split": "test"}, "on which results are evaluated"),
        ("adamerging", {"plus_plus": True}, "trimmed the adapters while learning"),
        ("adamerging", {"variant": "layer_wise_plus_plus"}, "trimmed the adapters while learning"),
        ("gradient", {"variant": "module_wise"}, "'task_wise' or 'layer_wise'"),
        ("gradient", {"merge_impl": "magic"}, "merge_impl is 'magic'"),
        ("gradient", {"delta_residency": "disk"}, "delta_residency is 'disk'"),
        ("gradient", {"zero_dropout": False}, "without dropout"),
        ("gradient", {"dtype_compute": "int8"}, "dtype_compute is 'int8'"),
        ("gradient", {"ce_reduction": "sum"}, "ce_reduction is 'sum'"),
        ("gradient", {"ce_ignore_index": 0}, "ce_ignore_index is 0"),
        ("gradient", {"ce_task_weighting": "manual"}, "gives no numbers"),
        ("gradient", {"sampling": {"default": {"strategy": "lucky"}}}, "strategy is 'lucky'"),
        ("gradient", {"sampling": {"other": {}}}, "'other' is not known here"),
        ("gradient", {"heldout_eval": {"enabled": True}}, "does not choose them"),
        (
            "gradient",
            {"heldout_eval": {"enabled": True, "split": "validation", "pareto": {"reference_point": [1, 0]}}},
            "the base",
        ),
        (
            "gradient",
            {"heldout_eval": {"enabled": True, "split": "train", "pareto": {"selection_criterion": "best_single_metric"}}},
            "does not measure the others",
        ),
        ("gradient", {"hierarchical": {"enabled": True}}, "belongs to supermerge"),
        ("supermerge", {"hierarchical": {"enabled": True, "strategy": "depth_first"}}, "must be 'breadth_first'"),
        ("gradient", {"eval_subset": {"per_task": {"a": 1}}}, "not possible"),
        ("gradient", {"resume_checkpoint": "best.pt"}, "another framework"),
        ("regret_smoothmax", {"init_lambda_values": [0.1, 0.9]}, "adapters\\[\\].weight"),
        ("gradient", {"grad_accum_steps": 2, "gradient_accumulation_steps": 2}, "mean the same"),
        ("gradient", {"stepz": 3}, "Did you mean 'steps'"),
        ("gradient", {"steps": -1}, "steps"),
        ("evolve", {}, "it must be one of none, bayes"),
    ],
)
def test_what_cannot_be_honored_is_refused_with_the_reason(kind: str, params: dict[str, Any], words: str) -> None:
    import re

    assert re.search(words, refused(kind, **params))


#: Every parameter of the earlier framework's optimizers → (the optimizers that had it, a value, what becomes of it). `tasks`
#: has tests of its own.
EVERY: dict[str, tuple[str, Any, str]] = {
    "variant": ("all", "layer_wise", "granularity"),
    "plus_plus": ("adamerging gradient supermerge", True, "refused"),
    "plus_plus_k": ("adamerging gradient supermerge", 20, "noted"),
    "ties_k": ("adamerging gradient supermerge", 20, "noted"),
    "plus_plus_lambda": ("adamerging gradient supermerge", 1.0, "noted"),
    "steps": ("all", 7, "steps"),
    "lr": ("all", 0.5, "learning_rate"),
    "betas": ("all", [0.8, 0.9], "betas"),
    "batch_size": ("all", 3, "prompts"),
    "init_lambda": ("adamerging gradient supermerge", 0.7, "initial"),
    "split": ("all", "train", "split"),
    "normalize_coefficients": ("adamerging gradient supermerge", True, "normalize"),
    "coefficient_parameterization": ("gradient", "sigmoid_alpha", "link"),
    "project_coefficients": ("gradient", False, "link"),
    "coefficient_min": ("gradient", -0.5, "lowest"),
    "coefficient_max": ("gradient", 2.0, "highest"),
    "use_autocast": ("all", True, "noted"),
    "gradient_checkpointing": ("all", True, "checkpointing"),
    "zero_dropout": ("all", False, "refused"),
    "allow_tf32": ("all", True, "noted"),
    "force_cpu": ("all", True, "noted"),
    "merge_impl": ("all", "fused_linear", "noted"),
    "delta_residency": ("all", "gpu_cache", "noted"),
    "dtype_compute": ("all", "bf16", "compute_dtype"),
    "task_vector_dtype": ("all", "bf16", "noted"),
    "model_dtype": ("all", "bf16", "noted"),
    "empty_cache_interval": ("all", 5, "noted"),
    "logging_steps": ("all", 5, "log_every"),
    "log_every": ("all", 5, "log_every"),
    "log_anything": ("all", True, "noted"),
    "entropy_rolling_window": ("adamerging", 10, "noted"),
    "entropy_temperature": ("adamerging", 2.0, "entropy_temperature"),
    "entropy_chunk_size": ("adamerging", 4096, "noted"),
    "require_valid_label_mask": ("adamerging", True, "noted"),
    "progress_bar": ("all", True, "noted"),
    "dataloader_num_workers": ("all", 2, "noted"),
    "dataloader_pin_memory": ("all", True, "noted"),
    "pin_memory": ("all", True, "noted"),
    "non_blocking_transfer": ("all", True, "noted"),
    "gradient_accumulation_steps": ("all", 4, "accumulate"),
    "grad_accum_steps": ("all", 4, "accumulate"),
    "seed": ("all", 3, "seed"),
    "early_stopping_patience": ("all", 5, "patience"),
    "early_stopping_threshold": ("all", 0.1, "threshold"),
    "early_stopping_min_delta": ("all", 0.1, "threshold"),
    "early_stopping_warmup_steps": ("gradient supermerge", 9, "stop_warmup"),
    "min_optimizer_steps_before_early_stop": ("gradient supermerge", 9, "min_steps"),
    "restore_best_checkpoint": ("adamerging gradient supermerge", True, "restore_best"),
    "enforce_validation_only_selection": ("gradient supermerge", False, "noted"),
    "eval_subset": ("all", {"max_samples": 9}, "count"),
    "sampling": ("all", {"default": {"strategy": "inverse"}}, "sampler"),
    "heldout_eval": ("all", {"enabled": True, "split": "validation"}, "criterion"),
    "save_metadata_pre_eval": ("all", True, "noted"),
    "print_coefficients_pre_eval": ("all", True, "noted"),
    "ce_use_model_loss": ("gradient supermerge", True, "noted"),
    "ce_label_smoothing": ("gradient supermerge", 0.1, "label_smoothing"),
    "ce_reduction": ("gradient supermerge", "mean", "noted"),
    "ce_ignore_index": ("gradient supermerge", -100, "noted"),
    "ce_task_weighting": ("supermerge", "baseline_normalized", "task_weights"),
    "ce_manual_task_weights": ("gradient supermerge", {"a": 1.0}, "noted"),
    "ce_baseline_source": ("gradient supermerge", "single_task_eval", "noted"),
    "ce_baseline_floor": ("gradient supermerge", 1e-3, "baseline_floor"),
    "ce_baseline_batches": ("gradient supermerge", 5, "baseline_batches"),
    "ce_multiplier_cap": ("gradient supermerge", 2.0, "weight_cap"),
    "magnitude_scope": ("supermerge", "global", "magnitude"),
    "magnitude_init": ("supermerge", 2.0, "magnitude_initial"),
    "magnitude_parameterization": ("supermerge", "linear", "noted"),
    "learn_magnitude": ("supermerge", False, "learn_magnitude"),
    "hierarchical": ("supermerge", {"enabled": True}, "group_size"),
    "checkpoint_dir": ("supermerge", "x", "noted"),
    "resume_checkpoint": ("supermerge", "best.pt", "refused"),
    "tau": ("regret_smoothmax", 0.5, "tau"),
    "regret_eps": ("regret_smoothmax", 1e-2, "regret_eps"),
    "baseline_batches": ("regret_smoothmax", 5, "baseline_batches"),
    "init_lambda_values": ("regret_smoothmax", [0.1, 0.9], "refused"),
    "from_lambda": ("regret_smoothmax", True, "refused"),
}


@every("key", list(EVERY))
def test_every_parameter_is_honored_noted_or_refused_with_the_reason(key: str) -> None:
    kinds, value, becomes = EVERY[key]
    for kind in ("adamerging", "gradient", "supermerge", "regret_smoothmax") if kinds == "all" else kinds.split():
        if becomes == "refused":
            assert key in (message := refused(kind, **{key: value}))
            assert "is not known" not in message
            continue
        spec, notes = migrated(kind, **{key: value})
        if becomes == "noted":
            assert f"{key}: " in notes.partition("Not carried over: ")[2]
        else:
            assert getattr(spec, becomes) != getattr(migrated(kind)[0], becomes), kind


def test_tasks_of_the_optimizer_are_those_of_the_recipe(tmp_path: Any) -> None:
    data = {**OLD, "eval_tasks": ["a"], "optimizer": {"type": "gradient", "params": {"tasks": ["b"]}}}
    with pytest.raises(RecipeError, match="other tasks than eval_tasks"):
        migrate(data)


def test_the_scale_is_as_it_was() -> None:
    data, _ = migrate({**OLD, "optimizer": {"type": "supermerge", "params": {"variant": "layer_wise"}}})
    assert data["scale"] == 1.0
    assert data["method"] == "weighted_delta_n"
