"""Encoders on labels per word, numbers, pairs and similarity: every side against PEFT; moments, tuning and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import PeftModel
from scipy.stats import pearsonr, spearmanr
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    PreTrainedTokenizerFast,
)

import plait
from plait.adapters.adapter import Adapter
from plait.calibration.inputs import encode_texts
from plait.calibration.passages import Reader
from plait.calibration.texts import read_texts
from plait.mixture import Mixture
from plait.tasks.inputs import Words
from plait.tasks.loading import load_task
from plait.tuning.teaching import make_lesson
from tests.command_line import exit_code
from tests.text_classifiers import with_head
from tests.two_adapters import NAMES, Folder, save_drawn, write_yaml

# PEFT's and torch's own
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c", "##a", "##b", "##c"]
TAGS = ["O", "B-X", "I-X"]
CLASSES = {"tags": BertForTokenClassification, "number": BertForSequenceClassification, "pairs": BertForSequenceClassification}
OUTPUTS = {"tags": 3, "number": 1, "pairs": 2}
TYPES = {"tags": "TOKEN_CLS", "number": "SEQ_CLS", "pairs": "SEQ_CLS", "likeness": "FEATURE_EXTRACTION"}


def pieces() -> PreTrainedTokenizerFast:
    """Return a tokenizer that cuts words into several pieces, and numbers the texts of a pair."""
    inner = Tokenizer(models.WordPiece({word: i for i, word in enumerate(PIECES)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, **names, model_input_names=["input_ids", "token_type_ids", "attention_mask"]
    )


def fresh(kind: str, outputs: int = 2) -> Any:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(PIECES),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=40,
        initializer_range=0.5,
        num_labels=outputs,
    )
    body = BertModel(config)
    if kind == "likeness":
        return body.eval()
    model = CLASSES[kind](config)
    model.bert.load_state_dict(body.state_dict(), strict=False)
    return model.eval()


SENTENCES = [["ab", "c", "bac", "a", "cab"], ["b", "abc"], ["cc", "a", "bca", "abca"], ["c", "aab", "b"], ["acb"], ["ba", "ca"]]


def rows(kind: str, name: str) -> list[dict[str, Any]]:
    """Return the data of a task: two tasks of a kind differ in what is right."""
    letter = {"one": "a", "two": "b"}[name]
    found = []
    for words in SENTENCES:
        count = float(sum(word.count(letter) for word in words))
        if kind == "tags":
            tags = [("B-X" if letter in word else "O") for word in words]
            found.append({"tokens": words, "ner": [TAGS.index(t) for t in tags]})
        else:
            label = ("few", "many")[count > 2]
            found.append({"text": " ".join(words), "other": words[-1], "score": count, "label": label})
    return found


def write(folder: Path, kind: str, name: str, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    own = rows(kind, name)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in own))
    pair = {"prompt": "{{ text }}", "second": "{{ other }}"}
    content: dict[str, Any] = {
        "tags": {"kind": "token_classification", "labels": TAGS, "words": "tokens", "tags": "ner", "metric": "word_accuracy"},
        "number": {"kind": "regression", "prompt": "{{ text }}", "target": "{{ score }}"},
        "pairs": {"kind": "sequence_classification", **pair, "target": "{{ label }}", "labels": ["few", "many"]},
        "likeness": {"kind": "sentence_similarity", **pair, "target": "{{ score }}"},
    }[kind]
    content |= {"name": name, "data": {"path": f"{name}.jsonl"}, "splits": {"test": {"rows": [0, len(own)]}}, **changes}
    return write_yaml(folder, name, content)


class World(Folder):
    """A base, and two adapters of every kind with what PEFT makes of them."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        fresh("likeness").save_pretrained(folder / "base")
        pieces().save_pretrained(folder / "base")
        for kind in TYPES:
            for name in NAMES:
                self.adapter(kind, name)
                write(folder / kind / "tasks", kind, name)

    def adapter(self, kind: str, name: str) -> Path:
        """Write an adapter whose factors are as drawn, and its head."""
        place = self.folder / kind / name
        if not place.is_dir():
            seed = 25 + 17 * (name == "two")  # adapters that differ in what they answer
            plain = fresh(kind, OUTPUTS.get(kind, 2))
            save_drawn(place, plain, seed, target_modules=["query", "value"], task_type=TYPES[kind])
        return place

    def evaluate(self, kind: str, **settings: Any) -> plait.Evaluation:
        wanted = {"tasks": self.tasks(kind), "base": self.folder / "base", "workspace": None, "batch_size": 4}
        return plait.evaluate(self.adapters(kind), **{**wanted, **settings})

    def peft(self, kind: str, adapter: Path) -> Any:
        return PeftModel.from_pretrained(fresh(kind, OUTPUTS.get(kind, 2)), str(adapter)).eval()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("encoders"))


