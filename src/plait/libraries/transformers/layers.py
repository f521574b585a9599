"""Layers of transformers' models that plait knows by name."""

from __future__ import annotations

from typing import Any

#: What the parts of a head are called in classifiers of images and sounds.
MEDIA_HEADS = ("projector", "classifier")
#: The layers whose output is one value per label.
LABEL_LAYERS = ("classifier", "score", "out_proj")
#: What Conv1D layers are called in the models that have them. In others (GPT-BigCode, Qwen 1) layers of these names are Linear.
CONV1D_LAYERS = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})
CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "decision_transformer", "imagegpt", "clvp", "clvp_decoder"})
#: The order in which modules of fused experts declare their parameters.
EXPERT_PARAMETERS = ("gate_up_proj", "gate_proj", "w1", "up_proj", "w3", "down_proj", "w2")


def is_conv1d(module: Any) -> bool:
    """Whether a module is transformers' Conv1D, a linear layer with a matrix (d_in, d_out); torch's Conv1d is another thing."""
    return type(module).__name__ == "Conv1D"


def holds_transposed(module: Any) -> bool:
    """Whether a module of fused experts holds its matrices as (d_in, d_out); PEFT reads the same flag."""
    return bool(getattr(module, "is_transposed", False))


def embedding_scale(module: Any) -> Any:
    """Return what an embedding multiplies its rows with (Gemma, BART), a number or a tensor; None where nothing."""
    return getattr(module, "embed_scale", None)
