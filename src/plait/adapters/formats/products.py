"""Factors as programs for image models store them, and products of factors, as one pair A, B of PEFT's.

    LoRA   ΔW = B A                     lora_down, lora_up; with a kernel in lora_mid (LoCon) A is lora_mid times lora_down
    LoHa   ΔW = (W1a W1b) ⊙ (W2a W2b)   hada_w1_a, …; with hada_t1 and hada_t2 each factor has a kernel
    LoKr   ΔW = W1 ⊗ W2                 each whole or a product: lokr_w1, or lokr_w1_a and lokr_w1_b; a kernel in lokr_t2

An elementwise product of ranks r1 and r2 has rank r1 · r2 (its factors are the products of all pairs of columns, and of rows);
a Kronecker product of b columns and rank r has rank b · r. Sources: Hyeon-Woo et al. 2022, https://arxiv.org/abs/2108.06098,
proposition 1; Yeh et al. 2024, https://arxiv.org/abs/2309.14859, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from plait.adapters.formats.scalings import one_number
from plait.adapters.formats.views import View, same
from plait.adapters.layouts import Convolution, Linear
from plait.deferred import Tensor, torch
from plait.errors import listed
from plait.tensorfiles.reader import FLOATS, TensorFile

ALPHA = "alpha"
_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_KNOWN = {
    "lora_A", "lora_B", "lora_mid", "bias", "magnitude", *_LOHA, "hada_t1", "hada_t2",
    "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
}  # fmt: skip
#: What LyCORIS and kohya's scripts store besides, and what to do about it.
_REFUSED = {
    "dora_scale": "DoRA's magnitudes as LyCORIS has them, whose delta needs the base model's weights",
    "diff": "a full difference of weights, which has no low rank; plait extract makes an adapter of two models",
    "diff_b": "a full difference of a bias, which does not belong to a LoRA",
    "w_norm": "trained norms, which do not belong to a LoRA",
    "b_norm": "trained norms, which do not belong to a LoRA",
    "scalar": "a trained scalar of LyCORIS, which its own export multiplies in",
}


class Factored(NamedTuple):
    """One target module.

    Attributes:
        views: PEFT's name → tensor.
        scaling: s in ΔW = s · B A.
        method: what it was: `LoRA`, `LoCon`, `LoHa` or `LoKr`.
    """

    views: Mapping[str, View]
    scaling: float
    method: str


class _ReadFactors(NamedTuple):
    """A pair of factors that is computed: shapes on disk as PEFT has them, and how each is made, in float64."""

    shape_a: tuple[int, ...]
    shape_b: tuple[int, ...]
    make_a: Callable[[], Tensor]
    make_b: Callable[[], Tensor]
    dim: int | None  # that alpha is divided by; None where alpha counts for nothing


def factored(file: TensorFile, path: str, parts: Mapping[str, str], kernel: tuple[int, ...] | None = None) -> Factored:
    """Return the factors of one module.

    Args:
        file: of the tensors.
        path: of the module.
        parts: `lora_A`, `hada_w1_a`, `alpha`, … → tensor name.
        kernel: of the module, where its name gives it: () for a matrix, (3, 3), …; None where it does not.

    Raises:
        ValueError: they have no exact low rank, or shapes contradict each other; the text follows the module's name.
    """
    _check_parts(file, parts)
    alpha = one_number(file, parts[ALPHA]) if ALPHA in parts else None
    names = Linear.tensor_names(path)
    if any(part.startswith("hada_") for part in parts):
        _check_all_used(parts, "LoHa", {*_LOHA, "hada_t1", "hada_t2"})
        return _computed(file, path, parts, _loha(file, parts, kernel), alpha, "LoHa")
    if any(part.startswith("lokr_") for part in parts):
        first = {"lokr_w1"} if "lokr_w1" in parts else {"lokr_w1_a", "lokr_w1_b"}
        _check_all_used(parts, "LoKr", {*first, "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"})
        return _computed(file, path, parts, _lokr(file, parts, kernel), alpha, "LoKr")
    if lacking := [p for p in ("lora_A", "lora_B") if p not in parts]:
        raise ValueError(f"{' and '.join(lacking)} missing; found {', '.join(sorted(parts))}")
    if "lora_mid" in parts:
        _check_all_used(parts, "LoCon", {"lora_A", "lora_B", "lora_mid"})
        return _computed(file, path, parts, _locon(file, parts), alpha, "LoCon")
    views = {names.a: same(file, parts["lora_A"]), names.b: same(file, parts["lora_B"])}
    if "bias" in parts:
        views[names.bias] = same(file, parts["bias"])
    if "magnitude" in parts:
        views[names.magnitude] = same(file, parts["magnitude"])
    method = "LoCon" if len(views[names.a].shape) > 2 else "LoRA"
    return Factored(views, 1.0 if alpha is None else alpha / views[names.b].shape[1], method)


def _check_parts(file: TensorFile, parts: Mapping[str, str]) -> None:
    """Refuse parts of other methods, of other dtypes than floats, and of shapes that no factor has."""
    for part in sorted(parts):
        if part in _REFUSED:
            raise ValueError(f"{parts[part]!r} is {_REFUSED[part]}")
        if part != ALPHA and part not in _KNOWN:
            raise ValueError(f"{parts[part]!r} is not a part of a LoRA, LoHa or LoKr")
    for part in sorted(parts.keys() - {ALPHA}):
        info = file.tensors[parts[part]]
        if info.dtype not in FLOATS:
            raise ValueError(f"{parts[part]!r} is stored as {info.dtype}; factors are {', '.join(FLOATS)}")
        if 0 in info.shape:
            raise ValueError(f"{parts[part]!r} is {list(info.shape)}, without a value")
        if len(info.shape) < 2 and part not in ("bias", "magnitude"):
            raise ValueError(f"{parts[part]!r} is {list(info.shape)}; a factor has two dimensions or more")


def _check_all_used(parts: Mapping[str, str], method: str, used: Collection[str]) -> None:
    """Refuse parts that the delta of a method does not have: they would be lost without a word."""
    if others := sorted(parts.keys() - {*used, ALPHA}):
        besides = listed((repr(parts[part]) for part in others), 3)
        raise ValueError(f"is {method}, and {besides} besides has no part in that. Take out what does not count")


def _computed(
    file: TensorFile, path: str, parts: Mapping[str, str], product: _ReadFactors, alpha: float | None, method: str
) -> Factored:
    """Return computed factors: float32, or float64 where the file's own are."""
    stored = {file.tensors[name].dtype for part, name in parts.items() if part != ALPHA}
    dtype = "F64" if "F64" in stored else "F32"
    to = torch.float64 if dtype == "F64" else torch.float32
    layout = Convolution if len(product.shape_a) > 2 else Linear
    names = layout.tensor_names(path)
    views = {
        names.a: View(product.shape_a, dtype, lambda: product.make_a().to(to)),
        names.b: View(product.shape_b, dtype, lambda: product.make_b().to(to)),
    }
    return Factored(views, 1.0 if alpha is None or product.dim is None else alpha / product.dim, method)


