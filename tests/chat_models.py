"""A tokenizer of single bytes with a chat template, and a small language model beside it: every token is a character."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|end|>", "<|pad|>", "<s>"]


def byte_tokenizer(template: str | None = CHATML, **special: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer; `eos_token`, `pad_token`, `bos_token` are of `SPECIAL`, and by default only the end is set."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(SPECIAL)
    made = PreTrainedTokenizerFast(tokenizer_object=inner, **{"eos_token": "<|im_end|>", **special})
    made.chat_template = template
    return made


def save_chat_model(folder: Path, *, seed: int = 0, tokenizer: PreTrainedTokenizerFast | None = None, **config: Any) -> Path:
    """Write a model of random weights and its tokenizer."""
    tokens = tokenizer or byte_tokenizer()
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings = LlamaConfig(
        vocab_size=len(tokens), max_position_embeddings=512, pad_token_id=None, bos_token_id=None,
        eos_token_id=tokens.eos_token_id, **{**sizes, **config},
    )  # fmt: skip
    model = LlamaForCausalLM(settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # the initialization is so small that all characters look alike
    model.save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder


def write_rows(file: Path, rows: Sequence[dict[str, Any]]) -> Path:
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return file


def questions(count: int = 12) -> list[dict[str, Any]]:
    return [{"question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(count)]
