"""Images and sounds: moments beside those of PEFT's models, merges that calibrate on them, and what is refused."""

from __future__ import annotations

import io
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import plait
from plait.adapters.adapter import Adapter
from plait.calibration.texts import read_texts
from plait.errors import PlaitError, TaskError
from plait.hub.pretrained import load_feature_extractor, load_image_processor
from plait.merging.moments import MomentsFile
from plait.mixture import Mixture
from plait.tasks.examples import read_examples
from plait.tasks.images import decoded
from plait.tasks.inputs import Example
from plait.tasks.loading import load_task
from plait.tuning.teaching import make_lesson
from tests.calibrated import dense
from tests.e2e import test_audio_tasks as sounds
from tests.e2e import test_image_tasks as images
from tests.text_classifiers import with_head
from tests.two_adapters import NAMES, Folder, redrawn, save_drawn

soundfile = pytest.importorskip("soundfile")
# PEFT's and torch's own
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
KINDS = ("vit", "clip", "wav2vec2", "whisper")  # one size of images, sounds of three lengths, sounds filled up to one
SEEN = ("vit", "clip")
SPLITS = {"calibration": {"rows": [0, 6]}, "test": {"rows": [6, 9]}}


CLASSES = [[f"very {label}", f"{label} :"] for label in images.LABELS]


def plain(kind: str) -> Any:
    model = images.fresh(kind) if kind in SEEN else sounds.fresh(kind)
    return redrawn(model) if kind == "wav2vec2" else model


def write(folder: Path, kind: str, name: str, **changes: Any) -> Path:
    module, prompts = images if kind in SEEN else sounds, {"class_prompts": images.PROMPTS} if kind == "clip" else {}
    return module.write(folder, name, **{"splits": SPLITS, **prompts, **changes})


class World(Folder):
    """A base of every kind with a head, two adapters with heads of their own, and tasks with calibration and test."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        for kind in KINDS:
            plain(kind).save_pretrained(folder / kind / "base")
            (images.save_processor if kind in SEEN else sounds.save_extractor)(kind, folder / kind / "base")
            layers = ["q_proj", "v_proj", "query", "value", "fc1", "output.dense", "output_dense"]
            saved = {"vit": ["classifier"], "clip": None}.get(kind, ["projector", "classifier"])
            for name in NAMES:
                seed = 3 + 17 * (name == "two")
                save_drawn(folder / kind / name, plain(kind), seed, target_modules=layers, modules_to_save=saved)
                write(folder / kind / "tasks", kind, name)
        images.tokenizer().save_pretrained(folder / "clip" / "base")

    def given(self, kind: str) -> dict[str, Any]:
        return {"tasks": self.tasks(kind), "base_model": str(self.folder / kind / "base")}

    def prepared(self, kind: str, example: Example) -> dict[str, torch.Tensor]:
        """Return what transformers gives the model of one example; the texts of classes are other inputs."""
        base = self.folder / kind / "base"
        if kind in SEEN:
            return {**load_image_processor(base)(images=decoded(example.image or b""), return_tensors="pt")}
        values, rate = soundfile.read(io.BytesIO(example.audio or b""), dtype="float32")
        extractor = load_feature_extractor(base)
        found = extractor(values, sampling_rate=rate, return_tensors="pt")
        return {key: found[key] for key in extractor.model_input_names[:1]}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("senses"))


def scores(kind: str, model: Any, given: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Return a model's scores of the labels, one example, and one text of a class, at a time."""
    if kind != "clip":
        return torch.cat([model(**one).logits for one in given])
    texts = [torch.cat([model(**given[0], **images.read(text)).text_embeds for text in some]).mean(0) for some in CLASSES]
    classes = torch.stack([mean / mean.norm() for mean in texts])
    seen = torch.cat([model(**one, **images.read("very red")).image_embeds for one in given])
    found: torch.Tensor = model.logit_scale.exp() * seen @ classes.T
    return found


