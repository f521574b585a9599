"""Tasks asked of encoder-decoder models (T5, BART): against the model alone, and with adapters that were trained for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

import plait
from plait.errors import TaskError
from plait.evaluation.scoring import answer_examples
from plait.tasks.examples import read_examples
from plait.tasks.loading import load_task
from tests.language_models import LABELS, WORDS, label, tokenizer, write_task

# PEFT's and torch's own
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": 40}


def closing(template: str) -> PreTrainedTokenizerFast:
    """Return the word tokenizer with what its family puts around texts."""
    tokens = tokenizer()
    tokens._tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
    return tokens


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(
        **TOKENS, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0, initializer_factor=2.0
    )
    return T5ForConditionalGeneration(config).eval()


def bart() -> BartForConditionalGeneration:
    """Positions are learned: padding must not shift them. The decoder begins with </s> <s>."""
    torch.manual_seed(0)
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2), ("attention_heads", 4))}
    sizes |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "d_model": 32, "max_position_embeddings": 64, "init_std": 0.4}
    config = BartConfig(**TOKENS, **sizes, decoder_start_token_id=2, forced_bos_token_id=1, forced_eos_token_id=None)
    return BartForConditionalGeneration(config).eval()


FAMILIES: dict[str, tuple[Callable[[], torch.nn.Module], str, list[int]]] = {
    "t5": (t5, "$A </s>", [0]),
    "bart": (bart, "<s> $A </s>", [2, 1]),
}


def asked(folder: Path, **changes: object) -> object:
    """Return examples of prompts of different lengths and answers of one and two words."""
    prompt = "sort {% if word in ['w1', 'w7'] %}very very {% endif %}{{ word }} :"
    labels = ["red", "very blue", "good bad red"]
    wanted = {"prompt": prompt, "labels": labels, "target": "red", **changes}
    return read_examples(load_task(write_task(folder, "sort", rows=WORDS[:9], **wanted)), "test")


def literal(model: torch.nn.Module, prompt: list[int], begin: list[int], message: list[int]) -> float:
    """Read one pair whole."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([begin + message[:-1]])).logits
    logp = logits[0].double().log_softmax(-1)
    return sum(float(logp[len(begin) - 1 + k, token]) for k, token in enumerate(message))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_log_likelihoods_are_the_models_own(tmp_path, family, batch_size):
    make, template, begin = FAMILIES[family]
    model, tokens = make(), closing(template)
    examples = asked(tmp_path)
    for example, found in zip(examples.items, answer_examples(model, tokens, examples, batch_size=batch_size), strict=True):
        prompt = tokens(example.prompt)["input_ids"]
        assert prompt[-1] == 2
        message = [tokens(text, add_special_tokens=False)["input_ids"] for text in example.choices]
        expected = [literal(model, prompt, begin, words) for words in message]
        assert found.scores == pytest.approx(expected, abs=2e-4)
        assert found.given == example.choices[expected.index(max(expected))]
        assert found.tokens == (1, 2, 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_what_the_model_says_alone(tmp_path, family):
    make, template, _ = FAMILIES[family]
    model, tokens = make(), closing(template)
    examples = asked(tmp_path, kind="generation", labels=None, max_new_tokens=5)
    found = answer_examples(model, tokens, examples, batch_size=4)
    for example, one in zip(examples.items, found, strict=True):
        ids = torch.tensor([tokens(example.prompt)["input_ids"]])
        with torch.no_grad():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, num_beams=1)
        assert one.given == tokens.decode(out[0], skip_special_tokens=True)
    assert len({a.given for a in found}) > 1
    longest = max(range(len(found)), key=lambda i: len(found[i].given))
    word = found[longest].given.split()[-1]
    stopped = asked(tmp_path, kind="generation", labels=None, max_new_tokens=5, stop=[word])
    cut = answer_examples(model, tokens, stopped, batch_size=4)[longest].given
    assert cut == found[longest].given[: found[longest].given.index(word)]


def test_only_the_longer_side_must_fit(tmp_path):
    """BART reads 64 tokens in the encoder, and 64 in the decoder."""
    model, tokens = bart(), closing("<s> $A </s>")
    long = {"prompt": "very " * 55 + "{{ word }} :", "kind": "generation", "labels": None}
    answer_examples(model, tokens, asked(tmp_path, max_new_tokens=20, **long), batch_size=4)
    with pytest.raises(TaskError, match=r"9 of 9 texts are longer than the model's context of 64 tokens .the longest has 65"):
        answer_examples(model, tokens, asked(tmp_path, max_new_tokens=64, **long), batch_size=4)


def train(folder: Path, task: str) -> Path:
    """Train a LoRA adapter on all words, and save it as PEFT does."""
    tokens, model = closing("$A </s>"), t5()
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q", "v", "wi", "wo"], task_type="SEQ_2_SEQ_LM")
    model = get_peft_model(model, config)
    ids = torch.tensor([tokens(f"{task} {word} :")["input_ids"] for word in WORDS])
    targets = torch.tensor([tokens(label(task, word))["input_ids"] for word in WORDS])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        model(input_ids=ids, labels=targets).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return folder


def by_peft(base: Path, adapter: Path | None, task: str) -> float:
    """Score a task with PEFT alone: the likelier of two labels of one word."""
    model, tokens = AutoModelForSeq2SeqLM.from_pretrained(base), closing("$A </s>")
    model = (model if adapter is None else PeftModel.from_pretrained(model, str(adapter))).eval()
    ids = torch.tensor([tokens(f"{task} {word} :")["input_ids"] for word in WORDS])
    with torch.no_grad():
        logits = model(input_ids=ids, decoder_input_ids=torch.zeros(len(WORDS), 1, dtype=torch.long)).logits[:, 0]
    choices = [tokens.convert_tokens_to_ids(word) for word in LABELS[task]]
    right = [LABELS[task][int(row[choices].argmax())] == label(task, word) for row, word in zip(logits, WORDS, strict=True)]
    return sum(right) / len(WORDS)


def test_evaluation_of_a_merge(tmp_path):
    """Classification and generation; base, singles and merge as PEFT has them, from memory and from files."""
    t5().save_pretrained(tmp_path / "base")
    closing("$A </s>").save_pretrained(tmp_path / "base")
    adapters = {name: train(tmp_path / name, name) for name in ("sort", "rate")}
    tasks = [write_task(tmp_path / "tasks", name) for name in adapters]
    message = [write_task(tmp_path / "generated", name, kind="generation", labels=None, max_new_tokens=3) for name in adapters]
    about = {"base": tmp_path / "base", "workspace": None}
    found = plait.evaluate(adapters, weights=[0.7, 0.6], tasks=tasks, **about)
    merged = plait.merge(adapters, weights=[0.7, 0.6], base_model=str(tmp_path / "base"), out=tmp_path / "out").folder
    for task in found.tasks:
        assert task.single == by_peft(tmp_path / "base", adapters[task.task], task.task) == 1.0
        assert task.base == by_peft(tmp_path / "base", None, task.task)
        assert task.merged == by_peft(tmp_path / "base", merged, task.task)
        assert task.base < 0.8
    saved = plait.evaluate(str(merged), tasks=tasks, **about)
    assert [t.merged for t in saved.tasks] == [t.merged for t in found.tasks]
    generated = plait.evaluate(adapters, weights=[0.7, 0.6], tasks=message, **about)
    assert [t.single for t in generated.tasks] == [1.0, 1.0], "a word, and then the end"
    assert all(t.base == 0.0 for t in generated.tasks)
