"""`plait tune` that learns coefficients, by every objective, on a small model whose plain merge is bad."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import plait
from plait.errors import PlaitError
from plait.notices import PlaitWarning
from plait.tuning.pipeline import TuneResult
from tests import text_classifiers
from tests.e2e import test_encoder_decoder as encoder_decoder
from tests.language_models import LABELS, WORDS, label, save_model, train_adapter, train_pair, tune_pair, write_task
from tests.warm import check_killed, run_forked

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = {"steps": 24, "prompts": 8, "learning_rate": 5e-2, "look_every": 6, "held_out": 0, "generic_lines": 0}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = train_pair(tmp_path_factory.mktemp("coefficients"))
    for task in ("sort", "rate"):
        write_task(folder, task, splits={"calibration": "calibration.jsonl", "test": "test.jsonl"})
        (folder / task / "test.jsonl").rename(folder / task / "calibration.jsonl")
        others = [json.dumps({"word": f"{word} {word}", "label": label(task, word)}) for word in WORDS]
        (folder / task / "test.jsonl").write_text("\n".join(others) + "\n")
    return folder


def tune(place: Path, out: Path, tasks: Path | None = None, **changes: Any) -> TuneResult:
    return tune_pair(place, out, QUICK, [(tasks or place) / f"{t}.yaml" for t in ("sort", "rate")], **changes)


def tensors(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("method", ["regmean", "linear"])
@pytest.mark.parametrize("granularity", ["task", "layer", "module"])
def test_the_learned_recipe_makes_the_same_adapter_without_data(
    place: Path, tmp_path: Path, method: str, granularity: str
) -> None:
    found = tune(place, tmp_path / "tuned", method=method, tune={"granularity": granularity})
    record = found.record
    assert record.kept.share < record.start.share
    again = plait.merge(found.folder / "recipe.yaml", out=tmp_path / "again")
    assert tensors(again.folder) == tensors(found.folder)
    text = (found.folder / "recipe.yaml").read_text()
    assert "\ntasks:" not in text
    assert "\ntune:" not in text
    assert record.coefficients is not None
    assert record.coefficients.columns == (("start",) if method == "regmean" else ()) + ("sort", "rate")
    assert (tmp_path / "tuned" / "start").exists() == (method == "regmean")
    assert record.rank == 8  # columns that span the same need no more
    checked = plait.verify(found.folder)
    assert {x.state for x in (*checked.files, *checked.inputs)} == {"equal"}
    assert {x.name: x.state for x in checked.rebuilt or ()} == {
        "adapter_config.json": "equal",
        "adapter_model.safetensors": "equal",
    }


@pytest.mark.parametrize("method", ["regmean", "linear"])
def test_directions_give_an_adapter_and_a_file_of_coefficients(place: Path, tmp_path: Path, method: str) -> None:
    found = tune(place, tmp_path / "tuned", method=method, tune={"granularity": "direction"})
    assert found.record.kept.share < 0.5 * found.record.start.share
    assert load_file(found.folder / "coefficients.safetensors")["coefficients"].shape[0] == 8  # target modules
    assert not (found.folder / "recipe.yaml").exists()


@pytest.mark.parametrize("objective", ["distill", "hidden", "gradient", "supermerge", "regret_smoothmax"])
@pytest.mark.parametrize("what", [{"granularity": "module"}, {"train": "factors", "learning_rate": 1e-2}])
def test_every_objective_goes_down(place: Path, tmp_path: Path, objective: str, what: dict[str, Any]) -> None:
    record = tune(place, tmp_path / "tuned", tune={"objective": objective, **what}).record
    assert sum(record.losses[-3:]) < 0.8 * sum(record.losses[:3])
    assert record.kept.share <= record.start.share
    labels = [note for note in record.notes if "labels were read" in note]
    assert bool(labels) == (objective in ("gradient", "supermerge", "regret_smoothmax"))


def test_an_entropy_that_leads_away_is_not_kept(place: Path, tmp_path: Path) -> None:
    spec = {"objective": "adamerging", "granularity": "module", "learning_rate": 0.3, "link": "raw"}
    record = tune(place, tmp_path / "tuned", tune=spec).record
    assert record.losses[-1] < record.losses[0]
    assert record.looks[-1].share > record.start.share  # it does lead away
    assert record.kept.share <= record.start.share
    free = tune(place, tmp_path / "free", tune={**spec, "restore_best": False}).record
    assert free.kept_step == 24


def test_a_tree_ends_in_a_flat_recipe(tmp_path_factory: pytest.TempPathFactory, place: Path, tmp_path: Path) -> None:
    third = place / "third"
    if not third.exists():
        train_adapter(third, "sort", steps=20)
    file = write_task(tmp_path, "sort", name="third", splits={"calibration": "test.jsonl"})
    found = plait.tune(
        {"sort": place / "sort", "rate": place / "rate", "third": third},
        tasks=[place / "sort.yaml", place / "rate.yaml", file],
        out=tmp_path / "tuned",
        base_model=str(place / "base"),
        method="linear",
        scale=0.5,  # a start that leaves much to learn
        tune={**QUICK, "objective": "supermerge", "granularity": "layer", "group_size": 2, "polish_steps": 12},
    )
    record = found.record
    assert [sorted(leaf for child in node for leaf in child) for node in record.tree] == [
        ["sort", "third"],  # trained for the same
        ["rate", "sort", "third"],
    ]
    assert len(record.losses) == 24 + 24 + 12
    assert record.kept.share < record.start.share
    assert tensors(plait.merge(found.folder / "recipe.yaml", out=tmp_path / "again").folder) == tensors(found.folder)


def test_objectives_without_labels_read_none(place: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    for task in ("sort", "rate"):
        write_task(other, task, splits={"calibration": "test.jsonl"})
        rows = [{"word": w, "label": LABELS[task][0]} for w in WORDS]  # most are wrong
        (other / task / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    for objective in ("distill", "hidden", "adamerging", "gradient"):
        spec = {"objective": objective, "granularity": "task", "steps": 6}
        one = tune(place, tmp_path / objective, tune=spec)
        two = tune(place, tmp_path / f"{objective}-2", tasks=other, tune=spec)
        assert (tensors(one.folder) == tensors(two.folder)) == (objective != "gradient")


def test_controls_change_nothing_and_come_less_far(place: Path, tmp_path: Path) -> None:
    spec = {"granularity": "module"}
    plain = tune(place, tmp_path / "plain", tune=spec)
    found = tune(place, tmp_path / "controls", tune=spec, controls=True)
    assert tensors(plain.folder) == tensors(found.folder)
    assert found.record.control is not None
    assert found.record.random is not None
    assert found.record.random.held.share > found.record.kept.share


ROOT = Path(__file__).parents[2]
KILLED = """
import os, signal, sys, torch, plait
import plait.tuning.working as working
torch.set_num_threads(1)
save, left = working.WorkingState.save, [int(sys.argv[2])]
def save_and_die(self, *rest):
    save(self, *rest)
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
working.WorkingState.save = save_and_die
import plait.tuning.pipeline as pipeline
if sys.argv[2] == "0":  # while the result is being written
    pipeline.write_json = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
