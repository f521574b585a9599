"""One job in a fresh process, like `jobs.py`: the live mixture compared with PEFT and with dense deltas, on one model.

All of them compute the same loss, of the last position's logits, so that what differs is what they do to the layers.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from measuring import measured

LAMBDA = 0.3
Run = tuple[nn.Module, list[Tensor]]  # a causal model that is ready to run, and what is learned


def random_adapter(like: str, out: str) -> dict[str, Any]:
    """Write an adapter with the names, shapes and sizes of another, and random values."""
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(0)
    tensors = load_file(Path(like) / "adapter_model.safetensors")
    drawn = {n: (torch.randn(t.shape, generator=generator) * t.float().std()).to(t.dtype) for n, t in tensors.items()}
    Path(out).mkdir(parents=True, exist_ok=True)
    save_file(drawn, Path(out) / "adapter_model.safetensors")
    (Path(out) / "adapter_config.json").write_bytes((Path(like) / "adapter_config.json").read_bytes())
    return {}


def times(
    base: str, adapters: list[str], dtype: str, shape: tuple[int, int], rounds: int, variants: list[str]
) -> dict[str, Any]:
    """Time forward, and forward with backward, of all variants in turn, so that a busy moment hits them alike."""
    ids = _ids(*shape)
    found: dict[str, dict[str, list[tuple[float, float]]]] = {v: {"forward": [], "step": []} for v in variants}
    with ExitStack() as stack:
        runs = {v: stack.enter_context(VARIANTS[v](base, adapters, dtype)) for v in variants}
        for _ in range(rounds + 1):
            for variant, (model, learned) in runs.items():
                found[variant]["forward"].append(_timed(lambda m=model: _forward(m, ids)))
                found[variant]["step"].append(_timed(lambda m=model: _loss(m, ids).backward()))
                _forget(learned)
    return {v: {work: _fastest(pairs[1:]) for work, pairs in kinds.items()} for v, kinds in found.items()}


def memory(base: str, adapters: list[str], dtype: str, shape: tuple[int, int], variant: str) -> dict[str, Any]:
    """Return the peak of one variant: all of it on top of the libraries, and the steps alone on top of the loaded model."""
    import peft  # noqa: F401 (the baseline)
    import transformers.models.llama.modeling_llama  # noqa: F401 (from_pretrained would import it)

    import plait.mixture  # noqa: F401 (the baseline)

    ids = _ids(*shape)
    with measured() as everything, VARIANTS[variant](base, adapters, dtype) as (model, learned), measured() as work:
        for _ in range(2):
            _loss(model, ids).backward()
            _forget(learned)
    return {"all": asdict(everything), "work": asdict(work)}


def agreement(base: str, adapters: list[str], shape: tuple[int, int], variants: list[str]) -> dict[str, Any]:
    """Return how far the gradients to λ of some variants are from the mixture's, relative to its largest; in float32."""
    ids, found = _ids(*shape), {}
    for variant in ("mixture", *variants):
        with VARIANTS[variant](base, adapters, "float32") as (model, (values,)):
            _loss(model, ids).backward()
            found[variant] = values.grad.clone()
    ours = found.pop("mixture")
    return {variant: float((theirs - ours).abs().max() / ours.abs().max()) for variant, theirs in found.items()}


def switching(base: str, adapters: list[str]) -> dict[str, Any]:
    """Return the median seconds of exchanging coefficients, and of entering and leaving another set of adapters."""
    from plait.mixture import Mixture

    mixture = Mixture.load(base, _open(adapters))
    values = [torch.rand(len(adapters)) for _ in range(200)]
    exchanging, entering = [], []
    with mixture.mixed(values[0]):
        for value in values:
            exchanging.append(_timed(lambda v=value: mixture.set_coefficients(v))[0])
    for name in mixture.names * 20:
        start = time.perf_counter()
        with mixture.active({name: 1.0}):
            entering.append(time.perf_counter() - start)
    return {"exchange": statistics.median(exchanging), "enter": statistics.median(entering)}


