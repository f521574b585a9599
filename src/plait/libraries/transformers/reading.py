"""How models of transformers take up what they read: arguments, caches, positions, masks.

It is asked of the model, not known by name: its `forward` has had an argument `past_key_values` (4.x) and `cache` (5.x);
its output has a field that holds a cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

_KNOWN_ARGUMENTS = ("cache", "past_key_values")
_MASKED_ATTENTION = frozenset({"sdpa", "eager"})  # implementations that add a mask (B, 1, L, L) to what they compute
_CONTINUED_LAYERS = frozenset({"full_attention", "sliding_attention"})


def forward_parameters(model: Any) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a model's `forward`, decorators looked through."""
    return inspect.signature(model.forward).parameters


def takes_any_keyword(model: Any) -> bool:
    """Whether a model's `forward` takes keywords that it does not name."""
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in forward_parameters(model).values())


def cache_argument(model: Any) -> str | None:
    """Return the parameter of a model's `forward` that takes a cache, by its annotation or by a known name."""
    parameters = forward_parameters(model)
    annotated = [name for name, p in parameters.items() if p.annotation is not p.empty and "Cache" in str(p.annotation)]
    return next(iter([*annotated, *(name for name in _KNOWN_ARGUMENTS if name in parameters)]), None)


def cache_of(output: Any) -> tuple[str, Any] | None:
    """Return the field of a model's output that holds a cache, and the cache; None where there is none.

    A cache is an instance of `transformers.Cache`: it has a length and can copy its rows.
    """
    fields = output.items() if isinstance(output, Mapping) else vars(output).items()
    for name, value in fields:
        if callable(getattr(value, "get_seq_length", None)) and _row_copier(value) is not None:
            return name, value
    return None


def copy_rows(cache: Any, rows: Any) -> None:
    """Make a cache hold these rows of its own, in this order, each as often as it is named.

    Args:
        cache: a cache of transformers; changed in place.
        rows: indices, int64 (n,).
    """
    copier = _row_copier(cache)
    if copier is None:
        raise TypeError(f"the rows of a {type(cache).__name__} cannot be copied")
    copier(rows)


def _row_copier(cache: Any) -> Any:
    return getattr(cache, "reorder_cache", None) or getattr(cache, "batch_select_indices", None)


def why_not_continued(model: Any) -> str | None:
    """Return why what a model has read cannot be kept, copied for several rows and continued; None where it can."""
    text_config = model.config.get_text_config()
    if getattr(model, "_is_stateful", False):
        return "it keeps a running state of what it has read, which padding would change"
    other = sorted(set(getattr(text_config, "layer_types", None) or ()) - _CONTINUED_LAYERS)
    if other:
        return f"plait does not know how to continue its layers of type {', '.join(other)}"
    if not getattr(model, "_supports_cache_class", True):
        return "its code has a cache of its own, not one of transformers' cache classes"
    return None


def why_cache_not_continued(cache: Any) -> str | None:
    """Return why a cache cannot be copied for several rows and continued: a layer holds more than keys and values."""
    for layer in getattr(cache, "layers", ()):
        held = [name for name in ("conv_states", "recurrent_states") if hasattr(layer, name)]
        if held:
            return f"its cache holds {' and '.join(held)}, a running state that padding would change"
    return None


def attention_window(model: Any) -> int | None:
    """Return how many tokens back a model's layers look, where some of them do not see the complete text; else None."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    slides = "sliding_attention" in kinds or (not kinds and getattr(config, "use_sliding_window", True))
    window = getattr(config, "sliding_window", None)
    return int(window) if slides and window else None


def counts_by_place(model: Any) -> bool:
    """Whether a model takes the distance of two tokens from where they are in its memory, padding included.

    So do models that cannot be given positions (MPT's ALiBi, models of an encoder-decoder's decoder) and local attention
    (GPT-Neo).
    """
    return "position_ids" not in forward_parameters(model) or "local" in (getattr(model.config, "attention_layers", None) or ())


def why_not_packed(model: Any, longest: int) -> str | None:
    """Return why several texts cannot be read in one row, with a mask of which token sees which; None where they can.

    Args:
        model: causal.
        longest: tokens of the longest text.
    """
    reason = why_not_continued(model)
    if reason is not None:
        return reason
    if "attention_mask" not in forward_parameters(model) or counts_by_place(model):
        return "its forward takes no positions, or no mask"
    attention = getattr(model.config, "_attn_implementation", None)
    if attention not in _MASKED_ATTENTION:
        return f"its attention ({attention}) takes no mask of which token sees which"
    window = attention_window(model)
    if window is not None and longest >= window:
        return f"its layers look {window} tokens back only"
    return None


def reserved_positions(model: Any) -> int:
    """Return how many of a model's positions no token uses: RoBERTa and its variants count from after the padding's."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.padding_idx) + 1
    return 0


def position_shift(model: Any) -> Any:
    """Return how far the positions after what a model has read are from the count of its tokens, (rows, 1); None: they are it.

    With multimodal rotary positions (Qwen2-VL and others) an image takes fewer positions than tokens; the model keeps the
    difference of what it read last.

    Raises:
        LookupError: it has such positions, and keeps no difference.
    """
    shifts = [module.rope_deltas for module in model.modules() if hasattr(module, "rope_deltas")]
    if shifts and shifts[0] is not None:
        return shifts[0]
    text = model.config.get_text_config()
    rotary = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    if "mrope_section" in str(rotary):
        raise LookupError("its positions of images are not known after it has read them")
    return None
