"""One job in a fresh process: `python bench/jobs.py JOB ARGUMENTS RESULT`, both of them JSON, the latter a file to write.

Every job imports torch first and measures what comes on top of it.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from measuring import measured
from spectra import merge_growing, merge_once

SHORT = 5.0  # seconds; what takes less is repeated
WEIGHTS_FILE = "adapter_model.safetensors"


def make(layers: int, cache: str, base: bool) -> dict[str, Any]:  # noqa: FBT001 (called with JSON)
    """Make the adapters and, where wanted, the base model."""
    import synthetic

    materials = synthetic.locate(Path(cache), layers)
    synthetic.make(materials, base=base)
    synthetic.warm(materials)
    return {}


def plait_merge(adapters: list[str], out: str, settings: dict[str, Any], repeat: int = 1) -> dict[str, Any]:
    """Merge with plait; `busy` is the CPU time of the quickest of `repeat` merges, without what only a first one imports."""
    import torch  # noqa: F401 (the baseline)

    with measured() as everything:
        import plait
        import plait.api.files

        with measured() as work:
            result = plait.merge(dict(zip("ab", adapters, strict=True)), out=out, force=True, **settings)
    busy = [work.cpu_seconds]
    for _ in range(repeat - 1):
        start = time.process_time()
        plait.merge(dict(zip("ab", adapters, strict=True)), out=out, force=True, **settings)
        busy.append(time.process_time() - start)
    return {
        "all": asdict(everything),
        "work": asdict(work),
        "busy": min(busy),
        "rank": result.record.rank,
        "kept": result.record.kept,
    }


def peft_merge(base: str, adapters: list[str], out: str) -> dict[str, Any]:
    """Merge exactly with PEFT, as its documentation does: load the base, load the adapters, `cat`, save."""
    import torch

    with measured() as everything:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM
        from transformers.models.qwen3 import modeling_qwen3  # noqa: F401 (from_pretrained would import it)

        with measured() as work:
            model = PeftModel.from_pretrained(
                AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), adapters[0], adapter_name="a"
            )
            model.load_adapter(adapters[1], "b")
            model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "merged", combination_type="cat")
            model.save_pretrained(out, selected_adapters=["merged"])
    return {"all": asdict(everything), "work": asdict(work)}


def peft_modules(
    adapters: list[str], out: str, modules: list[str], combination_type: str, rank: int, density: float | None
) -> dict[str, Any]:
    """Time PEFT's dense combinations on one-layer models, a module of layer 0 at a time, and keep what they make."""
    import torch
    from safetensors.torch import save_file

    seconds, cpu_seconds, tensors = {}, {}, {}
    for module in modules:
        factors = [_factors(a, module) for a in adapters]
        model = _one_linear(factors)
        runs: list[float] = []
        busy = time.process_time()
        while not runs or (runs[0] < SHORT and len(runs) < 3):
            model.delete_adapter("merged") if runs else None
            start = time.perf_counter()
            model.add_weighted_adapter(
                ["a", "b"], [1.0, 1.0], "merged", combination_type=combination_type, svd_rank=rank, density=density
            )
            runs.append(time.perf_counter() - start)
        seconds[module] = statistics.median(runs)
        cpu_seconds[module] = (time.process_time() - busy) / len(runs)
        layer = model.base_model.model.linear
        for part, held in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            tensors[f"{_path(module)}.{part}.weight"] = held["merged"].weight.detach().to(torch.float32).contiguous()
    Path(out).mkdir(parents=True, exist_ok=True)
    save_file(tensors, Path(out) / WEIGHTS_FILE)
    return {"seconds": seconds, "cpu_seconds": cpu_seconds}


def make_module(folder: str, module: str, shape: tuple[int, int]) -> dict[str, Any]:
    """Make two adapters of one module."""
    import synthetic

    return {"adapters": [str(p) for p in synthetic.make_module(Path(folder), module, (shape[0], shape[1]))]}


def energies(folders: list[str], module: str) -> dict[str, Any]:
    """Return the squared norm of every adapter's delta of a module of layer 0."""
    return {"energies": [float(_dense(folder, module).square().sum()) for folder in folders]}


