"""`plait eval` on a small trained model: what a merge kept, from memory and from files, cached, written and required."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

import plait
from plait.adapters import Adapter
from plait.errors import OutputError, PlaitError, TaskError
from plait.evaluation.loaded_base import placement
from plait.evaluation.scores import Answers, adapter_digest, model_digest
from plait.evaluation.session import AnswerSession
from plait.mixture import Mixture
from plait.notices import PlaitWarning
from tests.command_line import exit_code
from tests.every import begin_anew
from tests.language_models import LABELS, WORDS, label, save_model, train_adapter, write_task

# PEFT's and torch's own
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
NAMES = ("sort", "rate")


class Prepared:
    """Base, adapters and tasks on disk, made once."""

    def __init__(self, folder: Path) -> None:
        self.base = save_model(folder / "base")
        self.adapters = {name: train_adapter(folder / "adapters" / name, name) for name in NAMES}
        self.tasks = [write_task(folder / "tasks", name) for name in NAMES]

    def evaluate(self, workspace: Path | None, source: object = None, **settings: object) -> plait.Evaluation:
        wanted = {"tasks": self.tasks, "base": self.base, "workspace": workspace, "weights": [0.7, 0.6], **settings}
        if isinstance(source, str):
            del wanted["weights"]
        return plait.evaluate(source or self.adapters, **wanted)

    def arguments(self, workspace: Path) -> list[str]:
        return [
            "eval",
            *(f"{name}={path}" for name, path in self.adapters.items()),
            *("--tasks", *map(str, self.tasks)),
            *("--base-id", str(self.base), "--workspace", str(workspace)),
        ]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return Prepared(tmp_path_factory.mktemp("prepared"))


def kept_scores(workspace: Path, name: str) -> dict[str, tuple[tuple[float, ...], ...]]:
    """Return every log-likelihood of a candidate, per task, as the cache holds them."""
    found = {}
    for file in (workspace / ".scores").glob("*.json"):
        answers = Answers.model_validate_json(file.read_text())
        if answers.contender == name:
            found[answers.task] = tuple(a.scores for a in answers.answers)
    return found


def test_every_adapter_knows_its_own_task(prepared, tmp_path):
    """Fails when labels are shifted, when another adapter is attached, or when none is."""
    found = prepared.evaluate(tmp_path, matrix=True)
    for task in found.tasks:
        assert task.single == 1.0
        assert task.base <= 0.75
        assert task.recovery == pytest.approx((task.merged - task.base) / (1 - task.base))
        assert task.examples == 24
        assert task.recovery_interval[0] <= task.recovery <= task.recovery_interval[1]
    matrix = found.matrix
    assert matrix.adapters == matrix.tasks == NAMES
    for i in range(2):
        assert matrix.values[i][i] == matrix.recovery[i][i] == 1.0
        assert matrix.values[i][1 - i] <= 0.8, "an adapter does not know the other task"
    assert found.worst_recovery == min(t.recovery for t in found.tasks)
    assert found.mean_recovery == pytest.approx(sum(t.recovery for t in found.tasks) / 2)


def test_a_merge_of_one_adapter_alone_is_that_adapter(prepared, tmp_path):
    found = prepared.evaluate(tmp_path, {"sort": prepared.adapters["sort"]}, tasks=prepared.tasks[:1], weights=[1.0])
    (task,) = found.tasks
    assert task.recovery == 1.0
    assert task.recovery_interval[0] < 1.0 <= task.recovery_interval[1], "24 examples without a difference are not certainty"
    scores = kept_scores(tmp_path, "sort"), kept_scores(tmp_path, "linear, delta")
    assert scores[0]["sort"] == scores[1].get("sort", kept_scores(tmp_path, "merged").get("sort"))


def test_with_the_adapters_exchanged_recovery_goes(prepared, tmp_path):
    """The planted bug itself: each name on the other's files."""
    found = prepared.evaluate(tmp_path, {"sort": prepared.adapters["rate"], "rate": prepared.adapters["sort"]})
    assert all(task.single < 0.9 for task in found.tasks)


