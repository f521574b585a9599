"""A baked model gives the logits of the adapters on the base, for every shape of model and kind of layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import plait
from plait.errors import PlanError
from tests.baking_models import adapter_output, make_adapter, run, save_model

# PEFT and transformers on layers that they cover with warnings of their own
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
    pytest.mark.filterwarnings("ignore::UserWarning:transformers"),
]

_LM, _SEQ, _CLS = tf.AutoModelForCausalLM, tf.AutoModelForSeq2SeqLM, tf.AutoModelForSequenceClassification
_ATTENTION = ["q_proj", "v_proj"]
_EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
CASES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "llama, all linear": ("llama", _LM, {"target_modules": "all-linear"}),
    "llama, embedding and head": ("llama", _LM, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "llama tied, linear": ("llama tied", _LM, {"target_modules": _ATTENTION}),
    "llama tied, embedding": ("llama tied", _LM, {"target_modules": ["q_proj", "embed_tokens"]}),
    "llama tied, head": ("llama tied", _LM, {"target_modules": ["q_proj", "lm_head"]}),
    "llama tied, both": ("llama tied", _LM, {"target_modules": ["embed_tokens", "lm_head"]}),
    "llama, patterns and rslora": (
        "llama",
        _LM,
        {"target_modules": _ATTENTION, "use_rslora": True, "rank_pattern": {"v_proj": 5}, "alpha_pattern": {"q_proj": 3}},
    ),
    "gpt2, Conv1D": ("gpt2", _LM, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "gpt2, Conv1D and embedding": ("gpt2", _LM, {"target_modules": ["c_attn", "wte"], "fan_in_fan_out": True}),
    "qwen3 moe, experts": ("qwen3 moe", _LM, _EXPERTS),
    "mixtral, experts": ("mixtral", _LM, _EXPERTS),
    "bert, classification": ("bert", _CLS, {"target_modules": ["query", "value"]}),
    "t5": ("t5", _SEQ, {"target_modules": ["q", "v", "wo"]}),
    "t5, one use of four": ("t5", _SEQ, {"target_modules": r"encoder\.embed_tokens|.*\.q"}),
    "t5, two uses of four": ("t5", _SEQ, {"target_modules": r"decoder\.embed_tokens|lm_head|.*\.q"}),
    "t5, all uses, each otherwise": ("t5", _SEQ, {"target_modules": ["shared", "embed_tokens", "lm_head", "q"]}),
    "t5, the owner alone": ("t5", _SEQ, {"target_modules": ["shared", "q"]}),
    "whisper": ("whisper", tf.AutoModelForSpeechSeq2Seq, {"target_modules": ["q_proj", "fc1"]}),
    "whisper, convolutions": ("whisper", tf.AutoModelForSpeechSeq2Seq, {"target_modules": ["conv1", "conv2", "q_proj"]}),
    "vit": ("vit", tf.AutoModelForImageClassification, {"target_modules": ["q_proj", "fc1"]}),
    "vit, convolution": ("vit", tf.AutoModelForImageClassification, {"target_modules": ["projection", "q_proj"]}),
    "lora_bias": ("bert", _CLS, {"target_modules": ["query", "value"], "lora_bias": True}),
}


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(request, tmp_path_factory):
    kind, auto, config = CASES[request.param]
    folder = tmp_path_factory.mktemp("case")
    base = save_model(kind, folder / "base")
    adapters = {
        "a": make_adapter(base, folder / "a", 10, auto, **config),
        "b": make_adapter(base, folder / "b", 20, auto, **config),
    }
    return base, adapters, auto


def reload(folder: Path, auto: Any, **options: Any) -> Any:
    """Load a baked model; nothing may be missing or left over."""
    model, report = auto.from_pretrained(folder, output_loading_info=True, dtype=torch.float32, **options)
    assert not report["missing_keys"], report
    assert not report["unexpected_keys"], report
    assert not report["mismatched_keys"], report
    return model.eval()


def test_logits_equal_the_adapters_on_the_base(case, tmp_path):
    base, adapters, auto = case
    weights = {"a": 0.7, "b": -0.4}
    expected = adapter_output(base, adapters, weights, auto)
    result = plait.bake(adapters, base=base, weights=weights, out=tmp_path / "out")
    torch.testing.assert_close(run(reload(result.folder, auto)), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(run(reload(base, auto)), expected, atol=1e-3), "the adapters must matter"


def test_one_adapter(case, tmp_path):
    base, adapters, auto = case
    expected = adapter_output(base, {"a": adapters["a"]}, {"a": 1.0}, auto)
    result = plait.bake([adapters["a"]], base=base, out=tmp_path / "out")
    torch.testing.assert_close(run(reload(result.folder, auto)), expected, rtol=1e-5, atol=1e-5)
    lock = json.loads((result.folder / "plait.lock").read_text())
    assert lock["kind"] == "bake"


def test_an_expert_that_is_missing_in_the_checkpoint_is_told(tmp_path):
    from safetensors.torch import load_file, save_file

    base = save_model("qwen3 moe", tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "a", 1, _LM, **_EXPERTS)
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.3.down_proj.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PlanError, match=r"1\.mlp\.experts\.down_proj: .* has tensors for 48 of its delta's 64 rows"):
        plait.bake([adapter], base=base, out=tmp_path / "out")
