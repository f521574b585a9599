"""Quantized bases: the plain model that transformers makes of them without a GPU, plus the deltas; others are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import plait
from plait.errors import AdapterError, PlanError
from plait.tensorfiles import blocks as files
from tests.adapters_on_disk import Linear, read_deltas, write_adapter

SMALL = {
    "vocab_size": 32, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 96,
    "num_key_value_heads": 1, "max_position_embeddings": 32, "tie_word_embeddings": False,
}  # fmt: skip
TARGETS = {f"model.layers.0.self_attn.{n}": Linear(d_out=m, d_in=64) for n, m in {"q_proj": 64, "k_proj": 32}.items()}
FP8 = {"quant_method": "fp8", "weight_block_size": [32, 16], "modules_to_not_convert": ["lm_head"]}
MXFP4 = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
}


def save(model: tf.PreTrainedModel, folder: Path, settings: dict[str, object], change: Callable[..., dict]) -> Path:
    """Save a model in bfloat16, its tensors changed into quantized ones, in two files."""
    model.bfloat16().save_pretrained(folder)
    changed: dict[str, torch.Tensor] = {}
    for name, tensor in sorted(load_file(folder / "model.safetensors").items()):
        changed |= change(name, tensor)
    (folder / "model.safetensors").unlink()
    names = list(changed)  # scales and weights come to lie in different files
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, members in halves.items():
        save_file({n: changed[n] for n in members}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: file for file, members in halves.items() for n in members}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def to_fp8(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    if tensor.ndim != 2 or any(part in name for part in ("embed", "lm_head", "gate.weight")):
        return {name: tensor}
    (m, n), (tall, wide) = tensor.shape, FP8["weight_block_size"]
    blocks = tensor.float().reshape(m // tall, tall, n // wide, wide)
    scales = blocks.abs().amax((1, 3), keepdim=True) / 448
    codes = (blocks / scales).to(torch.float8_e4m3fn).reshape(m, n)
    return {name: codes, f"{name}_scale_inv": scales.reshape(m // tall, n // wide)}


def to_mxfp4(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return {name: tensor}
    experts, d_in, d_out = tensor.shape
    codes = torch.randint(0, 256, (experts, d_out, d_in // 32, 16), dtype=torch.uint8)
    exponents = torch.randint(118, 126, (experts, d_out, d_in // 32), dtype=torch.uint8)
    return {f"{name}_blocks": codes, f"{name}_scales": exponents}


def fp8_llama(folder: Path) -> Path:
    torch.manual_seed(0)
    return save(tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL)), folder, FP8, to_fp8)


def fp8_moe(folder: Path) -> Path:
    torch.manual_seed(0)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 32}
    return save(tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**SMALL, **experts)), folder, FP8, to_fp8)


def gpt_oss(folder: Path) -> Path:
    torch.manual_seed(0)
    config = tf.GptOssConfig(
        **{**SMALL, "intermediate_size": 32, "pad_token_id": 0, "eos_token_id": 1}, head_dim=32, num_local_experts=3,
        num_experts_per_tok=2, sliding_window=16,
    )  # fmt: skip
    return save(tf.GptOssForCausalLM(config), folder, MXFP4, to_mxfp4)


@pytest.mark.parametrize("make", [fp8_llama, fp8_moe, gpt_oss])
def test_the_plain_model_is_the_one_that_transformers_makes(make, tmp_path, monkeypatch):
    """Every parameter that no adapter touches, bit for bit; the others are float32 sums of it and the delta, rounded once."""
    base = make(tmp_path / "base")
    adapter = write_adapter(tmp_path / "a", TARGETS, r=4).folder
    monkeypatch.setattr(files, "TENSOR_BLOCK_ELEMENTS", 500)  # several blocks of rows, across the blocks of scales
    out = plait.bake([adapter], base=base, dequantize=True, out=tmp_path / "out").folder
    plain = tf.AutoModelForCausalLM.from_pretrained(base)
    baked = tf.AutoModelForCausalLM.from_pretrained(out)
    assert baked.dtype == plain.dtype == torch.bfloat16
    deltas = read_deltas(adapter, TARGETS)
    raw = {n: t for path in base.glob("*.safetensors") for n, t in load_file(path).items()}
    before, after = plain.state_dict(), baked.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        delta = deltas.get(name.removesuffix(".weight"))
        if delta is None:
            assert torch.equal(tensor, before[name]), name
            continue
        weight = raw[name].float()
        if f"{name}_scale_inv" in raw:
            scales = raw[f"{name}_scale_inv"]
            weight = weight * scales.repeat_interleave(32, 0).repeat_interleave(16, 1)
        exact = weight.double() + torch.tensor(delta)
        close = (tensor.double() - exact).abs() <= exact.abs() * 2.0**-8 * 1.001
        assert bool(close.all()), name
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    lock = json.loads((out / "plait.lock").read_text())
    assert lock["options"]["dequantize"] is True
    assert plait.verify(out).ok


@pytest.mark.parametrize(
    ("scale", "factor"),
    [(torch.tensor(0.3), 0.3), (torch.tensor([0.3]), 0.3), (torch.tensor([[125]], dtype=torch.uint8), 0.25)],
)
@pytest.mark.parametrize("codes", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_one_scale_for_a_whole_tensor_and_scales_that_are_exponents(scale, factor, codes, tmp_path):
    values = torch.randn(6, 10).to(codes)
    (tmp_path / "base").mkdir()
    tensors = {"up.weight": values, "up.weight_scale_inv": scale, "other.weight": torch.ones(6, 10)}
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    config = {"quantization_config": {"quant_method": "fp8"}, "dtype": "float32", "tie_word_embeddings": False}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    adapter = write_adapter(tmp_path / "a", {"other": Linear(6, 10)}).folder
    out = plait.bake([adapter], base=tmp_path / "base", dequantize=True, out=tmp_path / "out").folder
    assert torch.equal(load_file(out / "model.safetensors")["up.weight"], values.float() * torch.tensor(factor))


def test_workers_and_blocks_change_no_byte(tmp_path, monkeypatch):
    base = gpt_oss(tmp_path / "base")
    adapter = write_adapter(tmp_path / "a", TARGETS, r=4).folder
    made = []
    for workers, block in ((1, 1 << 20), (3, 70)):
        monkeypatch.setattr(files, "TENSOR_BLOCK_ELEMENTS", block)
        out = plait.bake([adapter], base=base, dequantize=True, workers=workers, out=tmp_path / str(workers)).folder
        made.append({p.name: load_file(p) for p in sorted(out.glob("*.safetensors"))})
    for name, tensors in made[0].items():
        for tensor in tensors:
            if not tensor.endswith(("q_proj.weight", "k_proj.weight")):  # sums may be blocked otherwise
                assert torch.equal(tensors[tensor], made[1][name][tensor]), tensor


def test_adapters_of_dequantized_experts(tmp_path):
    """The parameter behind `…_blocks` and `…_scales` is a target like any other."""
    from plait.adapters.layouts import Parameter
    from plait.adapters.lowrank import LowRank

    base = gpt_oss(tmp_path / "base")
    torch.manual_seed(1)
    slices = [LowRank(torch.randn(2, 64), torch.randn(64, 2)) for _ in range(3)]
    a, b = Parameter(64, 64, 3).pack(slices)
    path = "base_model.model.model.layers.0.mlp.experts"
    (tmp_path / "a").mkdir()
    save_file({f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}, tmp_path / "a" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_parameters": ["mlp.experts.gate_up_proj"]}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "x/y"}))
    out = plait.bake([tmp_path / "a"], base=base, dequantize=True, dtype="float32", out=tmp_path / "out").folder
    name = "model.layers.0.mlp.experts.gate_up_proj"
    plain = tf.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).get_parameter(name)
    (found,) = (t[name] for p in out.glob("*.safetensors") if name in (t := load_file(p)))
    deltas = torch.stack([(s.b @ s.a).mT for s in slices])
    torch.testing.assert_close(found, plain.detach() + deltas, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("bitsandbytes", "bitsandbytes unpacks its weights with kernels of its own"),
        ("compressed-tensors", "known to the compressed-tensors library alone"),
        ("gptq", "transformers has no way back from it"),
        ("bitnet", "does not dequantize it on a processor"),
    ],
)
def test_what_cannot_be_dequantized_is_refused_with_the_reason(method, reason, tmp_path):
    base = fp8_llama(tmp_path / "base")
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": {"quant_method": method}}
    (base / "config.json").write_text(json.dumps(config))
    adapter = write_adapter(tmp_path / "a", TARGETS).folder
    with pytest.raises(
        PlanError, match=rf"quantized \({method}, in config\.json\).*--dequantize knows fp8 and mxfp4: .*{reason}"
    ):
        plait.bake([adapter], base=base, dequantize=True, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_the_flag_it_is_named(tmp_path):
    base = fp8_llama(tmp_path / "base")
    adapter = write_adapter(tmp_path / "a", TARGETS).folder
    with pytest.raises(PlanError, match=r"quantized \(fp8, in config\.json\).*bake --dequantize"):
        plait.bake([adapter], base=base, out=tmp_path / "out")


def test_tensors_without_a_plain_form_are_all_named(tmp_path):
    base = fp8_llama(tmp_path / "base")
    for path in base.glob("*.safetensors"):
        tensors = load_file(path)
        odd = {n: torch.ones(3, 3) if n.endswith("v_proj.weight_scale_inv") else t for n, t in tensors.items()}
        save_file({n: t for n, t in odd.items() if not n.endswith("q_proj.weight_scale_inv")}, path)
    index = json.loads((base / "model.safetensors.index.json").read_text())
    index["weight_map"].pop("model.layers.0.self_attn.q_proj.weight_scale_inv")
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    adapter = write_adapter(tmp_path / "a", TARGETS).folder
    with pytest.raises(PlanError) as caught:
        plait.bake([adapter], base=base, dequantize=True, out=tmp_path / "out")
    message = str(caught.value)
    assert "2 tensors cannot be dequantized here" in message
    assert "8-bit floats without a weight_scale_inv" in message
    assert "with scales [3, 3] for blocks of 32 × 16" in message


def test_the_way_out_for_gguf(tmp_path):
    """What the refusal says is what transformers needs: without the configuration it loads the file and refuses to save it."""
    gguf = pytest.importorskip("gguf")
    folder = tmp_path / "base"
    folder.mkdir()
    writer = gguf.GGUFWriter(str(folder / "tiny.gguf"), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(96)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(32)
    writer.add_vocab_size(32)
    shapes = {"token_embd": (32, 64), "output": (32, 64)}
    attention = {"attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64)}
    block = attention | {"ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96)}
    torch.manual_seed(0)
    for name, shape in (shapes | {f"blk.0.{n}": s for n, s in block.items()}).items():
        codes = gguf.quants.quantize(torch.randn(shape).numpy(), gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(f"{name}.weight", codes, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", torch.ones(64).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    adapter = write_adapter(tmp_path / "a", TARGETS).folder
    message = r"gguf_file='tiny\.gguf', quantization_config=GgufConfig\(dequantize=True\)\), then save_pretrained"
    with pytest.raises(AdapterError, match=message):
        plait.bake([adapter], base=folder, dequantize=True, out=tmp_path / "out")
    settings = tf.GgufConfig(dequantize=True)
    plain = tf.AutoModelForCausalLM.from_pretrained(folder, gguf_file="tiny.gguf", quantization_config=settings)
    plain.save_pretrained(tmp_path / "plain")
    out = plait.bake([adapter], base=tmp_path / "plain", out=tmp_path / "out").folder
    assert tf.AutoModelForCausalLM.from_pretrained(out).dtype == plain.dtype
