"""Weighted sums that numpy writes: the bytes, the records and the errors of the engine that computes with torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import plait
from plait.merging import side_by_side
from plait.merging.side_by_side import SideBySide

FILES = ("adapter_model.safetensors", "adapter_config.json")
MODULES = {"model.layers.0.q": (24, 20), "model.layers.0.v": (8, 20), "model.layers.1.q": (24, 20)}


def factors(ranks: dict[str, int], seed: int, dtype: torch.dtype = torch.float32, size: float = 1.0) -> dict[str, torch.Tensor]:
    """Return A and B of modules by their names in the file."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for module, rank in ranks.items():
        rows, columns = MODULES[module]
        prefix = f"base_model.model.{module}"
        found[f"{prefix}.lora_A.weight"] = (torch.randn(rank, columns, generator=generator) * size).to(dtype)
        found[f"{prefix}.lora_B.weight"] = (torch.randn(rows, rank, generator=generator) * size).to(dtype)
    return found


def save(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    rank = max(len(t) for name, t in tensors.items() if "lora_A" in name or "embedding_A" in name)
    ranks = {n.removeprefix("base_model.model.").split(".lora")[0]: len(t) for n, t in tensors.items() if "_A" in n}
    found = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 3,
        "target_modules": sorted({module.rpartition(".")[2] for module in ranks}),
        "rank_pattern": {module: r for module, r in ranks.items() if r != rank},
        "base_model_name_or_path": "base",
    }
    (folder / "adapter_config.json").write_text(json.dumps(found | config), encoding="utf-8")
    return folder


def outcome(adapters: dict[str, Path], out: Path, settings: dict[str, Any]) -> tuple[Any, ...]:
    """Return the bytes of a merge's files and its record, or its error."""
    try:
        record = plait.merge(adapters, out=out, **settings).record.model_dump(exclude={"seconds", "finished"})
    except plait.PlaitError as error:
        return type(error), str(error).replace(str(out), "")
    return *((out / name).read_bytes() for name in FILES), record


def compared(
    adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> tuple[int, int]:
    """Merge both ways, require the same outcome, and return how many modules numpy made, and of how many."""
    made: list[bool] = []
    plain = SideBySide._factors

    def watched(self: SideBySide, target: str) -> Any:
        made.append((found := plain(self, target)) is not None)
        return found

    monkeypatch.setattr(SideBySide, "_factors", watched)
    mine = outcome(adapters, tmp_path / "numpy", settings)
    monkeypatch.setattr(SideBySide, "fits", staticmethod(lambda inventory, plan: False))
    assert mine == outcome(adapters, tmp_path / "torch", settings)
    return sum(made), len(made)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"weights": {"a": 0.37, "b": -1.3}, "scale": 0.7},
        {"weights": {"a": 0.0}, "layout": "pattern"},
        {"method": {"name": "pipeline", "combine": {"name": "mean", "factor": 1.7}}},
    ],
)
def test_the_bytes_are_those_of_the_engine(tmp_path, monkeypatch, dtype, stored, settings) -> None:
    """Adapters of other ranks, scalings and dtypes, of which each lacks a module of the other."""
    q, v, other = MODULES
    a = save(tmp_path / "a", factors({q: 4, v: 2}, 0, stored))
    b = save(tmp_path / "b", factors({q: 3, other: 5}, 1), use_rslora=True)
    made = compared({"a": a, "b": b}, tmp_path, monkeypatch, {"dtype": dtype, **settings})
    assert made[1] == 3
    # of a module of which all is multiplied with zero, the engine makes sure that nothing was lost
    assert made[0] == (2 if settings.get("weights") == {"a": 0.0} else 3)


