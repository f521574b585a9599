"""SuperMerge in a tree (arXiv:2412.10416): groups of similar adapters learn first, then groups of groups, then all together.

At a linear merge the tree is an order of learning, not another model: the coefficient of a leaf is the product of those on its
path. What it saves is the cost of a step, which reads the texts of one group only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Group = tuple[int, ...]  # leaves


def similarity(gram: Tensor) -> Tensor:
    """Return |cos| of every two deltas from their inner products, (T, T) float64; 0 where one is zero."""
    norms = gram.diagonal().clamp(min=0).sqrt()
    product = norms.unsqueeze(1) * norms
    return torch.where(product > 0, gram / product.clamp(min=1e-300), 0.0).abs()


def levels(similar: Tensor, size: int) -> list[list[tuple[Group, ...]]]:
    """Return the tree from the leaves up: per level, the nodes; per node, its children, each as the leaves below it.

    Groups are made greedily, the most similar pair first, then what is most similar to the group on average, up to `size`
    children. A node of one child is not one: it goes up as it is.
    """
    items: list[Group] = [(t,) for t in range(len(similar))]
    found = []
    while len(items) > 1:
        groups = _groups(items, similar, size)
        found.append([tuple(g) for g in groups if len(g) > 1])
        items = sorted(tuple(sorted(leaf for child in g for leaf in child)) for g in groups)
    return found


def _groups(items: Sequence[Group], similar: Tensor, size: int) -> list[list[Group]]:
    left = list(items)
    groups = []
    while left:
        if len(left) <= size:
            groups.append(left)
            break
        pairs = [(_between(a, b, similar), -i, -j) for i, a in enumerate(left) for j, b in enumerate(left) if i < j]
        _, i, j = max(pairs)
        group = [left[-i], left[-j]]
        left = [x for x in left if x not in group]
        while len(group) < size and left:
            nearest = max(left, key=lambda x: (sum(_between(x, y, similar) for y in group), [-leaf for leaf in x]))
            group.append(nearest)
            left.remove(nearest)
        groups.append(group)
    return groups


def _between(one: Group, other: Group, similar: Tensor) -> float:
    return float(similar[list(one)][:, list(other)].mean())
