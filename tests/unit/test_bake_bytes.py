"""The bytes of a bake: float32 sums rounded once, the base's files where nothing changes, and nothing of chance."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import plait
from plait.baking import deltas
from plait.errors import PlanError
from plait.linalg import blocks
from plait.tensorfiles import blocks as files
from tests.adapters_on_disk import Embedding, Linear, write_adapter
from tests.unit.test_bake_plan import MODULES, tensors, write_base


def grid(shape: tuple[int, ...], seed: int, scale: float) -> np.ndarray:
    """Return multiples of `scale` so few and small that sums of products are exact in float32, in any order."""
    return np.random.default_rng(seed).integers(-8, 9, shape) * scale


@pytest.fixture
def exact(tmp_path):
    """A bfloat16 base and two adapters whose float32 sum is exact: the result has one right answer, bit for bit."""
    shapes = {"model.layers.0.q_proj": (48, 40), "model.layers.0.o_proj": (40, 48)}
    base = {f"{m}.weight": torch.tensor(grid(s, 9, 2.0**-3)).bfloat16() for m, s in shapes.items()}
    (tmp_path / "base").mkdir()
    save_file({**base, "model.norm.weight": torch.ones(40).bfloat16()}, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text('{"dtype": "bfloat16", "tie_word_embeddings": false}')
    pair = {}
    expected = {name: weight.double() for name, weight in base.items()}
    for seed, (name, weight) in enumerate({"a": 0.75, "b": -0.5}.items()):
        values = {m: (grid((2, s[1]), seed, 2.0**-6), grid((s[0], 2), seed + 5, 2.0**-7)) for m, s in shapes.items()}
        modules = {m: Linear(*s, values=values[m]) for m, s in shapes.items()}
        written = write_adapter(tmp_path / name, modules, r=2, alpha=4)
        pair[name] = written.folder
        for module, delta in written.deltas.items():
            expected[f"{module}.weight"] += weight * torch.tensor(delta)
    return tmp_path / "base", pair, {n: t.bfloat16() for n, t in expected.items()}


def test_bfloat16_is_the_float32_sum_rounded_once(exact, tmp_path):
    base, pair, expected = exact
    result = plait.bake(pair, base=base, weights={"a": 0.75, "b": -0.5}, out=tmp_path / "out")
    baked = load_file(result.folder / "model.safetensors")
    twice = load_file(base / "model.safetensors")
    for name, tensor in expected.items():
        assert baked[name].dtype == torch.bfloat16
        assert torch.equal(baked[name], tensor), name
        assert not torch.equal(baked[name], twice[name])


def test_random_values_are_rounded_from_the_exact_sum(tmp_path):
    """Where the exact sum is not within float32 noise of a tie, the bits are those of its rounding."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(60, 50, generator=generator).bfloat16()
    (tmp_path / "base").mkdir()
    save_file({"m.weight": weight}, tmp_path / "base" / "model.safetensors")
    written = write_adapter(tmp_path / "a", {"m": Linear(60, 50)}, r=8)
    plait.bake([written.folder], base=tmp_path / "base", out=tmp_path / "out")
    baked = load_file(tmp_path / "out" / "model.safetensors")["m.weight"]
    exact = weight.double() + torch.tensor(written.deltas["m"])
    noise = 1e-6 * (exact.abs() + 2)
    clear = (exact - noise).bfloat16() == (exact + noise).bfloat16()
    assert clear.double().mean() > 0.99
    assert torch.equal(baked[clear], exact.bfloat16()[clear])


def test_headers_names_and_order_stay(tmp_path):
    base = write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "a", MODULES).folder
    plait.bake([adapter], base=base, out=tmp_path / "out")
    for path in base.glob("*.safetensors"):
        one, two = path.read_bytes(), (tmp_path / "out" / path.name).read_bytes()
        lead = 8 + int.from_bytes(one[:8], "little")
        assert one[:lead] == two[:lead]
        assert len(one) == len(two)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(tmp_path / "out").values())
    assert index["weight_map"] == json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]


def test_workers_change_no_byte(tmp_path):
    base = write_base(tmp_path / "base")
    pair = [write_adapter(tmp_path / n, MODULES, seed=i).folder for i, n in enumerate("ab")]
    digests = set()
    for workers in (1, 2, 4):
        out = plait.bake(pair, base=base, out=tmp_path / f"{workers}", workers=workers, method="ties", density=0.5).folder
        digests.add(tuple(hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(out.glob("*.safetensors"))))
    assert len(digests) == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_dtype_casts_all_floats_and_nothing_else(dtype, tmp_path):
    base = write_base(tmp_path / "base", position_ids=torch.arange(3))
    written = write_adapter(tmp_path / "a", MODULES)
    plait.bake([written.folder], base=base, out=tmp_path / "out", dtype=dtype)
    wanted = getattr(torch, dtype)
    before, after = tensors(base), tensors(tmp_path / "out")
    assert list(after["position_ids"]) == [0, 1, 2]
    for name in before.keys() - {"position_ids"}:
        delta = written.deltas.get(name.removesuffix(".weight"))
        exact = before[name].double() + (0 if delta is None else torch.tensor(delta))
        assert after[name].dtype == wanted
        torch.testing.assert_close(
            after[name].double(), exact, rtol=torch.finfo(wanted).eps if dtype != "float64" else 1e-6, atol=1e-6
        )
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == dtype
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in after.values())