def compare(left: str, right: str, modules: list[str]) -> dict[str, Any]:
    """Return the largest relative difference between the deltas of two adapters over some modules of layer 0."""
    return {"difference": max(_relative(_dense(left, m) - _dense(right, m), _dense(right, m)) for m in modules)}


def sum_errors(adapters: list[str], weight: float, results: dict[str, str], modules: list[str]) -> dict[str, Any]:
    """Return, per result and module, how far it is from the exact weighted sum in float64: ‖M − BA‖ / ‖M‖."""
    errors: dict[str, list[float]] = {name: [] for name in results}
    for module in modules:
        exact = weight * sum(_dense(folder, module) for folder in adapters)
        for name, folder in results.items():
            errors[name].append(_relative(exact - _dense(folder, module), exact))
    return {"errors": errors}


def ties_errors(
    adapters: list[str], out: str, settings: dict[str, Any], ranks: list[int], modules: list[str]
) -> dict[str, Any]:
    """Return plait's truncation error over the dense SVD's, per rank and module, both on plait's own dense TIES result."""
    import torch
    from safetensors import safe_open

    import plait

    sources = dict(zip("ab", adapters, strict=True))
    dense = plait.merge(sources, out=Path(out) / "dense", force=True, kind="delta", **settings).folder
    for rank in ranks:
        plait.merge(sources, out=Path(out) / f"r{rank}", force=True, rank=rank, **settings)
    ratios: dict[str, list[float]] = {str(rank): [] for rank in ranks}
    file = next(dense.glob("*.safetensors"))
    with safe_open(file, framework="pt") as tensors:
        for module in modules:
            name = next(n for n in tensors.keys() if module in n)  # noqa: SIM118 (no mapping)
            matrix = tensors.get_tensor(name).double()
            s = torch.linalg.svdvals(matrix).square()
            for rank in ranks:
                best = float((s[rank:].sum() / s.sum()).sqrt())
                ours = _relative(matrix - _dense(str(Path(out) / f"r{rank}"), module), matrix)
                ratios[str(rank)].append(ours / best)
    return {"ratios": ratios}


def make_sharded(layers: int, cache: str) -> dict[str, Any]:
    """Make the adapters, and the base model in several files."""
    import synthetic

    materials = synthetic.locate(Path(cache), layers)
    synthetic.make(materials, base=False)
    folder = synthetic.make_sharded_base(Path(cache), layers)
    synthetic.warm(synthetic.Materials(layers, folder, materials.adapters))
    return {"base": str(folder), "bytes": sum(p.stat().st_size for p in folder.iterdir())}


def lay_out_as_fetched(base: str) -> dict[str, Any]:
    """Lay a base out as the Hub's cache does: files under the name of their sha256, and links to them."""
    import hashlib

    source = Path(base)
    home = source.with_name(f"{source.name}-fetched")
    folder = home / "snapshots" / "fetched"
    folder.mkdir(parents=True, exist_ok=True)
    (home / "blobs").mkdir(exist_ok=True)
    for path in source.iterdir():
        with path.open("rb") as file:
            blob = home / "blobs" / hashlib.file_digest(file, "sha256").hexdigest()
        for link, target in ((blob, path), (folder / path.name, blob)):
            link.unlink(missing_ok=True)
            link.symlink_to(target) if link != blob else link.hardlink_to(target)
    return {"base": str(folder)}


def copy(base: str, out: str) -> dict[str, Any]:
    """Copy a folder as `cp -r` does, and then flush it to disk."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", base, out], check=True)
    seconds = time.perf_counter() - start
    for path in Path(out).iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return {"seconds": seconds, "flushed": time.perf_counter() - start}


def plait_bake(base: str, adapters: list[str], out: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Bake with plait."""
    import torch  # noqa: F401 (the baseline)

    with measured() as everything:
        import plait
        import plait.api.files

        with measured() as work:
            result = plait.bake(dict(zip("ab", adapters, strict=True)), base=base, out=out, **settings)
    changed = result.record.bytes_changed
    return {"all": asdict(everything), "work": asdict(work), "changed": changed, "total": result.plan.output_bytes}


