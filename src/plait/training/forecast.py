"""What the phases would cost: examples, steps, tokens, disk. Tokenizes the data, and loads no weights."""

from __future__ import annotations

from pathlib import Path

from plait.records import Record
from plait.training.causal import encode_data
from plait.training.classification import encode_examples, tokenizer_of
from plait.training.estimate import estimate
from plait.training.preflight import ResolvedPhase


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
    lengths, left_out, truncated = _lengths(phase)
    job, settings = phase.opened.job, phase.settings
    found = estimate(phase.opened, settings, out, examples=len(lengths), merged=False)
    batch = settings.train_batch_size * settings.gradient_accumulation_steps
    return Forecast(
        name=phase.phase.name,
        state="done" if phase.record else "to do" if phase.checkpoint is None else f"from step {phase.checkpoint}",
        data=phase.opened.data.summary,
        examples=len(lengths),
        left_out=left_out,
        truncated=truncated,
        steps=found.steps,
        tokens=round(sum(lengths) / len(lengths) * batch * found.steps),
        parameters=found.trainable,
        bytes=found.bytes,
        init_seed=None if job.lora is None else job.lora.init_seed,
    )


def _lengths(phase: ResolvedPhase) -> tuple[list[int], int, int]:
    """Return the tokens of every example that is trained on, and how many were left out and cut."""
    opened = phase.opened
    if opened.job.kind == "causal":
        train, _ = encode_data(opened, phase.settings)
        return [len(item.ids) for item in train.items], train.left_out, train.truncated
    texts = encode_examples(opened, opened.data, *tokenizer_of(opened))
    return [len(item["input_ids"]) for item in texts.items], texts.left_out, texts.truncated
