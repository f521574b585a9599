"""Adapters by the names of tasks: the best run of a registry, announced; whatever else could be meant is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import plait
from plait.errors import AddressError, OutputError, RecipeError
from plait.hub.references import parse_reference
from plait.notices import PlaitWarning
from plait.recipes.loading import load_recipe, migrate_file
from tests.adapters_on_disk import layers, write_adapter
from tests.every import every

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
BEST = "run_20260102_030405"


def train(root: Path, task: str, *, kind: str = "lora", runs: Any = None, best: str | None = BEST) -> Path:
    """Write two runs of a task and their registry, as the earlier framework did; return the folder of the better one."""
    home = root / "artifacts" / task / "adapters" / kind
    for seed, run in enumerate((BEST, "run_20260102_040506")):
        write_adapter(home / "runs" / run, layers(1, {"q_proj": (6, 5)}), seed=seed)
    entries = [{"run_id": BEST, "is_best": True}, {"run_id": "run_20260102_040506", "is_best": False, "is_latest": True}]
    (home / "runs_registry.json").write_text(json.dumps({"runs": entries if runs is None else runs}))
    if best is not None:
        (home / "best").symlink_to(Path("runs", best))
    return home / "runs" / BEST


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_task_is_its_best_run(root: Path) -> None:
    kws, asr = train(root, "kws"), train(root, "asr", best=None)
    with pytest.warns(
        PlaitWarning, match=r"'kws' is not a folder and is taken for a task: .*run_20260102_030405, the best run in"
    ):
        parse_reference("kws")
    with pytest.warns(PlaitWarning, match="'asr' is not a folder"):
        made = plait.merge(["kws", "intent=asr"], method="linear", out=root / "out")
    assert [(s["name"], s["path"]) for s in made.record.sources] == [
        ("kws", f"./{kws.relative_to(root)}"),
        ("intent", f"./{asr.relative_to(root)}"),
    ]
    assert plait.verify(made.folder).ok
    metadata = json.loads((made.folder / "merge_metadata.json").read_text())
    assert [(s["task"], s["run_id"]) for s in metadata["source_adapters"]] == [("kws", BEST), ("intent", BEST)]


def test_a_recipe_of_the_earlier_framework_names_tasks(root: Path) -> None:
    best = train(root, "kws")
    write_adapter(root / "configs" / "merge" / "asr", layers(1, {"q_proj": (6, 5)}), seed=7)
    train(root, "asr")
    file = root / "configs" / "merge" / "old.yaml"
    file.write_text("adapters: [asr, kws]\nmethod: uniform_delta\nmerge_mode: common\n")
    with pytest.warns(PlaitWarning) as caught:
        adapters = load_recipe(file).adapters
    assert ["'kws' is not a folder" in str(w.message) for w in caught if w.category is PlaitWarning] == [True]
    path = f"../../{best.relative_to(root)}"
    assert [(a.name, a.path) for a in adapters] == [("asr", "./asr"), ("kws", path)], "a folder comes first, as it did there"
    text, notes = migrate_file(file)
    assert f"path: {path}" in text
    assert any("else the task's best adapter in artifacts/" in note for note in notes)
    assert len(plait.plan(file).modules) == 1


def test_an_evaluation_takes_a_task(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best = train(root, "kws")

    def find(reference: str) -> None:
        raise OutputError(reference)

    monkeypatch.setattr("plait.evaluation.pipeline._find", find)
    with pytest.warns(PlaitWarning, match="taken for a task"), pytest.raises(OutputError, match=re.escape(str(best))):
        plait.evaluate("kws", tasks=["kws.yaml"], workspace=None)


def test_an_adapter_in_a_tasks_folder_is_called_by_the_task(root: Path) -> None:
    best = train(root, "kws")
    assert parse_reference(str(best)).default_name() == "kws"
    assert parse_reference(str(best.parent.parent / "best")).default_name() == "kws"
    assert parse_reference(f"intent={best}").default_name() == "intent"


@every(
    ("given", "message"),
    [
        ({"runs": []}, r"runs_registry.json: one run must be the best \(is_best\) and have a run_id, got none"),
        ({"runs": [{"run_id": "a", "is_best": True}, {"run_id": "b", "is_best": True}]}, r"must be the best .*got a, b"),
        ({"runs": "run"}, "one run must be the best"),
        ({"runs": [3, {"is_best": True}]}, "one run must be the best"),
        ({"runs": [{"run_id": "../../../../..", "is_best": True}]}, "one run must be the best"),
        ({"runs": [{"run_id": "gone", "is_best": True}], "best": None}, "the best run is 'gone', and .*gone is not a folder"),
        ({"best": "run_20260102_040506"}, "has 'run_20260102_030405' as its best run, and .*best is another folder: .*040506"),
    ],
)
def test_what_is_not_one_adapter_is_refused(tmp_path_factory: pytest.TempPathFactory, given: Any, message: str) -> None:
    place = tmp_path_factory.mktemp("root")
    train(place, "kws", **given)
    with pytest.raises(AddressError, match=message):
        parse_reference("kws", base=place)


def test_two_kinds_of_adapters_are_refused_and_none_is_said(root: Path) -> None:
    train(root, "kws")
    train(root, "kws", kind="other")
    (root / "artifacts" / "asr" / "adapters").mkdir(parents=True)
    with pytest.raises(AddressError, match=r"one folder in .*kws/adapters must have a runs_registry.json, got lora, other"):
        parse_reference("kws")
    with pytest.raises(RecipeError) as error:
        plait.plan(["kws", "asr"], method="linear")
    assert "must have a runs_registry.json, got lora, other" in str(error.value)
    assert "must have a runs_registry.json, got none" in str(error.value)


def test_a_word_without_a_task_is_refused_as_before(root: Path) -> None:
    (root / "artifacts" / "merged").mkdir(parents=True)
    for word in ("kws", "merged"):
        with pytest.raises(AddressError, match="a repository needs its owner"):
            parse_reference(word)
    assert parse_reference("kws", allow_bare=True).repo == "kws"
