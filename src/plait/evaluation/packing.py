"""Several texts in one row, where every token sees its own text only: common beginnings are read once, and nothing is padded.

The texts of a row form a tree with a node per token. A node attends to the nodes above it and to itself, and its position is
its depth, so that every path from the root is read as that text alone would be. It is one pass, and gradients flow through it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from plait.evaluation.output_layer import only_positions
from plait.libraries.transformers import reading

#: Nodes of a row, where no text is longer: the attention to all nodes of a row still costs little, compared with the layers.
MOST_NODES = 256
_TRIED = 3  # texts on which it is tried whether a model can read packed rows
#: Mean deviation of scores, as a share of their standard deviation, up to which packed rows read as texts alone do.
_ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-4}
_COARSE_ROUNDING = 0.05
_WORTH = 0.9  # of what is read when padded, at most; above, packing saves nothing


@dataclass(frozen=True, eq=False)
class PackedRows:
    """Texts as rows of tokens.

    Attributes:
        ids: (R, L) int64.
        positions: (R, L) int64, of every token in its text.
        seen: (R, L, L) bool; `seen[r, i, j]` is whether token i of row r attends to token j.
        places: per text its row, and the column of every token.
    """

    ids: Tensor
    positions: Tensor
    seen: Tensor
    places: tuple[tuple[int, tuple[int, ...]], ...]

    def mask(self, dtype: torch.dtype) -> Tensor:
        """Return what is added to the attention's logits, (R, 1, L, L): 0, or the lowest number where nothing is seen."""
        lowest = torch.finfo(dtype).min
        return torch.zeros(self.seen.shape, dtype=dtype).masked_fill_(~self.seen, lowest).unsqueeze(1)


def pack_shared(texts: Sequence[Sequence[int]], most: int = MOST_NODES) -> PackedRows:
    """Pack texts into rows of at most `most` nodes (or one longer text); equal beginnings in a row are one path.

    The rows are as few as fill up in the order of the texts' tokens, and of about one length: all are read as the longest.
    """
    rows, places = _fill(texts, most)
    mean = -(-sum(map(len, rows)) // len(rows))
    for limit in range(mean, most, max(1, most // 8)):
        found, evenly = _fill(texts, limit)
        if len(found) == len(rows):
            return _rectangle(found, evenly)
    return _rectangle(rows, places)


def _fill(texts: Sequence[Sequence[int]], most: int) -> tuple[list[_Tree], list[tuple[int, tuple[int, ...]]]]:
    rows: list[_Tree] = []
    places: list[tuple[int, tuple[int, ...]]] = [(0, ())] * len(texts)
    for i in sorted(range(len(texts)), key=lambda i: tuple(texts[i])):  # neighbors begin alike
        if not rows or len(rows[-1]) + rows[-1].missing(texts[i]) > max(most, len(texts[i])):
            rows.append(_Tree())
        places[i] = (len(rows) - 1, rows[-1].add(texts[i]))
    return rows, places


def pack_apart(texts: Sequence[Sequence[int]]) -> PackedRows:
    """Pack texts into one row in their order, every token a node of its own."""
    row = _Tree()
    return _rectangle([row], [(0, row.add(text, shared=False)) for text in texts])


def worth_packing(packed: PackedRows, texts: Sequence[Sequence[int]]) -> bool:
    """Whether fewer tokens are read than with padding."""
    return packed.ids.numel() <= _WORTH * len(texts) * max(map(len, texts))


_reasons: WeakKeyDictionary[Any, str | None] = WeakKeyDictionary()


def why_not_packed(model: Any, texts: Sequence[Sequence[int]]) -> str | None:
    """Return why a causal model does not read packed rows as it reads texts alone; None where it does.

    It is asked once, with a few of the texts.
    """
    reason = reading.why_not_packed(model, max(map(len, texts)))
    if reason is None:
        if model not in _reasons:
            _reasons[model] = _try(model, [*texts[:_TRIED], texts[0][::-1]])  # two differ, even where there is one text
        reason = _reasons[model]
    return reason


def packed_keywords(model: Any, packed: PackedRows) -> dict[str, Any]:
    """Return what a model's forward is given for packed rows."""
    return {
        "input_ids": packed.ids.to(model.device),
        "position_ids": packed.positions.to(model.device) + reading.reserved_positions(model),
        "attention_mask": packed.mask(model.dtype).to(model.device),
        "use_cache": False,
    }


def _try(model: Any, texts: Sequence[Sequence[int]]) -> str | None:
    def last(keywords: dict[str, Any], row: int, column: int) -> Tensor:
        at = torch.tensor([row], device=model.device), torch.tensor([column], device=model.device)
        with only_positions(model, *at) as gathered:
            logits: Tensor = model(**keywords).logits
        return (logits[0, 0] if gathered else logits[row, column]).float()

    packed = pack_shared(texts)
    with torch.no_grad():
        alone = [{"input_ids": torch.tensor([[*t]], device=model.device), "use_cache": False} for t in texts]
        wanted = torch.stack([last(keywords, 0, len(t) - 1) for keywords, t in zip(alone, texts, strict=True)])
        try:
            found = torch.stack([last(packed_keywords(model, packed), row, columns[-1]) for row, columns in packed.places])
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:
            return f"reading them fails ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    deviation = float((found - wanted).abs().mean() / wanted.std(-1).mean())
    fits = deviation <= _ROUNDING.get(model.dtype, _COARSE_ROUNDING)
    return None if fits else "in one row, they are not what they are alone"


class _Tree:
    """The texts of a row."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.depths: list[int] = []
        self.parents: list[int] = []
        self._children: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        return len(self.tokens)

    def missing(self, text: Sequence[int]) -> int:
        """Return how many nodes a text would add."""
        at = -1
        for depth, token in enumerate(text):
            found = self._children.get((at, token))
            if found is None:
                return len(text) - depth
            at = found
        return 0

    def add(self, text: Sequence[int], *, shared: bool = True) -> tuple[int, ...]:
        """Add a text, and return its nodes."""
        nodes: list[int] = []
        for depth, token in enumerate(text):
            parent = nodes[-1] if nodes else -1
            node = self._children.get((parent, token)) if shared else None
            if node is None:
                node = len(self.tokens)
                self._children[parent, token] = node
                self.tokens.append(token)
                self.depths.append(depth)
                self.parents.append(parent)
            nodes.append(node)
        return tuple(nodes)


def _rectangle(rows: Sequence[_Tree], places: Sequence[tuple[int, tuple[int, ...]]]) -> PackedRows:
    width = max(map(len, rows))
    ids, positions = np.zeros((len(rows), width), np.int64), np.zeros((len(rows), width), np.int64)
    seen = np.zeros((len(rows), width, width), bool)
    for r, tree in enumerate(rows):
        ids[r, : len(tree)], positions[r, : len(tree)] = tree.tokens, tree.depths
        for i, parent in enumerate(tree.parents):
            if parent >= 0:
                seen[r, i] = seen[r, parent]
            seen[r, i, i] = True
        filled = np.arange(len(tree), width)
        seen[r, filled, filled] = True  # a softmax over nothing is not a number
    return PackedRows(torch.from_numpy(ids), torch.from_numpy(positions), torch.from_numpy(seen), tuple(places))
