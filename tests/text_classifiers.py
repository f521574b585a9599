"""A small encoder without a head, word tasks, and adapters with a head of their own that were really trained for them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification, BertModel

from tests.language_models import WORDS, tokenizer

LABELS = {"sort": ["red", "blue"], "rate": ["good", "bad"], "third": ["red", "good", "blue"]}


def label(task: str, word: str) -> str:
    """Return the right label: by halves for `sort`, by parity for `rate`, by the rest of three for `third`."""
    number = int(word[1:])
    return LABELS[task][{"sort": number // 12, "rate": number % 2, "third": number % 3}[task]]


def encoder(labels: int = 2) -> BertForSequenceClassification:
    """Return the encoder with a new head; the same encoder for any number of labels."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        initializer_range=0.3,
        num_labels=labels,
    )
    body = BertModel(config)
    model = BertForSequenceClassification(config)
    model.bert = body
    return model.eval()


def save_encoder(folder: Path) -> Path:
    encoder().bert.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def train_classifier(folder: Path, task: str, steps: int = 60) -> Path:
    """Train a LoRA adapter with its head (`modules_to_save`) on all words, and save it as PEFT does."""
    tokens, names = tokenizer(), LABELS[task]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value", "dense"], task_type="SEQ_CLS")
    plain = encoder(len(names))
    torch.manual_seed(sum(map(ord, task)))
    torch.nn.init.normal_(plain.classifier.weight, std=0.5)  # heads of different tasks do not resemble each other
    model = get_peft_model(plain, config)
    ids = torch.tensor([tokens(f"very {word} :")["input_ids"] for word in WORDS])
    targets = torch.tensor([names.index(label(task, word)) for word in WORDS])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=targets).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return folder


def write_classification(folder: Path, task: str, **changes: object) -> Path:
    """Write a `sequence_classification` task over all words."""
    data = folder / task
    data.mkdir(parents=True, exist_ok=True)
    (data / "test.jsonl").write_text("".join(json.dumps({"word": w, "label": label(task, w)}) + "\n" for w in WORDS))
    content = {
        "name": task,
        "kind": "sequence_classification",
        "data": {"path": task},
        "splits": {"test": "test.jsonl"},
        "prompt": "very {{ word }} :",
        "target": "{{ label }}",
        "labels": LABELS[task],
        **changes,
    }
    file = folder / f"{task}.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def with_head(adapter: Path, head: Path, out: Path) -> Path:
    """Write an adapter with the head of another."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(adapter, out)
    own, other = (load_file(p / "adapter_model.safetensors") for p in (adapter, head))
    config = json.loads((head / "adapter_config.json").read_text())
    layers = config["modules_to_save"]
    body = {n: t for n, t in own.items() if not any(layer in n for layer in layers)}
    mine = json.loads((adapter / "adapter_config.json").read_text())
    mine["modules_to_save"] = config["modules_to_save"]
    (out / "adapter_config.json").write_text(json.dumps(mine))
    save_file(body | {n: t for n, t in other.items() if any(layer in n for layer in layers)}, out / "adapter_model.safetensors")
    return out
