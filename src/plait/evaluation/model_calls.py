"""Calls of a live model: with what its forward takes, on texts that fit it, giving numbers that are numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from plait.errors import TaskError
from plait.libraries import transformers as library

#: Called with how many were finished since it was last called.
StepListener: TypeAlias = Callable[[int], object]
_SHORTEN = "Leave them out, or let prompts lose their beginning with 'max_tokens' in the task."


def check_lengths(model: Any, lengths: Sequence[int], *, advice: str = _SHORTEN) -> None:
    """Make sure that texts fit a model's context.

    Args:
        model: of transformers.
        lengths: in tokens.
        advice: the last sentence of a refusal.

    Raises:
        TaskError: some do not.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limit = None if limit is None else limit - library.reserved_positions(model)
    too_long = [n for n in lengths if limit is not None and n > limit]
    if too_long:
        raise TaskError(
            f"{len(too_long)} of {len(lengths)} texts are longer than the model's context of {limit} tokens (the longest has "
            f"{max(too_long)}). {advice}"
        )


def vocabulary(model: Any) -> int | None:
    """Return how many tokens a model has embeddings for; None where that is not known."""
    return getattr(model.get_input_embeddings(), "num_embeddings", None)


class BrokenOutputsError(TaskError):
    """A model's outputs are NaN."""


def check_numbers(model: Any, scores: Sequence[float]) -> None:
    """Refuse outputs that are NaN.

    Raises:
        BrokenOutputsError: one is NaN.
    """
    if any(map(math.isnan, scores)):
        base = getattr(model, "name_or_path", "") or "in memory"
        raise BrokenOutputsError(
            f"the model's outputs are NaN (computed in {model.dtype}). A weight is broken, there or in the base {base}, or the "
            "dtype too narrow: try --load-dtype float32 (dtype='float32')."
        )


def decoder_start(model: Any) -> int:
    """Return the token that an encoder-decoder model's decoder begins with.

    Raises:
        TaskError: its configuration names none.
    """
    for config in (getattr(model, "generation_config", None), model.config):
        token = getattr(config, "decoder_start_token_id", None)
        if token is not None:
            return int(token)
    raise TaskError(f"{type(model).__name__}: the configuration names no decoder_start_token_id; answers cannot begin.")


def padded(rows: Sequence[Sequence[int]], device: torch.device, pad: int = 0, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Return tokens and attention mask, both (rows, longest row), int64; what is filled up is `pad`, with mask 0."""
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), pad), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        own = slice(width - len(row), None) if left else slice(len(row))
        ids[i, own], mask[i, own] = torch.tensor(row, dtype=torch.long), 1
    return ids.to(device), mask.to(device)


class NotContinuedError(Exception):
    """What a model has read cannot be continued; the message says why."""


class ModelCall:
    """Calls a model with what its forward takes."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._takes = set(library.forward_parameters(model))
        self._any = library.takes_any_keyword(model)
        self._offset = library.reserved_positions(model)
        self._argument: str | None = None
        self._continued = False

    @property
    def masks(self) -> bool:
        """Whether padding tokens can be recognized."""
        return "attention_mask" in self._takes or not self._takes - {"args", "kwargs"}

    def may_cache(self) -> bool:
        """Whether the forward can return a cache."""
        return self._any or "use_cache" in self._takes

    def read(self, ids: Tensor, mask: Tensor, *, keep: int | None = None) -> Any:
        """Read texts from their beginning, and keep nothing; `keep`: the last positions whose logits are wanted."""
        return self._call(ids, mask, keep=keep, use_cache=False)

    def begin(self, ids: Tensor, mask: Tensor, *, use_cache: bool) -> tuple[Any, Any]:
        """Read the beginning of texts; return the logits at the end and the cache, where one is wanted.

        Raises:
            NotContinuedError: the model gives no cache that can be continued.
        """
        out = self._attempt(ids, mask, keep=1, use_cache=use_cache, **self._positions(ids, mask))
        return out.logits, self._cache(out) if use_cache else None

    def go_on(self, ids: Tensor, mask: Tensor, cache: Any, *, last: bool) -> tuple[Any, Any]:
        """Read on from a cache, which takes up what is read; return the logits and the cache.

        Args:
            ids: what is read (n, w).
            mask: 1 where a token is, (n, tokens in the cache + w).
            cache: of what was read.
            last: whether only the logits at the end are wanted.

        Raises:
            NotContinuedError: the model does not take up the cache.
        """
        before = int(cache.get_seq_length())
        past = {str(self._argument): cache}
        out = self._attempt(ids, mask, keep=1 if last else None, use_cache=True, **past, **self._positions(ids, mask))
        if int(cache.get_seq_length()) != before + ids.shape[1]:
            raise NotContinuedError(f"its forward takes '{self._argument}' but does not read on from it")
        self._continued = True
        return out.logits, cache

    def _attempt(self, ids: Tensor, mask: Tensor, **keywords: Any) -> Any:
        """Call the model; until it has read on from a cache once, a failure only means that it cannot."""
        try:
            return self._call(ids, mask, **keywords)
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, AttributeError, RuntimeError) as error:
            if self._continued:
                raise
            words = " ".join(str(error).split())[:200]
            raise NotContinuedError(f"reading on from what it has read fails ({type(error).__name__}: {words})") from error

    def _cache(self, out: Any) -> Any:
        found = library.cache_of(out)
        if found is None:
            raise NotContinuedError("its output holds no cache that can be copied row by row")
        field, cache = found
        reason = library.why_cache_not_continued(cache)
        if reason is not None:
            raise NotContinuedError(reason)
        if self._argument is None:
            named = field if field in self._takes else library.cache_argument(self._model)
            self._argument = named or (field if self._any else None)
        if self._argument is None:
            raise NotContinuedError(f"its output holds a cache as '{field}', but its forward takes none")
        return cache

    def _positions(self, ids: Tensor, mask: Tensor) -> dict[str, Any]:
        if "position_ids" not in self._takes:
            return {}
        return {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :] + self._offset}

    def _call(self, ids: Tensor, mask: Tensor, *, keep: int | None, use_cache: bool, **more: Any) -> Any:
        if self.masks:
            more["attention_mask"] = mask
        if keep is not None and "logits_to_keep" in self._takes:
            more["logits_to_keep"] = keep
        if self.may_cache():
            more["use_cache"] = use_cache
        return self._model(input_ids=ids, **more)
