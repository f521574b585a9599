"""A bake on another device: every block goes there and comes back, and none meets a tensor that stayed behind.

No accelerator is needed: a kind of tensor takes its place, which refuses to meet plain tensors as an accelerator's do.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

import plait
from plait.errors import RecipeError
from tests.adapters_on_disk import layers, write_adapter
from tests.small_models import peft_adapter, save_base

HERE = torch.device("cpu")


class Far(torch.Tensor):
    """A tensor of the device that takes the place."""

    device = property(lambda _: THERE)  # type: ignore[assignment]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if func is torch.Tensor.numpy or any(type(x) is torch.Tensor and x.dim() for x in tensors):
            raise RuntimeError(f"{func}: expected all tensors to be on the same device")
        return super().__torch_function__(func, types, args, kwargs or {})


class There:
    """The device."""

    type = "cuda"


THERE = There()


@pytest.fixture
def moves(monkeypatch):
    """Take the place of CUDA; count what is moved there and back."""
    counts: Counter[str] = Counter()
    to, cpu = torch.Tensor.to, torch.Tensor.cpu

    def moved(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        where = args[0] if args else None
        with torch._C.DisableTorchFunctionSubclass():
            plain = self.as_subclass(torch.Tensor)
            if where is THERE:
                counts["there"] += 1
                return plain.clone().as_subclass(Far)
            if isinstance(where, Far):
                return to(plain, where.dtype).as_subclass(Far)
            found = to(plain, *args, **kwargs)
            return found.as_subclass(Far) if isinstance(self, Far) else found

    def back(self: torch.Tensor) -> torch.Tensor:
        if not isinstance(self, Far):
            return cpu(self)
        counts["back"] += 1
        return self.as_subclass(torch.Tensor).clone()

    monkeypatch.setattr(torch.Tensor, "to", moved)
    monkeypatch.setattr(torch.Tensor, "cpu", back)
    for module in ("plan", "pipeline"):
        monkeypatch.setattr(f"plait.baking.{module}.usable_device", lambda _: THERE, raising=False)
    return counts


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "every kind of layer": ({"target_modules": ["embed", "q_proj", "c_attn", "conv1", "conv2", "head"]}, {}),
    "dense": ({"target_modules": ["embed", "q_proj", "conv2"]}, {"method": "ties", "density": 0.5}),
    "DoRA": ({"target_modules": ["embed", "q_proj", "conv2"], "use_dora": True}, {}),
    "lora_bias": ({"target_modules": ["q_proj"], "lora_bias": True}, {}),
    "experts": ({"target_modules": [], "target_parameters": ["experts.gate_up_proj"]}, {}),
    "whole tensors": ({"target_modules": ["q_proj"], "modules_to_save": ["head"]}, {"heads": {"policy": "average"}}),
    "tokens": ({"target_modules": ["q_proj"], "trainable_token_indices": {"embed": [3, 7]}}, {"heads": {"policy": "average"}}),
    "another dtype": ({"target_modules": ["q_proj"]}, {"dtype": "bfloat16"}),
}


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("case", CASES)
def test_the_same_bytes_by_way_of_the_device(case, tmp_path, moves):
    config, settings = CASES[case]
    base = save_base(tmp_path / "base")
    (base / "config.json").write_text(json.dumps({"tie_word_embeddings": False}))
    pair = {name: peft_adapter(tmp_path / name, seed, **config) for seed, name in enumerate("ab")}
    moves.clear()  # PEFT's
    result = plait.bake(pair, base=base, weights=[0.7, -0.4], out=tmp_path / "there", device="cuda", **settings)
    assert moves["there"] > 0
    changed = [t for s in result.plan.shards for t in s.tensors]
    assert moves["back"] >= len(changed) > 0, "every tensor that is not copied comes back"
    assert json.loads((result.folder / "plait.lock").read_text())["options"]["device"] == "cuda"
    assert (result.folder / "model.safetensors").read_bytes() == _here(pair, base, tmp_path, settings)


def _here(pair: dict[str, Path], base: Path, tmp_path: Path, settings: dict[str, Any]) -> bytes:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("plait.baking.plan.usable_device", lambda _: HERE)
        folder = plait.bake(pair, base=base, weights=[0.7, -0.4], out=tmp_path / "here", **settings).folder
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is an accelerator here")
def test_a_device_that_is_not_here_is_said_before_anything_is_read(tmp_path):
    """Nothing that is named exists: the device is what is wrong first."""
    nothing = str(tmp_path / "nothing")
    for call in (
        lambda: plait.bake([nothing], base=nothing, out=tmp_path / "out", device="cuda"),
        lambda: plait.verify(nothing, parity=_prompts(tmp_path), device="cuda"),
    ):
        with pytest.raises(RecipeError, match=r"device 'cuda' cannot be used: .*\. Use 'cpu'"):
            call()


def test_prompts_that_are_not_there_are_said_before_a_rebuild(tmp_path, monkeypatch):
    adapter = write_adapter(tmp_path / "a", layers(1, {"q_proj": (4, 4)}))
    merged = plait.merge([adapter.folder], out=tmp_path / "out").folder
    monkeypatch.setattr("plait.verification.verify.rebuild", lambda *_: pytest.fail("rebuilt in vain"))
    with pytest.raises(RecipeError, match=r"nothing\.txt: No such file or directory\. Give a file of prompts"):
        plait.verify(merged, parity=tmp_path / "nothing.txt")


def _prompts(folder: Path) -> Path:
    (folder / "prompts.txt").write_text("a\n")
    return folder / "prompts.txt"