def candidates(base: str, adapters: list[str], dtype: str, shape: tuple[int, int], rounds: int, count: int) -> dict[str, Any]:
    """Time `count` candidates in one pass, and in as many passes."""
    from plait.mixture import Mixture

    mixture, ids = Mixture.load(base, _open(adapters), dtype=dtype), _ids(*shape)
    values = torch.rand(count, len(adapters))
    repeated, rows = ids.repeat(count, 1), values.repeat_interleave(len(ids), 0)

    def together() -> None:
        with mixture.candidates(rows) as model:
            _forward(model, repeated)

    def apart() -> None:
        with mixture.mixed(values[0]) as model:
            for value in values:
                mixture.set_coefficients(value)
                _forward(model, ids)

    runs: dict[str, list[tuple[float, float]]] = {"together": [], "apart": []}
    for _ in range(rounds + 1):
        runs["together"].append(_timed(together))
        runs["apart"].append(_timed(apart))
    return {name: _fastest(pairs[1:]) for name, pairs in runs.items()}


@contextmanager
def _bare(base: str, adapters: list[str], dtype: str) -> Iterator[Run]:
    """No adapter; gradients reach the first layer's input, which is the least that learning anything costs."""
    model = _model(base, dtype)
    model.model.embed_tokens.register_forward_hook(lambda module, args, y: y.requires_grad_() if torch.is_grad_enabled() else y)
    yield model, []


@contextmanager
def _mixture(base: str, adapters: list[str], dtype: str) -> Iterator[Run]:
    from plait.mixture import Mixture

    mixture = Mixture(_model(base, dtype), _open(adapters))
    values = torch.full(mixture.axes.shape("layer"), LAMBDA, requires_grad=True)
    with mixture.mixed(values, "layer") as model:
        yield model, [values]


@contextmanager
def _learned(base: str, adapters: list[str], dtype: str) -> Iterator[Run]:
    """The factors of the adapters' sum, of their total rank, as `plait tune` learns them: in float32."""
    from plait.mixture import Mixture

    opened = _open(adapters)
    mixture = Mixture(_model(base, dtype), opened)
    factors = mixture.learned({path: _summed(opened, path) for path in opened[0].targets})
    with mixture.learning(factors) as model:
        yield model, factors.parameters()


def _summed(opened: Sequence[Any], path: str) -> list[Any]:
    from plait.adapters import LowRank

    parts = [a.read(path)[0].scaled(a.targets[path].scaling) for a in opened]
    return [LowRank.concatenate(parts, [LAMBDA] * len(parts))]


@contextmanager
def _peft(base: str, adapters: list[str], dtype: str, *, float32: bool = True) -> Iterator[Run]:
    """One active LoRA of the adapters' total rank, trained as PEFT trains: its factors are float32 by default."""
    from peft import LoraConfig, get_peft_model

    rank = sum(a.ranks[-1] for a in _open(adapters))
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(_model(base, dtype), config, autocast_adapter_dtype=float32).eval()
    yield model.get_base_model(), [p for p in model.parameters() if p.requires_grad]


@contextmanager
def _peft_same_dtype(base: str, adapters: list[str], dtype: str) -> Iterator[Run]:
    with _peft(base, adapters, dtype, float32=False) as run:
        yield run


@contextmanager
def _applied(base: str, adapters: list[str], dtype: str) -> Iterator[Run]:
    """W x + Σₜ λₜ ΔWₜ x, every dense ΔWₜ held in memory: one product of W's size per adapter."""
    model, opened, values = _with_coefficients(base, adapters, dtype)
    for path in opened[0].targets:
        module, layer = model.get_submodule(path), int(path.split(".")[2])
        deltas = [b @ a for a, b in _factors(opened, path, module.weight.dtype)]

        def add(
            module: nn.Module, args: tuple[Tensor, ...], y: Tensor, deltas: list[Tensor] = deltas, layer: int = layer
        ) -> Tensor:
            for value, delta in zip(values[layer].to(y.dtype), deltas, strict=True):
                y = y + value * F.linear(args[0], delta)
            return y

        module.register_forward_hook(add)
    yield model, [values]


@contextmanager
def _dense(base: str, adapters: list[str], dtype: str) -> Iterator[Run]:
    """W + Σₜ λₜ ΔWₜ in every call, every dense ΔWₜ held in memory."""
    with _merged_weights(base, adapters, dtype, _held) as run:
        yield run


@contextmanager
def _streamed(base: str, adapters: list[str], dtype: str) -> Iterator[Run]:
    """W + Σₜ λₜ ΔWₜ in every call, every dense ΔWₜ formed when it is needed, and again in the backward pass."""
    with _merged_weights(base, adapters, dtype, _formed) as run:
        yield run