from tests.e2e.test_tune_coefficients import tune
from pathlib import Path
tune(Path(sys.argv[1]), Path(sys.argv[3]), tune=eval(sys.argv[4]), controls=True)
"""


@pytest.mark.parametrize(
    ("saves", "spec"),
    [
        (0, {"granularity": "layer"}),
        (1, {"granularity": "layer"}),
        (4, {"objective": "gradient", "learning_rate": 1e-2}),
        (11, {"granularity": "layer"}),
    ],
)
def test_a_killed_tuning_goes_on_to_the_same_bytes(place: Path, tmp_path: Path, saves: int, spec: dict[str, Any]) -> None:
    plain = tune(place, tmp_path / "plain", tune=spec, controls=True)
    out = tmp_path / "killed"
    check_killed(run_forked(KILLED, str(place), str(saves), str(out), repr(spec), folder=ROOT))
    working = tmp_path / ".killed.tuning"
    assert working.is_dir()
    assert not out.exists()
    found = tune(place, out, tune=spec, controls=True)
    assert {p.name for p in tmp_path.iterdir()} == {"plain", "killed"}
    assert tensors(found.folder) == tensors(plain.folder)
    same = {"looks", "losses", "kept_step", "scales", "coefficients", "control", "random"}
    assert found.record.model_dump(include=same) == plain.record.model_dump(include=same)


def test_what_another_request_left_is_not_gone_on_from(place: Path, tmp_path: Path) -> None:
    check_killed(run_forked(KILLED, str(place), "3", str(tmp_path / "out"), "{'granularity': 'layer'}", folder=ROOT))
    assert [p.name for p in tmp_path.iterdir()] == [".out.tuning"]
    with pytest.warns(PlaitWarning, match="of another tuning .*; it is removed"):
        found = tune(place, tmp_path / "out", tune={"granularity": "layer", "seed": 1})
    assert tensors(found.folder) == tensors(tune(place, tmp_path / "plain", tune={"granularity": "layer", "seed": 1}).folder)


def test_a_state_is_of_contents_and_not_of_places(place: Path, tmp_path: Path) -> None:
    """A moved folder goes on; an adapter with another scaling, which its tensor file does not show, does not."""
    shutil.copytree(place, tmp_path / "first")
    check_killed(
        run_forked(KILLED, str(tmp_path / "first"), "3", str(tmp_path / "out"), "{'granularity': 'layer'}", folder=ROOT)
    )
    moved = (tmp_path / "first").rename(tmp_path / "moved")
    shutil.copytree(tmp_path / ".out.tuning", tmp_path / ".other.tuning")
    with warnings.catch_warnings():
        warnings.simplefilter("error", PlaitWarning)
        tune(moved, tmp_path / "out", tune={"granularity": "layer"})
    config = next(moved.glob("**/adapter_config.json"))
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 5}))
    with pytest.warns(PlaitWarning, match="of another tuning .*; it is removed"):
        tune(moved, tmp_path / "other", tune={"granularity": "layer"})


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"split": "test"}, "'test' judges results"),
        ({"train": "factors", "granularity": "task"}, "'granularity' is of coefficients"),
        ({"objective": "adamerging"}, "learns coefficients"),
        ({"objective": "gradient", "texts": "lines"}, "reads labels, and texts: lines has none"),
        ({"granularity": "direction", "link": "tanh"}, "per direction have no link"),
        ({"granularity": "module", "link": "softmax"}, "no place for a start"),
        ({"granularity": "module", "group_size": 2}, "'group_size' is of objective 'supermerge'"),
        ({"granularity": "layer", "objective": "supermerge", "group_size": 2}, "use method 'linear', not 'regmean'"),
        ({"judge": "loss"}, "judge 'loss' reads labels"),
        ({"task_weights": "manual"}, "needs the numbers"),
        ({"objective": "gradient", "task_weights": {"other": 1}}, "'other' is not a task"),
        ({"objective": "gradient", "task_weights": {"sort": 1}}, "gives 'rate' no number"),
        ({"objective": "gradient", "task_weights": {"sort": 0, "rate": 0}}, "is 0 for every task"),
        ({"samplers": {"other": "inverse"}}, "'other' is not a task"),
        ({"link": "tanh"}, "'link' is of coefficients; give a granularity"),
        ({"objective": "kl"}, "objective"),
    ],
)
def test_bad_requests_are_refused_before_the_base_is_loaded(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: dict[str, Any], words: str
) -> None:
    monkeypatch.setattr("plait.mixture.Mixture.load", lambda *a, **k: pytest.fail("the base was loaded"))
    with pytest.raises(PlaitError, match=words):
        tune(place, tmp_path / "no", tune=spec)
    assert not any(tmp_path.iterdir())


def test_the_test_split_is_learned_from_only_where_it_is_allowed(place: Path, tmp_path: Path) -> None:
    record = tune(place, tmp_path / "out", tune={"split": "test", "allow_test": True, "steps": 1}).record
    assert any("do not judge the result on it" in note for note in record.notes)


def test_weights_of_the_recipe_are_where_coefficients_start(place: Path, tmp_path: Path) -> None:
    weights = {"policy": "per_layer", "layers": {"0": {"sort": 0.5, "rate": 0.25}}, "default": 2.0}
    made = tune(place, tmp_path / "out", method="linear", weights=weights, scale=0.5, tune={"granularity": "layer", "steps": 0})
    assert made.record.coefficients is not None
    assert [row for row in made.record.coefficients.values] == [(0.25, 0.125), (1.0, 1.0)]
    plain = plait.merge([place / "sort", place / "rate"], weights=weights, scale=0.5, out=tmp_path / "plain")
    one, two = (load_file(f / "adapter_model.safetensors") for f in (made.folder, plain.folder))
    for key in one:
        if "lora_A" in key:
            b = key.replace("lora_A", "lora_B")
            torch.testing.assert_close(one[b] @ one[key], two[b] @ two[key], rtol=1e-4, atol=1e-6)


def test_transforms_act_while_learning_as_in_the_recipe(place: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"method": "linear", "transforms": [{"name": "layer_l2_normalize", "target_norm": 3.0}]}
    found = tune(place, tmp_path / "out", tune={"granularity": "module"}, **changes)
    again = plait.merge(found.folder / "recipe.yaml", out=tmp_path / "again")
    assert tensors(again.folder) == tensors(found.folder)
    assert found.record.distance > 0
    with pytest.raises(PlaitError, match="transforms would change the start"):
        tune(place, tmp_path / "no", tune={"granularity": "module"}, transforms=changes["transforms"])


@pytest.mark.parametrize("granularity", ["task", "layer", "module", "direction"])
def test_a_report_shows_what_was_learned_and_kept(place: Path, tmp_path: Path, granularity: str) -> None:
    found = tune(place, tmp_path / "tuned", tune={"granularity": granularity, "steps": 6}, controls=granularity == "layer")
    made = plait.report([found.folder], out=tmp_path / "page.html", figures=tmp_path / "figures")
    text = (tmp_path / "page.html").read_text()
    assert "What tuning kept" in text
    assert f"coefficients per {granularity}" in text
    assert ("fresh LoRA" in text) == (granularity == "layer")
    weights = made.report.weights
    if granularity == "direction":
        assert weights is None
        return
    assert weights is not None
    assert weights.adapters == ("start", "sort", "rate")
    assert weights.layers == (("model",) if granularity == "task" else ("model.layers.0", "model.layers.1"))
    record = found.record.coefficients
    assert record is not None
    if granularity != "module":
        assert weights.values == record.values
    else:
        rows = [v for name, v in zip(record.rows, record.values, strict=True) if "layers.1." in name]
        assert weights.values[1] == pytest.approx([sum(column) / len(rows) for column in zip(*rows, strict=True)])
    assert (tmp_path / "figures" / "weights.svg").exists() == (granularity != "task")


OBJECTIVES = ["distill", "hidden", "adamerging", "gradient", "supermerge", "regret_smoothmax"]


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return folders with a base, two adapters and their tasks: a classifier, an encoder-decoder, and free answers."""
    folder = tmp_path_factory.mktemp("families")
    splits = {"calibration": "test.jsonl"}
    text_classifiers.save_encoder(folder / "heads" / "base")
    encoder_decoder.t5().save_pretrained(folder / "apart" / "base")
    encoder_decoder.closing("$A </s>").save_pretrained(folder / "apart" / "base")
    save_model(folder / "free" / "base")
    for task in ("sort", "rate"):
        text_classifiers.train_classifier(folder / "heads" / task, task)
        text_classifiers.write_classification(folder / "heads", task, splits=splits)
        encoder_decoder.train(folder / "apart" / task, task)
        write_task(folder / "apart", task, splits=splits)
        train_adapter(folder / "free" / task, task)
        write_task(folder / "free", task, splits=splits, kind="generation", labels=None, max_new_tokens=2)
    return {name: folder / name for name in ("heads", "apart", "free")}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("family", ["heads", "apart", "free"])
def test_other_models_and_tasks(families: dict[str, Path], tmp_path: Path, family: str, objective: str) -> None:
    spec = {"objective": objective, "granularity": "module", "steps": 12, "checkpointing": True, "link": "raw"}
    record = tune(families[family], tmp_path / "tuned", method="linear", tune=spec).record
    first, last = record.losses[:4], record.losses[-4:]  # a step's loss is of four texts per task
    assert sum(last) < sum(first)
    assert record.kept.score >= record.start.score
    if objective != "adamerging":  # an entropy may gain on the worst task, which decides, and lose on the mean
        assert record.kept.share <= record.start.share