def peft_bake(base: str, adapters: list[str], out: str, max_shard_size: str) -> dict[str, Any]:
    """Bake with PEFT, as its documentation does: load, merge_and_unload, save."""
    import torch

    with measured() as everything:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM
        from transformers.models.qwen3 import modeling_qwen3  # noqa: F401 (from_pretrained would import it)

        with measured() as work:
            model = PeftModel.from_pretrained(
                AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), adapters[0], adapter_name="a"
            )
            model.load_adapter(adapters[1], "b")
            merged = model.merge_and_unload(adapter_names=["a", "b"])
            merged.save_pretrained(out, max_shard_size=max_shard_size)
    return {"all": asdict(everything), "work": asdict(work)}


def bake_arithmetic(adapters: list[str], layers: int, workers: int) -> dict[str, Any]:
    """Time what a bake computes, on data in memory: bfloat16 blocks to float32, both deltas added, rounded once."""
    from concurrent.futures import ThreadPoolExecutor

    import torch

    import plait
    import synthetic
    from plait.baking.deltas import add_rows
    from plait.tensorfiles.blocks import tensor_block_ranges

    opened = [plait.Adapter.open(Path(a), n) for a, n in zip(adapters, "ab", strict=True)]

    def one(target: str, shape: tuple[int, int]) -> None:
        delta = plait.LowRank.concatenate([a.read(target)[0] for a in opened], [1.0, 1.0])
        weight = torch.ones(shape, dtype=torch.bfloat16)
        for i, j in tensor_block_ranges(*shape):
            block = weight[i:j].float()
            add_rows(delta, block, i, transposed=False)
            block.to(torch.bfloat16)

    start = time.perf_counter()
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for done in [pool.submit(one, *t) for t in synthetic.targets(layers)]:
            done.result()
    return {"seconds": time.perf_counter() - start}


def bake_floor(base: str, adapters: list[str], out: str) -> dict[str, Any]:
    """Do with as little as possible what a bake does: the same products, rounding and hashes, one file after another.

    Buffers are made once, nothing is planned or checked, and adapters and names are taken to be as `synthetic` makes them.
    """
    import hashlib

    import torch

    import plait
    from plait.tensorfiles.reader import SafetensorsFile

    torch.set_num_threads(1)
    start, cpu = time.perf_counter(), time.process_time()
    opened = [plait.Adapter.open(Path(a), n) for a, n in zip(adapters, "ab", strict=True)]
    for adapter in opened:
        with adapter.file.path.open("rb") as file:
            hashlib.file_digest(file, "sha256")
    read, wide, rounded = (torch.empty(1 << 20, dtype=d) for d in (torch.bfloat16, torch.float32, torch.bfloat16))
    chunk = memoryview(bytearray(1 << 18))
    Path(out).mkdir()
    for path in sorted(Path(base).glob("*.safetensors")):
        with path.open("rb") as file:
            hashlib.file_digest(file, "sha256")
        digest, tensors = hashlib.sha256(), SafetensorsFile(path).tensors
        source, target = os.open(path, os.O_RDONLY), os.open(Path(out, path.name), os.O_RDWR | os.O_CREAT)
        os.posix_fallocate(target, 0, path.stat().st_size)
        position = min(i.start for i in tensors.values())
        os.copy_file_range(source, target, position, 0, 0)
        digest.update(os.pread(target, position, 0))
        for name, info in sorted(tensors.items(), key=lambda item: item[1].start):
            module = name.removesuffix(".weight")
            if module not in opened[0].targets:
                _copied(source, target, info.start, info.nbytes, digest, chunk)
                continue
            delta = plait.LowRank.concatenate([a.read(module)[0] for a in opened], [1.0, 1.0])
            rows, columns = info.shape
            step = (1 << 20) // columns
            for i in range(0, rows, step):
                j = min(rows, i + step)
                size, at = (j - i) * columns, info.start + i * columns * 2
                os.preadv(source, [memoryview(read[:size].view(torch.uint8).numpy().data)], at)
                block = wide[:size].copy_(read[:size]).view(-1, columns)
                block.addmm_(delta.b[i:j], delta.a)
                made = memoryview(rounded[:size].copy_(block.view(-1)).view(torch.uint8).numpy().data)
                digest.update(made)
                os.pwrite(target, made, at)
        os.fsync(target)
        os.close(source)
        os.close(target)
    return {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}


