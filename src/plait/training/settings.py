"""A job's arguments → the configuration object of its trainer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plait.errors import RecipeError, did_you_mean
from plait.training.job import TrainingJob

_PRECISION = ("bf16", "fp16")


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
        raise RecipeError(f"arguments: {', '.join(elsewhere)}: said beside 'arguments', not in them. Take it out.")
    if uploading := [name for name in values if name.startswith(("hub_", "push_to_hub"))]:
        raise RecipeError(f"arguments: {', '.join(uploading)}: training uploads nothing. Take it out; `plait push` uploads.")
    unknown = [name for name in values if name not in known]
    if unknown:
        hints = "".join(did_you_mean(name, known) for name in unknown)
        raise RecipeError(f"arguments: {', '.join(unknown)}: {kind.__name__} has none of that name.{hints}")
    if not has_accelerator():
        values.setdefault("use_cpu", True)
        if not any(name in values for name in _PRECISION):
            values["bf16"] = False
    if "include_num_input_tokens_seen" in known:
        values.setdefault("include_num_input_tokens_seen", "non_padding")
    seed = job.seed if job.lora is None or job.lora.init_seed is None else job.lora.init_seed
    return made(kind, {**values, "output_dir": str(out), "seed": seed})


def made(kind: type, values: Mapping[str, Any]) -> Any:
    """Make a configuration object, telling what it refuses as an error of the user's.

    Raises:
        RecipeError: as above.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations of the library's own defaults
            return kind(**values)
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError(f"{kind.__name__}: {' '.join(str(error).split())}") from error


def trusts_code(job: TrainingJob, settings: Any) -> bool:
    """Return whether code beside the weights may be run; releases of TRL have it in one configuration or the other."""
    return bool(getattr(settings, "trust_remote_code", False) or job.model.get("trust_remote_code", False))


def has_accelerator() -> bool:
    """Return whether torch can use anything but the processor."""
    import torch

    return torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available()