@torch.no_grad()
def value(kind: str, name: str, model: Any) -> float:
    """Return the metric of a task as transformers and scipy have it, one text at a time."""
    tokens, own = pieces(), rows(kind, name)
    if kind == "tags":
        right = []
        for row in own:
            ids, first = [2], []
            for word in row["tokens"]:
                first.append(len(ids))
                ids += [PIECES.index(word[0]), *(PIECES.index(f"##{letter}") for letter in word[1:])]
            best = model(input_ids=torch.tensor([[*ids, 3]])).logits[0].argmax(-1).tolist()
            right += [best[at] == tag for at, tag in zip(first, row["ner"], strict=True)]
        return sum(right) / len(right)
    if kind == "number":
        given = [model(**tokens(r["text"], return_tensors="pt")).logits.item() for r in own]
        return float(pearsonr(given, [r["score"] for r in own]).statistic)
    if kind == "pairs":
        best = [model(**tokens(r["text"], r["other"], return_tensors="pt")).logits.argmax().item() for r in own]
        return sum(("few", "many")[b] == r["label"] for b, r in zip(best, own, strict=True)) / len(own)
    both = [[model(**tokens(r[c], return_tensors="pt")).last_hidden_state[0].mean(0) for c in ("text", "other")] for r in own]
    cosines = [torch.cosine_similarity(x, y, dim=0).item() for x, y in both]
    return float(spearmanr(cosines, [r["score"] for r in own]).statistic)


@pytest.mark.parametrize("kind", TYPES)
def test_every_side_is_what_peft_makes_of_it(world: World, tmp_path: Path, kind: str) -> None:
    """Base, single and merge, with the head of the task's own adapter: words of several tokens, pairs with their segments."""
    found = world.evaluate(kind, weights=[0.5, 0.5])
    merged = plait.merge(world.adapters(kind), weights=[0.5, 0.5], out=tmp_path / "out").folder
    values = set()
    for task in found.tasks:
        own = world.adapters(kind)[task.task]
        assert task.single == pytest.approx(value(kind, task.task, world.peft(kind, own)), abs=1e-6)
        bare = world.peft(kind, own)
        for parameter_name, parameter in bare.named_parameters():
            if "lora_B" in parameter_name:
                parameter.data.zero_()
        assert task.base == pytest.approx(value(kind, task.task, bare), abs=1e-6)
        model = world.peft(kind, merged if kind == "likeness" else with_head(merged, own, tmp_path / "mixed"))
        assert task.merged == pytest.approx(value(kind, task.task, model.eval()), abs=1e-6)
        values |= {task.base, task.single, task.merged}
    assert len(values) > 3


def test_a_pair_is_read_with_its_segments(world: World) -> None:
    """The planted bug itself: without the numbers of the two texts other answers come out."""
    tokens = pieces()
    model = world.peft("pairs", world.adapters("pairs")["one"])
    given = tokens("ab c", "bac", return_tensors="pt")
    plain = {k: v for k, v in given.items() if k != "token_type_ids"}
    assert not torch.allclose(model(**given).logits, model(**plain).logits, atol=1e-3)
    mixture = Mixture.load(world.folder / "base", [Adapter.open(p, n) for n, p in world.adapters("pairs").items()])
    task = load_task(world.tasks("pairs")[0])
    texts = read_texts(task, kind="split", count=3, seed=0, split="test")
    passages = encode_texts(mixture, texts, "one")
    with mixture.active({"one": 1.0}) as acting, torch.no_grad():
        found = Reader(acting, head=True).logits(passages)
        expected = torch.cat(
            [model(**tokens(p.first, p.second, return_tensors="pt")).logits for p in texts.prompts]  # type: ignore[union-attr]
        )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", TYPES)
