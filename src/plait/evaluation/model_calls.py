"""Calls of a live model: with what its forward takes, on texts that fit it, giving numbers that are numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from plait.errors import PlaitError, TaskError
from plait.libraries.transformers import reading
from plait.tasks.perceiving import Perceived

#: Called with how many were finished since it was last called.
StepListener: TypeAlias = Callable[[int], object]
_PER_TOKEN = ("mm_token_type_ids", "token_type_ids")  # inputs of images and sounds that have a value per token, 0 for text
_NOTHING: Mapping[str, Tensor] = {}
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
    limit = None if limit is None else limit - reading.reserved_positions(model)
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


class Asked(Protocol):
    """A prompt, which may have images or sounds."""

    @property
    def perceived(self) -> Perceived | None:
        """What a model is given of them; None where there are none."""


def form_of(question: Asked) -> str:
    """Return what must be the same of questions that share a batch: of images or sounds the names and sizes of inputs."""
    return "" if question.perceived is None else question.perceived.form


def perceived_of(questions: Sequence[Asked], model: Any, width: int | None = None) -> dict[str, Tensor]:
    """Return what a model is given of the images or sounds of questions of one form, where they have some.

    Args:
        questions: of one length, unless a width is given.
        model: that reads them.
        width: tokens of a row, of which those after a prompt are text; as many as the prompts have when None.

    Raises:
        TaskError: the model takes no such inputs.
    """
    given = [q.perceived.tensors() for q in questions if q.perceived is not None]
    takes, found = reading.forward_parameters(model), dict[str, Tensor]()
    names = [
        name for name in (given[0] if given else ()) if name in takes or name not in _PER_TOKEN
    ]  # not every model has these
    for name in names:
        parts = [one[name] for one in given]
        if width is not None and name in _PER_TOKEN:
            parts = [torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts]
        joined = torch.cat(parts).to(model.device)
        if joined.is_floating_point() and name not in takes:  # others would be ignored in silence
            raise TaskError(f"{type(model).__name__} reads texts alone: it takes no {name!r}, which images or sounds become.")
        found[name] = joined.to(model.dtype) if joined.is_floating_point() else joined
    return found


@contextmanager
def refused_inputs(model: Any, perceived: Mapping[str, Tensor]) -> Iterator[None]:
    """Refuse images or sounds that a model fails at inside the block.

    Raises:
        TaskError: it does.
    """
    try:
        yield
    except (PlaitError, torch.OutOfMemoryError):
        raise
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError) as error:
        if not perceived:
            raise
        raise TaskError(
            f"{type(model).__name__} cannot read what the processor makes of images or sounds ({', '.join(perceived)}); the "
            f"two do not belong together: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        ) from error


class NotContinuedError(Exception):
    """What a model has read cannot be continued; the message says why."""


class ModelCall:
    """Calls a model with what its forward takes."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._takes = set(reading.forward_parameters(model))
        self._any = reading.takes_any_keyword(model)
        self._offset = reading.reserved_positions(model)
        self._argument: str | None = None
        self._continued = False

    @property
    def masks(self) -> bool:
        """Whether padding tokens can be recognized."""
        return "attention_mask" in self._takes or not self._takes - {"args", "kwargs"}

    def may_cache(self) -> bool:
        """Whether the forward can return a cache."""
        return self._any or "use_cache" in self._takes

    def read(self, ids: Tensor, mask: Tensor, *, keep: int | None = None, perceived: Mapping[str, Tensor] = _NOTHING) -> Any:
        """Read texts, with their images or sounds, from their beginning, and keep nothing.

        Args:
            ids: what is read (n, w).
            mask: 1 where a token is, likewise.
            keep: the last positions whose logits are wanted; all when None.
            perceived: what the model is given of images or sounds.
        """
        with refused_inputs(self._model, perceived):
            return self._call(ids, mask, keep=keep, use_cache=False, **perceived)

    def begin(
        self, ids: Tensor, mask: Tensor, *, use_cache: bool, perceived: Mapping[str, Tensor] = _NOTHING
    ) -> tuple[Any, Any, Any]:
        """Read the beginning of texts; return the logits at the end, the cache, where one is wanted, and what shifts positions.

        Those of texts with images or sounds are the model's own: it knows how many an image takes.

        Raises:
            NotContinuedError: the model gives no cache that can be continued.
        """
        positions = {} if perceived else self._positions(ids, mask)
        out = self._attempt(ids, mask, keep=1, use_cache=use_cache, **positions, **perceived)
        return out.logits, self._cache(out) if use_cache else None, self._shift(len(ids)) if use_cache and perceived else None

    def _shift(self, rows: int) -> Any:
        """Return by how much later positions of texts with images differ from the count of tokens; None where they do not."""
        try:
            found = reading.position_shift(self._model)
        except LookupError as error:
            raise NotContinuedError(str(error)) from None
        if found is not None and tuple(found.shape) != (rows, 1):
            raise NotContinuedError(f"it keeps its shift of positions in a form that is not known, {tuple(found.shape)}")
        return found

    def go_on(self, ids: Tensor, mask: Tensor, cache: Any, *, last: bool, shift: Tensor | None = None) -> tuple[Any, Any]:
        """Read on from a cache, which takes up what is read; return the logits and the cache.

        Args:
            ids: what is read (n, w).
            mask: 1 where a token is, (n, tokens in the cache + w).
            cache: of what was read.
            last: whether only the logits at the end are wanted.
            shift: added to every position, (n, 1).

        Raises:
            NotContinuedError: the model does not take up the cache.
        """
        before = int(cache.get_seq_length())
        past = {str(self._argument): cache}
        positions = self._positions(ids, mask)
        if shift is not None:
            if not positions:
                raise NotContinuedError("its forward takes no positions, and images shift them")
            positions = {name: places + shift.to(places.device) for name, places in positions.items()}
        out = self._attempt(ids, mask, keep=1 if last else None, use_cache=True, **past, **positions)
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
        found = reading.cache_of(out)
        if found is None:
            raise NotContinuedError("its output holds no cache that can be copied row by row")
        field, cache = found
        reason = reading.why_cache_not_continued(cache)
        if reason is not None:
            raise NotContinuedError(reason)
        if self._argument is None:
            named = field if field in self._takes else reading.cache_argument(self._model)
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
