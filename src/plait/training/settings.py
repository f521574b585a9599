"""A job's arguments → the configuration object of its trainer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from plait.errors import PlanError, RecipeError, collect, did_you_mean
from plait.extras import optional
from plait.recipes.problems import show_value
from plait.training.job import LoraSettings, TrainingJob

_PRECISION = ("bf16", "fp16")
_LOADING = ("dtype", "attn_implementation", "trust_remote_code")
_PLAIN: Mapping[Any, str] = {bool: "true or false", int: "an integer", float: "a number", NoneType: "null"}


def trainer_settings(kind: type, job: TrainingJob, out: Path) -> Any:
    """Make the configuration of a trainer.

    Without an accelerator the processor is used, in float32 unless the job names another precision. The seed is that of A,
    which is drawn while the trainer is made.

    Args:
        kind: `SFTConfig` or `TrainingArguments`.
        job: whose arguments; `warmup_ratio` is taken for releases that know only `warmup_steps`.
        out: folder of the checkpoints.

    Raises:
        RecipeError: an argument is not known or has another place, or they contradict each other.
    """
    known = kind.__dataclass_fields__  # type: ignore[attr-defined]
    values = dict(job.arguments)
    if "warmup_ratio" in values and "warmup_ratio" not in known:
        values.setdefault("warmup_steps", values.pop("warmup_ratio"))
    if elsewhere := [name for name in values if name in ("output_dir", "seed")]:
        raise RecipeError(f"arguments: {', '.join(elsewhere)}: a key of its own, not one of 'arguments'. Take it out.")
    if uploading := [name for name in values if name.startswith(("hub_", "push_to_hub"))]:
        raise RecipeError(f"arguments: {', '.join(uploading)}: training uploads nothing. Take it out; `plait push` uploads.")
    check_values(kind, values, "arguments")
    if values.get("truncation_mode", "keep_start") != "keep_start":
        raise RecipeError("arguments: truncation_mode: long examples always lose their end (keep_start). Take it out.")
    if not has_accelerator():
        values.setdefault("use_cpu", True)
        if not any(name in values for name in _PRECISION):
            values["bf16"] = False
    if "include_num_input_tokens_seen" in known:
        values.setdefault("include_num_input_tokens_seen", "non_padding")
    seed = job.seed if job.lora is None or job.lora.init_seed is None else job.lora.init_seed
    return construct(kind, {**values, "output_dir": str(out), "seed": seed})


def check_values(kind: type, values: Mapping[str, Any], where: str) -> None:
    """Make sure that values have the kinds which a configuration class declares; the classes themselves take anything.

    Args:
        kind: a dataclass of TRL or transformers.
        values: name → value.
        where: what they are called, for messages.

    Raises:
        RecipeError: a name is not known, or a value does not fit; all of them.
    """
    hints = get_type_hints(kind)
    fields = kind.__dataclass_fields__  # type: ignore[attr-defined]
    problems = []
    for name, value in values.items():
        if name not in fields:
            problems.append(f"{where}: {name}: {kind.__name__} has none of that name.{did_you_mean(name, fields)}")
            continue
        wanted, choices = set(get_args(hints[name]) or (hints[name],)), fields[name].metadata.get("choices")
        fits = wanted | ({int} if float in wanted else set())
        if wanted <= set(_PLAIN) and type(value) not in fits:
            kinds = " or ".join(text for plain, text in _PLAIN.items() if plain in wanted and plain is not NoneType)
            problems.append(f"{where}: {name} is {show_value(value)}; it must be {kinds}.")
        elif choices is not None and value is not None and value not in choices:
            problems.append(f"{where}: {name} is {show_value(value)}; it must be one of {', '.join(map(str, choices))}.")
    collect(RecipeError, problems, where)


def construct(kind: type, values: Mapping[str, Any]) -> Any:
    """Make a configuration object, turning what it refuses into an error of plait.

    Raises:
        RecipeError: as above.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations of the library's own defaults
            return kind(**values)
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError(f"{kind.__name__}: {' '.join(str(error).split())}") from error


def lora_config(lora: LoraSettings, task_type: str | None) -> Any:
    """Return PEFT's configuration of an adapter.

    Args:
        lora: as asked for.
        task_type: `CAUSAL_LM`, `SEQ_CLS`, or None: PEFT has none for images and sounds.
    """
    given = {"target_parameters": lora.target_parameters, "modules_to_save": lora.modules_to_save}
    return optional("peft", "train", "LoRA").LoraConfig(
        task_type=task_type,
        r=lora.r,
        lora_alpha=int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets if isinstance(lora.targets, str | None) else list(lora.targets),
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        **{name: list(value) for name, value in given.items() if value is not None},
    )


def get_adapted(model: Any, config: Any, base: str) -> Any:
    """Return a model with a new adapter.

    Args:
        model: of transformers.
        config: PEFT's.
        base: what the model is called, for messages.

    Raises:
        PlanError: PEFT finds no layer to adapt, or cannot adapt one.
    """
    try:
        return optional("peft", "train", "LoRA").get_peft_model(model, config)
    except ValueError as error:
        raise PlanError(f"{base} cannot be trained so: {' '.join(str(error).split())}") from error


def loading(values: dict[str, Any]) -> dict[str, Any]:
    """Return how a job's model is loaded that TRL does not load.

    Raises:
        RecipeError: a value has another name than those that transformers itself takes.
    """
    unknown = [name for name in values if name not in _LOADING]
    if unknown:
        raise RecipeError(f"model: {', '.join(unknown)}: a classifier or speech model takes {', '.join(_LOADING)}.")
    return values


def has_accelerator() -> bool:
    """Return whether torch can use anything but the processor."""
    import torch

    return torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available()