def test_moments_are_taken_of_every_kind(world: World, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "merged"
    options = {"base_model": world.folder / "base", "calibration": {"count": 6}}
    tasks = [write(tmp_path / "tasks", kind, n, splits={"calibration": {"rows": [0, 6]}}) for n in NAMES]
    plait.merge(world.adapters(kind), method="regmean", tasks=tasks, out=out, **options)
    assert (out / "adapter_model.safetensors").is_file()


def test_labels_per_word_are_tuned_on(world: World, tmp_path: Path) -> None:
    tasks = [write(tmp_path / "tasks", "tags", n, splits={"calibration": {"rows": [0, 6]}}) for n in NAMES]
    for objective in ("distill", "gradient"):
        result = plait.tune(
            list(world.adapters("tags").values()),
            tasks=tasks,
            out=tmp_path / objective,
            base_model=str(world.folder / "base"),
            tune={"steps": 6, "objective": objective, "prompts": 3},
        )
        assert result.folder.is_dir()


def test_a_sentence_has_an_answer_per_word(world: World) -> None:
    """Distributions, right labels and losses of a text with labels per word, against transformers one text at a time."""
    name, tokens = "two", pieces()
    task = load_task(world.tasks("tags")[1])
    texts = read_texts(task, kind="split", count=3, seed=0, split="test")
    mixture = Mixture.load(world.folder / "base", [Adapter.open(p, n) for n, p in world.adapters("tags").items()])
    right = tuple(" ".join("B-X" if "b" in w else "O" for w in cast("Words", p).words) for p in texts.prompts)
    lesson = make_lesson(mixture, texts, name, right=right)
    model, rows = world.peft("tags", world.adapters("tags")[name]), []
    for p in texts.prompts:
        given = tokens(list(cast("Words", p).words), is_split_into_words=True, return_tensors="pt")
        with torch.no_grad():
            logits = model(**given).logits[0]
        rows.append(torch.stack([logits[given.word_ids().index(i)] for i in range(len(cast("Words", p).words))]))
    torch.testing.assert_close(lesson.answers.log_p, torch.cat(rows).log_softmax(-1), atol=1e-5, rtol=1e-5)
    assert lesson.targets == tuple(tuple(TAGS.index(tag) for tag in text.split()) for text in right)
    with mixture.active({name: 1.0}) as acting, torch.no_grad():
        outputs = lesson.outputs(acting, [2, 0])
    torch.testing.assert_close(outputs.logits, torch.cat([rows[2], rows[0]]), atol=1e-5, rtol=1e-5)
    assert outputs.targets is not None
    assert outputs.targets.tolist() == [*lesson.targets[2], *lesson.targets[0]]


@pytest.mark.parametrize("kind", ["number", "likeness"])
def test_numbers_have_no_divergence(world: World, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = [write(tmp_path / "tasks", kind, n, splits={"calibration": {"rows": [0, 6]}}) for n in NAMES]
    given = [*map(str, world.adapters(kind).values()), "--tasks", *map(str, tasks), "--base-id", str(world.folder / "base")]
    for command in (["tune", *given], ["merge", *given, "--scale", "auto"]):
        assert exit_code(*command, "-o", str(tmp_path / "out")) == 2
        assert "its answers are numbers, not distributions" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_check_counts_words_and_shows_pairs(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    found = {}
    for kind in ("tags", "pairs", "number"):
        assert exit_code("tasks", "check", str(world.tasks(kind)[0]), "--model", str(world.folder / "base"), "--json") == 0
        found[kind] = json.loads(capsys.readouterr().out)["tasks"][0]["splits"]["test"]
    assert found["tags"]["targets"] == {"O": 5, "B-X": 12, "I-X": 0}
    assert found["tags"]["tokens"] == {"shortest": 5, "median": 7, "longest": 12, "longest_answer": 0, "truncated": 0}
    assert found["pairs"]["rendered"][1] == {"prompt": "b abc\nabc", "target": "few"}
    assert found["number"]["targets"] is None


@torch.no_grad()
def test_search_is_by_the_metric(world: World, tmp_path: Path) -> None:
    """Right are the numbers that the own adapter gives, so that there is something to keep."""
    tasks = [write(tmp_path / "tasks", "number", name) for name in NAMES]
    for name, adapter in world.adapters("number").items():
        model = world.peft("number", adapter)
        texts = [row["text"] for row in rows("number", name)]
        lines = [{"text": x, "score": model(**pieces()(x, return_tensors="pt")).logits.item()} for x in texts]
        (tmp_path / "tasks" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = plait.sweep(
        world.adapters("number"),
        search={"grid": {"scale": [0.5, 1.0]}, "split": "test", "allow_test": True},
        tasks=tasks,
        base_model=str(world.folder / "base"),
        out=tmp_path / "study",
        workspace=tmp_path / "artifacts",
    )
    assert found.recipe.scale in (0.5, 1.0)
