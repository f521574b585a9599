"""What an extraction is asked for, and which layers that means."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator

from plait.adapters.layouts import Embedding
from plait.errors import PlanError, RecipeError, did_you_mean
from plait.extraction.pairing import Pair
from plait.recipes.schema import Dtype, Output
from plait.records import Record


class ExtractRequest(Record):
    """What is asked for.

    Attributes:
        base: reference of the base model.
        finetuned: reference of the full fine-tune.
        rank: a number, or `energy:0.99`.
        targets: names of layers (`q_proj`) or shell patterns over module paths; when None all Linear layers, fused experts,
            and convolutions, but for grouped ones whose LoRA would be larger than they are.
        embeddings: also take embeddings, as `lora_embedding_*`.
        modules_to_save: keep what cannot be a LoRA in full: norms and the like as `modules_to_save`, biases as `lora_bias`.
        dtype: of the written factors.
        layout: one rank for all modules, or each its own.
        base_id: the base model's name in the adapter; the reference as given when None.
    """

    base: str
    finetuned: str
    rank: int | str
    targets: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    embeddings: bool = False
    modules_to_save: bool = False
    dtype: Dtype = "float32"
    layout: Literal["uniform", "pattern"] = "uniform"
    base_id: str | None = None

    @field_validator("rank")
    @classmethod
    def _rank(cls, value: int | str) -> int | str:
        rank = Output(rank=value).rank
        if rank == "auto":
            raise ValueError("a full fine-tune has no rank of its own: give a number, or energy:0.99")
        return rank


def make_request(**settings: Any) -> ExtractRequest:
    """Return a request, checked.

    Raises:
        RecipeError: with everything that is wrong.
    """
    try:
        return ExtractRequest(**settings)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors()]
        raise RecipeError("\n".join(dict.fromkeys(problems))) from None


def select_layers(pairs: Sequence[Pair], request: ExtractRequest) -> tuple[Pair, ...]:
    """Return the layers asked for.

    Raises:
        PlanError: a pattern that no layer has, all of them at once.
    """
    able = [p for p in pairs if isinstance(p.form, type) and (request.embeddings or not p.form.reads_tokens)]
    if request.targets is None:
        return tuple(p for p in able if not p.is_outweighed)
    problems = [text for pattern in request.targets if (text := _unmatched(pattern, able, pairs))]
    if problems:
        raise PlanError("\n".join(problems))
    return tuple(p for p in able if any(_matches(pattern, p) for pattern in request.targets))


def _matches(pattern: str, pair: Pair) -> bool:
    """Return whether a pattern means a layer: the end of its path (`q_proj`, `self_attn.q_proj`), or a shell pattern."""
    path = pair.module if pair.is_experts else pair.layer
    return path == pattern or path.endswith(f".{pattern}") or fnmatchcase(path, pattern)


def _unmatched(pattern: str, able: Sequence[Pair], pairs: Sequence[Pair]) -> str | None:
    if any(_matches(pattern, p) for p in able):
        return None
    other = next((p for p in pairs if p.name.endswith(".weight") and _matches(pattern, p)), None)
    if other is not None and other.form is Embedding:
        return f"--targets {pattern!r} is an embedding; add --embeddings (embeddings=True)."
    if other is not None:
        return f"--targets {pattern!r}: {other.name!r} cannot be a LoRA here, shape {list(other.shape)}."
    names = sorted({(p.module if p.is_experts else p.layer).rpartition(".")[2] for p in able})
    near = did_you_mean(pattern, names)
    return f"--targets {pattern!r} is not a layer of these models.{near} Layers are {', '.join(names)}; or '*.layers.0.*'."
