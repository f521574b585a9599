"""Second moments of modules' inputs, E[x xᵀ], taken while a model reads passages."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait.calibration.passages import Passage, Reader
from plait.errors import PlanError

_BATCH_TOKENS = 4096


class InputMoments:
    """Σ x xᵀ over the tokens that enter modules, float32; modules that read one tensor (q, k and v) share one sum.

    Args:
        modules: path → module, all of one model.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = modules
        self._sums: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = defaultdict(int)
        self._source: dict[str, str] = {}  # path → path under which its sum is kept
        self._last: tuple[str, Any] = ("", None)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Take in the inputs of all modules while the block runs."""
        hooks = [m.register_forward_pre_hook(self._hook(path)) for path, m in self._modules.items()]
        try:
            yield
        finally:
            self._last = ("", None)
            for hook in hooks:
                hook.remove()

    def means(self) -> dict[str, Tensor]:
        """Return path → E[x xᵀ], (d_in, d_in) float32; modules that share inputs share the tensor."""
        means = {path: total / self._tokens[path] for path, total in self._sums.items()}
        return {path: means[source] for path, source in self._source.items()}

    def _hook(self, path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def take(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            (x, *_) = inputs
            first, seen = self._last
            source = self._source.setdefault(path, first if seen is x else path)
            if source != path and seen is x:
                return  # counted already
            if source != path:  # other modules were run in between: a tensor of the same values, of which nobody knows
                source = self._source[path] = path
            rows = _rows(module, x)
            if path in self._sums:
                self._sums[path].addmm_(rows.mT, rows)
            else:
                self._sums[path] = rows.mT @ rows
            self._tokens[path] += len(rows)
            self._last = (path, x)

        return take


def _rows(module: nn.Module, x: Tensor) -> Tensor:
    """Return a module's inputs as (tokens, d_in) float32: of a convolution its unfolded patches.

    Raises:
        PlanError: a convolution whose patches are not unfolded here.
    """
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return x.detach().reshape(-1, x.shape[-1]).float()
    if isinstance(module, nn.Conv3d) or module.groups > 1 or module.padding_mode != "zeros" or isinstance(module.padding, str):
        raise PlanError(
            f"the inputs of {module} cannot be collected; use a method that needs no second moments, or give files."
        )
    image, ones, zeros = (x.unsqueeze(2), (1,), (0,)) if isinstance(module, nn.Conv1d) else (x, (), ())
    patches = F.unfold(
        image.detach().float(),
        (*ones, *module.kernel_size),
        (*ones, *module.dilation),
        (*zeros, *module.padding),
        (*ones, *module.stride),
    )  # (batch, d_in, places)
    return patches.mT.reshape(-1, patches.shape[1])


def equal_lengths(passages: Sequence[Passage]) -> Iterator[list[Passage]]:
    """Yield batches of passages of equal lengths, of at most a few thousand tokens: nothing is padded."""
    groups: dict[tuple[int, int], list[Passage]] = defaultdict(list)
    for passage in passages:
        groups[len(passage.prompt), passage.tokens].append(passage)
    for (_, tokens), group in sorted(groups.items()):
        size = max(1, _BATCH_TOKENS // tokens)
        for at in range(0, len(group), size):
            yield group[at : at + size]


def take_moments(
    model: Any,
    modules: Mapping[str, nn.Module],
    passages: Sequence[Passage],
    *,
    head: bool = False,
    report: Callable[[int], object] = lambda done: None,
) -> dict[str, Tensor]:
    """Return path → E[x xᵀ] over all tokens of some passages, as a model that acts now reads them.

    Args:
        model: of transformers, with whatever acts on it.
        modules: path → module of the model.
        passages: read once each.
        head: whether the model answers by a classification head.
        report: called with the number of passages read since it was last called.
    """
    moments, reader = InputMoments(modules), Reader(model, head=head)
    with torch.inference_mode(), moments.watching():
        for batch in equal_lengths(passages):
            reader.read(batch)
            report(len(batch))
    return moments.means()
