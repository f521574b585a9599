"""Every layout that LoRA has, baked into a plain checkpoint: the same outputs as the adapters on the base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import plait
from plait.adapters.lowrank import LowRank
from plait.baking.deltas import own_columns
from plait.errors import PlanError
from plait.linalg.blocks import RowBlocks
from tests.adapters_on_disk import Conv, write_adapter
from tests.small_models import both_active, net, peft_adapter, save_base

# PEFT on layers that it covers with warnings of its own
pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning:peft"), pytest.mark.filterwarnings("ignore::UserWarning:torch")]

IDS = torch.arange(48).reshape(3, 16) % 20
CASES = {
    "linear": {"target_modules": ["q_proj", "v_proj"]},
    "square Conv1D": {"target_modules": ["c_attn"], "fan_in_fan_out": True},
    "embedding": {"target_modules": ["embed", "q_proj"]},
    "convolutions": {"target_modules": ["conv1", "conv2"]},
    "lora_bias": {"target_modules": ["q_proj", "v_proj"], "lora_bias": True},
    "experts": {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    "experts and modules": {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]},
    "everything": {"target_modules": ["embed", "q_proj", "v_proj", "back", "conv1", "conv2", "head"]},
}


def untied(folder: Path) -> Path:
    """Save the base with a configuration that leaves no question about tied weights."""
    save_base(folder)
    (folder / "config.json").write_text(json.dumps({"tie_word_embeddings": False}))
    return folder


def baked_output(folder: Path) -> torch.Tensor:
    model = net()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    with torch.no_grad():
        return model.eval()(IDS)


@pytest.fixture(scope="module", params=CASES, ids=str)
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    config = CASES[request.param]
    pair = {"a": peft_adapter(folder / "a", 10, **config), "b": peft_adapter(folder / "b", 20, **{**config, "lora_alpha": 3})}
    return untied(folder / "base"), pair


def test_linear_equals_both_adapters_active(pair, tmp_path):
    base, adapters = pair
    weights = {"a": 0.7, "b": -0.4}
    result = plait.bake(adapters, base=base, weights=weights, out=tmp_path / "out")
    torch.testing.assert_close(baked_output(result.folder), both_active(adapters, weights, IDS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [{"method": "ties", "density": 0.4}, {"method": "dare_ties", "density": 0.5}], ids=str)
def test_a_dense_merge_is_baked_whole(pair, settings, tmp_path):
    """The bake is base + the dense delta that `plait merge --kind delta` writes, which is tested on its own."""
    base, adapters = pair
    dense = plait.merge(adapters, out=tmp_path / "delta", kind="delta", **settings)
    deltas = load_file(dense.folder / "delta.safetensors")
    result = plait.bake(adapters, base=base, out=tmp_path / "out", **settings)
    before, after = load_file(base / "model.safetensors"), load_file(result.folder / "model.safetensors")
    changed = 0
    for name, tensor in before.items():
        delta = deltas.get(name, torch.zeros_like(tensor)).reshape(tensor.shape)
        torch.testing.assert_close(after[name], tensor + delta, rtol=1e-6, atol=1e-6, msg=name)
        changed += name in deltas
    assert changed == len(deltas)


def test_dora_is_exact(tmp_path):
    """Σ wₜ (Wₜ' − W) + W on the dense weights that PEFT makes of each adapter."""
    base = untied(tmp_path / "base")
    targets = ["q_proj", "v_proj", "embed", "c_attn", "conv2"]
    trio = {
        "a": peft_adapter(tmp_path / "a", 1, target_modules=targets, use_dora=True, fan_in_fan_out=True),
        "b": peft_adapter(tmp_path / "b", 2, target_modules=["q_proj", "v_proj"], r=2),
        "c": peft_adapter(tmp_path / "c", 3, target_modules=targets[:3], use_dora=True, r=3),
    }
    weights = {"a": 0.6, "b": -0.3, "c": 0.5}
    result = plait.bake(trio, base=base, weights=weights, out=tmp_path / "out")
    plain = {n: p.detach() for n, p in net().named_parameters()}
    singles = {}
    for name, folder in trio.items():
        model = PeftModel.from_pretrained(net(), folder).merge_and_unload()
        singles[name] = {n: p.detach() for n, p in model.named_parameters()}
    merged = load_file(result.folder / "model.safetensors")
    for name, weight in plain.items():
        expected = weight + sum(w * (singles[n][name] - weight) for n, w in weights.items())
        torch.testing.assert_close(merged[name], expected, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_a_grouped_convolution(tmp_path):
    """PEFT's LoRA there mixes the groups, which no grouped weight can do; one that keeps them apart can be baked."""
    base = untied(tmp_path / "base")
    mixing = peft_adapter(tmp_path / "mixing", 1, target_modules=["grouped", "head"])
    with pytest.raises(PlanError, match=r"grouped: 'grouped\.weight' is a convolution in 2 groups.*reads all input channels"):
        plait.bake([mixing], base=base, out=tmp_path / "out")
    apart = write_adapter(tmp_path / "apart", {"grouped": Conv(6, 6, (3,), groups=2)}, r=4)
    result = plait.bake([apart.folder], base=base, out=tmp_path / "out")
    before, after = (load_file(f / "model.safetensors")["grouped.weight"].double() for f in (base, result.folder))
    torch.testing.assert_close(after, before + torch.tensor(apart.deltas["grouped"]), rtol=1e-6, atol=1e-6)


def groups_apart(folder: Path, seed: int) -> Path:
    """Write an adapter as PEFT stores it whose groups read their own channels alone."""
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(4, 6, 3, generator=generator), torch.randn(6, 2, 1, generator=generator)
    a[:2, 3:], a[2:, :3] = 0, 0
    folder.mkdir()
    names = [f"base_model.model.grouped.lora_{part}.weight" for part in "AB"]
    save_file(dict(zip(names, (a, b), strict=True)), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["grouped"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("settings", [{}, {"method": "ties", "density": 0.6}, {"method": "ties", "space": "core"}], ids=str)
def test_groups_that_read_their_own_channels(tmp_path, settings):
    """PEFT's LoRA on a grouped convolution, zero for the channels of other groups: in the weight what it is beside it."""
    base = untied(tmp_path / "base")
    pair = {name: groups_apart(tmp_path / name, seed) for seed, name in enumerate("ab")}
    result = plait.bake(pair, base=base, weights=[0.7, -0.4], out=tmp_path / "out", **settings)
    dense = plait.merge(pair, weights=[0.7, -0.4], out=tmp_path / "delta", kind="delta", **settings)
    delta = load_file(dense.folder / "delta.safetensors")["grouped.weight"]  # over all channels
    own = torch.cat([delta[:3, :3], delta[3:, 3:]])
    torch.testing.assert_close(torch.cat([delta[:3, 3:], delta[3:, :3]]), torch.zeros(6, 3, 3), rtol=0, atol=1e-5)
    before, after = (load_file(f / "model.safetensors")["grouped.weight"] for f in (base, result.folder))
    torch.testing.assert_close(after, before + own, rtol=1e-5, atol=1e-5)
    if not settings:
        expected = both_active(pair, {"a": 0.7, "b": -0.4}, IDS)
        torch.testing.assert_close(baked_output(result.folder), expected, rtol=1e-5, atol=1e-5)


def test_a_result_that_mixes_groups_has_no_place():
    """Rounding outside of a group's own channels is none of it; more is an error, as factors and dense."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 6, generator=generator), torch.randn(4, 3, generator=generator)
    a[:, 2:] = 0
    for noise, fits in ((1e-7, True), (1e-3, False)):
        a[1, 5] = noise
        for matrix in (LowRank(a, b), RowBlocks((4, 6), lambda i, j: (b @ a)[i:j], torch.float32)):
            if not fits:
                with pytest.raises(PlanError, match=r"conv\.weight \(conv\): this method makes a group"):
                    own_columns(matrix, 0, 2, where="conv.weight (conv)")
                continue
            own = own_columns(matrix, 0, 2, where="conv.weight (conv)")
            torch.testing.assert_close(own.dense(), b @ a[:, :2], rtol=1e-6, atol=1e-6)


def test_a_lora_bias_of_zeros_needs_no_bias(tmp_path):
    """PEFT has a lora_bias beside all layers or none; where the base has no bias it can be nothing."""
    base = untied(tmp_path / "base")
    adapter = peft_adapter(tmp_path / "a", 1, target_modules=["q_proj"], lora_bias=True)
    tensors, parts = load_file(base / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    del tensors["layers.0.q_proj.bias"]
    parts["base_model.model.layers.0.q_proj.lora_B.bias"].zero_()
    save_file(tensors, base / "model.safetensors")
    save_file(parts, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    result = plait.bake([adapter], base=base, out=tmp_path / "out")
    baked = load_file(result.folder / "model.safetensors")
    assert "layers.0.q_proj.bias" not in baked
    assert not torch.equal(baked["layers.0.q_proj.weight"], tensors["layers.0.q_proj.weight"])


def test_dora_under_another_method_is_refused(tmp_path):
    base = untied(tmp_path / "base")
    a = peft_adapter(tmp_path / "a", 1, target_modules=["q_proj"], use_dora=True)
    b = peft_adapter(tmp_path / "b", 2, target_modules=["q_proj"])
    with pytest.raises(PlanError, match="only linear methods have an exact form"):
        plait.bake([a, b], base=base, method="ties", out=tmp_path / "out")


def test_a_lora_bias_without_a_bias_is_refused(tmp_path):
    base = untied(tmp_path / "base")
    adapter = peft_adapter(tmp_path / "a", 1, target_modules=["q_proj"], lora_bias=True)
    tensors = load_file(base / "model.safetensors")
    del tensors["layers.0.q_proj.bias"]
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(PlanError, match=r"layers\.0\.q_proj: the adapters have a lora_bias, the base model has no bias there"):
        plait.bake([adapter], base=base, out=tmp_path / "out")


def test_heads_of_one_adapter_are_part_of_its_model(tmp_path):
    base = untied(tmp_path / "base")
    adapter = peft_adapter(tmp_path / "a", 1, target_modules=["q_proj"], modules_to_save=["head"])
    result = plait.bake([adapter], base=base, out=tmp_path / "out")
    torch.testing.assert_close(baked_output(result.folder), both_active({"a": adapter}, {"a": 1.0}, IDS), rtol=1e-5, atol=1e-5)
    assert not (result.folder / "heads").exists()


def test_heads_of_several_follow_the_recipe(tmp_path):
    base = untied(tmp_path / "base")
    pair = {n: peft_adapter(tmp_path / n, s, target_modules=["q_proj"], modules_to_save=["head"]) for s, n in enumerate("ab")}
    heads = {n: load_file(pair[n] / "adapter_model.safetensors")["base_model.model.head.weight"] for n in pair}
    own = load_file(base / "model.safetensors")["head.weight"]
    assert not torch.equal(heads["a"], heads["b"])
    for policy, expected in (
        ({"policy": "separate"}, own),
        ({"policy": "from", "adapter": "b"}, heads["b"]),
        ({"policy": "average"}, (heads["a"].double() + heads["b"].double()).div(2).float()),
    ):
        out = tmp_path / policy["policy"]
        result = plait.bake(pair, base=base, out=out, heads=policy)
        assert torch.equal(load_file(out / "model.safetensors")["head.weight"], expected)
        assert (out / "heads").exists() == (policy["policy"] == "separate")
        assert any("kept under heads/" in n for n in result.plan.notes) == (policy["policy"] == "separate")
    kept = load_file(tmp_path / "separate" / "heads" / "a" / "heads.safetensors")
    assert torch.equal(kept["base_model.model.head.weight"], heads["a"])


def test_trained_token_rows(tmp_path):
    base = untied(tmp_path / "base")
    adapter = peft_adapter(tmp_path / "a", 1, target_modules=["q_proj"], trainable_token_indices={"embed": [3, 7]})
    result = plait.bake([adapter], base=base, out=tmp_path / "out")
    torch.testing.assert_close(baked_output(result.folder), both_active({"a": adapter}, {"a": 1.0}, IDS), rtol=1e-5, atol=1e-5)
    before, after = (load_file(f / "model.safetensors")["embed.weight"] for f in (base, result.folder))
    assert [i for i in range(20) if not torch.equal(before[i], after[i])] == [3, 7]


def test_trained_biases(tmp_path):
    base = untied(tmp_path / "base")
    adapter = peft_adapter(tmp_path / "a", 1, target_modules=["q_proj"], bias="lora_only")
    tensors = load_file(adapter / "adapter_model.safetensors")
    (name,) = (n for n in tensors if "layers.0" in n and n.endswith(".bias"))
    tensors[name] += 1
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    result = plait.bake([adapter], base=base, out=tmp_path / "out")
    torch.testing.assert_close(baked_output(result.folder), both_active({"a": adapter}, {"a": 1.0}, IDS), rtol=1e-5, atol=1e-5)
    assert torch.equal(load_file(result.folder / "model.safetensors")["layers.0.q_proj.bias"], tensors[name])