def _copied(source: int, target: int, start: int, count: int, digest: Any, chunk: memoryview) -> None:
    """Copy a range from one file to the same place of another, and hash it."""
    end = start + count
    while start < end:
        done = os.copy_file_range(source, target, min(1 << 25, end - start), start, start)
        for at in range(start, start + done, len(chunk)):
            digest.update(chunk[: os.preadv(target, [chunk[: start + done - at]], at)])
        start += done


def bake_hashes(folders: list[str], workers: int) -> dict[str, Any]:
    """Time the sha256 of all files, on several threads."""
    import hashlib
    from concurrent.futures import ThreadPoolExecutor

    def one(path: Path) -> None:
        with path.open("rb") as file:
            hashlib.file_digest(file, "sha256")

    start = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, [p for f in folders for p in sorted(Path(f).glob("*.safetensors"))]))
    return {"seconds": time.perf_counter() - start}


def compare_models(left: str, right: str) -> dict[str, Any]:
    """Return how far two bakes are apart: ‖L − R‖ / ‖R‖ over all tensors, and the share of equal values."""
    from safetensors import safe_open

    def where(folder: str) -> dict[str, Path]:
        found = {}
        for path in Path(folder).glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                found |= dict.fromkeys(file.keys(), path)
        return found

    one, two = where(left), where(right)
    apart = norm = equal = count = 0.0
    for name in one.keys() & two.keys():
        with safe_open(one[name], "pt") as a, safe_open(two[name], "pt") as b:
            x, y = a.get_tensor(name).float(), b.get_tensor(name).float()
        apart, norm = apart + float((x - y).square().sum()), norm + float(y.square().sum())
        equal, count = equal + float((x == y).sum()), count + x.numel()
    return {"difference": (apart / norm) ** 0.5, "equal": equal / count, "only_one": sorted(one.keys() ^ two.keys())}


def startup(statement: str) -> dict[str, Any]:
    """Run a statement that leaves Python or returns; say whether torch is imported after it."""
    import contextlib
    import io

    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        exec(statement, {})
    return {"torch": "torch" in sys.modules}


def _path(module: str) -> str:
    return f"base_model.model.model.layers.0.{module}"


def _factors(folder: str, module: str) -> tuple[Any, Any]:
    """Return A and B of a module of layer 0."""
    from safetensors import safe_open

    with safe_open(Path(folder, WEIGHTS_FILE), framework="pt") as tensors:
        return tensors.get_tensor(f"{_path(module)}.lora_A.weight"), tensors.get_tensor(f"{_path(module)}.lora_B.weight")


def _dense(folder: str, module: str) -> Any:
    """Return a module's delta in float64; every adapter here has scaling 1."""
    a, b = _factors(folder, module)
    return b.double() @ a.double()


def _relative(difference: Any, reference: Any) -> float:
    return float(difference.norm() / reference.norm())


def _one_linear(factors: Iterable[tuple[Any, Any]]) -> Any:
    """Return a PEFT model of one `Linear` with two adapters."""
    import torch
    from peft import LoraConfig, get_peft_model

    (a0, b0), (a1, b1) = factors
    model = torch.nn.Module()
    model.linear = torch.nn.Linear(a0.shape[1], b0.shape[0], bias=False)
    config = LoraConfig(r=a0.shape[0], lora_alpha=a0.shape[0], target_modules=["linear"])
    wrapped = get_peft_model(model, config, adapter_name="a")
    wrapped.add_adapter("b", config)
    layer = wrapped.base_model.model.linear
    for name, a, b in (("a", a0, b0), ("b", a1, b1)):
        layer.lora_A[name].weight.data.copy_(a)
        layer.lora_B[name].weight.data.copy_(b)
    return wrapped


JOBS: dict[str, Callable[..., dict[str, Any]]] = {
    f.__name__: f
    for f in (
        make_sharded,
        copy,
        lay_out_as_fetched,
        plait_bake,
        peft_bake,
        bake_arithmetic,
        bake_floor,
        bake_hashes,
        compare_models,
        make,
        make_module,
        energies,
        plait_merge,
        peft_merge,
        peft_modules,
        compare,
        sum_errors,
        ties_errors,
        startup,
        merge_once,
        merge_growing,
    )
}

if __name__ == "__main__":
    job, arguments, result = sys.argv[1:]
    Path(result).write_text(json.dumps(JOBS[job](**json.loads(arguments))), encoding="utf-8")
