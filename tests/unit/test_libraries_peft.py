"""What plait expects of PEFT beyond its documented use. A test that fails names what a release has changed."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
import transformers
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn

from plait.adapters.config import KNOWN_KEYS
from plait.libraries.peft import EXPERT_LAYERS, LABELED_TASKS, TASK_HEADS, reads_past_adapters, scalings
from plait.libraries.transformers.kinds import AUTO_MODELS
from tests.language_models import language_model


def test_a_lora_layer_holds_its_scalings_by_adapter_and_reads_them_at_every_call():
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(language_model(), config).eval()
    layers = {name: found for name, m in model.named_modules() if (found := scalings(m)) is not None}
    assert len(layers) == 2
    assert all(name.endswith("q_proj") and found == {"default": 4.0} for name, found in layers.items())
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = model(ids).logits
        for found in layers.values():
            found["default"] = 0.0
        after = model(ids).logits
        with model.disable_adapter():
            bare = model(ids).logits
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, bare)
    assert scalings(nn.Linear(2, 2)) is None


@pytest.mark.parametrize("task", TASK_HEADS)
def test_a_task_adds_its_head_to_what_is_saved(task):
    config = transformers.BertConfig(
        vocab_size=37, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    model = getattr(transformers, AUTO_MODELS[task]).from_config(config)
    wrapped = get_peft_model(model, LoraConfig(task_type=task, target_modules=["query"]))
    assert set(TASK_HEADS[task]) <= set(wrapped.peft_config["default"].modules_to_save)


def test_task_types_are_pefts():
    assert {*TASK_HEADS, *LABELED_TASKS, *AUTO_MODELS} <= set(TaskType.__members__)


def test_layers_of_mamba_are_refused():
    config = transformers.MambaConfig(vocab_size=37, hidden_size=16, state_size=4, num_hidden_layers=1)
    for layer in ("conv1d", "out_proj"):
        assert reads_past_adapters(config.model_type, layer)
        with pytest.raises(ValueError, match="incompatible with Mamba"):
            get_peft_model(transformers.MambaForCausalLM(config), LoraConfig(target_modules=[layer]))
    assert not reads_past_adapters(config.model_type, "in_proj")
    assert not reads_past_adapters("llama", "out_proj")


def test_names_that_peft_takes_for_fused_experts():
    conversion = pytest.importorskip("peft.utils.transformers_weight_conversion")
    meant = {name for names in getattr(conversion, "_MOE_TARGET_MODULE_MAPPING", {}).values() for name in names}
    assert meant <= set(EXPERT_LAYERS)


def test_every_key_of_the_configuration_is_known():
    """A new one may change what the factors mean: it belongs among those that are read, refused or known to change nothing."""
    assert {field.name for field in fields(LoraConfig)} <= KNOWN_KEYS
