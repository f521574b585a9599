"""Classification heads: each task's own beside base, single adapters and merges, from memory and from files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel

import plait
from plait.errors import PlanError, RecipeError
from plait.evaluation.scores import Answers
from plait.mixture import load
from tests.language_models import WORDS, tokenizer, write_task
from tests.text_classifiers import LABELS, encoder, label, save_encoder, train_classifier, with_head, write_classification

# PEFT's and torch's own
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
NAMES = ("sort", "rate", "third")
WEIGHTS = {"sort": 0.8, "rate": 0.7, "third": 0.6}


class Prepared:
    """Base, adapters with heads and their tasks on disk, made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = save_encoder(folder / "base")
        self.adapters = {name: train_classifier(folder / "adapters" / name, name) for name in NAMES}
        self.tasks = {name: write_classification(folder / "tasks", name) for name in NAMES}

    def evaluate(self, source: object = None, *, names: tuple[str, ...] = NAMES, **settings: object) -> plait.Evaluation:
        adapters = {name: self.adapters[name] for name in names}
        wanted = {"tasks": [self.tasks[n] for n in names], "base": self.base, "workspace": None, **settings}
        if not isinstance(source, str):
            wanted.setdefault("weights", {n: WEIGHTS[n] for n in names})
        return plait.evaluate(source or adapters, **wanted)

    def accuracy(self, task: str, adapter: Path, head: Path) -> float:
        """Score a task with PEFT alone: an adapter's encoder with the head of another."""
        model = PeftModel.from_pretrained(
            encoder(len(LABELS[task])), str(with_head(adapter, head, self.folder / "mixed"))
        ).eval()
        ids = torch.tensor([tokenizer()(f"very {word} :")["input_ids"] for word in WORDS])
        with torch.no_grad():
            found = model(input_ids=ids).logits.argmax(-1).tolist()
        return sum(LABELS[task][i] == label(task, word) for i, word in zip(found, WORDS, strict=True)) / len(WORDS)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return Prepared(tmp_path_factory.mktemp("prepared"))


def test_every_side_is_judged_with_the_tasks_own_head(prepared, tmp_path):
    """Base, single and merge, each against PEFT with that very head; the tasks have two and three labels."""
    found = prepared.evaluate()
    merged = plait.merge(prepared.adapters, weights=WEIGHTS, out=tmp_path / "out").folder
    nothing = plait.merge(prepared.adapters, weights=dict.fromkeys(NAMES, 0.0), out=tmp_path / "nothing").folder
    for task in found.tasks:
        own = prepared.adapters[task.task]
        assert task.single == prepared.accuracy(task.task, own, own) == 1.0
        assert task.merged == prepared.accuracy(task.task, merged, own)
        assert task.base == prepared.accuracy(task.task, nothing, own)
        assert task.base < 0.8
        assert 0 < task.recovery <= 1
    assert len({t.merged for t in found.tasks}) > 1


def test_a_wrong_head_is_seen(prepared, tmp_path):
    """The planted bug itself: the heads of two tasks exchanged, the encoders right."""
    wrong = {
        "sort": with_head(prepared.adapters["sort"], prepared.adapters["rate"], tmp_path / "sort"),
        "rate": with_head(prepared.adapters["rate"], prepared.adapters["sort"], tmp_path / "rate"),
    }
    tasks = [prepared.tasks[n] for n in wrong]
    found = plait.evaluate(wrong, tasks=tasks, base=prepared.base, workspace=None)
    assert [t.single < 0.9 for t in found.tasks] == [True, True], [t.single for t in found.tasks]


def test_a_head_of_another_number_of_labels_is_refused(prepared, tmp_path):
    task = write_classification(tmp_path, "third", name="sort", labels=LABELS["third"])
    with pytest.raises(
        plait.TaskError, match=r"the model's head \(BertForSequenceClassification\) has outputs \[2\]; the task has 3 labels"
    ):
        prepared.evaluate(names=("sort",), tasks=[task])


def test_the_matrix_judges_every_adapter_with_the_tasks_head(prepared):
    matrix = prepared.evaluate(matrix=True).matrix
    for i, task in enumerate(NAMES):
        for j, name in enumerate(NAMES):
            assert matrix.values[j][i] == prepared.accuracy(task, prepared.adapters[name], prepared.adapters[task])


