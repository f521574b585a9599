"""Merges that take moments, scale and parameters on the texts of their tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import plait
from plait.errors import OutputError, PlaitError
from plait.evaluation.loaded_base import LoadedBase
from plait.hub.pretrained import LoadOptions
from plait.methods import METHODS
from plait.methods.auto import SEARCHED
from plait.notices import PlaitWarning
from tests.calibrated import SEEN, calibrate, make_place, merge, write_split_task
from tests.command_line import exit_code
from tests.language_models import label, language_model, tokenizer, write_task

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("calibrate"))


def adapter(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def test_a_merge_with_tasks_takes_the_moments_by_itself_once(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments = calibrate(place, tmp_path / "moments").folder
    wanted = plait.merge([place / "sort", place / "rate"], method="regmean", moments=moments, out=tmp_path / "wanted")
    monkeypatch.chdir(tmp_path)
    with pytest.warns(
        UserWarning, match=r"second moments of sort, rate, taken now on 16 texts of split 'calibration' \(sort, rate\)"
    ):
        merged = merge(place, tmp_path / "merged")
    assert adapter(merged.folder) == adapter(wanted.folder)
    kept = {p.name.split("-")[0]: p for p in (tmp_path / "artifacts" / "moments").iterdir()}
    assert kept["sort"].read_bytes() == (moments / "sort.safetensors").read_bytes()
    lock = json.loads((merged.folder / "plait.lock").read_text())
    (texts,) = (t for t in json.loads((moments / "calibration.json").read_text())["texts"] if t["task"] == "sort")
    assert lock["inputs"]["sort"]["moments"]["texts"] == {"sort": texts["digest"]}
    assert plait.verify(merged.folder).ok
    with monkeypatch.context() as patch:
        patch.setattr("plait.mixture.Mixture.load", lambda *a, **k: pytest.fail("the base was loaded"))
        with pytest.warns(UserWarning, match="taken by an earlier run"):
            again = merge(place, tmp_path / "again")
    assert adapter(again.folder) == adapter(merged.folder)
    recipe = tmp_path / "below" / "recipe.yaml"
    recipe.parent.mkdir()
    recipe.write_text(
        f"version: 1\nbase_model: {place}/base\nadapters: [{place}/sort, {place}/rate]\nmethod: regmean\n"
        f"tasks: [{place}/sort.yaml, {place}/rate.yaml]\n"
    )
    assert adapter(plait.merge(recipe, out=tmp_path / "recipe").folder) == adapter(merged.folder)
    flags = [str(place / "sort"), str(place / "rate"), "--tasks", str(place / "sort.yaml"), str(place / "rate.yaml")]
    flags += ["--base-id", str(place / "base"), "--method", "regmean"]
    assert exit_code("merge", *flags, "-o", str(tmp_path / "flags")) == 0
    assert adapter(tmp_path / "flags") == adapter(merged.folder)


def test_an_evaluation_takes_what_a_recipe_lacks(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tasks, base = [write_split_task(tmp_path, task) for task in ("sort", "rate")], str(place / "base")
    for task in ("sort", "rate"):  # an evaluation reads the labels of all splits
        rows = [json.dumps({"word": word, "label": label(task, word)}) for word in SEEN]
        (tmp_path / task / "calibration.jsonl").write_text("\n".join(rows) + "\n")
    settings: dict[str, Any] = {"tasks": tasks, "base_model": base, "method": "regmean", "scale": "auto", "workspace": None}
    with (
        pytest.warns(PlaitWarning, match="are kept in"),
        pytest.warns(PlaitWarning, match="regmean, core: second moments are of 16"),
    ):
        found = plait.evaluate([place / "sort", place / "rate"], **settings)
    with pytest.warns(PlaitWarning, match="taken by an earlier run"):
        merged = merge(place, tmp_path / "merged", scale="auto", tasks=tasks)
    saved = plait.evaluate(merged.folder, tasks=tasks, workspace=None)
    assert [t.merged for t in found.tasks] == [t.merged for t in saved.tasks]
    flags = [str(place / "sort"), str(place / "rate"), "--tasks", *map(str, tasks), "--base-id", base]
    assert exit_code("eval", *flags, "--methods", "linear,regmean", "--json") == 0
    board = json.loads(capsys.readouterr().out)
    assert not board.get("skipped", board.get("board", {}).get("skipped"))
    judged = write_task(tmp_path, "sort", rows=SEEN, splits={"calibration": "test.jsonl", "test": "test.jsonl"})
    with pytest.raises(PlaitError, match=r"examples of .test. are in .calibration. too"):
        plait.evaluate([place / "sort", place / "rate"], **{**settings, "tasks": [judged, tasks[1]]})


def test_how_the_base_is_loaded_is_asked_for(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    seen: list[Any] = []
    real = LoadedBase.__init__

    def spied(self: LoadedBase, base: Path, adapters: Any, options: LoadOptions, progress: Any) -> None:
        seen.append((options.dtype, options.device_map))
        real(self, base, adapters, options, progress)

    monkeypatch.setattr(LoadedBase, "__init__", spied)
    with pytest.warns(PlaitWarning, match="are kept in"):
        merge(place, tmp_path / "merged", load_dtype="bfloat16", device_map="cpu")
    flags = [str(place / "sort"), str(place / "rate"), "--tasks", str(place / "sort.yaml"), str(place / "rate.yaml")]
    flags += ["--base-id", str(place / "base"), "--method", "regmean", "--load-dtype", "float16", "--device-map", "cpu"]
    assert exit_code("bake", *flags, "-o", str(tmp_path / "baked")) == 0
    assert seen == [("bfloat16", "cpu"), ("float16", "cpu")]
    with pytest.raises(PlaitError, match="loads no model; leave them out"):
        plait.merge([place / "sort", place / "rate"], load_dtype="bfloat16", out=tmp_path / "no")
    for command in ("merge", "bake"):
        planned = [command, str(place / "sort"), str(place / "rate"), "--base-id", str(place / "base"), "--dry-run"]
        assert exit_code(*planned, "-o", str(tmp_path / "no")) == 0
        assert exit_code(*planned, "-o", str(tmp_path / "no"), "--load-dtype", "bfloat16") == 2


def test_a_plan_says_what_is_taken_first(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [str(place / "sort"), str(place / "rate"), "--tasks", str(place / "sort.yaml"), str(place / "rate.yaml")]
    flags += ["--base-id", str(place / "base")]
    assert exit_code("merge", *flags, "--method", "regmean", "--scale", "auto", "--dry-run") == 0
    shown = capsys.readouterr().out.replace("\n", " ")
    assert "second moments are taken first" in shown
    assert "the scale is found on the tasks' texts" in shown


def test_a_scale_is_found_without_labels(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = merge(place, tmp_path / "merged", method="linear", scale="auto")
    scale = result.record.recipe["scale"]
    assert 0.25 <= scale <= 4
    assert any(
        f"scale {scale:.4g} was found on 16 texts of split 'calibration' (sort, rate)" in note for note in result.record.notes
    )
    assert json.loads((result.folder / "plait.lock").read_text())["recipe"]["scale"] == scale
    assert plait.verify(result.folder).ok
    same = plait.merge([place / "sort", place / "rate"], scale=scale, out=tmp_path / "same")
    assert adapter(same.folder) == adapter(result.folder)
    shares = {factor: share(place, tmp_path, scale * factor) for factor in (0.7, 1.0, 1.5)}
    assert min(shares, key=lambda factor: shares[factor]) == 1.0


def share(place: Path, tmp_path: Path, scale: float) -> float:
    """Return the share of a plain sum with a scale."""
    return share_of(place, plait.merge([place / "sort", place / "rate"], scale=scale, out=tmp_path / f"at {scale}").folder)


def share_of(place: Path, out: Path) -> float:
    """Return the mean over the tasks of KL(own ‖ merge) / KL(own ‖ base) on their calibration words, by PEFT in float64."""
    encode, found = tokenizer(), []
    for task in ("sort", "rate"):
        ids = torch.tensor([encode(f"{task} {word} :")["input_ids"] for word in SEEN])
        own, merged = (PeftModel.from_pretrained(language_model(), folder) for folder in (place / task, out))
        with torch.no_grad():
            p, q, b = (m(input_ids=ids).logits[:, -1].double().log_softmax(-1) for m in (own, merged, language_model()))
        found.append(float((p.exp() * (p - q)).sum() / (p.exp() * (p - b)).sum()))
    return sum(found) / len(found)


def test_a_scale_of_a_solved_and_of_a_dense_merge(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="second moments"):
        solved = merge(place, tmp_path / "solved", scale="auto").record
    assert solved.recipe["scale"] != 1
    dense = merge(place, tmp_path / "dense", method="ties", space="delta", kind="delta", scale="auto").record
    assert dense.recipe["scale"] != 1


AUTO = [
    ({"method": "regmean", "ridge": "auto"}, ("ridge",)),
    ({"method": "ties", "density": "auto", "scale": "auto"}, ("scale", "density")),
    ({"method": "della", "space": "core", "density": "auto"}, ("density",)),  # density ± epsilon must stay below 1
]


@pytest.mark.parametrize(("settings", "names"), AUTO)
def test_parameters_are_found_without_labels(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], names: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    sources, moments = [place / "sort", place / "rate"], {}
    if settings["method"] == "regmean":
        moments = {"moments": calibrate(place, tmp_path / "moments").folder}
    done = merge(place, tmp_path / "merged", **settings, **moments).record
    (note,) = (n for n in done.notes if "found on 16 texts of split 'calibration' (sort, rate)" in n)
    values = {name: done.recipe["scale"] if name == "scale" else done.recipe["method"][name] for name in names}
    assert note.startswith(", ".join(f"{name} {value:.4g}" for name, value in values.items()))
    assert plait.verify(tmp_path / "merged").ok

    def shares(**changed: float) -> float:
        found = {key: value for key, value in settings.items() if value != "auto"} | values | changed
        out = plait.merge(sources, **found, **moments, out=tmp_path / "other", force=True).folder
        return share_of(place, out)

    best = shares()
    default = {
        name: 1.0 if name == "scale" else METHODS[settings["method"]].params.model_fields[name].default for name in names
    }
    assert best <= shares(**default) + 1e-6
    tried = [(name, value) for name in names if name != "scale" for value in SEARCHED[name] if value <= 0.9]
    assert all(best <= shares(**{name: value}) + 1e-6 for name, value in tried)


def test_auto_parameters_are_refused_where_nothing_finds_them(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = [place / "sort", place / "rate"]
    for call in (
        lambda: plait.merge(sources, method="ties", density="auto", out=tmp_path / "no"),
        lambda: plait.plan(sources, method="ties", density="auto"),
    ):
        with pytest.raises(PlaitError, match=r"density: 'auto' is found"):
            call()
    with pytest.raises(PlaitError, match="density"):
        plait.merge(sources, method="ties", density="much", out=tmp_path / "no")
    with pytest.raises(PlaitError, match="ridge"):
        plait.merge(sources, method="ties", ridge="auto", out=tmp_path / "no")
    flags = [*map(str, sources), "--tasks", str(place / "sort.yaml"), str(place / "rate.yaml"), "--method", "ties"]
    flags += ["--base-id", str(place / "base")]
    assert exit_code("merge", *flags, "--density", "auto", "--scale", "auto", "--dry-run") == 0
    assert "the scale and density are found on the tasks' texts" in capsys.readouterr().out.replace("\n", " ")


def test_tasks_that_are_not_read_are_noted(place: Path, tmp_path: Path) -> None:
    notes = merge(place, tmp_path / "ties", method="ties").record.notes
    assert notes[-1] == "--tasks (tasks=) changes nothing here: method 'ties' lacks no second moments, and no value is 'auto'."


def test_a_scale_of_auto_is_refused_without_tasks(place: Path, tmp_path: Path) -> None:
    sources = [place / "sort", place / "rate"]
    for call in (lambda: plait.merge(sources, scale="auto", out=tmp_path / "no"), lambda: plait.plan(sources, scale="auto")):
        with pytest.raises(PlaitError, match="'auto' is found"):
            call()
    with pytest.raises(PlaitError, match="scale"):
        plait.merge(sources, scale="much", out=tmp_path / "no")


def test_an_output_is_checked_before_anything_is_taken(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plait.mixture.Mixture.load", lambda *a, **k: pytest.fail("the base was loaded"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    with pytest.raises(OutputError, match="exists"):
        merge(place, tmp_path / "mine", scale="auto")
