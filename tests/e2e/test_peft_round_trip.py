"""Adapters made by PEFT, merged by plait, loaded by PEFT again: the same outputs as both adapters active."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

import plait
from tests.small_models import both_active, loaded, peft_adapter, save_base

# PEFT on layers that it covers with warnings of its own
pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning:peft"), pytest.mark.filterwarnings("ignore::UserWarning:torch")]

IDS = torch.arange(48).reshape(3, 16) % 20
CASES = {
    "linear": ({"target_modules": ["q_proj", "v_proj"]}, {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 3}),
    "mixed ranks": ({"target_modules": ["q_proj"], "r": 2}, {"target_modules": ["q_proj"], "r": 7}),
    "rslora on the first": ({"target_modules": ["q_proj"], "use_rslora": True}, {"target_modules": ["q_proj"]}),
    "rslora on both": (
        {"target_modules": ["q_proj"], "use_rslora": True},
        {"target_modules": ["q_proj"], "use_rslora": True},
    ),
    "patterns": (
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"layers.1.q_proj": 6},
            "alpha_pattern": {"v_proj": 5},
        },
        {"target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"layers.0.*": 32}},
    ),
    "different targets": ({"target_modules": ["q_proj"]}, {"target_modules": ["v_proj", "head"]}),
    "a layer each": (
        {"target_modules": ["q_proj"], "exclude_modules": ["layers.1.q_proj"]},
        {"target_modules": ["q_proj"], "exclude_modules": ["layers.0.q_proj"]},
    ),
    "Conv1D": (
        {"target_modules": ["c_attn"], "fan_in_fan_out": True},
        {"target_modules": ["c_attn"], "fan_in_fan_out": True},
    ),
    "embedding": ({"target_modules": ["embed", "q_proj"]}, {"target_modules": ["embed"], "r": 3}),
    "convolutions": ({"target_modules": ["conv1", "conv2"]}, {"target_modules": ["conv1", "conv2"], "r": 3}),
    "grouped convolution": ({"target_modules": ["grouped", "head"]}, {"target_modules": ["grouped"], "r": 6}),
    "lora_bias": (
        {"target_modules": ["q_proj"], "lora_bias": True},
        {"target_modules": ["q_proj", "v_proj"], "lora_bias": True},
    ),
    "lora_bias of a grouped convolution": (
        {"target_modules": ["grouped", "conv2"], "lora_bias": True},
        {"target_modules": ["grouped"], "lora_bias": True, "r": 6},
    ),
    "experts": (
        {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
        {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
    "experts and modules": (
        {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]},
        {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]},
    ),
}


@pytest.fixture(scope="module", params=CASES, ids=str)
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    first, second = CASES[request.param]
    return {"a": peft_adapter(folder / "a", 10, **first), "b": peft_adapter(folder / "b", 20, **second)}


def tensor_bytes(folder: Path) -> int:
    file = folder / "adapter_model.safetensors"
    return file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little")


def test_linear_equals_both_adapters_active(pair, tmp_path):
    weights = {"a": 0.7, "b": -0.4}
    expected = both_active(pair, weights, IDS)
    for layout in ("uniform", "pattern"):
        result = plait.merge(pair, weights=weights, out=tmp_path / layout, layout=layout)
        assert result.record.result == "exact"
        assert result.plan.output_bytes == tensor_bytes(result.folder)
        torch.testing.assert_close(loaded(result.folder, IDS), expected, rtol=1e-5, atol=1e-5)


def test_one_adapter_of_weight_one_is_itself(pair, tmp_path):
    for name, folder in pair.items():
        result = plait.merge({name: folder}, out=tmp_path / name)
        torch.testing.assert_close(loaded(result.folder, IDS), loaded(folder, IDS), rtol=1e-5, atol=1e-5)


def test_opposite_copies_cancel(pair, tmp_path):
    result = plait.merge({"x": pair["a"], "y": pair["a"]}, weights=[1, -1], out=tmp_path / "out")
    from tests.small_models import net

    with torch.no_grad():
        torch.testing.assert_close(loaded(result.folder, IDS), net()(IDS), rtol=1e-5, atol=1e-5)


def test_spaces_agree_on_a_method_that_prunes_nothing(pair, tmp_path):
    """magnitude_prune of density 1 is the weighted sum, whatever the coordinates."""
    weights = {"a": 0.7, "b": -0.4}
    expected = both_active(pair, weights, IDS)
    for space, rank in (("delta", 64), ("core", "auto"), ("knots", "auto")):
        out = tmp_path / space
        plait.merge(pair, method="magnitude_prune", density=1, space=space, weights=weights, rank=rank, out=out)
        torch.testing.assert_close(loaded(out, IDS), expected, rtol=1e-4, atol=1e-4)


def test_two_experts_wrappers_trained_apart_do_not_mix(tmp_path):
    """`experts.lora_A` is gate_up_proj in one file and down_proj in the other; by position they would be added."""
    targets = {"up": "experts.gate_up_proj", "down": "experts.down_proj"}
    pair = {
        n: peft_adapter(tmp_path / n, s, target_modules=[], target_parameters=[t]) for s, (n, t) in enumerate(targets.items())
    }
    merged = plait.merge(pair, out=tmp_path / "out")
    names = {m.target for m in merged.plan.modules}
    assert names == {f"layers.{i}.experts.{p}" for i, p in itertools.product((0, 1), ("gate_up_proj", "down_proj"))}
    alone = {n: loaded(f, IDS) for n, f in pair.items()}
    assert not torch.allclose(loaded(merged.folder, IDS), alone["up"])


def test_dora_merges_exactly_into_dora(tmp_path):
    """Σ wₜ (Wₜ' − W) + W, computed on dense weights, equals the weights that PEFT makes of the merged adapter."""
    from peft import PeftModel

    from tests.small_models import net

    base = save_base(tmp_path / "base")
    targets = ["q_proj", "v_proj", "embed", "c_attn", "conv2"]
    pair = {
        "a": peft_adapter(tmp_path / "a", 1, target_modules=targets, use_dora=True, fan_in_fan_out=True),
        "b": peft_adapter(tmp_path / "b", 2, target_modules=["q_proj", "v_proj"], r=2),
        "c": peft_adapter(tmp_path / "c", 3, target_modules=targets[:3], use_dora=True, r=3),
    }
    weights = {"a": 0.6, "b": -0.3, "c": 0.5}

    def baked(folder: Path) -> dict[str, torch.Tensor]:
        return dict(PeftModel.from_pretrained(net(), folder).merge_and_unload().named_parameters())

    plain = dict(net().named_parameters())
    singles = {n: baked(f) for n, f in pair.items()}
    result = plait.merge(pair, weights=weights, base_model=str(base), out=tmp_path / "out")
    config = json.loads((result.folder / "adapter_config.json").read_text())
    assert config["use_dora"] is True
    assert result.plan.output_bytes == tensor_bytes(result.folder)
    merged = baked(result.folder)
    for name, weight in plain.items():
        expected = weight + sum(w * (singles[n][name] - weight) for n, w in weights.items())
        torch.testing.assert_close(merged[name], expected, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(
    ("first", "second", "text"),
    [
        (
            {"target_modules": ["c_attn"], "fan_in_fan_out": True},
            {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]},
            r"'layers.0.c_attn' is stored transposed .* no fused experts, such as 'layers.0.experts.down_proj'",
        ),
        (
            {"target_modules": ["q_proj"], "use_dora": True},
            {"target_modules": ["grouped"], "target_parameters": ["experts.down_proj"]},
            r"'a': DoRA applies to all of an adapter.*no form on fused experts and grouped convolutions, such as 'grouped'",
        ),
    ],
)
def test_what_peft_cannot_hold_in_one_adapter_is_refused(first, second, text, tmp_path):
    pair = {"a": peft_adapter(tmp_path / "a", 1, **first), "b": peft_adapter(tmp_path / "b", 2, **second)}
    base = str(save_base(tmp_path / "base"))
    with pytest.raises(plait.PlanError, match=text):
        plait.merge(pair, base_model=base, out=tmp_path / "out")
    plait.merge({"b": pair["b"]}, base_model=base, out=tmp_path / "alone")