@pytest.mark.parametrize(
    "change",
    [
        "subnormal entries",
        "a column that is too small",
        "a column of zeros",
        "all zero",
        "a NaN",
        "an infinite value",
        "values that overflow",
        "a small value in the first rows alone",
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_not_normal_is_left_to_the_engine(tmp_path, monkeypatch, change, dtype) -> None:
    q, v, _ = MODULES
    tensors = factors({q: 4, v: 2}, 0)
    b = tensors[f"base_model.model.{q}.lora_B.weight"]
    match change:
        case "subnormal entries":
            b[3:5] = 1e-40
        case "a column that is too small":
            b[:, 1] = 1e-38
        case "a column of zeros":
            b[:, 1] = 0
        case "all zero":
            b[:] = 0
        case "a NaN":
            b[2, 1] = float("nan")
        case "an infinite value":
            b[2, 1] = float("inf")
        case "values that overflow":
            b[2, 1] = 3e38
        case "a small value in the first rows alone":
            b[:10, 1] = 0
    adapters = {"a": save(tmp_path / "a", tensors), "b": save(tmp_path / "b", factors({q: 3}, 1))}
    made = compared(adapters, tmp_path, monkeypatch, {"dtype": dtype, "weights": {"a": 1.0, "b": 0.0}})
    assert made[0] < 2 or change in ("subnormal entries", "a column of zeros", "a small value in the first rows alone")


@pytest.mark.parametrize("weight", [1e-45, 1e-38, 3e37, -1e-40])
def test_weights_at_the_ends_of_float32(tmp_path, monkeypatch, weight) -> None:
    q, v, _ = MODULES
    adapters = {"a": save(tmp_path / "a", factors({q: 4, v: 2}, 0)), "b": save(tmp_path / "b", factors({q: 3}, 1))}
    compared(adapters, tmp_path, monkeypatch, {"weights": {"a": weight, "b": weight}})


def test_other_layouts_next_to_linear_ones(tmp_path, monkeypatch) -> None:
    """A convolution and an embedding are the engine's, the rest is not."""
    q, v, _ = MODULES
    adapters = {}
    for seed, name in enumerate("ab"):
        more = {
            "base_model.model.conv.lora_A.weight": torch.randn(2, 6, 3, 3),
            "base_model.model.conv.lora_B.weight": torch.randn(8, 2, 1, 1),
            "base_model.model.embed.lora_embedding_A": torch.randn(2, 30),
            "base_model.model.embed.lora_embedding_B": torch.randn(16, 2),
        }
        adapters[name] = save(tmp_path / name, {**factors({q: 4, v: 2}, seed), **more})
    assert compared(adapters, tmp_path, monkeypatch, {}) == (2, 4)


@pytest.mark.parametrize(
    "settings", [{"rank": 3}, {"method": "svd"}, {"kind": "delta"}, {"space": "factors"}, {"method": "ties"}, {"format": "mlx"}]
)
def test_what_is_no_such_sum_is_merged_by_the_engine(tmp_path, monkeypatch, settings) -> None:
    q, _, _ = MODULES
    adapters = {n: save(tmp_path / n, factors({q: 4}, seed)) for seed, n in enumerate("ab")}
    asked = list[str]()
    write = SideBySide.write
    monkeypatch.setattr(SideBySide, "write", lambda self, *given: (asked.append("numpy"), write(self, *given))[1])
    plait.merge(adapters, out=tmp_path / "out", **settings)
    assert any((tmp_path / "out").glob("*.safetensors"))
    assert not asked
    plait.merge(adapters, out=tmp_path / "sum")
    assert asked == ["numpy"], "a sum without these settings"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_values_are_converted_as_torch_does(dtype) -> None:
    """Numbers of every size, ties, subnormal ones and signed zeros."""
    bits = np.random.default_rng(0).integers(0, 1 << 32, 1 << 16, dtype=np.uint32)
    halves = np.arange(1 << 16, dtype=np.uint32) << 16
    bits = np.concatenate([bits, halves, halves | 0x8000, halves | 0x7FFF, halves | 0x8001, halves >> 9])
    x = bits.view(np.float32)
    x = x[np.abs(x) <= (65504.0 if dtype == torch.float16 else 3.38e38)]  # no NaN
    expected = torch.from_numpy(x.copy()).to(dtype)
    found = np.empty(x.shape, dtype=np.uint16 if dtype == torch.bfloat16 else str(dtype).removeprefix("torch."))
    side_by_side._store(x[:, None], 1, str(dtype).removeprefix("torch."), out=found[:, None])
    kind = torch.int32 if dtype == torch.float32 else torch.int16
    assert np.array_equal(found.view(np.int32 if dtype == torch.float32 else np.int16), expected.view(kind).numpy())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_is_read_as_torch_reads_it(tmp_path, dtype) -> None:
    every_value = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    every_value = every_value[every_value.isfinite()]
    values = torch.cat([every_value, torch.zeros(-len(every_value) % 4, dtype=dtype)]).view(4, -1)
    module = "base_model.model.model.layers.0.q"
    tensors = {f"{module}.lora_A.weight": values, f"{module}.lora_B.weight": torch.randn(8, 4, dtype=dtype)}
    adapter = plait.Adapter.open(save(tmp_path / "a", tensors), "a")
    found = side_by_side._read(adapter, f"{module}.lora_A.weight")
    assert found is not None
    assert np.array_equal(found.values.view(np.int32), values.float().view(torch.int32).numpy())


def test_such_a_merge_and_its_check_import_no_torch(tmp_path) -> None:
    """torch takes a second and 200 MB, which is more than the sum."""
    q, v, _ = MODULES
    sources = [str(save(tmp_path / n, factors({q: 4, v: 2}, seed, torch.bfloat16))) for seed, n in enumerate("ab")]
    out = str(tmp_path / "out")
    code = (
        "import sys\nfrom plait.cli.main import main\n"
        f"for words in (['merge', *{sources!r}, '-o', {out!r}, '--dtype', 'bfloat16'], ['verify', {out!r}]):\n"
        "    try: main(words)\n"
        "    except SystemExit as left: print('left', left.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [line for line in done.stdout.splitlines() if line.startswith("left ")] == ["left 0 False"] * 2