def _locon(file: TensorFile, parts: Mapping[str, str]) -> _ReadFactors:
    a, mid, b = (file.tensors[parts[p]].shape for p in ("lora_A", "lora_mid", "lora_B"))
    if len(mid) < 3 or mid[:2] != (b[1], a[0]) or math.prod(a[2:]) != 1 or math.prod(b[2:]) != 1:
        raise ValueError(f"lora_down is {list(a)}, lora_mid {list(mid)} and lora_up {list(b)}; they do not fit each other")

    def make_a() -> Tensor:
        down, kernel = (_double(file, parts[p]) for p in ("lora_A", "lora_mid"))
        return torch.einsum("pq...,qi->pi...", kernel, down.flatten(1))

    return _ReadFactors((b[1], a[1], *mid[2:]), b, make_a, lambda: _double(file, parts["lora_B"]), b[1])


def _loha(file: TensorFile, parts: Mapping[str, str], kernel: tuple[int, ...] | None) -> _ReadFactors:
    if lacking := [p for p in _LOHA if p not in parts]:
        raise ValueError(f"{' and '.join(lacking)} missing; found {', '.join(sorted(parts))}")
    a1, b1, a2, b2 = (file.tensors[parts[p]].shape for p in _LOHA)
    if any(len(shape) != 2 for shape in (a1, b1, a2, b2)):
        raise ValueError("factors of LoHa are matrices")
    tucker = [p for p in ("hada_t1", "hada_t2") if p in parts]
    if len(tucker) == 1:
        raise ValueError(f"has {tucker[0]} alone; LoHa of a convolution has both kernels or none")
    if tucker:
        return _loha_with_kernels(file, parts)
    ranks = a1[1], a2[1]
    if (b1[0], b2[0]) != ranks or a1[0] != a2[0] or b1[1] != b2[1]:
        raise ValueError(f"its factors are {list(a1)}, {list(b1)}, {list(a2)} and {list(b2)}; they do not fit each other")
    size = _kernel(kernel, b1[1])
    inputs = b1[1] // math.prod(size), *size
    shape_b = (a1[0], ranks[0] * ranks[1], *(1 for _ in size))
    return _ReadFactors(
        (ranks[0] * ranks[1], *inputs),
        shape_b,
        lambda: _row_pairs(_double(file, parts["hada_w1_b"]), _double(file, parts["hada_w2_b"])).reshape(-1, *inputs),
        lambda: _row_pairs(_double(file, parts["hada_w1_a"]).mT, _double(file, parts["hada_w2_a"]).mT).mT.reshape(shape_b),
        b1[0],
    )


