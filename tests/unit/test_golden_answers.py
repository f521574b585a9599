"""Answers of tiny models with fixed weights, kept in tests/golden: they may change only with ANSWERS_VERSION.

`python -m tests.unit.test_golden_answers` writes them again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from plait.evaluation.scores import ANSWERS_VERSION
from plait.evaluation.scoring import answer_examples
from plait.tasks.examples import Examples
from plait.tasks.inputs import Example
from plait.tasks.kinds import KINDS
from tests.language_models import WORDS, label, language_model, tokenizer
from tests.text_classifiers import encoder

FILE = Path(__file__).parents[1] / "golden" / "answers.json"
CHANGED = "answers changed: raise ANSWERS_VERSION and regenerate (python -m tests.unit.test_golden_answers)"
COMMON = {"name": "t", "data": {"path": "x"}, "splits": {"test": "x"}, "prompt": "x", "target": "x"}
CHOICES = ("red", "very blue")
ASKED: dict[str, dict[str, Any]] = {
    "classification": {"kind": "classification", "labels": CHOICES},
    "classification, tokens": {"kind": "classification", "labels": CHOICES, "length": "tokens"},
    "classification, bytes": {"kind": "classification", "labels": CHOICES, "length": "bytes"},
    "classification, calibrated": {"kind": "classification", "labels": CHOICES, "calibrated": True},
    "multiple_choice": {"kind": "multiple_choice", "choices": "c"},
    "generation": {"kind": "generation", "max_new_tokens": 4},
    "perplexity": {"kind": "perplexity"},
    "sequence_classification": {"kind": "sequence_classification", "labels": CHOICES},
}


def filled(model: Any) -> Any:
    """Set every weight by a formula of integers."""
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            places = torch.arange(parameter.numel(), dtype=torch.int64)
            values = ((places * 7919 + number * 104729) * 2654435761 % 2147483647 % 2001 - 1000).double() / 1000
            scale = 1.0 if parameter.ndim == 1 else 2 / parameter.shape[-1] ** 0.5
            parameter.copy_((values * scale).reshape(parameter.shape))
    return model.eval()


def seq2seq() -> T5ForConditionalGeneration:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": len(tokenizer())}
    return T5ForConditionalGeneration(T5Config(**sizes, pad_token_id=0, eos_token_id=2, decoder_start_token_id=0))


def answers() -> dict[str, list[dict[str, Any]]]:
    found = {}
    for side, causal in (("causal", filled(language_model())), ("encoder-decoder", filled(seq2seq()))):
        for name, fields in ASKED.items():
            head = fields["kind"] == "sequence_classification"
            if head and side != "causal":
                continue
            task: Any = KINDS[fields["kind"]].model_validate({**COMMON, **({} if head else {"delimiter": " "}), **fields})
            ranked = fields["kind"] in ("classification", "multiple_choice", "sequence_classification")
            items = [Example.of(f"sort {w} :", label("sort", w), CHOICES if ranked else ()) for w in WORDS[::4]]
            examples = Examples(task, "test", tuple(items), "sort N/A :" if fields.get("calibrated") else None)
            model = filled(encoder()) if head else causal
            made = answer_examples(model, tokenizer(), examples, batch_size=4)
            found[f"{side}: {name}"] = [a.model_dump(mode="json", include={"given", "scores", "tokens"}) for a in made]
    return found


def test_answers_are_those_of_this_version():
    golden = json.loads(FILE.read_text(encoding="utf-8"))
    assert golden["version"] == ANSWERS_VERSION, "regenerate: python -m tests.unit.test_golden_answers"
    found = answers()
    assert found.keys() == golden["answers"].keys(), CHANGED
    for name, rows in golden["answers"].items():
        for row, made in zip(rows, found[name], strict=True):
            assert (made["given"], made["tokens"]) == (row["given"], row["tokens"]), f"{name}: {CHANGED}"
            assert made["scores"] == pytest.approx(row["scores"], rel=1e-4, abs=1e-4), f"{name}: {CHANGED}"


if __name__ == "__main__":
    FILE.write_text(json.dumps({"version": ANSWERS_VERSION, "answers": answers()}, indent=1) + "\n", encoding="utf-8")
