"""`plait.Session`: base and adapters loaded once, and what is merged, scored, asked and saved is that of the commands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import plait
from plait import mixture
from plait.errors import RecipeError, TaskError
from plait.mixture import Mixture
from plait.results.lock import read_lock
from tests.language_models import LABELS, train_adapter, train_pair, write_task

# PEFT's and torch's own
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
TIES = {"method": "ties", "space": "core", "scale": 1.5}
NUMBERS = ("mean_recovery", "worst_recovery", "worst_task")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = train_pair(tmp_path_factory.mktemp("session"), steps=20)
    for task in LABELS:
        write_task(folder / "tasks", task)
    return folder


def arguments(place: Path, workspace: Path) -> dict[str, Any]:
    tasks = [place / "tasks" / f"{task}.yaml" for task in LABELS]
    return {"base": place / "base", "tasks": tasks, "workspace": workspace}


def adapters(place: Path) -> dict[str, Path]:
    return {task: place / task for task in LABELS}


def test_a_session_gives_what_the_commands_give_and_loads_once(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[Path] = []
    load = Mixture.load
    monkeypatch.setattr(Mixture, "load", lambda folder, *given, **how: loads.append(folder) or load(folder, *given, **how))
    session = plait.Session(adapters(place), **arguments(place, tmp_path / "artifacts"))
    assert not loads, "before anything is needed"
    one, two = session.merge("one", weights=[0.7, 0.6]), session.merge("two", **TIES)
    scores, asked = [session.score(merged) for merged in (one, two, one)], session.ask("sort w3 :", one, two, max_new_tokens=4)
    saved = session.save(two, tmp_path / "two")
    assert len(loads) == 1
    assert [getattr(scores[0], n) for n in NUMBERS] == [getattr(scores[2], n) for n in NUMBERS]
    given = {"base": place / "base", "workspace": tmp_path / "other"}
    tasks = arguments(place, tmp_path)["tasks"]
    for found, settings in (
        (scores[0], {"weights": [0.7, 0.6]}),
        (scores[1], {"method": "ties", "space": "core", "scale": 1.5}),
    ):
        again = plait.evaluate(adapters(place), tasks=tasks, **given, **settings)
        assert [getattr(again, n) for n in NUMBERS] == [getattr(found, n) for n in NUMBERS]
        assert again.tag == found.tag
    merged = plait.merge(adapters(place), out=tmp_path / "again", **TIES)
    assert saved.folder == tmp_path / "two"
    weights = "adapter_model.safetensors"
    assert (saved.folder / weights).read_bytes() == (merged.folder / weights).read_bytes()
    replies = asked.prompts[0].replies
    assert [*replies] == ["base", "sort", "rate", "one", "two"]
    alone = plait.ask("sort w3 :", str(saved.folder), sources=adapters(place), base=place / "base", max_new_tokens=4)
    assert alone.prompts[0].replies["two"] == replies["two"]


def test_moments_and_scale_of_texts(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    session = plait.Session(adapters(place), **arguments(place, tmp_path / "artifacts"))
    merged = session.merge(method="regmean", scale="auto", calibration={"texts": "lines", "count": 8})
    assert isinstance(merged.recipe.scale, float)
    assert all(entry.moments for entry in merged.recipe.adapters)
    assert session.score(merged).mean_recovery is not None
    lock = read_lock(session.save(merged, tmp_path / "merged").folder)
    assert lock.recipe["scale"] == merged.recipe.scale


def test_a_mixture_and_states_of_ones_own(place: Path, tmp_path: Path) -> None:
    session = plait.Session(adapters(place), **arguments(place, tmp_path / "artifacts"))
    weights = torch.tensor([0.7, 0.6])
    found = session.evaluator.score(lambda heads: session.mixture.mixed(weights, heads=heads))
    assert found.mean_recovery == session.score(session.merge(weights=[0.7, 0.6])).mean_recovery
    assert "sort" in repr(session)
    assert "ties" in repr(session.merge(method="ties"))


def test_the_base_that_is_given_is_that_of_the_merge_too(place: Path, tmp_path: Path) -> None:
    """Of adapters that call it by several names, and of DoRA, whose delta needs its weights."""
    train_adapter(tmp_path / "dora", "sort", steps=2, use_dora=True)
    shutil.copytree(place / "rate", tmp_path / "rate")
    for name in ("dora", "rate"):
        config = tmp_path / name / "adapter_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": f"/elsewhere/{name}"}))
    given: Any = {"sort": tmp_path / "dora", "rate": tmp_path / "rate"}
    base, tasks = place / "base", arguments(place, tmp_path)["tasks"]
    session = plait.Session(given, base=base, tasks=tasks, workspace=None)
    scored = session.score(session.merge())
    assert plait.evaluate(given, tasks=tasks, base=base, workspace=None).mean_recovery == scored.mean_recovery
    wanted = session.ask("sort w3 :", session.merge(), max_new_tokens=3).prompts[0].replies
    assert plait.ask("sort w3 :", given, base=base, max_new_tokens=3).prompts[0].replies == wanted
    plait.evaluator(given, tasks=tasks, base=base, workspace=None)
    mixture.load(given, base=base)
    with pytest.raises(RecipeError, match="they mean the same"):
        mixture.load(given, base=base, base_model=str(base))


def test_what_is_refused(place: Path, tmp_path: Path) -> None:
    session = plait.Session(adapters(place), base=place / "base", workspace=tmp_path / "artifacts")
    merged = session.merge()
    with pytest.raises(RecipeError, match="this session has no tasks to score on"):
        session.score(merged)
    with pytest.raises(RecipeError, match="merged: two of those that are asked have this name"):
        session.ask("sort w3 :", merged, session.merge(scale=2))
    with pytest.raises(RecipeError, match="must be at least 1"):
        session.ask("sort w3 :", max_new_tokens=0)
    with pytest.raises(RecipeError, match="'densty' is not known here"):
        session.merge(method="ties", densty=0.3)
    with pytest.raises(TaskError, match="o such file"):
        plait.Session(adapters(place), tasks=[tmp_path / "none.yaml"], base=place / "base")
