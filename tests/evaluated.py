"""Evaluations as records and in folders, made without a model, and pages about them."""

from __future__ import annotations

from html.parser import HTMLParser

import plait
from plait.evaluation.comparison import Leaderboard, LeaderboardEntry
from plait.evaluation.record import Evaluation, InterferenceMatrix, Sample, SingleAdapter, TaskResult
from plait.evaluation.workspace import write_comparison, write_evaluation
from plait.results.digests import sha256
from plait.testing import cohort

HOSTILE = "<script>document.title='broken'</script> & \"quoted\""


def task(name: str, recovery: float | None, **changes) -> TaskResult:
    fields = {
        "task": name, "kind": "classification", "metric": "accuracy", "higher_is_better": True, "adapter": name, "examples": 40,
        "subset": None, "base": 0.2, "single": 0.9, "merged": 0.8, "base_interval": (0.1, 0.3), "single_interval": (0.8, 1.0),
        "merged_interval": (0.7, 0.9), "recovery": recovery, "recovery_interval": (0.7, 1.05) if recovery is not None else None,
        "undefined": None if recovery is not None else "its own adapter is no better than the base", "below_base": False,
        "samples": (Sample(id="1", prompt=HOSTILE, target="yes", base="no", single="yes", merged="perhaps"),),
    }  # fmt: skip
    return TaskResult(**{**fields, **changes})


def evaluation(*tasks: TaskResult, **changes) -> Evaluation:
    known = {t.task: t.recovery for t in tasks if t.recovery is not None}
    worst = min(known, key=known.get) if known else None
    fields = {
        "plait": plait.__version__, "name": "ties", "kind": "merge", "tag": "ties_1", "method": "ties", "space": "core",
        "recipe": None, "base_model": "base", "split": "test", "dtype": "float32", "batch_size": 8, "draws": 100, "seed": 0,
        "sources": (SingleAdapter(name="a", path="./a", repo=None, commit=None, sha256="0" * 64),), "tasks": tasks,
        "mean_recovery": sum(known.values()) / len(known) if known else None, "mean_interval": (0.7, 0.9),
        "worst_recovery": known.get(worst), "worst_interval": (0.5, 0.9) if known else None, "worst_task": worst,
        "below_base": tuple(t.task for t in tasks if t.below_base), "undefined": (), "matrix": None, "notes": (HOSTILE,),
        "finished": "2026-01-02T03:04:05+00:00", "seconds": 1.0,
    }  # fmt: skip
    return Evaluation(**{**fields, **changes})


WHOLE = evaluation(
    task("maths", 0.95),
    task("code", -0.3, below_base=True, recovery_interval=(-0.6, 0.1)),
    task("none", None, samples=()),
    matrix=InterferenceMatrix(
        adapters=("maths", "code"),
        tasks=("maths", "code"),
        values=((0.9, 0.1), (0.3, 0.8)),
        recovery=((1.0, -0.5), (None, 1.0)),
    ),
)


def run_folder(folder, found: Evaluation):
    folder.mkdir(parents=True)
    (folder / "eval_results_test.json").write_text(found.model_dump_json())
    return folder


class Page(HTMLParser):
    """The texts of a page, what it would fetch, and whether its tags are closed."""

    VOID = frozenset({"meta", "link", "br", "img", "input", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.fetched += [v for k, v in attrs if k in ("src", "href") and v != "data:,"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def pair_on_disk(folder, **recipe) -> Evaluation:
    """Write two adapters, and return the evaluation of a merge of them."""
    cohort([(12, 10), (8, 12)], [2, 2], seed=3).save(folder)
    places = {name: folder / name for name in ("adapter0", "adapter1")}
    adapters = [{"name": name, "path": str(place)} for name, place in places.items()]
    sources = tuple(
        SingleAdapter(name=name, path=str(place), repo=None, commit=None, sha256=sha256(place / "adapter_model.safetensors"))
        for name, place in places.items()
    )
    return evaluation(task("a", 0.9), recipe={"adapters": adapters, **recipe}, sources=sources)


def board_of(*evaluations: Evaluation) -> Leaderboard:
    places = tuple(
        LeaderboardEntry(
            name=f"{e.name}!", tag=e.tag, method=e.method, space=e.space, mean_recovery=e.mean_recovery,
            worst_recovery=e.worst_recovery, worst_interval=e.worst_interval, worst_task=e.worst_task, below_base=e.below_base,
            recovery={t.task: t.recovery for t in e.tasks}, metric={t.task: t.merged for t in e.tasks},
        )
        for e in evaluations
    )  # fmt: skip
    first = evaluations[0]
    return Leaderboard(
        plait=plait.__version__, split="test", adapters=("a",), base={t.task: t.base for t in first.tasks},
        single={t.task: t.single for t in first.tasks}, places=places, skipped={"slerp": "takes two"}, notes=(),
    )  # fmt: skip


def leaderboard_on_disk(folder):
    """Write two merges on a leaderboard, in a workspace; return the leaderboard's folder, and the second one's own run."""
    best = evaluation(task("maths", 0.95), task("code", 0.9), name="best", tag="ties_1")
    other = evaluation(task("maths", 0.8), task("code", 0.5), name="other", tag="ties_2")
    runs = [write_evaluation(folder / "ws", e) for e in (best, other)]
    return write_comparison(folder / "ws", ["a"], board_of(best, other).model_dump(mode="json")), runs[1]
