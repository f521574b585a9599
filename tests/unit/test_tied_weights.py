"""Which parameters are one and the same: as transformers names them, or as its models of before version 5 have them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers

from plait.libraries.transformers.conversion import tied_parameters

SIZES = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 12}
T5 = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 12}


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (transformers.LlamaForCausalLM, transformers.LlamaConfig(tie_word_embeddings=True, **SIZES)),
        (transformers.LlamaForCausalLM, transformers.LlamaConfig(tie_word_embeddings=False, **SIZES)),
        (transformers.T5ForConditionalGeneration, transformers.T5Config(**T5)),
    ],
    ids=["llama tied", "llama", "t5"],
)
def test_names_and_objects_say_the_same(kind, config):
    with torch.device("meta"):
        model = kind(config)
    nameless = SimpleNamespace(tie_weights=model.tie_weights, named_parameters=model.named_parameters)
    assert tied_parameters(nameless) == tied_parameters(model)
    assert bool(tied_parameters(model)) == config.tie_word_embeddings
