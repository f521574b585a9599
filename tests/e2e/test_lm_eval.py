"""Tasks of lm-eval on the live mixture: its own numbers, without a second model; no network."""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import plait
from plait.errors import MissingPackageError, TaskError
from plait.evaluation.scoring import answer_examples
from plait.mixture import Mixture
from plait.tasks.examples import read_examples
from plait.tasks.loading import absolute_reference, load_task
from tests.command_line import exit_code
from tests.language_models import LABELS, WORDS, label, language_model, save_model, tokenizer, train_adapter

lm_eval = pytest.importorskip("lm_eval")
# PEFT's, torch's and lm-eval's own
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"),
    pytest.mark.xdist_group("lm_eval"),
]
NAMES = ("sort", "rate")
KINDS = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{ task }} {{ word }} :",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            {"metric": "f1", "aggregation": "f1", "higher_is_better": True},
        ],
    },
    "cloze": {
        "output_type": "multiple_choice",
        "doc_to_text": "gold",
        "doc_to_choice": "{{ [task ~ ' ' ~ word ~ ' : ' ~ choices[0], task ~ ' ' ~ word ~ ' : ' ~ choices[1]] }}",
        "doc_to_target": "very",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "generated": {
        "output_type": "generate_until",
        "doc_to_text": "{{ task }} {{ word }} :",
        "doc_to_target": "{{ choices[gold] }}",
        "generation_kwargs": {"until": ["</s>"], "max_gen_toks": 1, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "filter_list": [
            {"name": "plain", "filter": [{"function": "take_first"}]},
            {"name": "never", "filter": [{"function": "regex", "regex_pattern": "(nothing)"}, {"function": "take_first"}]},
        ],
    },
    "drawn": {
        "output_type": "generate_until",
        "doc_to_text": "{{ task }} {{ word }} :",
        "doc_to_target": "{{ choices[gold] }}",
        "generation_kwargs": {"until": ["</s>"], "max_gen_toks": 8, "do_sample": True, "temperature": 2.0},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
    "read": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{ task }} {{ word }} : {{ choices[gold] }}",
        "metric_list": [{"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}],
    },
}


class Prepared:
    """Base, adapters and tasks of the harness on disk, made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = save_model(folder / "base")
        self.adapters = {name: train_adapter(folder / "adapters" / name, name) for name in NAMES}
        for name in NAMES:
            rows = [
                {"task": name, "word": w, "choices": LABELS[name], "gold": LABELS[name].index(label(name, w))} for w in WORDS
            ]
            data = folder / f"{name}.json"
            data.write_text("\n".join(map(json.dumps, rows)))
            for kind, about in KINDS.items():
                config = {
                    "task": f"{name}_{kind}",
                    "dataset_path": "json",
                    "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
                    "test_split": "test",
                    **about,
                }
                (folder / "harness").mkdir(exist_ok=True)
                (folder / "harness" / f"{name}_{kind}.yaml").write_text(yaml.safe_dump(config))

    def task(self, name: str, which: str = "choice", **changes: object) -> Path:
        """Write plait's file of a task."""
        content = {"name": name, "kind": f"lm_eval:{name}_{which}", "include": "harness", **changes}
        file = self.folder / f"{name}-{which}-{zlib.crc32(str(changes).encode())}.yaml"
        file.write_text(yaml.safe_dump(content))
        return file

    def evaluate(self, kind: str = "choice", workspace: Path | None = None, **settings: object) -> plait.Evaluation:
        wanted = {"tasks": [self.task(name, kind) for name in NAMES], "weights": [0.7, 0.6], **settings}
        return plait.evaluate(self.adapters, base=self.base, workspace=workspace, **wanted)

    def reference(self, kind: str, adapter: Path | None) -> dict[str, dict[str, float]]:
        """Ask lm-eval alone: the base, or the base with an adapter loaded by PEFT."""
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
        from peft import PeftModel

        model = AutoModelForCausalLM.from_pretrained(self.base)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, str(adapter))
        manager = TaskManager(include_path=str(self.folder / "harness"), include_defaults=False)
        lm = HFLM(pretrained=model.eval(), tokenizer=tokenizer(), batch_size=16)
        names = [f"{name}_{kind}" for name in NAMES]
        with pytest.MonkeyPatch.context() as patch:
            # It would fork this process, in which other tests have left threads of Ray, and wait for its child for good.
            patch.setenv("DISABLE_MULTIPROC", "1")
            found = evaluate(lm=lm, task_dict=manager.load(names), bootstrap_iters=10)
        return dict(zip(NAMES, (found["results"][n] for n in names), strict=True))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return Prepared(tmp_path_factory.mktemp("prepared"))


def test_numbers_are_those_of_lm_eval_alone(prepared, tmp_path):
    """Base, every single adapter and the merge, each against the harness with PEFT in place of the mixture."""
    found = prepared.evaluate()
    merged = plait.merge(prepared.adapters, weights=[0.7, 0.6], out=tmp_path / "out")
    base, whole = prepared.reference("choice", None), prepared.reference("choice", merged.folder)
    for task in found.tasks:
        alone = prepared.reference("choice", prepared.adapters[task.task])[task.task]
        sides = zip(("base", "single", "merged"), (base[task.task], alone, whole[task.task]), strict=True)
        for side, theirs in sides:
            assert getattr(task, side) == theirs["acc,none"], (task.task, side)
            assert getattr(task, f"{side}_stderr") == theirs["acc_stderr,none"], (task.task, side)
        assert task.metric == "acc"
        assert task.kind == f"lm_eval:{task.task}_choice"
        assert task.single == 1.0 > task.base
        assert task.recovery == pytest.approx((task.merged - task.base) / (1 - task.base))
        assert task.recovery_interval[0] <= task.recovery <= task.recovery_interval[1]
    assert 0 < found.tasks[0].base_stderr < 0.2


def test_intervals_are_drawn_from_the_documents(prepared):
    """The interval of a mean is that of 24 noughts and ones, whichever evaluator found them."""
    (task, _) = prepared.evaluate().tasks
    right = round(task.base * 24)
    draws = np.random.default_rng(0).binomial(24, right / 24, 20_000) / 24
    assert task.base_interval == pytest.approx(tuple(np.percentile(draws, (2.5, 97.5))), abs=1 / 24 + 1e-9)


def test_the_model_is_loaded_once_and_left_as_it_was(prepared, monkeypatch):
    loads, models = [], []
    load = Mixture.load.__func__

    def loading(cls, *arguments, **keywords):
        loads.append(1)
        models.append(load(cls, *arguments, **keywords))
        return models[-1]

    monkeypatch.setattr(Mixture, "load", classmethod(loading))
    prepared.evaluate()
    assert len(loads) == 1
    fresh = AutoModelForCausalLM.from_pretrained(prepared.base).state_dict()
    for name, tensor in models[0].model.state_dict().items():
        assert torch.equal(tensor, fresh[name]), name
    assert "tie_weights" not in models[0].model.__dict__


def test_what_is_said_and_what_is_read(prepared, tmp_path):
    merged = plait.merge(prepared.adapters, weights=[0.7, 0.6], out=tmp_path / "out")
    for kind, key in (("generated", "exact_match,plain"), ("read", "word_perplexity,none")):
        found = prepared.evaluate(kind)
        base, whole = prepared.reference(kind, None), prepared.reference(kind, merged.folder)
        for task in found.tasks:
            assert task.base == pytest.approx(base[task.task][key], rel=1e-5)
            assert task.merged == pytest.approx(whole[task.task][key], rel=1e-5)
            low, high = task.base_interval
            assert low <= task.base <= high
        assert task.higher_is_better == (kind == "generated")
    assert found.tasks[0].single_stderr is None, "lm-eval has no formula for it"


def test_another_filter_judges_otherwise(prepared):
    never = [prepared.task(name, "generated", metric="exact_match,never") for name in NAMES]
    assert [t.single for t in prepared.evaluate(tasks=never).tasks] == [0.0, 0.0]


def test_with_the_adapters_exchanged_recovery_goes(prepared):
    """A planted bug: each name on the other's files."""
    found = plait.evaluate(
        {"sort": prepared.adapters["rate"], "rate": prepared.adapters["sort"]},
        tasks=[prepared.task(name) for name in NAMES],
        base=prepared.base,
        workspace=None,
    )
    assert all(task.single < 0.9 for task in found.tasks)


def test_finished_answers_are_kept(prepared, tmp_path, monkeypatch):
    first = prepared.evaluate(workspace=tmp_path)
    monkeypatch.setattr(Mixture, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    again = prepared.evaluate(workspace=tmp_path)
    assert again.tasks == first.tasks
    with pytest.raises(pytest.fail.Exception):
        prepared.evaluate(workspace=tmp_path, tasks=[prepared.task("sort", num_fewshot=1), prepared.task("rate")])


def test_a_subset_is_of_the_same_documents(prepared):
    whole = read_examples(load_task(prepared.task("sort")), "test")
    found = prepared.evaluate(subset=8)
    assert [t.examples for t in found.tasks] == [8, 8]
    assert found.tasks[0].single == 1.0, "answers belong to their documents"
    assert all(s.single == s.target for task in found.tasks for s in task.samples)
    assert {s.prompt for s in found.tasks[0].samples} <= {e.prompt for e in whole.items}
    assert whole.take([5, 3]).take([1]).rows == (3,)


def test_a_head_in_the_place_of_a_tied_one_stays(prepared):
    """lm-eval ties the weights of every model it is given; here that would undo what acts."""
    model = language_model(tie_word_embeddings=True)
    head = torch.nn.Parameter(torch.flip(model.lm_head.weight.detach(), (0,)), requires_grad=False)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.lm_head.weight = head
    examples = read_examples(load_task(prepared.task("sort")), "test")
    for example, found in zip(examples.items, answer_examples(model, tokenizer(), examples, batch_size=4), strict=True):
        ids = tokenizer()(example.prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            last = model(ids).logits[0, -1]
        likeliest = max(example.choices, key=lambda c: float(last[tokenizer()(c)["input_ids"][0]]))
        assert found.given == likeliest
    assert model.lm_head.weight is head


def test_answers_that_are_drawn_are_drawn_alike(prepared):
    examples = read_examples(load_task(prepared.task("sort", "drawn")), "test")
    model, before = language_model(), torch.get_rng_state()
    first = answer_examples(model, tokenizer(), examples, batch_size=16)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    assert answer_examples(model, tokenizer(), examples, batch_size=16) == first


def test_examples_are_the_harnesss_requests(prepared):
    examples = read_examples(load_task(prepared.task("rate")), "test")
    first = examples.items[1]
    assert (first.prompt, first.target, first.choices) == ("rate w1 :", " bad", (" good", " bad"))
    few = read_examples(load_task(prepared.task("rate", num_fewshot=2)), "test")
    assert few.items[1].prompt.count("rate") == 3
    assert few.items[1].prompt == read_examples(load_task(prepared.task("rate", num_fewshot=2)), "test").items[1].prompt
    assert few.digest != examples.digest
    cloze = read_examples(load_task(prepared.task("rate", "cloze")), "test").items[1]
    assert (cloze.prompt, cloze.target) == ("", "rate w1 : bad very")
    assert cloze.choices == ("rate w1 : good very", "rate w1 : bad very")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "lm_eval:sort_choise"}, "Did you mean 'sort_choice'?"),
        ({"metric": "accuracy"}, "lm_eval:sort_choice has acc, f1"),
        ({"metric": "f1"}, "has no paired bootstrap here. Metrics of lm_eval:sort_choice that have one: acc."),
        ({"metric": "acc,strict"}, "has no filter 'strict'; there are none"),
    ],
)
def test_what_is_refused_before_a_model_is_loaded(prepared, monkeypatch, changes, message):
    monkeypatch.setattr(Mixture, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(TaskError) as found:
        prepared.evaluate(tasks=[prepared.task("sort", **changes)])
    assert message in str(found.value)


def test_only_its_own_split(prepared):
    with pytest.raises(TaskError, match="has no split 'validation': lm-eval evaluates on documents of its own choice"):
        prepared.evaluate(split="validation")


def test_data_that_cannot_be_read_is_said(prepared):
    config = yaml.safe_load((prepared.folder / "harness" / "sort_choice.yaml").read_text())
    config |= {"task": "lost", "dataset_kwargs": {"data_files": {"test": str(prepared.folder / "nowhere.json")}}}
    (prepared.folder / "lost").mkdir()
    (prepared.folder / "lost" / "lost.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(TaskError, match="lm_eval:lost cannot be opened: FileNotFoundError"):
        prepared.evaluate(tasks=[prepared.task("sort", kind="lm_eval:lost", include="lost")])


def test_from_the_command_line(prepared, tmp_path, capsys):
    arguments = ["eval", *(f"{n}={p}" for n, p in prepared.adapters.items()), "--base-id", str(prepared.base)]
    arguments += ["--workspace", str(tmp_path), "--tasks", *(str(prepared.task(n)) for n in NAMES), "--json"]
    assert exit_code(*arguments) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [t["single"] for t in shown["tasks"]] == [1.0, 1.0]
    assert exit_code("tasks", "check", str(prepared.task("sort")), "--model", str(prepared.base), "--json") == 0
    (check,) = json.loads(capsys.readouterr().out)["tasks"]
    assert (check["metric"], check["splits"]["test"]["examples"]) == ("acc", 24)
    assert check["splits"]["test"]["tokens"]["longest_answer"] == 1


def test_a_name_alone_is_a_task():
    task = load_task("lm_eval:arc_easy")
    assert (task.name, task.own_adapter, task.harness_name) == ("arc_easy", "arc_easy", "arc_easy")
    assert (
        absolute_reference("lm_eval:arc_easy", Path("anywhere"))
        == absolute_reference(Path("lm_eval:arc_easy"))
        == "lm_eval:arc_easy"
    )
    assert absolute_reference("a.yaml", Path("/there")) == "/there/a.yaml"
    with pytest.raises(TaskError, match="which task"):
        load_task("lm_eval:")


def test_without_lm_eval_the_extra_is_named(prepared, monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingPackageError) as found:
        prepared.evaluate(tasks=[prepared.task("sort", description="not seen before")])
    assert "needs the package 'lm_eval': python -m pip install 'plait[lm-eval]'" in str(found.value)