def scores(workspace: Path, name: str) -> dict[str, list[tuple[float, ...]]]:
    """Return what the head gave for every text, per task."""
    kept = [Answers.model_validate_json(f.read_text()) for f in (workspace / ".scores").glob("*.json")]
    return {k.task: [a.scores for a in k.answers] for k in kept if k.contender == name}


HEADS = {
    "apart": {},
    "averaged": {"heads": {"policy": "average"}},
    "averaged, bfloat16": {"heads": {"policy": "average"}, "dtype": "bfloat16"},
    "of one": {"heads": {"policy": "from", "adapter": "rate"}},
}


@pytest.mark.parametrize("policy", HEADS)
def test_memory_and_files_give_the_same_numbers(prepared, tmp_path, policy):
    """Bit for bit in float32, whatever becomes of the heads."""
    pair = ("sort", "rate")  # heads of equal shape
    live = prepared.evaluate(names=pair, workspace=tmp_path / "live", **HEADS[policy])
    adapters = {n: prepared.adapters[n] for n in pair}
    weights = {n: WEIGHTS[n] for n in pair}
    merged = plait.merge(adapters, weights=weights, out=tmp_path / "out", base_model=str(prepared.base), **HEADS[policy])
    saved = prepared.evaluate(str(merged.folder), names=pair, workspace=tmp_path / "saved")
    assert [t.merged for t in live.tasks] == [t.merged for t in saved.tasks]
    found = scores(tmp_path / "live", "merged")
    assert set(found) == set(pair)
    assert found == scores(tmp_path / "saved", "out")


def test_averaged_heads_are_the_mean_and_no_tasks_own(prepared, tmp_path):
    pair = ("sort", "rate")
    own = prepared.evaluate(names=pair, workspace=tmp_path / "own")
    mean = prepared.evaluate(names=pair, workspace=tmp_path / "mean", heads={"policy": "average"})
    apart, together = scores(tmp_path / "own", "merged"), scores(tmp_path / "mean", "merged")
    # on the same encoder the mean of two linear heads says the mean of what they say
    prepared.evaluate(names=pair, workspace=tmp_path / "first", heads={"policy": "from", "adapter": "sort"})
    prepared.evaluate(names=pair, workspace=tmp_path / "second", heads={"policy": "from", "adapter": "rate"})
    one, other = scores(tmp_path / "first", "merged")["sort"], scores(tmp_path / "second", "merged")["sort"]
    middle = [tuple((a + b) / 2 for a, b in zip(x, y, strict=True)) for x, y in zip(one, other, strict=True)]
    torch.testing.assert_close(torch.tensor(together["sort"]), torch.tensor(middle), atol=1e-5, rtol=1e-5)
    assert apart["sort"] == one
    assert apart["sort"] != together["sort"]
    assert [t.single for t in own.tasks] == [t.single for t in mean.tasks] == [1.0, 1.0]


def test_heads_of_different_tasks_do_not_average(prepared):
    with pytest.raises(PlanError, match=r"has different shapes .* heads of different tasks do not average"):
        prepared.evaluate(heads={"policy": "average"})


@torch.no_grad()
def test_a_live_merge_takes_the_heads_that_are_asked_for(prepared, tmp_path):
    pair = {n: prepared.adapters[n] for n in ("sort", "rate")}
    ids = torch.tensor([tokenizer()(f"very {word} :")["input_ids"] for word in WORDS])
    for policy, heads_of in (("separate", "rate"), ("average", None)):
        merged = plait.merge(pair, heads={"policy": policy}, out=tmp_path / policy).folder
        folder = with_head(merged, pair["rate"], tmp_path / "mixed") if heads_of else merged
        expected = PeftModel.from_pretrained(encoder(), str(folder)).eval()(input_ids=ids).logits
        with load(pair, base=prepared.base, heads={"policy": policy}, heads_of=heads_of) as live:
            torch.testing.assert_close(live.model(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(RecipeError, match="heads_of is 'sort', but the recipe's heads are 'average'"):
        load(pair, base=prepared.base, heads={"policy": "average"}, heads_of="sort")
    with pytest.raises(PlanError, match="no adapter is named 'srot'"):
        load(pair, base=prepared.base, heads_of="srot")


def test_a_classifier_is_asked_for_no_texts(prepared):
    task = write_task(prepared.folder / "texts", "sort")
    with pytest.raises(
        plait.TaskError, match=r"'sort' \(classification\) asks for texts, but BertForSequenceClassification generates none"
    ):
        prepared.evaluate(names=("sort",), tasks=[task])
