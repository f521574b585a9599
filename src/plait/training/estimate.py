"""What a run will take, before it begins: parameters, steps, tokens, bytes on disk. No weights are loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.checkpoints.digests import weight_files
from plait.errors import PlanError
from plait.extras import optional
from plait.hub.pretrained import load_config, refuse_failures
from plait.libraries.transformers.quiet import silence
from plait.libraries.trl import trusts_code
from plait.records import Record
from plait.results.disk import free_space
from plait.training.job import ResolvedJob
from plait.training.kinds import KINDS
from plait.training.preflight import ResolvedPhase

_MOMENTS = 2  # of Adam, per parameter
_FLOAT32 = 4


@dataclass(frozen=True)
class Estimate:
    """What a run takes.

    Attributes:
        parameters: of the model, the adapter's left out.
        trainable: of them, or of the adapter, that are trained.
        steps: of the optimizer.
        checkpoints: that exist at the same time, at most.
        bytes: written, at most: checkpoints, results, merged model.
        passing: of them, those of checkpoints.
        free: on the disk.
    """

    parameters: int
    trainable: int
    steps: int
    checkpoints: int
    bytes: int
    passing: int
    free: int

    def problem(self, out: Path, *, phases: int = 1, together: int = 1, spare: int = 0) -> str | None:
        """Return why the disk does not suffice; None where it does.

        Args:
            out: where everything is written.
            phases: runs of this size.
            together: of them, those that have checkpoints at the same time.
            spare: bytes of what else is written.
        """
        needed = (self.bytes - self.passing) * phases + self.passing * together + spare
        if needed <= self.free:
            return None
        what = f"{self.checkpoints} checkpoints among them" if phases == 1 else f"{phases} adapters and their checkpoints"
        return (
            f"{out}: about {needed / 1e9:.2f} GB are needed ({what}), and {self.free / 1e9:.2f} GB are free. Free some, choose "
            "another output folder, or keep fewer checkpoints (save_total_limit: 1)."
        )


class Forecast(Record):
    """What one phase would cost.

    Attributes:
        name: of the phase.
        state: `done`, `from step N` (a checkpoint is there), or `to do`.
        data: place and format, for people.
        examples: trained on.
        left_out: longer than the limit.
        truncated: cut to it.
        steps: optimizer steps in all.
        tokens: read in training, padding left out; about, as the last batch of an epoch may be smaller.
        parameters: trained.
        bytes: of adapter and checkpoints on disk, at most.
        init_seed: of A.
    """

    name: str
    state: str
    data: str
    examples: int
    left_out: int
    truncated: int
    steps: int
    tokens: int
    parameters: int
    bytes: int
    init_seed: int | None


def forecast(phase: ResolvedPhase, out: Path) -> Forecast:
    """Return what a phase would cost.

    Args:
        phase: with its data.
        out: where everything is written.

    Raises:
        PlaitError: its data cannot be tokenized, or PEFT finds no layer to adapt.
    """
    (train, _), lora, settings = phase.encoded, phase.opened.job.lora, phase.settings
    examples = len(train.items)
    found = estimate(phase, out, examples=examples)
    batch = settings.train_batch_size * settings.gradient_accumulation_steps
    return Forecast(
        name=phase.phase.name,
        state="done" if phase.record else "to do" if phase.checkpoint is None else f"from step {phase.checkpoint}",
        data=phase.opened.data.summary,
        examples=examples,
        left_out=train.left_out,
        truncated=train.truncated,
        steps=found.steps,
        tokens=round(sum(train.lengths) / examples * batch * found.steps),
        parameters=found.trainable,
        bytes=found.bytes,
        init_seed=None if lora is None else lora.init_seed,
    )


def estimate(phase: ResolvedPhase, out: Path, *, examples: int, merged: bool = False) -> Estimate:
    """Count parameters on a model without weights, steps and bytes.

    Args:
        phase: with its data.
        out: where everything is written.
        examples: trained on; with packing fewer steps are taken than they would be.
        merged: whether a merged model is written as well.

    Raises:
        PlanError: transformers does not know the model, or PEFT finds no layer to adapt.
    """
    opened, config = phase.opened, phase.settings
    with silence():
        parameters, trainable = _count(opened, config)
    batch = config.train_batch_size * config.gradient_accumulation_steps * config.world_size
    steps = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * math.ceil(examples / batch))
    checkpoints = _checkpoints(config, steps)
    result = trainable * _FLOAT32
    passing = checkpoints * result * (1 if config.save_only_model else 1 + _MOMENTS)
    needed = passing + result * (1 if opened.job.lora is None else 2)
    needed += sum(p.stat().st_size for p in weight_files(opened.base.folder)) if merged else 0
    return Estimate(parameters, trainable, steps, checkpoints, needed, passing, free_space(out)[1])


def _checkpoints(config: Any, steps: int) -> int:
    strategy = str(getattr(config.save_strategy, "value", config.save_strategy))
    if strategy == "no":
        return 0
    every = config.save_steps if config.save_steps >= 1 else max(1, math.ceil(config.save_steps * steps))
    made = math.ceil(config.num_train_epochs) if strategy == "epoch" else math.ceil(steps / every)
    return int(min(made, config.save_total_limit + 1) if config.save_total_limit else made)


def _count(opened: ResolvedJob, config: Any) -> tuple[int, int]:
    """Return all parameters, and those that are trained."""
    import torch

    transformers, name = optional("transformers", "train", "training"), opened.job.base
    model_name, revision = opened.model
    trust = trusts_code(config, opened.job.model)
    kind = KINDS[opened.job.kind]
    about = load_config(model_name, revision=revision, trust_remote_code=trust, folder=opened.base.folder)
    if opened.job.labels is not None:
        about.num_labels = len(opened.job.labels)
    with refuse_failures(name, "this model cannot be trained so", PlanError, folder=opened.base.folder), torch.device("meta"):
        model = getattr(transformers, kind.LOADER).from_config(about, trust_remote_code=trust)
        parameters = model.num_parameters()
        if opened.job.lora is None:
            return parameters, parameters
        adapted = optional("peft", "train", "LoRA").get_peft_model(model, kind.lora_of(opened.job.lora, model))
    return parameters, sum(p.numel() for p in adapted.parameters() if p.requires_grad)