def plain_moments(model: Any, given: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return E[x xᵀ] of what PEFT's LoRA layers read, one example at a time, in float64."""
    layers = {n.removeprefix("base_model.model."): m.base_layer for n, m in model.named_modules() if hasattr(m, "lora_A")}
    rows: dict[str, list[torch.Tensor]] = {n: [] for n in layers}
    hooks = [m.register_forward_pre_hook(partial(lambda n, _, x: rows[n].append(x[0]), n)) for n, m in layers.items()]
    with torch.no_grad():
        for one in given:
            model(**one)
    for hook in hooks:
        hook.remove()
    flat = {n: torch.cat([x.reshape(-1, x.shape[-1]) for x in some]).double() for n, some in rows.items()}
    return {n: x.T @ x / len(x) for n, x in flat.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_moments_are_those_of_each_adapter_on_its_own_files(world: World, tmp_path: Path, kind: str) -> None:
    folder = plait.calibrate(world.adapters(kind), out=tmp_path / "moments", count=3, **world.given(kind)).folder
    found = {}
    for name, task in zip(NAMES, world.tasks(kind), strict=True):
        model = PeftModel.from_pretrained(plain(kind), str(world.adapters(kind)[name])).eval()
        (about,) = (t for t in json.loads((folder / "calibration.json").read_text())["texts"] if t["task"] == name)
        items = read_examples(load_task(task), "calibration").items
        chosen = [e for e in items if e.prompt_text in about["shown"]]
        assert len(chosen) == about["count"] == 3
        given = [world.prepared(kind, e) for e in chosen]
        if kind == "clip":  # every image with every text
            given = [{**one, **images.read(text)} for one in given for some in CLASSES for text in some]
        wanted = plain_moments(model, given)
        file = MomentsFile(folder / f"{name}.safetensors")
        found[name] = {target: dense(file.read(target, None)) for target in wanted}
        assert len(wanted) >= 6
        for target, gram in wanted.items():
            torch.testing.assert_close(found[name][target], gram, rtol=1e-4, atol=1e-5, msg=target)
    assert not all(torch.allclose(found["one"][t], found["two"][t], rtol=1e-2) for t in found["one"])
    assert plait.verify(folder).ok


@pytest.mark.parametrize("kind", ["clip", "whisper"])
def test_merges_calibrate_by_themselves(world: World, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`regmean` is that of moments that were taken before; its other forms, and a scale, are found without a label."""
    monkeypatch.chdir(tmp_path)
    taken = plait.calibrate(world.adapters(kind), out=tmp_path / "moments", **world.given(kind)).folder
    given = plait.merge(world.adapters(kind), method="regmean", moments=taken, out=tmp_path / "given").folder
    own = plait.merge(world.adapters(kind), method="regmean", out=tmp_path / "own", **world.given(kind)).folder
    name = "adapter_model.safetensors"
    assert (own / name).read_bytes() == (given / name).read_bytes()
    layered = plait.merge(world.adapters(kind), method="regmean_sequential", out=tmp_path / "layered", **world.given(kind))
    assert (layered.folder / name).read_bytes() != (own / name).read_bytes()
    scaled = plait.merge(world.adapters(kind), method="linear", scale="auto", out=tmp_path / "scaled", **world.given(kind))
    assert "no label was read" in " ".join(scaled.record.notes)


def test_no_label_is_read(world: World, tmp_path: Path) -> None:
    first = plait.calibrate(world.adapters("vit"), out=tmp_path / "first", **world.given("vit")).folder
    tasks = [write(tmp_path / "tasks", "vit", name) for name in NAMES]
    for name in NAMES:
        file = tmp_path / "tasks" / f"{name}.jsonl"
        rows = [{**json.loads(line), "label": "never read"} for line in file.open()]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {**world.given("vit"), "tasks": tasks}
    second = plait.calibrate(world.adapters("vit"), out=tmp_path / "second", **given).folder
    for name in NAMES:
        assert (first / f"{name}.safetensors").read_bytes() == (second / f"{name}.safetensors").read_bytes()


def test_files_that_the_task_is_judged_on_are_refused(world: World, tmp_path: Path) -> None:
    """By their content, whatever they are called."""
    for kind in ("vit", "wav2vec2"):
        tasks = [write(tmp_path / kind, kind, n, splits={**SPLITS, "test": {"rows": [5, 9]}}) for n in NAMES]
        with pytest.raises(
            TaskError, match=r"task 'one': 1 of 6 texts \(split 'calibration'\) are in split 'test' too"
        ) as error:
            plait.calibrate(world.adapters(kind), out=tmp_path / "out", **{**world.given(kind), "tasks": tasks})
        assert "sha256" in str(error.value)


def test_files_of_the_users_own(world: World, tmp_path: Path) -> None:
    """A folder, or rows without labels, in place of a split."""
    (tmp_path / "mine").mkdir()
    for i in range(3):
        (tmp_path / "mine" / f"{i}.png").write_bytes(images.picture(100 + i))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"image": f"mine/{i}.png"}) + "\n" for i in range(3)))
    tasks = [write(tmp_path / "tasks", "vit", n, splits={"test": {"rows": [6, 9]}}) for n in NAMES]
    files = {"one": str(tmp_path / "mine"), "two": str(tmp_path / "rows.jsonl")}
    found = plait.calibrate(world.adapters("vit"), out=tmp_path / "out", **{**world.given("vit"), "tasks": tasks}, files=files)
    assert [(t.source, t.count) for t in found.record.texts] == [("mine", 3), ("rows.jsonl", 3)]
    assert found.record.texts[0].digest == found.record.texts[1].digest
    assert plait.verify(found.folder).ok


def test_sounds_of_several_lengths_are_answered_in_their_order(world: World) -> None:
    """One pass per length; distributions of the own adapter and outputs, against transformers one sound at a time."""
    adapters = [Adapter.open(folder, name) for name, folder in world.adapters("wav2vec2").items()]
    mixture = Mixture.load(world.folder / "wav2vec2" / "base", adapters)
    texts = read_texts(load_task(world.tasks("wav2vec2")[1]), kind=None, count=None, seed=0)
    lesson, model = make_lesson(mixture, texts, "two"), PeftModel.from_pretrained(plain("wav2vec2"), adapters[1].folder).eval()
    with torch.no_grad():
        rows = torch.cat([model(**world.prepared("wav2vec2", e)).logits for e in texts.examples.items])
    torch.testing.assert_close(lesson.answers.log_p, rows.log_softmax(-1), atol=1e-5, rtol=1e-5)
    with mixture.active({"two": 1.0}) as acting, torch.no_grad():
        outputs = lesson.outputs(acting, [4, 0, 2, 1])
    torch.testing.assert_close(outputs.logits, rows[[4, 0, 2, 1]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tuning_starts_bad_and_ends_better(world: World, tmp_path: Path, kind: str) -> None:
    """By its own record, and by PEFT's models of the adapters, one example at a time in float64."""
    learn = {"steps": 24, "learning_rate": 0.02, "held_out": 0, "tolerance": 0}
    if kind == "clip":
        learn["soft_weight"] = 0  # at this rate it swings between two tasks of two classes each
    result = plait.tune(world.adapters(kind), method="linear", out=tmp_path / "tuned", tune=learn, **world.given(kind))
    found = result.record
    assert found.start.share > 0.2
    assert found.kept.share < 0.4 * found.start.share
    assert not any("labels were read" in note for note in found.notes)
    for name, task in zip(NAMES, world.tasks(kind), strict=True):
        own = world.adapters(kind)[name]
        teacher = PeftModel.from_pretrained(plain(kind), str(own)).eval()
        merged = result.folder if kind == "clip" else with_head(result.folder, own, tmp_path / "mixed")
        tuned = PeftModel.from_pretrained(plain(kind), str(merged)).eval()
        given = [world.prepared(kind, e) for e in read_examples(load_task(task), "calibration").items]
        with torch.no_grad():
            p, q = (scores(kind, m, given).double().log_softmax(-1) for m in (teacher, tuned))
        assert found.kept.divergence[name] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(("kind", "objective"), [("vit", "adamerging"), ("vit", "gradient"), ("clip", "gradient")])
def test_objectives_of_labels(world: World, tmp_path: Path, kind: str, objective: str) -> None:
    """Labels are read only where the objective needs them, and coefficients are a plain recipe."""
    learn = {"steps": 12, "objective": objective, "granularity": "module", "held_out": 0, "restore_best": False, "prompts": 6}
    result = plait.tune(world.adapters(kind), method="linear", out=tmp_path / "out", tune=learn, **world.given(kind))
    assert any("labels were read: 12 in all" in note for note in result.record.notes) == (objective == "gradient")
    assert result.record.losses[-1] < result.record.losses[0]
    again = plait.merge(result.folder / "recipe.yaml", out=tmp_path / "again").folder
    name = "adapter_model.safetensors"
    assert (again / name).read_bytes() == (result.folder / name).read_bytes()


REFUSED = [
    ("vit", {"splits": {"test": {"rows": [6, 9]}}}, "no text can replace an image file"),
    ("wav2vec2", {"splits": {"test": {"rows": [6, 9]}}}, "rows with the column 'audio', or a folder"),
]


@pytest.mark.parametrize(("kind", "changes", "words"), REFUSED)
def test_what_cannot_be_read_is_refused_before_the_base_is_loaded(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, changes: dict[str, Any], words: str
) -> None:
    monkeypatch.setattr("plait.mixture.Mixture.load", lambda *a, **k: pytest.fail("the base was loaded"))
    tasks = [write(tmp_path / "tasks", kind, name, **changes) for name in NAMES]
    for command in (plait.calibrate, plait.tune, partial(plait.merge, method="regmean")):
        with pytest.raises(PlaitError, match=words):
            command(world.adapters(kind), out=tmp_path / "out", **{**world.given(kind), "tasks": tasks})
    with pytest.raises(PlaitError, match="objective 'hidden' compares hidden states where an answer is read"):
        plait.tune(world.adapters(kind), out=tmp_path / "out", tune={"objective": "hidden"}, **world.given(kind))
    for texts in ("lines", "template"):
        with pytest.raises(PlaitError, match="no text can replace an"):
            plait.calibrate(world.adapters(kind), out=tmp_path / "out", texts=texts, **world.given(kind))
