"""Second moments of modules' inputs, E[x xᵀ], taken while a model reads passages."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch.nn.functional as F

from plait.calibration.passages import Passage, Reader
from plait.deferred import Tensor, torch
from plait.errors import PlanError
from plait.evaluation.packing import MOST_NODES
from plait.linalg.inputs import InputRows, add_outer_products, mirror_lower

_BATCH_TOKENS = 4096
_BATCH_MEDIA = 8  # images or sounds read at a time
MOST_ROWS = 2048  # inputs that are kept of a module; up to this width their sum of x xᵀ is, over all tokens
_GOLDEN = (5**0.5 - 1) / 2  # multiples of it modulo 1 are spread evenly, and in step with no length of texts


class InputMoments:
    """E[x xᵀ] of what enters modules; modules that read one tensor (q, k and v) share one.

    Of a width d ≤ `most_rows` it is the sum of x xᵀ over the tokens, in float32, once there are d of them. Before that, and for
    larger d, the inputs themselves are kept, in their own dtype: all of them, or `most_rows` spread evenly over the tokens.

    Args:
        modules: path → module, all of one model.
        most_rows: inputs kept per module.
        seed: of the choice of tokens.
        shares: path → share of the tokens that are looked at, evenly spread; the others are not summed either. All of a module
            that is not named.
    """

    def __init__(
        self,
        modules: Mapping[str, torch.nn.Module],
        *,
        most_rows: int = MOST_ROWS,
        seed: int = 0,
        shares: Mapping[str, float] | None = None,
    ) -> None:
        self._modules = modules
        self._most = most_rows
        self._offset = random.Random(f"tokens {seed}").random()
        self._shares = shares or {}
        self._taken: dict[str, _ModuleInputs] = {}
        self._source: dict[str, str] = {}  # path → path under which its inputs are kept
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

    def found(self) -> dict[str, Tensor | InputRows]:
        """Return path → E[x xᵀ], (d_in, d_in) float32 or `InputRows`, on the processor; modules that share inputs share it."""
        means = {path: taken.mean() for path, taken in self._taken.items()}
        return {path: means[source] for path, source in self._source.items()}

    @property
    def sampled(self) -> dict[str, tuple[int, int]]:
        """Path → (tokens kept, tokens seen), of modules that keep some only."""
        counts = {path: (taken.kept, taken.seen) for path, taken in self._taken.items()}
        return {path: counts[source] for path, source in self._source.items() if counts[source][0] < counts[source][1]}

    @property
    def seen(self) -> int:
        """Tokens, patches or moments of sounds that the module with most of them was given."""
        return max((taken.seen for taken in self._taken.values()), default=0)

    def _hook(self, path: str) -> Callable[[torch.nn.Module, tuple[Any, ...]], None]:
        def take(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
            (x, *_) = inputs
            first, seen = self._last
            source = self._source.setdefault(path, first if seen is x else path)
            if source != path and seen is x:
                return  # counted already
            if source != path:  # other modules were run in between: a tensor of the same values, which cannot be seen
                source = self._source[path] = path
            if path not in self._taken:
                self._taken[path] = _ModuleInputs(self._most, self._offset, self._shares.get(path, 1.0))
            self._taken[path].take(_rows(module, x))
            self._last = (path, x)

        return take


class _ModuleInputs:
    """The inputs of one module so far: rows, or their sum of x xᵀ."""

    def __init__(self, most: int, offset: float, share: float) -> None:
        self._most = most
        self._offset = offset
        self._total: Tensor | None = None
        self._rows: list[Tensor] = []
        self._keys: list[Tensor] = []
        self._below = share  # keys of tokens that are kept; every key is below 1
        self.seen = self._held = self._summed = 0

    @property
    def kept(self) -> int:
        return self._summed + min(self._held, self._most)

    def take(self, x: Tensor) -> None:
        """Take in (tokens, d)."""
        start, self.seen, width = self.seen, self.seen + len(x), x.shape[1]
        if width <= self._most:
            # a copy: the activation is freed
            self._rows.append(x.clone() if self._below >= 1 else x[(self._key(start) < self._below).to(x.device)])
            x = self._rows[-1]
            self._held += len(x)
            if self._held >= width:
                self._fold()
            return
        keys = self._key(start)
        chosen = keys < self._below
        self._rows.append(x[chosen.to(x.device)].cpu())  # a copy, as well
        self._keys.append(keys[chosen])
        self._held += len(self._keys[-1])
        if self._held > self._most + self._most // 2:
            self._prune()

    def _key(self, start: int) -> Tensor:
        """Return the keys in [0, 1) of the tokens from one on that were seen last; the very first is kept always."""
        keys = (torch.arange(start, self.seen, dtype=torch.float64) * _GOLDEN + self._offset) % 1
        keys[: start == 0] = 0
        return keys

    def _fold(self) -> None:
        """Add the rows to Σ x xᵀ, many at once."""
        x = torch.cat(self._rows).float()
        self._rows, self._held, self._summed = [], 0, self._summed + len(x)
        width = x.shape[1]
        if self._total is None:
            self._total = x.new_zeros(width, width)
        add_outer_products(self._total, x)

    def _prune(self) -> None:
        """Keep the tokens with the smallest keys."""
        keys = torch.cat(self._keys)
        if len(keys) > self._most:
            self._below = float(keys.kthvalue(self._most + 1).values)
        chosen = keys < self._below
        self._rows, self._keys = [torch.cat(self._rows)[chosen]], [keys[chosen]]
        self._held = len(self._keys[0])

    def mean(self) -> Tensor | InputRows:
        if self._total is not None:
            with torch.inference_mode():  # as the sum was begun
                if self._rows:
                    self._fold()
                mirror_lower(self._total)
            return (self._total / self._summed).cpu()
        if self._keys:
            self._prune()
        return InputRows(torch.cat(self._rows).cpu())


def _rows(module: torch.nn.Module, x: Tensor) -> Tensor:
    """Return a module's inputs as (tokens, d_in), float32 or narrower: of a convolution its unfolded patches.

    Raises:
        PlanError: a convolution whose patches are not unfolded here.
    """
    if not isinstance(module, torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.Conv3d):
        x = x.detach().reshape(-1, x.shape[-1])
        return x.float() if x.dtype == torch.float64 else x
    # the patches themselves, as models cut them that see images and videos (Qwen2-VL)
    are_patches = isinstance(module, torch.nn.Conv3d) and x.shape[2:] == module.kernel_size and not any(module.padding)
    if are_patches and module.groups == 1:
        return x.detach().float().flatten(1)
    if (
        isinstance(module, torch.nn.Conv3d)
        or module.groups > 1
        or module.padding_mode != "zeros"
        or isinstance(module.padding, str)
    ):
        raise PlanError(
            f"the inputs of {module} cannot be collected; use a method that needs no second moments, or give files."
        )
    image, ones, zeros = (x.unsqueeze(2), (1,), (0,)) if isinstance(module, torch.nn.Conv1d) else (x, (), ())
    patches = F.unfold(
        image.detach().float(),
        (*ones, *module.kernel_size),
        (*ones, *module.dilation),
        (*zeros, *module.padding),
        (*ones, *module.stride),
    )  # (batch, d_in, places)
    return patches.mT.reshape(-1, patches.shape[1])


def without_padding(reader: Reader, passages: Sequence[Passage]) -> Iterator[list[Passage]]:
    """Yield batches in which nothing is padded: of equal lengths, up to a few thousand tokens; small ones of several lengths
    together, where the model reads such in one row.
    """
    groups: dict[tuple[str, int, int], list[Passage]] = defaultdict(list)
    for passage in passages:
        groups[passage.form, len(passage.prompt), passage.tokens].append(passage)
    joins = len(groups) > 1 and reader.reads_in_one_row(passages)
    row: list[Passage] = []
    for (form, _, tokens), group in sorted(groups.items()):
        if joins and len(group) * tokens <= MOST_NODES:
            if row and sum(p.tokens for p in row) + len(group) * tokens > MOST_NODES:
                yield row
                row = []
            row += group
            continue
        size = max(1, _BATCH_TOKENS // max(1, tokens))
        size = min(size, _BATCH_MEDIA) if form else size
        for at in range(0, len(group), size):
            yield group[at : at + size]
    if row:
        yield row


def take_moments(
    model: Any,
    modules: Mapping[str, torch.nn.Module],
    passages: Sequence[Passage],
    *,
    head: bool = False,
    most_rows: int = MOST_ROWS,
    seed: int = 0,
    report: Callable[[int], object] = lambda done: None,
    until: Sequence[torch.nn.Module] = (),
) -> InputMoments:
    """Return the second moments of modules' inputs over the tokens of some passages, as a model that acts now reads them.

    Of many tokens, twice `most_rows` are looked at, evenly spread: sums over all of them would cost as much as the model. Of
    patches and moments of sounds no more than that, since their number is estimated from the largest passage.

    Args:
        model: of transformers, with whatever acts on it.
        modules: path → module of the model.
        passages: read once each.
        head: whether the model answers by a classification head.
        most_rows: inputs kept per module.
        seed: of the choice of tokens.
        report: called with the number of passages read since it was last called.
        until: every passage is read up to the first of these modules.
    """
    reader = Reader(model, head=head)
    if all(p.perceived is None for p in passages):
        shares = dict.fromkeys(modules, min(1.0, 2 * most_rows / sum(p.tokens for p in passages)))
    else:
        rows = _rows_of_largest(reader, modules, passages, until)
        shares = {path: min(1.0, 2 * most_rows / (count * len(passages))) for path, count in rows.items()}
    moments = InputMoments(modules, most_rows=most_rows, seed=seed, shares=shares)
    batches = list(without_padding(reader, passages))  # what it tries is not looked at
    with torch.inference_mode(), moments.watching(), _ending_at(until):
        for batch in batches:
            with suppress(_Reached):
                reader.read(batch)
            report(len(batch))
    return moments


def _rows_of_largest(
    reader: Reader, modules: Mapping[str, torch.nn.Module], passages: Sequence[Passage], until: Sequence[torch.nn.Module]
) -> dict[str, int]:
    """Return how many inputs each module gets of the largest passage: encoder and decoder, and convolutions, get different
    numbers, which only the model knows.
    """
    counts: dict[str, int] = defaultdict(int)

    def count(path: str, module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        counts[path] += len(_rows(module, inputs[0]))

    hooks = [m.register_forward_pre_hook(partial(count, path)) for path, m in modules.items()]
    try:
        with torch.inference_mode(), _ending_at(until), suppress(_Reached):
            reader.read([max(passages, key=lambda p: p.size)])
    finally:
        for hook in hooks:
            hook.remove()
    return {path: n for path, n in counts.items() if n}


class _Reached(Exception):
    """A module was reached at which reading ends."""


@contextmanager
def _ending_at(modules: Sequence[torch.nn.Module]) -> Iterator[None]:
    """End a forward pass at the first of some modules, by `_Reached`."""

    def end(*_: object) -> None:
        raise _Reached

    hooks = [m.register_forward_pre_hook(end) for m in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