def test_with_labels_shifted_by_one_nothing_is_known(prepared, tmp_path):
    """The planted bug itself: every target is that of the next word."""
    file = write_task(tmp_path, "rate")
    rows = [{"word": w, "label": label("rate", WORDS[(i + 1) % 24])} for i, w in enumerate(WORDS)]
    (tmp_path / "rate" / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (task,) = prepared.evaluate(None, tasks=[file]).tasks
    assert task.single == 0.0
    assert task.confusion.labels == tuple(LABELS["rate"])
    assert all(counts[i] == 0 for i, counts in enumerate(task.confusion.single)), "nothing on the diagonal"
    assert sum(map(sum, task.confusion.merged)) == 24


MERGES = {
    "linear": {},
    "ties in core": {"method": "ties", "space": "core", "density": 0.5},
    "ties, truncated": {"method": "ties", "space": "delta", "density": 0.5, "rank": 3},
    "in bfloat16": {"dtype": "bfloat16"},
    "each module its rank": {"layout": "pattern"},
}


@pytest.mark.parametrize("name", MERGES)
def test_memory_and_files_give_the_same_numbers(prepared, tmp_path, name):
    """Exactly: every log-likelihood, bit for bit in float32."""
    live = prepared.evaluate(tmp_path / "live", **MERGES[name])
    merged = plait.merge(
        prepared.adapters, weights=[0.7, 0.6], base_model=str(prepared.base), out=tmp_path / "out", **MERGES[name]
    )
    saved = prepared.evaluate(tmp_path / "saved", str(merged.folder))
    assert saved.kind == "adapter"
    assert [s.name for s in saved.sources] == list(NAMES), "found by the lock"
    for one, other in zip(live.tasks, saved.tasks, strict=True):
        assert (one.base, one.single, one.merged, one.recovery) == (other.base, other.single, other.merged, other.recovery)
        assert one.recovery_interval == other.recovery_interval
    scores = kept_scores(tmp_path / "live", "merged")
    assert set(scores) == set(NAMES)
    assert scores == kept_scores(tmp_path / "saved", "out")


def test_a_baked_model_gives_the_same_numbers(prepared, tmp_path):
    live = prepared.evaluate(tmp_path / "live")
    plait.bake(prepared.adapters, weights=[0.7, 0.6], base=prepared.base, out=tmp_path / "all-in-one")
    baked = prepared.evaluate(tmp_path / "baked", str(tmp_path / "all-in-one"), sources=prepared.adapters)
    assert baked.kind == "model"
    assert [t.merged for t in live.tasks] == [t.merged for t in baked.tasks]
    one, other = kept_scores(tmp_path / "live", "merged"), kept_scores(tmp_path / "baked", "all-in-one")
    for task in NAMES:
        for a, b in zip(one[task], other[task], strict=True):
            assert a == pytest.approx(b, abs=1e-4)


def test_a_baked_merge_is_known_by_the_adapters_of_the_merge(prepared, tmp_path):
    plait.merge(prepared.adapters, weights=[0.7, 0.6], base_model=str(prepared.base), out=tmp_path / "merged")
    plait.bake([tmp_path / "merged"], base=prepared.base, out=tmp_path / "full")
    merged, baked = (prepared.evaluate(None, str(tmp_path / name)) for name in ("merged", "full"))
    assert [s.name for s in baked.sources] == list(NAMES)
    assert [(t.single, t.recovery) for t in baked.tasks] == [(t.single, t.recovery) for t in merged.tasks]


def test_what_is_finished_is_not_asked_again(prepared, tmp_path, monkeypatch):
    first = prepared.evaluate(tmp_path)

    def load(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(Mixture, "load", load)
    again = prepared.evaluate(tmp_path)
    volatile = {"finished", "seconds"}
    assert again.model_dump(exclude=volatile) == first.model_dump(exclude=volatile)
    with pytest.raises(AssertionError, match="loaded"):
        prepared.evaluate(tmp_path, batch_size=3)
    with pytest.raises(AssertionError, match="loaded"):
        prepared.evaluate(tmp_path, weights=[0.7, 0.61])


def test_the_processor_is_one_device_whatever_it_is_called(prepared, tmp_path, monkeypatch):
    """`auto` is another device on another machine; answers of one are not those of the other."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    found = prepared.evaluate(tmp_path, device_map="auto")
    monkeypatch.setattr("plait.evaluation.session.answer_examples", lambda *_, **__: pytest.fail("asked again"))
    assert prepared.evaluate(tmp_path, device_map="cpu").tag == found.tag
    monkeypatch.undo()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert str(placement("auto")) != str(placement("cpu"))


def test_keys_are_of_files_and_of_a_models_own_code(prepared, tmp_path):
    model, adapter = (shutil.copytree(f, tmp_path / f.name) for f in (prepared.base, prepared.adapters["sort"]))
    opened = Adapter.open(adapter, "sort")
    keys = model_digest(model), adapter_digest(opened)
    (adapter / "adapter_old").mkdir()
    (model / "old.json").mkdir()
    assert (model_digest(model), adapter_digest(opened)) == keys
    (model / "modeling.py").write_text("# other code")
    assert model_digest(model) != keys[0]


def test_what_was_finished_before_a_failure_is_kept(prepared, tmp_path):
    bad = write_task(tmp_path, "rate", messages=[{"role": "user", "content": "rate {{ word }} :"}], prompt=None)
    with pytest.raises(TaskError, match="no chat template"):
        prepared.evaluate(tmp_path / "work", tasks=[prepared.tasks[0], bad])
    assert set(kept_scores(tmp_path / "work", "merged")) == {"sort"}


def test_subsets_have_results_of_their_own(prepared, tmp_path):
    whole = prepared.evaluate(tmp_path)
    part = prepared.evaluate(tmp_path, subset={"max_samples": 8, "per_task": {"rate": 6}})
    assert [t.examples for t in part.tasks] == [8, 6]
    assert whole.tag != part.tag
    for task in part.tasks:
        kept = json.loads((tmp_path / task.task / "subsets" / f"test_{task.subset}.json").read_text())
        assert (kept["examples"], kept["of"]) == (task.examples, 24)
    index = json.loads((tmp_path / "merged/linear/rate_sort/eval/index.json").read_text())["entries"]
    assert [entry["tag"] for entry in index] == [whole.tag, part.tag]


def test_where_results_go(prepared, tmp_path):
    found = prepared.evaluate(tmp_path, method="ties", density=0.5)
    home = tmp_path / "merged" / "ties" / "rate_sort"
    (bundle,) = (home / "runs").iterdir()
    assert sorted(p.name for p in bundle.iterdir()) == ["eval_results_test.json", "merge_metadata.json", "summary.json"]
    results = home / "eval" / "test" / f"eval_results_{found.tag}_test.json"
    assert plait.Evaluation.model_validate_json(results.read_text()) == found
    link = tmp_path / "sort" / "metrics" / "eval" / "test" / "merged" / "rate" / found.tag / "metrics.json"
    assert link.is_symlink()
    assert json.loads(link.read_text())["recovery"] == found.tasks[0].recovery
    (entry,) = json.loads((home / "eval" / "index.json").read_text())["entries"]
    assert (tmp_path / entry["results"]) == results
    assert (tmp_path / entry["run"]) == bundle


def test_samples_show_where_the_sides_differ(prepared):
    (task, _) = prepared.evaluate(None, weights=[0.0, 0.0]).tasks
    assert task.recovery == 0.0
    first = task.samples[0]
    assert first.single == first.target != first.base == first.merged
    assert first.prompt.startswith("sort w")


def test_a_recipe_with_its_own_tasks(prepared, tmp_path):
    recipe = {
        "base_model": str(prepared.base),
        "adapters": [{"name": n, "path": str(p), "weight": 0.5} for n, p in prepared.adapters.items()],
        "tasks": ["tasks/sort.yaml"],
        "eval": {"split": "test", "subset": {"max_samples": 10}, "draws": 100},
    }
    write_task(tmp_path / "tasks", "sort")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    found = plait.evaluate(tmp_path / "recipe.yaml", workspace=None)
    assert [(t.task, t.examples) for t in found.tasks] == [("sort", 10)]
    assert found.draws == 100


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_older_recipe_is_evaluated_on_its_own_split_and_subset(prepared, tmp_path):
    task = write_task(
        tmp_path / "tasks", "sort", splits={"test": "test.jsonl", "validation": "validation.jsonl"}, rows=WORDS[:12]
    )
    rows = [json.dumps({"word": word, "label": label("sort", word)}) for word in WORDS[12:]]
    (tmp_path / "tasks" / "sort" / "validation.jsonl").write_text("\n".join(rows) + "\n")
    old = {
        "adapters": [str(path) for path in prepared.adapters.values()],
        "method": "uniform_delta",
        "split": "validation",
        "eval_tasks": ["sort"],
        "eval_subset": {"max_samples": 6},
    }
    file = tmp_path / "old.yaml"
    file.write_text(yaml.safe_dump(old))
    of_its_own = plait.evaluate(file, base=prepared.base, workspace=None)
    given = plait.evaluate(file, tasks=[task], base=prepared.base, workspace=None)
    for found in (of_its_own, given):
        assert (found.split, [(t.task, t.examples) for t in found.tasks]) == ("validation", [("sort", 6)])
        assert not {s.prompt for t in found.tasks for s in t.samples} & {f"sort {word} :" for word in WORDS[:12]}


def test_a_task_without_an_adapter_has_no_recovery(prepared, tmp_path):
    task = write_task(tmp_path, "sort", name="other")
    with pytest.warns(PlaitWarning, match=r"task 'other': no adapter is called 'other', so that its recovery is not defined"):
        (result,) = prepared.evaluate(None, tasks=[task]).tasks
    assert (result.single, result.recovery) == (None, None)
    assert "no adapter is called 'other'" in result.undefined


def test_generation_and_perplexity(prepared, tmp_path):
    printed = write_task(tmp_path / "g", "sort", kind="generation", labels=None, max_new_tokens=1)
    read = write_task(tmp_path / "p", "rate", kind="perplexity", labels=None)
    sort, rate = prepared.evaluate(None, tasks=[printed, read]).tasks
    assert (sort.metric, sort.single) == ("exact_match", 1.0)
    assert (rate.metric, rate.higher_is_better) == ("perplexity", False)
    assert 1 <= rate.single < 1.2 < rate.base
    assert 0 < rate.recovery <= 1


def test_splits_that_overlap_are_refused(prepared, tmp_path):
    task = write_task(tmp_path, "sort", splits={"validation": "test.jsonl", "test": "test.jsonl"})
    with pytest.raises(TaskError, match="24 of 24 examples of 'test' are in 'validation' too"):
        prepared.evaluate(None, tasks=[task])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": []}, "there are no tasks"),
        ({"split": "dev"}, "split is 'dev'; it must be"),
        ({"subset": 0}, "max_samples is 0; it must be >= 1"),
        ({"base": "nowhere/at-all/x/y"}, "nowhere"),
        ({"load_dtype": "float23"}, "dtype 'float23' is not allowed; it must be one of auto, stored, float32"),
        ({"device_map": "gpu"}, "device_map 'gpu' cannot be used here"),
        ({"device_map": "meta"}, "device_map 'meta' cannot be used here: it holds no values"),
    ],
)
def test_what_is_refused(prepared, settings, message):
    with pytest.raises(PlaitError, match=message):
        prepared.evaluate(None, **settings)


def test_flags_that_say_nothing_here_are_refused(prepared, tmp_path, capsys):
    arguments = prepared.arguments(tmp_path)
    base = arguments.index("--base-id")
    for flags, message in (
        (["--seed", "3"], "--seed is that of the subset; give --subset"),
        (["--source", f"sort={prepared.base}"], "--source (sources=): belongs to one adapter or model"),
        (["--card"], "--card (card=): belongs to one adapter or model"),
        (["--base-id", str(prepared.adapters["sort"])], "the model's configuration cannot be loaded"),
    ):
        others = [*arguments[:base], *arguments[base + 2 :]] if "--base-id" in flags else arguments
        assert exit_code(*others, *flags) == 2
        assert message in " ".join(capsys.readouterr().err.split())


def test_a_workspace_that_cannot_be_is_refused_before_anything_is_asked(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(Mixture, "load", lambda *_, **__: pytest.fail("the base was loaded"))
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"workspace .*file/within cannot be written: .*file is not a folder"):
        prepared.evaluate(tmp_path / "file" / "within")
    for name in ("leads-nowhere", "held/.scores"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(tmp_path / "nowhere")
        with pytest.raises(OutputError, match=rf"cannot be written: .*{name} is a symbolic link that leads nowhere"):
            prepared.evaluate(tmp_path / name.split("/")[0])
    if Path("/proc/self").exists():
        with pytest.raises(OutputError, match="/proc/work cannot be written: "):
            prepared.evaluate(Path("/proc/work"))
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(OutputError, match="no permission to write in"):
        prepared.evaluate(tmp_path / "work")
    assert sorted(tmp_path.iterdir()) == before, "nothing is made to find out"


def test_a_merge_of_zeros_is_noted(prepared, tmp_path, capsys):
    note = "note: every weight is 0: the merged deltas are zero, and change nothing of the base model."
    assert exit_code(*prepared.arguments(tmp_path / "work"), "--weights", "0,0") == 0
    assert capsys.readouterr().err.count(note) == 1
    begin_anew()
    adapters = [f"{name}={path}" for name, path in prepared.adapters.items()]
    base = ["--base-id", str(prepared.base), "--weights", "0,0"]
    assert exit_code("ask", "sort w1 :", *adapters, *base, "--max-new-tokens", "2") == 0
    assert capsys.readouterr().err.count(note) == 1
    begin_anew()
    assert exit_code("bake", *adapters, *base, "-o", tmp_path / "baked", "--dry-run") == 0
    assert capsys.readouterr().err.count(note) == 1


def test_only_what_is_good_enough_is_saved(prepared, tmp_path, capsys):
    arguments = [*prepared.arguments(tmp_path / "work"), "--weights", "0.7", "0.6", "--json"]
    out = tmp_path / "out"
    assert exit_code(*arguments, "--require", "worst_recovery>=1.5", "-o", str(out)) == 3
    failed = json.loads(capsys.readouterr().out)
    assert not out.exists()
    assert failed["saved"] is None
    assert [r["met"] for r in failed["required"]] == [False]
    low = failed["worst_recovery"] - 0.01
    assert exit_code(*arguments, "--require", f"worst_recovery>={low}", "--require", "rate.metric>=0.5", "-o", str(out)) == 0
    passed = json.loads(capsys.readouterr().out)
    assert passed["saved"] == str(out)
    assert prepared.evaluate(None, str(out)).worst_recovery == failed["worst_recovery"]
    card = (out / "README.md").read_text()
    assert f"| sort | accuracy | 24 | {passed['tasks'][0]['base']:.3f} | 1.000 |" in card
    assert plait.verify(out, rebuild=False).ok


def test_results_in_a_card_replace_earlier_ones(prepared, tmp_path):
    merged = plait.merge(prepared.adapters, weights=[0.7, 0.6], base_model=str(prepared.base), out=tmp_path / "out")
    before = (tmp_path / "out" / "README.md").read_text()
    arguments = ["eval", str(merged.folder), "--workspace", str(tmp_path / "work"), "--card", "--tasks", str(prepared.tasks[0])]
    assert exit_code(*arguments) == 0
    once = (tmp_path / "out" / "README.md").read_text()
    assert once.count("## Results") == 1
    assert exit_code(*arguments, str(prepared.tasks[1])) == 0
    twice = (tmp_path / "out" / "README.md").read_text()
    assert twice.count("## Results") == 1
    assert "| rate | accuracy |" in twice
    start, end = twice.index("## Results"), twice.index("## Load it")
    assert twice[:start] + twice[end:] == before


def test_a_leaderboard(prepared, tmp_path, capsys, monkeypatch):
    loads = []
    load = Mixture.load.__func__
    monkeypatch.setattr(Mixture, "load", classmethod(lambda cls, *a, **k: loads.append(1) or load(cls, *a, **k)))
    arguments = [*prepared.arguments(tmp_path), "--methods", "linear,ties,slerp", "--spaces", "delta,core", "--density", "0.5"]
    assert exit_code(*arguments, "--json") == 0
    board = json.loads(capsys.readouterr().out)
    assert len(loads) == 1, "the base is loaded once"
    names = [p["name"] for p in board["places"]]
    assert {"linear, delta", "ties, delta", "ties, core"} <= set(names)
    order = [(p["worst_recovery"], p["mean_recovery"]) for p in board["places"]]
    assert order == sorted(order, reverse=True)
    assert json.loads((Path(board["run"]) / "leaderboard.json").read_text())["places"] == board["places"]
    alone = prepared.evaluate(None, weights=None, method="ties", space="core", density=0.5)
    (place,) = [p for p in board["places"] if p["name"] == "ties, core"]
    assert place["metric"] == {t.task: t.merged for t in alone.tasks}
    assert exit_code(*arguments) == 0
    assert "own adapter" in capsys.readouterr().out


def test_an_adapter_alone(prepared, tmp_path, capsys):
    arguments = ["eval", str(prepared.adapters["sort"]), "--tasks", str(prepared.tasks[0]), "--base-id", str(prepared.base)]
    arguments += ["--workspace", str(tmp_path)]
    assert exit_code(*arguments) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("sort · test\n")
    assert "the task's own adapter is not known; name it with --source sort=PATH" in " ".join(shown.out.split())
    assert "--source NAME=PATH" in shown.err
    assert exit_code(*arguments, "--source", f"sort={prepared.adapters['sort']}") == 0
    assert "1.00" in capsys.readouterr().out
    assert exit_code(*arguments, "--method", "ties") == 2
    assert "is evaluated as it is; these belong to a merge: method" in capsys.readouterr().err
    assert exit_code(*arguments, "--heads-policy", "average") == 2
    assert "these belong to a merge: heads.policy." in capsys.readouterr().err
    assert exit_code(*arguments, "-o", str(tmp_path / "out")) == 2
    assert "--workspace (workspace=) has the results" in " ".join(capsys.readouterr().err.split())


def test_check_of_tasks(prepared, capsys):
    assert exit_code("tasks", "check", *map(str, prepared.tasks), "--model", str(prepared.base), "--json") == 0
    sort, rate = json.loads(capsys.readouterr().out)["tasks"]
    assert (sort["name"], rate["name"]) == NAMES
    assert sort["splits"]["test"]["targets"] == dict.fromkeys(LABELS["sort"], 12)
    assert exit_code("tasks", "check", str(prepared.tasks[0])) == 0
    assert "sort w0 :⟦ red⟧" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["{", "[]", '{"entries": 3}'])
@pytest.mark.parametrize("kind", ["merge", "leaderboard", "adapter"])
def test_a_broken_index_is_found_before_anything_is_asked(prepared, tmp_path, monkeypatch, kind, content):
    place = {"merge": "linear/rate_sort", "leaderboard": "ties/rate_sort", "adapter": "adapter/sort"}[kind]
    index = tmp_path / "merged" / place / "eval" / "index.json"
    index.parent.mkdir(parents=True)
    index.write_text(content)
    monkeypatch.setattr("plait.evaluation.session.AnswerSession.results", lambda *_: pytest.fail("asked"))
    arguments = prepared.arguments(tmp_path)
    if kind == "leaderboard":
        arguments += ["--methods", "linear,ties"]
    if kind == "adapter":
        arguments[1:3] = [str(prepared.adapters["sort"])]
    assert exit_code(*arguments) == 2
    assert index.read_text() == content
    index.unlink()


def test_an_adapter_alone_is_told_how_to_name_the_tasks_own(prepared, tmp_path):
    found = prepared.evaluate(None, source=str(prepared.adapters["sort"]), tasks=prepared.tasks[:1])
    assert found.tasks[0].undefined == "the task's own adapter is not known; name it with --source sort=PATH (sources=)"


def test_a_live_state_is_scored_in_one_call(prepared, tmp_path, monkeypatch):
    """Coefficients on the live base have the scores of the merge that they are; base and single adapters are asked once."""
    asked: list[str] = []
    monkeypatch.setattr(
        "plait.evaluation.session.AnswerSession._ask",
        lambda self, what, ask=AnswerSession._ask: asked.append(what.candidate.name) or ask(self, what),
    )
    live = plait.evaluator(prepared.adapters, tasks=prepared.tasks, base=prepared.base, workspace=tmp_path / "ws")
    weights = torch.tensor([0.7, 0.6])
    found = live.score(lambda heads: live.mixture.mixed(weights, heads=heads))
    wanted = prepared.evaluate(tmp_path / "ws")
    assert [(t.base, t.single, t.merged) for t in found.tasks] == [(t.base, t.single, t.merged) for t in wanted.tasks]
    assert sorted(asked) == sorted(["base", "base", "sort", "rate", "live", "live", "merged", "merged"])
    asked.clear()
    weights.fill_(0.0)
    assert live.score(lambda heads: live.mixture.mixed(weights, heads=heads)).mean_recovery == 0
    assert asked == ["live", "live"]  # nothing says what a live state depends on
