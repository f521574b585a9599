"""Uses of PEFT beyond its documented API."""

from __future__ import annotations

from typing import Any

#: Task type → the modules that PEFT adds to `modules_to_save`, and then looks for in the file.
TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
#: Task types whose head gives one value per label.
LABELED_TASKS = ("SEQ_CLS", "TOKEN_CLS")
#: Names by which PEFT means the fused experts of a model that has some, whatever other layers have them.
EXPERT_LAYERS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
_MAMBA_MODELS = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
_MAMBA_LAYERS = ("conv1d", "dt_proj", "out_proj")


def reads_past_adapters(model_type: object, layer: str) -> bool:
    """Whether a layer's weight is read past an adapter, by fused kernels or by the model's code; PEFT refuses most of these.

    Args:
        model_type: of the model's configuration.
        layer: its name, the last word of its path.
    """
    return model_type in _MAMBA_MODELS and layer in _MAMBA_LAYERS


def scalings(module: Any) -> dict[str, float] | None:
    """Return the scalings of a LoRA layer, adapter → s in s · B A, to be changed in place; None for any other layer."""
    found = getattr(module, "scaling", None)
    return found if isinstance(found, dict) else None
