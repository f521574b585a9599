"""A small language model that knows nothing, two word tasks, and adapters that were really trained for them.

A task gives every word one of two labels; the model sees `sort WORD :` or `rate WORD :` and says the label. The untrained
base guesses, an adapter knows its own task.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import plait
from plait.tuning.pipeline import TuneResult
from tests.kept import copy_of

WORDS = [f"w{i}" for i in range(24)]
LABELS = {"sort": ["red", "blue"], "rate": ["good", "bad"]}
_SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
_REST = ["sort", "rate", ":", "very", "N/A", *LABELS["sort"], *LABELS["rate"]]


def label(task: str, word: str) -> str:
    """Return the right label: by halves for `sort`, by parity for `rate`."""
    number = int(word[1:])
    return LABELS[task][number // 12 if task == "sort" else number % 2]


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate([*_SPECIAL, *_REST, *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def language_model(seed: int = 0, **config: object) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    wanted = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings = LlamaConfig(
        vocab_size=len(_SPECIAL) + len(_REST) + len(WORDS),
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **{**wanted, **config},
    )
    model = LlamaForCausalLM(settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # the initialization is so small that all words look alike
    return model.eval()


def save_model(folder: Path) -> Path:
    language_model().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def train_adapter(folder: Path, task: str, steps: int = 60, **changes: Any) -> Path:
    """Train a LoRA adapter on all words, and save it as PEFT does; what is given in `changes` replaces keys of its config."""
    described = json.dumps([task, steps, changes, torch.get_num_threads()], sort_keys=True)
    name = f"{task}-{zlib.crc32(described.encode()):08x}"
    copy_of(name, partial(_train_adapter, task=task, steps=steps, changes=changes), folder)
    torch.manual_seed(0)  # what is drawn next is the same where the adapter was there already
    return folder


def _train_adapter(folder: Path, task: str, steps: int, changes: dict[str, Any]) -> None:
    torch.manual_seed(sum(map(ord, task)))
    tokens = tokenizer()
    plain = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    config = LoraConfig(**{**plain, **changes})
    model = get_peft_model(language_model(), config)
    ids = torch.tensor([tokens(f"{task} {word} : {label(task, word)}")["input_ids"] for word in WORDS])
    labels = ids.clone()
    labels[:, :-1] = -100
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)


def train_pair(folder: Path, **settings: Any) -> Path:
    """Write a base, and its adapters `sort` and `rate`; `settings` as `train_adapter` takes them."""
    save_model(folder / "base")
    for task in ("sort", "rate"):
        train_adapter(folder / task, task, **settings)
    return folder


def write_task(folder: Path, task: str, *, rows: Sequence[str] = WORDS, **changes: object) -> Path:
    """Write a task's data and file: the words as test split; what is given in `changes` replaces keys of the file."""
    data = folder / task
    data.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"word": word, "label": label(task, word)}) for word in rows]
    (data / "test.jsonl").write_text("\n".join(lines) + "\n")
    content = {
        "name": task,
        "kind": "classification",
        "data": {"path": task},
        "splits": {"test": "test.jsonl"},
        "prompt": f"{task} {{{{ word }}}} :",
        "delimiter": " ",
        "target": "{{ label }}",
        "labels": LABELS[task],
        **changes,
    }
    file = folder / f"{task}.yaml"
    file.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}, sort_keys=False))
    return file


def tune_pair(place: Path, out: Path, spec: dict[str, Any], tasks: Sequence[Path], **changes: Any) -> TuneResult:
    """Tune the adapters `sort` and `rate` of a folder; `tune` among the changes is put on top of `spec`."""
    spec = {**spec, **changes.pop("tune", {})}
    base = str(place / "base")
    return plait.tune([place / "sort", place / "rate"], tasks=tasks, out=out, base_model=base, tune=spec, **changes)
