"""What is wrong with the flags of `plait sft`: contradictions, and things that this machine does not have."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec

from plait.errors import PlaitError
from plait.hub.references import repo_problem
from plait.hub.upload import check_push
from plait.training.arguments import Flags, lora_flags

#: What `report_to` may name, and the packages of which it needs one.
_TRACKERS: Mapping[str, tuple[str, ...]] = {
    "trackio": ("trackio",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
    "comet_ml": ("comet_ml",),
    "swanlab": ("swanlab",),
}


def flag_problems(flags: Flags) -> list[str]:
    """Return everything that is wrong with the flags, without reading data or asking anybody."""
    checks = (_inputs, _adapter, _quantized, _merging, _pushing, _evaluating, _best, _trackers)
    return [problem for check in checks for problem in check(flags)]


def hub_push_problem(flags: Flags) -> str | None:
    """Ask the Hub whether the result can be pushed; return why not."""
    try:
        with hub_token(flags):
            check_push(str(flags.get("hub_model_id")))
    except PlaitError as error:
        return f"--push_to_hub: {error}"
    return None


@contextmanager
def hub_token(flags: Flags) -> Iterator[None]:
    """Let `--hub_token` be the token within the block."""
    given, before = flags.get("hub_token"), os.environ.get("HF_TOKEN")
    if given is not None:
        os.environ["HF_TOKEN"] = given
    try:
        yield
    finally:
        if given is not None:
            os.environ.pop("HF_TOKEN")
            os.environ.update({} if before is None else {"HF_TOKEN": before})


def _inputs(flags: Flags) -> Iterator[str]:
    if not flags.get("model_name_or_path"):
        yield "--model_name_or_path is missing: a folder, or org/model on the Hub."
    if not flags.get("dataset_name"):
        yield "--dataset_name_or_path is missing: a file, a folder, or a data set on the Hub."
    if flags.get("dataset_streaming"):
        yield "--dataset_streaming: plait sft reads all rows before training, to check and count them. Leave it out."
    if flags.get("lora_task_type", "CAUSAL_LM") != "CAUSAL_LM":
        yield "--lora_task_type: plait sft trains causal language models (CAUSAL_LM); `plait train` trains classifiers."


def _adapter(flags: Flags) -> Iterator[str]:
    if flags.get("use_peft"):
        return
    if given := lora_flags(flags):
        yield f"{', '.join(given)} without --use_peft: the complete model would be trained. Add --use_peft, or leave them out."
    for flag in ("load_in_4bit", "load_in_8bit"):
        if flags.get(flag):
            yield f"--{flag} without --use_peft: a quantized model cannot be trained, only an adapter on it. Add --use_peft."


def _quantized(flags: Flags) -> Iterator[str]:
    wanted = [f"--{flag}" for flag in ("load_in_4bit", "load_in_8bit") if flags.get(flag)]
    if not wanted:
        return
    import torch

    if len(wanted) == 2:
        yield "--load_in_4bit and --load_in_8bit: give one of them."
    if not torch.cuda.is_available():
        yield f"{wanted[0]}: quantized training (QLoRA) needs a CUDA device, and torch finds none here. Leave it out."
    if find_spec("bitsandbytes") is None:
        yield f"{wanted[0]} needs the package bitsandbytes: python -m pip install bitsandbytes."


def _merging(flags: Flags) -> Iterator[str]:
    if flags.get("merge_adapter_with_base") and not flags.get("use_peft"):
        yield (
            "--merge_adapter_with_base without --use_peft: there is no adapter to merge. Add --use_peft, or leave the merge "
            "out: a full fine-tune is a complete model already."
        )
    if flags.get("upload_merged_model"):
        missing = [f"--{flag}" for flag in ("merge_adapter_with_base", "push_to_hub") if not flags.get(flag)]
        if missing:
            yield f"--upload_merged_model needs {' and '.join(missing)} as well."


def _pushing(flags: Flags) -> Iterator[str]:
    repo = flags.get("hub_model_id")
    if flags.get("push_to_hub") and not repo:
        yield "--push_to_hub needs to know where: --hub_repo_id org/name."
    elif repo and (problem := repo_problem(repo)):
        yield f"--hub_repo_id: {problem}."
    if repo and not flags.get("push_to_hub"):
        yield f"--hub_repo_id {repo} without --push_to_hub: nothing would be uploaded. Add --push_to_hub, or leave it out."


def _evaluating(flags: Flags) -> Iterator[str]:
    given = [f"--{name}" for name in ("eval_dataset_name_or_path", "test_split_size") if name in flags.given]
    if len(given) == 2:
        yield f"{' and '.join(given)}: give one of them."
    if given and not flags.evaluates:
        yield f"{given[0]} without --eval_strategy: nothing would be measured. Add --eval_strategy steps or epoch."
    if not 0 < flags.get("test_split_size", 0.5) < 1:
        yield f"--test_split_size {flags.get('test_split_size')}: a share between 0 and 1, both left out."


def _best(flags: Flags) -> Iterator[str]:
    """Check what transformers would refuse, with what to change."""
    if not flags.get("load_best_model_at_end"):
        return
    evals, saves = str(flags.get("eval_strategy", "no")), str(flags.get("save_strategy", "steps"))
    if evals == "no":
        yield "--load_best_model_at_end needs --eval_strategy steps or epoch: without losses no model is the best."
    elif saves not in (evals, "best"):
        yield f"--load_best_model_at_end: --save_strategy is {saves} and --eval_strategy {evals}; they must be the same."
    elif saves == evals == "steps":
        save, measure = flags.get("save_steps", 500), flags.get("eval_steps", flags.get("logging_steps", 10))
        if save >= 1 and measure >= 1 and save % measure:
            yield (
                f"--load_best_model_at_end: --save_steps {save:g} is not a multiple of --eval_steps {measure:g}, so that some "
                f"checkpoints would have no loss. Give --save_steps {max(1, round(save / measure)) * measure:g}."
            )


def _trackers(flags: Flags) -> Iterator[str]:
    report_to = flags.get("report_to", "none")
    for name in [report_to] if isinstance(report_to, str) else report_to:
        packages = _TRACKERS.get(name, ())
        if packages and not any(find_spec(package) for package in packages):
            yield f"--report_to {name} needs the package {packages[0]}: python -m pip install {packages[0]}."