Factors = list[tuple[Tensor, Tensor]]  # A and B of every adapter
Sum = Callable[[Tensor, Tensor], Tensor]  # W, λ (T,) → W + Σₜ λₜ ΔWₜ


@contextmanager
def _merged_weights(base: str, adapters: list[str], dtype: str, prepare: Callable[[Factors], Sum]) -> Iterator[Run]:
    model, opened, values = _with_coefficients(base, adapters, dtype)
    for path in opened[0].targets:
        module = model.get_submodule(path)
        merge = prepare(_factors(opened, path, module.weight.dtype))
        layer = int(path.split(".")[2])

        def cover(module: nn.Module, args: object, merge: Sum = merge, layer: int = layer) -> None:
            weight = module._parameters["weight"]
            module.__dict__["weight"] = merge(weight, values[layer])

        def uncover(module: nn.Module, args: object, output: object) -> None:
            del module.__dict__["weight"]

        module.register_forward_pre_hook(cover)
        module.register_forward_hook(uncover)
    yield model, [values]


def _with_coefficients(base: str, adapters: list[str], dtype: str) -> tuple[Any, list[Any], Tensor]:
    """Return the model, the adapters, and λ per layer."""
    model, opened = _model(base, dtype), _open(adapters)
    return model, opened, torch.full((len(model.model.layers), len(opened)), LAMBDA, requires_grad=True)


def _factors(opened: Sequence[Any], path: str, dtype: torch.dtype) -> Factors:
    scaled = [a.read(path)[0].scaled(a.targets[path].scaling).to(dtype) for a in opened]
    return [(s.a, s.b) for s in scaled]


def _held(factors: Factors) -> Sum:
    deltas = [b @ a for a, b in factors]

    def merge(weight: Tensor, values: Tensor) -> Tensor:
        for value, delta in zip(values.to(weight.dtype), deltas, strict=True):
            weight = weight + value * delta
        return weight

    return merge


def _formed(factors: Factors) -> Sum:
    def merge(weight: Tensor, values: Tensor) -> Tensor:
        merged: Tensor = _Streamed.apply(weight, values, factors)
        return merged

    return merge


class _Streamed(torch.autograd.Function):
    """∂λₜ = ⟨∂W, ΔWₜ⟩; nothing but λ is kept."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, values: Tensor, factors: Factors) -> Tensor:
        ctx.factors = factors
        merged = weight.clone()
        for value, (a, b) in zip(values.tolist(), factors, strict=True):
            merged.addmm_(b, a, alpha=value)
        return merged

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
        return None, torch.stack([(gradient * (b @ a)).sum(dtype=torch.float32) for a, b in ctx.factors]), None


VARIANTS: dict[str, Any] = {
    "base": _bare,
    "mixture": _mixture,
    "learned": _learned,
    "PEFT": _peft,
    "PEFT, the base's dtype": _peft_same_dtype,
    "applied": _applied,
    "dense": _dense,
    "streamed": _streamed,
}


def _model(base: str, dtype: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval().requires_grad_(requires_grad=False)


def _open(adapters: Sequence[str]) -> list[Any]:
    from plait.adapters import Adapter

    return [Adapter.open(Path(folder), Path(folder).name) for folder in adapters]


def _ids(batch: int, length: int) -> Tensor:
    return torch.randint(0, 40_000, (batch, length), generator=torch.Generator().manual_seed(0))


def _loss(model: Any, ids: Tensor) -> Tensor:
    hidden = model.model(ids, use_cache=False).last_hidden_state[:, -1].contiguous()
    loss: Tensor = model.lm_head(hidden).float().logsumexp(-1).mean()
    return loss


@torch.no_grad()
def _forward(model: Any, ids: Tensor) -> None:
    _loss(model, ids)


def _forget(learned: Sequence[Tensor]) -> None:
    for tensor in learned:
        tensor.grad = None


def _timed(work: Callable[[], object]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def _fastest(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    return {"wall": min(wall for wall, _ in pairs), "cpu": min(cpu for _, cpu in pairs)}


JOBS = {job.__name__: job for job in (random_adapter, times, memory, agreement, switching, candidates)}

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    job, arguments, result = sys.argv[1:]
    Path(result).write_text(json.dumps(JOBS[job](**json.loads(arguments))), encoding="utf-8")
