"""The demo's adapters on SmolLM2-135M-Instruct, in float32: the merged adapter is both adapters active."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import plait
from tests.demo import DEMO, base_model

WEIGHTS = {"sentiment": 0.7, "supersense": 0.5, "langid": -0.2}
TEXTS = ["Which language is this text: Bitte eine Zahl eingeben.", "Is this positive? I loved every minute."]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_logits_of_the_merged_adapter(tmp_path):
    base = base_model()
    folders = {name: DEMO / "adapters" / name for name in WEIGHTS}
    merged = plait.merge(folders, weights=WEIGHTS, out=tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(base)
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folders["sentiment"], adapter_name="sentiment"
    ).eval()
    for name in ("supersense", "langid"):
        model.load_adapter(folders[name], name)
    report = model.load_adapter(merged.folder, "merged")
    assert not report.missing_keys or not [k for k in report.missing_keys if "lora" in k]
    assert not report.unexpected_keys
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            for name, weight in WEIGHTS.items():
                module.scaling[name] *= weight
    with torch.no_grad():
        model.base_model.set_adapter(list(WEIGHTS))
        together = model(**batch).logits
        model.set_adapter("merged")
        alone = model(**batch).logits
        with model.disable_adapter():
            plain = model(**batch).logits
    seen = batch["attention_mask"].bool()
    assert (together - plain)[seen].abs().max() > 1, "the adapters do something"
    assert (together - alone)[seen].abs().max() < 1e-4