def _loha_with_kernels(file: TensorFile, parts: Mapping[str, str]) -> _ReadFactors:
    """LoHa with Tucker kernels: factor i is W[p, q, …] = Σ w_a[m, p] t[m, n, …] w_b[n, q], (d_out, d_in, *kernel)."""
    t1, t2, a1, b1, a2, b2 = (file.tensors[parts[p]].shape for p in ("hada_t1", "hada_t2", *_LOHA))
    fits = all(len(t) > 2 and t[:2] == (a[0], b[0]) for t, a, b in ((t1, a1, b1), (t2, a2, b2)))
    if not fits or t1[2:] != t2[2:] or a1[1] != a2[1] or b1[1] != b2[1]:
        raise ValueError("kernels and factors of its LoHa do not fit each other")
    rank, kernel = a1[0] * a2[0], t1[2:]

    def make_a() -> Tensor:
        inner = [
            torch.einsum("mn...,nq->mq...", _double(file, parts[f"hada_t{i}"]), _double(file, parts[f"hada_w{i}_b"]))
            for i in (1, 2)
        ]
        return _row_pairs(inner[0].flatten(1), inner[1].flatten(1)).reshape(rank, b1[1], *kernel)

    def make_b() -> Tensor:
        return _row_pairs(_double(file, parts["hada_w1_a"]), _double(file, parts["hada_w2_a"])).mT

    return _ReadFactors((rank, b1[1], *kernel), (a1[1], rank, *(1 for _ in kernel)), make_a, make_b, b1[0])


def _lokr(file: TensorFile, parts: Mapping[str, str], kernel: tuple[int, ...] | None) -> _ReadFactors:
    """LoKr: W1 ⊗ W2 = (W1 ⊗ W2a)(I ⊗ W2b), or (W1a ⊗ W2a)(W1b ⊗ W2b), whichever its parts give."""
    if "lokr_w2" in parts or not {"lokr_w2_a", "lokr_w2_b"} <= parts.keys():
        raise ValueError(
            "is a LoKr whose second factor is a full matrix, so that its delta has full rank. Add it to its base model with "
            "its own program, and make an adapter of the two models with plait extract"
        )
    shapes = {p: file.tensors[n].shape for p, n in parts.items()}
    first = ("lokr_w1",) if "lokr_w1" in parts else ("lokr_w1_a", "lokr_w1_b")
    if lacking := [p for p in first if p not in parts]:
        raise ValueError(f"{' and '.join(lacking)} missing; found {', '.join(sorted(parts))}")
    a2, b2, t2 = shapes["lokr_w2_a"], shapes["lokr_w2_b"], shapes.get("lokr_t2")
    matrices = [shapes[p] for p in first] + ([a2, b2] if t2 is not None else [a2])
    if any(len(shape) != 2 for shape in matrices) or (len(first) == 2 and shapes[first[0]][1] != shapes[first[1]][0]):
        raise ValueError("factors of its LoKr do not fit each other")
    if t2 is not None:
        # W2[p, q, …] = Σ w2_a[m, p] t[m, n, …] w2_b[n, q]
        if len(t2) < 3 or t2[:2] != (a2[0], b2[0]):
            raise ValueError("kernel and factors of its LoKr do not fit each other")
        rows, rank, inputs, size = a2[1], a2[0], b2[1], t2[2:]
    elif len(a2) == len(b2) == 2 and a2[1] == b2[0]:
        size = _kernel(kernel, b2[1])
        rows, rank, inputs = a2[0], a2[1], b2[1] // math.prod(size)
    else:
        raise ValueError("factors of its LoKr do not fit each other")
    outer_rows, outer_columns = shapes[first[0]][0], shapes[first[-1]][1]
    inner = outer_columns if len(first) == 1 else shapes[first[0]][1]

    def second() -> tuple[Tensor, Tensor]:
        left, right = _double(file, parts["lokr_w2_a"]), _double(file, parts["lokr_w2_b"])
        if t2 is not None:
            return left.mT.contiguous(), torch.einsum("mn...,nq->mq...", _double(file, parts["lokr_t2"]), right).flatten(1)
        return left, right.flatten(1)

    def make_b() -> Tensor:
        left = _double(file, parts[first[0]])
        return torch.kron(left, second()[0]).reshape(outer_rows * rows, inner * rank, *(1 for _ in size))

    def make_a() -> Tensor:
        right = torch.eye(outer_columns, dtype=torch.float64) if len(first) == 1 else _double(file, parts[first[1]])
        # columns of the Kronecker product are (outer, inner); those of a kernel stay behind them
        made = torch.einsum("ab,rqk->arbqk", right, second()[1].reshape(rank, inputs, -1))
        return made.reshape(inner * rank, outer_columns * inputs, *size)

    return _ReadFactors(
        (inner * rank, outer_columns * inputs, *size),
        (outer_rows * rows, inner * rank, *(1 for _ in size)),
        make_a,
        make_b,
        rank,
    )


def _kernel(kernel: tuple[int, ...] | None, columns: int) -> tuple[int, ...]:
    """Return the kernel of a module whose product is stored as matrices."""
    if kernel is None:
        raise ValueError("is a product of matrices, and its name does not tell whether the module is a convolution")
    if columns % math.prod(kernel):
        raise ValueError(f"has {columns} columns, which a kernel of {list(kernel)} does not divide")
    return kernel


def _row_pairs(one: Tensor, two: Tensor) -> Tensor:
    """Return the elementwise products of every row of one matrix with every row of another, (m · n, columns)."""
    return (one.unsqueeze(1) * two.unsqueeze(0)).flatten(0, 1)


def _double(file: TensorFile, name: str) -> Tensor:
    return file.read(name).double()
