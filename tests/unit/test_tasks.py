"""Task files, their data, prompts and metrics."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import jiwer
import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import accuracy_score, f1_score

from plait.errors import TaskError
from plait.tasks.answers import Answer
from plait.tasks.checking import check_task
from plait.tasks.encoding import PromptEncoder
from plait.tasks.examples import read_examples
from plait.tasks.kinds import KINDS
from plait.tasks.loading import load_task, load_tasks
from plait.tasks.metrics import metric_of
from plait.tasks.overlap import check_disjoint, overlaps
from plait.tasks.rows import read_file, read_rows
from tests.language_models import tokenizer, write_task

ROWS = [{"text": "a b", "label": "yes"}, {"text": "c", "label": "no"}, {"text": "d é", "label": "yes"}]
TASK = """\
name: t
kind: classification
data: {path: data}
splits: {test: rows.jsonl}
prompt: "Q: {{ text }}"
target: "{{ label }}"
labels: [yes, no]
"""


def written(folder: Path, text: str = TASK, rows: list[dict[str, object]] | None = None) -> Path:
    (folder / "data").mkdir(exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in (ROWS if rows is None else rows))
    (folder / "data" / "rows.jsonl").write_text(lines, encoding="utf-8")
    file = folder / "t.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def refused(file: Path, split: str = "test") -> str:
    with pytest.raises(TaskError) as found:
        read_examples(load_task(file), split)  # type: ignore[arg-type]
    return str(found.value)


BARE = 'name: t\nprompt: "Q: {{ text }}"\n'


def test_a_task_without_data_has_a_kind_by_its_labels(tmp_path):
    file = tmp_path / "t.yaml"
    file.write_text(BARE)
    task = load_task(file)
    assert (task.kind, task.split_names) == ("generation", ())
    file.write_text(BARE + "labels: [yes, no]\n")
    task = load_task(file)
    assert (task.kind, task.closed_labels) == ("classification", ("yes", "no"))
    check = check_task(task)
    assert (check.splits, check.ok) == ({}, True)
    assert "cannot be evaluated" in check.notes[0]
    assert "no data, only a prompt" in refused(file)
    file.write_text("name: t\nkind: sequence_classification\nprompt: x\nlabels: [a, b]\n")
    assert load_task(file).split_names == ()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("data: {path: x}\n", "'kind' is missing"),
        ("kind: generation\ndata: {path: x}\ntarget: x\n", "'data' needs 'splits'"),
        ("kind: generation\nsplits: {test: x}\ntarget: x\n", "'splits' needs 'data'"),
        ("kind: generation\ndata: {path: x}\nsplits: {test: x}\n", "'target' is missing"),
        ("kind: perplexity\n", "'target' is missing"),
    ],
)
def test_half_a_task_is_refused(tmp_path, more, words):
    (tmp_path / "t.yaml").write_text(BARE + more)
    with pytest.raises(TaskError, match=words):
        load_task(tmp_path / "t.yaml")


def test_examples(tmp_path):
    examples = read_examples(load_task(written(tmp_path)), "test")
    assert [(e.prompt, e.target, e.choices) for e in examples.items] == [
        ("Q: a b", "yes", ("yes", "no")),
        ("Q: c", "no", ("yes", "no")),
        ("Q: d é", "yes", ("yes", "no")),
    ]


def test_paths_start_at_the_file(tmp_path, monkeypatch):
    file = written(tmp_path)
    monkeypatch.chdir(tmp_path.parent)
    assert len(read_examples(load_task(file.relative_to(tmp_path.parent)), "test").items) == 3


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("prompt:", "promt:", "t.yaml:5: promt: 'promt' is not known here"),
        ("prompt:", "promt:", "Did you mean 'prompt'?"),
        ("kind: classification", "kind: clasification", "t.yaml:2: kind: kind is 'clasification'"),
        ("kind: classification", "kind: clasification", "Did you mean 'classification'?"),
        ("kind: classification\n", "", "'kind' is missing"),
        ("labels: [yes, no]", "labels: [yes]", "t.yaml:7: labels"),
        ("labels: [yes, no]", "labels: [yes, yes]", "'yes' is given more than once"),
        ("labels: [yes, no]", "labels: [yes, no]\nmetric: f1", "it must be 'accuracy' or 'macro_f1'"),
        ("labels: [yes, no]", "labels: [yes, no]\nmax_tokens: true", "it must be a number"),
        ("data: {path: data}", "data: {path: data, hub: a/b}", "give either 'path' (files) or 'hub'"),
        ("{test: rows.jsonl}", "{dev: rows.jsonl}", "splits"),
        ("{test: rows.jsonl}", "{test: {source: rows.jsonl, rows: [2, 2]}}", "one after the last row"),
        ("name: t", "name: t\nmessages: [{role: user, content: x}]", "give 'prompt' or 'messages', not both"),
        ("name: t", "name: t\nname: u", "'name' is given twice"),
    ],
)
def test_files_that_are_refused(tmp_path, old, new, message):
    assert message in refused(written(tmp_path, TASK.replace(old, new)))


def test_all_problems_at_once(tmp_path):
    text = refused(written(tmp_path, TASK.replace("prompt:", "promt:").replace("[yes, no]", "[yes]")))
    assert "promt" in text
    assert "labels" in text


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{{ text }}", "{{ txt }}", "'txt' is undefined; there are text, label"),
        ("{{ text }}", "{{ text", "is not Jinja2"),
        ("{{ text }}", "{{ ''.__class__.__mro__ }}", "unsafe"),
        ("rows.jsonl", "row.jsonl", "Did you mean 'rows.jsonl'?"),
        ("[yes, no]", "[yes, nope]", "target 'no' is none of 'yes', 'nope'"),
        ("{test: rows.jsonl}", "{test: {source: rows.jsonl, rows: [1, 9]}}", "takes rows 1 to 9, but there are 3"),
    ],
)
def test_data_that_is_refused(tmp_path, old, new, message):
    assert message in refused(written(tmp_path, TASK.replace(old, new)))


def test_a_split_that_is_not_there(tmp_path):
    assert "has no split 'validation'; it has test" in refused(written(tmp_path), "validation")


def test_tasks_of_one_name_are_refused(tmp_path):
    file = written(tmp_path)
    with pytest.raises(TaskError, match="another task is called 't' too"):
        load_tasks([file, file])


def test_rows_of_every_format(tmp_path):
    data = tmp_path / "data"
    written(tmp_path)
    (data / "rows.json").write_text(json.dumps(ROWS), encoding="utf-8")
    with (data / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(ROWS)
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(ROWS), data / "rows.parquet")
    for ending in ("jsonl", "json", "csv", "parquet"):
        task = load_task(written(tmp_path, TASK.replace("rows.jsonl", f"rows.{ending}")))
        assert [dict(row) for row in read_rows(task, "test")] == ROWS, ending
    (data / "rows.txt").write_text("x")
    assert "'.txt' is not read" in refused(written(tmp_path, TASK.replace("rows.jsonl", "rows.txt")))


def test_a_cell_may_be_a_long_document(tmp_path):
    (tmp_path / "t.csv").write_text("text,label\n" + "a" * 200_000 + ",yes\n")
    assert len(read_file(tmp_path / "t.csv")[0]["text"]) == 200_000


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
def test_data_that_one_would_wait_for(tmp_path, ending):
    (tmp_path / f"t.{ending}").symlink_to("/dev/zero")
    with pytest.raises(TaskError, match=rf"t\.{ending}: a folder, a pipe or a device, not a file"):
        read_file(tmp_path / f"t.{ending}")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.parquet", "no parquet", "t.parquet: this cannot be read as parquet: "),
        ("t.csv", "text,label\na,yes,more\n", "t.csv:2: this row has other columns than the first line."),
        ("t.json", '{"text": "a"}', "t.json: it must be a list of rows"),
        ("t.jsonl", '{"text": "a"}\n{', "t.jsonl:2: this is not JSON"),
        ("t.txt", "a", "'.txt' is not read; allowed: .jsonl, .json, .csv, .parquet"),
    ],
)
def test_files_that_are_broken(tmp_path, name, content, message):
    file = written(tmp_path, TASK.replace("rows.jsonl", name))
    (tmp_path / "data" / name).write_text(content)
    assert message in refused(file)


def test_rows_of_one_file(tmp_path):
    text = TASK.replace("{path: data}", "{path: data/rows.jsonl}").replace("{test: rows.jsonl}", "{test: {rows: [1, 3]}}")
    assert [e.prompt for e in read_examples(load_task(written(tmp_path, text)), "test").items] == ["Q: c", "Q: d é"]


def test_what_an_example_is_does_not_depend_on_its_row(tmp_path):
    first = read_examples(load_task(written(tmp_path)), "test")
    turned = read_examples(load_task(written(tmp_path, rows=ROWS[::-1])), "test")
    assert [e.id for e in turned.items] == [e.id for e in first.items][::-1]
    assert len({e.id for e in first.items}) == 3
    assert first.digest != turned.digest
    relabeled = TASK.replace("labels: [yes, no]", "labels: [yes, no]\nlength: tokens")
    assert read_examples(load_task(written(tmp_path, relabeled)), "test").digest != first.digest
    described = TASK + "description: other words\n"
    assert read_examples(load_task(written(tmp_path, described)), "test").digest == first.digest


def test_choices_of_a_row(tmp_path):
    text = TASK.replace("classification", "multiple_choice").replace("labels: [yes, no]", "choices: options")
    text = text.replace("{{ label }}", "{{ choices[answer] }}")
    rows = [{"text": "x", "options": ["p", "q"], "answer": 1}]
    (example,) = read_examples(load_task(written(tmp_path, text, rows)), "test").items
    assert (example.choices, example.target) == (("p", "q"), "q")
    each = text.replace("choices: options", 'choices: ["{{ text }}1", "{{ text }}2"]')
    (example,) = read_examples(load_task(written(tmp_path, each, rows)), "test").items
    assert (example.choices, example.target) == (("x1", "x2"), "x2")
    assert "is not a list of texts" in refused(written(tmp_path, text.replace("choices: options", "choices: text"), rows))


def split_task(folder: Path, **splits: list[dict[str, object]]) -> Path:
    file = written(folder, TASK.replace("{test: rows.jsonl}", "{" + ", ".join(f"{s}: {s}.jsonl" for s in splits) + "}"))
    for name, rows in splits.items():
        (folder / "data" / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return file


def test_splits_that_share_examples(tmp_path):
    other_label = [{"text": "c", "label": "yes"}]  # the same question, whatever the answer
    task = load_task(split_task(tmp_path, validation=other_label, test=ROWS))
    found = overlaps({s: read_examples(task, s) for s in ("validation", "test")})
    assert [(o.first, o.second, o.shared, o.of) for o in found] == [("validation", "test", 1, 3)]
    with pytest.raises(TaskError, match="1 of 3 examples of 'test' are in 'validation' too, such as 'Q: c'"):
        check_disjoint(task, found)
    assert not check_task(task).ok


def test_the_training_split_may_share_and_is_noted(tmp_path):
    task = load_task(split_task(tmp_path, train=ROWS[:2], test=ROWS))
    found = overlaps({s: read_examples(task, s) for s in ("train", "test")})
    assert check_disjoint(task, found) == ["task 't': 2 of 3 examples of 'test' are in 'train' too, such as 'Q: a b'."]
    assert check_task(task).ok


def test_what_check_says(tmp_path):
    found = check_task(load_task(write_task(tmp_path, "sort", prompt="sort {{ word }} : ")), tokenizer())
    test = found.splits["test"]
    assert (test.examples, test.duplicates, test.majority) == (24, 0, 0.5)
    assert test.targets == {"red": 12, "blue": 12}
    assert test.tokens is not None
    assert (test.tokens.shortest, test.tokens.longest, test.tokens.longest_answer) == (3, 3, 1)
    assert test.rendered[0].prompt == "sort w0 : "
    assert test.rendered[0].target == " red"
    assert any("ends in a blank" in note for note in found.notes)


def test_prompt_and_answer_are_tokenized_as_one_text(tmp_path):
    examples = read_examples(load_task(write_task(tmp_path, "sort", rows=["w3"])), "test")
    tokens = tokenizer()
    (question,) = PromptEncoder(tokens, examples.task).questions(examples, [("red", "very blue")])
    assert tokens.convert_ids_to_tokens(question.prompt) == ["sort", "w3", ":"]
    assert [tokens.convert_ids_to_tokens(a) for a in question.answers] == [["red"], ["very", "blue"]]


def test_a_boundary_inside_a_token(tmp_path):
    """`:` and `red` would be one word without a blank between them: then each is tokenized by itself."""
    examples = read_examples(load_task(write_task(tmp_path, "sort", rows=["w3"], delimiter="")), "test")
    tokens = tokenizer()
    (question,) = PromptEncoder(tokens, examples.task).questions(examples, [("red",)])
    assert tokens.convert_ids_to_tokens(question.prompt + question.answers[0]) == ["sort", "w3", ":", "red"]


def test_long_prompts_lose_their_beginning(tmp_path):
    examples = read_examples(load_task(write_task(tmp_path, "sort", rows=["w3"], max_tokens=2)), "test")
    tokens = tokenizer()
    (question,) = PromptEncoder(tokens, examples.task).questions(examples, [("red",)])
    assert tokens.convert_ids_to_tokens(question.prompt) == ["w3", ":"]
    assert question.truncated


def test_chat_needs_a_template(tmp_path):
    file = write_task(tmp_path, "sort", prompt=None, messages=[{"role": "user", "content": "sort {{ word }} :"}])
    examples = read_examples(load_task(file), "test")
    tokens = tokenizer()
    with pytest.raises(TaskError, match="no chat template"):
        PromptEncoder(tokens, examples.task)
    tokens.chat_template = (
        "{% for m in messages %}<s> {{ m.content }}{% endfor %}{% if add_generation_prompt %} very{% endif %}"
    )
    (first, *_) = PromptEncoder(tokens, examples.task).questions(examples, [("red",)] * 24)
    assert tokens.convert_ids_to_tokens(first.prompt) == ["<s>", "sort", "w0", ":", "very"]


def answers(pairs: list[tuple[str, str]]) -> list[Answer]:
    return [Answer(id=str(i), target=t, given=g) for i, (t, g) in enumerate(pairs)]


def text_task(folder: Path, kind: str, metric: str, **changes: object) -> object:
    labels = None if kind == "generation" else ["red", "blue", "green"]
    return load_task(write_task(folder, "sort", kind=kind, metric=metric, labels=labels, **changes))


CLASSES = [("red", "red"), ("red", "blue"), ("blue", "blue"), ("blue", "red"), ("red", "red"), ("blue", "blue"), ("red", "red")]
SPOKEN = [("the cat sat down", "the cat sat"), ("a b c", "a x c d"), ("hello there", "hello there"), ("one", "")]


@pytest.mark.parametrize(
    ("kind", "name", "pairs", "reference"),
    [
        ("classification", "accuracy", CLASSES, lambda t, g: accuracy_score(t, g)),
        ("classification", "macro_f1", CLASSES, lambda t, g: f1_score(t, g, average="macro")),
        ("generation", "exact_match", SPOKEN, lambda t, g: float(np.mean([a == b for a, b in zip(t, g, strict=True)]))),
        ("generation", "wer", SPOKEN, lambda t, g: jiwer.wer(list(t), list(g))),
        ("generation", "cer", SPOKEN, lambda t, g: jiwer.cer(list(t), list(g))),
        *(
            (
                "generation",
                r,
                SPOKEN,
                lambda t, g, r=r: float(np.mean([RougeScorer([r]).score(a, b)[r].fmeasure for a, b in zip(t, g, strict=True)])),
            )
            for r in ("rouge1", "rouge2", "rougeL")
        ),
    ],
)
def test_metrics_are_the_libraries(tmp_path, kind, name, pairs, reference):
    metric = metric_of(text_task(tmp_path, kind, name))
    given = answers(pairs)
    assert metric.value(given) == pytest.approx(reference(*zip(*pairs, strict=True)), abs=1e-12)
    assert metric.higher_is_better == (name not in ("wer", "cer"))
    # what the bootstrap computes from sums is the metric of the drawn examples
    rng = np.random.default_rng(0)
    for _ in range(20):
        drawn = rng.integers(0, len(given), len(given))
        counts = np.bincount(drawn, minlength=len(given))
        value = metric.from_sums(counts @ metric.statistics(given))
        assert value == pytest.approx(metric.value([given[i] for i in drawn]), abs=1e-12)


def test_perplexity_is_over_tokens(tmp_path):
    task = load_task(write_task(tmp_path, "sort", kind="perplexity", labels=None))
    given = [
        Answer(id=str(i), target="x", given=None, scores=(s,), tokens=(n,)) for i, (s, n) in enumerate([(-3.0, 2), (-5.0, 6)])
    ]
    assert metric_of(task).value(given) == pytest.approx(np.exp(8 / 8))
    assert not metric_of(task).higher_is_better


def test_rouge_is_refused_where_it_sees_nothing(tmp_path):
    """rouge-score reads a–z and 0–9; a right answer in another script would count as wrong."""
    text = TASK.replace("classification", "generation").replace("labels: [yes, no]", "metric: rougeL")
    assert len(read_examples(load_task(written(tmp_path, text)), "test").items) == 3
    listing = refused(written(tmp_path, text, [{"text": "a", "label": "你好"}]))
    assert "target '你好' has none of a–z and 0–9, all that rouge-score sees; use 'wer' or 'cer'" in listing


def test_normalization(tmp_path):
    plain = metric_of(text_task(tmp_path, "generation", "exact_match"))
    clean = metric_of(text_task(tmp_path, "generation", "exact_match", normalize=["lower", "punctuation", "whitespace"]))
    given = answers([("Red one", " red,  ONE. ")])
    assert plain.value(given) == 0
    assert clean.value(given) == 1


def test_an_unknown_kind_is_refused_with_those_that_there_are(tmp_path):
    printed = refused(written(tmp_path, TASK.replace("kind: classification", "kind: transcription")))
    assert "t.yaml:2: kind: kind is 'transcription'; it must be 'asr'" in printed
    assert "'lm_eval:NAME'" in printed


def test_a_task_of_lm_eval_as_a_file(tmp_path):
    file = tmp_path / "t.yaml"
    file.write_text("name: t\nkind: lm_eval:arc_easy\nadapter: a\nmetric: acc_norm\nnum_fewshot: 3\ninclude: mine\n")
    task = load_task(file)
    assert (task.harness_name, task.own_adapter, task.num_fewshot) == ("arc_easy", "a", 3)
    assert task.include == str(tmp_path / "mine")
    file.write_text("name: t\nkind: lm_eval:arc_easy\nprompt: x\n")
    with pytest.raises(TaskError, match=r"t.yaml:3: prompt: 'prompt' is not known here"):
        load_task(file)
    file.write_text("name: t\nkind: lm_eval\n")
    with pytest.raises(TaskError, match="kind"):
        load_task(file)


def test_every_task_of_the_page_is_one(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    found = []
    for number, block in enumerate(blocks):
        file = tmp_path / f"{number}.yaml"
        file.write_text(block, encoding="utf-8")
        found.append(load_task(file))
    assert [t.kind for t in found] == [
        "classification",
        "classification",
        "sequence_classification",
        "token_classification",
        "image_classification",
        "image_classification",
        "generation",
        "audio_classification",
        "classification",
        "asr",
        "lm_eval:arc_easy",
    ]
    shown = set(re.findall(r"^\| `(\w+)", page, re.MULTILINE))
    assert shown == set(KINDS), "the page names every kind"
