"""What plait expects of PEFT beyond its documented use. A test that fails names what a release has changed."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from plait.libraries.peft import scalings
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
