"""Which texts a step reads: a function of the seed, the task and the step, so that a resumed tuning reads the same."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Hashable, Sequence

from plait.recipes.tuning import Sampler


def draw_texts(
    items: Sequence[int], classes: Sequence[Hashable], sampler: Sampler, count: int, step: int, key: str
) -> list[int]:
    """Return the texts of a step.

    Args:
        items: indices of the texts that are learned from.
        classes: of every one of them.
        sampler: `uniform` and `none` read all texts in turn, in a new order each time; the others draw with replacement, with
            weights 1 / n of a class of n texts (`inverse`), 1 / √n (`sqrt_inverse`), or N / (C n) (`balanced`, the same draw as
            `inverse`).
        count: how many.
        step: from 1.
        key: of the task.
    """
    if sampler in ("uniform", "none"):
        return epoch_order(items, count, step, key)
    sizes = Counter(classes)
    weights = [class_weight(sampler, sizes[c], len(items), len(sizes)) for c in classes]
    return random.Random(f"{key} draw {step}").choices(list(items), weights, k=count)


def class_weight(sampler: Sampler, size: int, total: int, classes: int) -> float:
    """Return the weight of every text of a class of `size` texts."""
    match sampler:
        case "inverse":
            return 1 / size
        case "sqrt_inverse":
            return 1 / math.sqrt(size)
        case "balanced":
            return total / (classes * size)
    return 1.0


def epoch_order(items: Sequence[int], count: int, step: int, key: str) -> list[int]:
    """Return the texts of a step: a new order for every time that all have been read."""
    count = min(count, len(items))
    first, drawn = (step - 1) * count, []
    for position in range(first, first + count):
        round_, at = divmod(position, len(items))
        order = list(items)
        random.Random(f"{key} {round_}").shuffle(order)
        drawn.append(order[at])
    return drawn