def test_an_overflow_in_a_narrow_dtype_is_told(tmp_path):
    base = write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "a", MODULES, alpha=1e6).folder
    with pytest.raises(PlanError, match=r"values overflow in F16\. Bake with --dtype bfloat16 or float32"):
        plait.bake([adapter], base=base, out=tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_an_overflow_of_what_is_only_cast_is_told_too(tmp_path):
    base = write_base(
        tmp_path / "base", **{"big.weight": torch.full((2, 2), 1e6), "endless.weight": torch.full((2, 2), torch.inf)}
    )
    adapter = write_adapter(tmp_path / "a", MODULES).folder
    with pytest.raises(PlanError, match=r"big\.weight: values overflow in F16"):
        plait.bake([adapter], base=base, out=tmp_path / "out", dtype="float16")
    plait.bake([adapter], base=base, out=tmp_path / "out", dtype="bfloat16")
    assert tensors(tmp_path / "out")["endless.weight"].isinf().all()


def test_shard_size_packs_in_order(tmp_path):
    base = write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "a", MODULES).folder
    plain = plait.bake([adapter], base=base, out=tmp_path / "plain").folder
    small = plait.bake([adapter], base=base, out=tmp_path / "small", shard_size="200").folder
    one = plait.bake([adapter], base=base, out=tmp_path / "one", shard_size="1GB").folder
    names = sorted(p.name for p in small.glob("*.safetensors"))
    assert names == [f"model-{i:05}-of-{len(names):05}.safetensors" for i in range(1, len(names) + 1)]
    assert len(names) > 2
    assert [p.name for p in one.glob("*.safetensors")] == ["model.safetensors"]
    assert not (one / "model.safetensors.index.json").exists()
    expected = tensors(plain)
    for folder in (small, one):
        found = tensors(folder)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[n], t) for n, t in expected.items())
        with safe_open(next(folder.glob("*.safetensors")), "pt") as file:
            assert file.metadata() == {"format": "pt"}
    index = json.loads((small / "model.safetensors.index.json").read_text())
    assert all(name in load_file(small / shard) for name, shard in index["weight_map"].items())


def test_large_matrices_go_by_blocks_and_through_a_file(tmp_path, monkeypatch):
    """With blocks of a few rows and nothing held, every path gives what the paths for small matrices give."""
    generator = torch.Generator().manual_seed(3)
    weights = {"embed.weight": torch.randn(30, 12, generator=generator), "up.weight": torch.randn(25, 12, generator=generator)}
    (tmp_path / "base").mkdir()
    save_file(weights, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text('{"tie_word_embeddings": false}')
    modules = {"embed": Embedding(30, 12), "up": Linear(25, 12)}
    pair = [write_adapter(tmp_path / n, modules, seed=i).folder for i, n in enumerate("ab")]

    def bake(name: str, **settings: object) -> dict[str, torch.Tensor]:
        return load_file(plait.bake(pair, base=tmp_path / "base", out=tmp_path / name, **settings).folder / "model.safetensors")

    settings = [{}, {"method": "ties", "density": 0.5}]
    expected = [bake(f"held{i}", **s) for i, s in enumerate(settings)]
    monkeypatch.setattr(blocks, "MATRIX_BLOCK_ELEMENTS", 40)
    monkeypatch.setattr(files, "TENSOR_BLOCK_ELEMENTS", 70)
    monkeypatch.setattr(blocks, "HOLD_ELEMENTS", 0)
    monkeypatch.setattr(deltas, "HOLD_ELEMENTS", 0)
    for i, s in enumerate(settings):
        found = bake(f"blocks{i}", **s)
        for name, tensor in expected[i].items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)


def test_the_lock_is_true(tmp_path):
    base = write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "a", MODULES).folder
    out = plait.bake([adapter], base=base, out=tmp_path / "out", dtype="bfloat16").folder
    lock = json.loads((out / "plait.lock").read_text())
    for name, digest in lock["outputs"].items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest
    made = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert set(lock["outputs"]) == made - {"plait.lock", "merge_metadata.json", "summary.json"}
    for name, digest in lock["base"]["files"].items():
        assert hashlib.sha256((base / name).read_bytes()).hexdigest() == digest
    assert (out / lock["base"]["path"]).resolve() == base.resolve()
    options = {"dtype": "bfloat16", "shard_size": None, "device": "cpu", "dequantize": False, "full_tensors": True}
    assert lock["options"] == options
    record = json.loads((out / "merge_metadata.json").read_text())
    assert record["shards"] == {n: d for n, d in lock["outputs"].items() if n.endswith(".safetensors")}


def test_progress_counts_every_byte(tmp_path):
    class Listener:
        def __init__(self) -> None:
            self.stages: dict[str, list[object]] = {}

        def start(self, stage: str, total: int, unit: str = "steps") -> None:
            self.now = self.stages.setdefault(stage, [total, unit, 0])

        def advance(self, steps: int = 1) -> None:
            self.now[2] += steps

        def finish(self) -> None:
            pass

    base = write_base(tmp_path / "base", position_ids=torch.arange(3))
    adapter = write_adapter(tmp_path / "a", MODULES).folder
    listener = Listener()
    result = plait.bake([adapter], base=base, out=tmp_path / "out", progress=listener, workers=2)
    total, unit, done = listener.stages["bake"]
    assert (total, unit) == (result.plan.output_bytes, "B")
    assert done == total
    assert Path(result.folder).is_dir()
