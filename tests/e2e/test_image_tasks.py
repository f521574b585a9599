"""Images: heads of ViT and DINOv2, class prompts of CLIP, against PEFT; data of every form, and broken files by row."""

from __future__ import annotations

import base64
import io
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

import plait
from plait.adapters.adapter import Adapter
from plait.errors import TaskError
from plait.evaluation.vision import class_likeness, image_outputs
from plait.hub.pretrained import load_image_processor
from plait.mixture import Mixture
from plait.tasks.examples import read_examples
from plait.tasks.images import decoded
from plait.tasks.loading import load_task
from tests.command_line import exit_code
from tests.language_models import tokenizer
from tests.text_classifiers import with_head
from tests.two_adapters import NAMES, Folder, save_drawn, write_labeled_files

# PEFT's and torch's own
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
LABELS = ["red", "blue", "good"]
SIZE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 8,
    "patch_size": 4,
}
PROMPTS = ["very {{ label }}", "{{ label }} :"]


def fresh(kind: str, labels: int = 3) -> Any:
    torch.manual_seed(0)
    if kind == "vit":
        return ViTForImageClassification(ViTConfig(**SIZE, num_labels=labels, initializer_range=0.5)).eval()
    if kind == "dinov2":
        small = {key: value for key, value in SIZE.items() if key != "intermediate_size"}
        return Dinov2ForImageClassification(Dinov2Config(**small, num_labels=labels, initializer_range=0.5)).eval()
    text = {"vocab_size": 40, "max_position_embeddings": 16, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    text |= {key: value for key, value in SIZE.items() if "size" not in key or key in ("hidden_size", "intermediate_size")}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=SIZE, projection_dim=8)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)  # the initialization is so small that all images look alike
    return model


def save_processor(kind: str, folder: Path) -> None:
    """Write how the model sees images."""
    plain = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}}
    crop = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    settings = {"image_processor_type": "CLIPImageProcessor", **crop} if kind == "clip" else plain
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def read(text: Any) -> dict[str, torch.Tensor]:
    found = tokenizer()(text, return_tensors="pt")
    return {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"]}


def picture(number: int, form: str = "PNG", size: tuple[int, int] = (9, 12)) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, form)
    return stream.getvalue()


def write(folder: Path, name: str, **changes: Any) -> Path:
    """Write a task with a picture per row."""
    return write_labeled_files(folder, name, "image_classification", [picture(i) for i in range(12)], LABELS, **changes)


class World(Folder):
    """A base of every kind, two adapters of each, and the tasks."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        for kind in ("vit", "dinov2", "clip"):
            base = fresh(kind, 5)  # a head for other labels than the adapters'
            base.save_pretrained(folder / kind / "base")
            save_processor(kind, folder / kind / "base")
            for name in NAMES:
                saved = None if kind == "clip" else ["classifier"]
                layers = ["q_proj", "v_proj", "query", "value"]  # as releases of transformers call them
                seed = 3 + 17 * (name == "two")
                save_drawn(folder / kind / name, self.plain(kind), seed, target_modules=layers, modules_to_save=saved)
                write(folder / kind / "tasks", name, **({"class_prompts": PROMPTS} if kind == "clip" else {}))
        tokenizer().save_pretrained(folder / "clip" / "base")

    def plain(self, kind: str) -> Any:
        if kind == "clip":
            return fresh(kind)
        model, body = fresh(kind), fresh(kind, 5)
        model.load_state_dict({k: v for k, v in body.state_dict().items() if "classifier" not in k}, strict=False)
        return model

    def processor(self, kind: str) -> Any:
        return load_image_processor(self.folder / kind / "base")

    def peft(self, kind: str, adapter: Path) -> Any:
        return PeftModel.from_pretrained(self.plain(kind), str(adapter)).eval()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("images"))


@torch.no_grad()
def accuracy(world: World, kind: str, task: Path, model: Any) -> float:
    """Return the accuracy as transformers has it, image by image, and every text of a class by itself."""
    examples, prepare = read_examples(load_task(task), "test").items, world.processor(kind)
    right, classes = 0, []
    for example in examples:
        pixels = prepare(images=decoded(example.image or b""), return_tensors="pt")
        if kind != "clip":
            scores = model(**pixels).logits[0].tolist()
        else:
            if not classes:
                texts = [[f"very {label}", f"{label} :"] for label in LABELS]
                embedded = [[model(**pixels, **read(t)).text_embeds for t in some] for some in texts]
                classes = [torch.cat(some).mean(0) for some in embedded]
            image = model(**pixels, **read("very red")).image_embeds[0]
            scores = [float(image @ mean / mean.norm()) for mean in classes]
        right += LABELS[int(np.argmax(scores))] == example.target
    return right / len(examples)


@pytest.mark.parametrize("kind", ["vit", "dinov2", "clip"])
def test_every_side_is_what_peft_makes_of_it(world: World, tmp_path: Path, kind: str) -> None:
    """Base, single, merge in memory and from files; convolutions of the stem, which no adapter has, are left alone."""
    settings: dict[str, Any] = {"tasks": world.tasks(kind), "base": world.folder / kind / "base", "batch_size": 5}
    found = plait.evaluate(world.adapters(kind), weights=[0.5, 0.5], workspace=tmp_path / "live", **settings)
    merged = plait.merge(world.adapters(kind), weights=[0.5, 0.5], out=tmp_path / "out").folder
    saved = plait.evaluate(str(merged), workspace=None, sources=world.adapters(kind), **settings)
    values = set()
    for task, again, file in zip(found.tasks, saved.tasks, world.tasks(kind), strict=True):
        own = world.adapters(kind)[task.task]
        bare = world.peft(kind, own)
        for parameter_name, parameter in bare.named_parameters():
            if "lora_B" in parameter_name:
                parameter.data.zero_()
        mixed = merged if kind == "clip" else with_head(merged, own, tmp_path / "mixed")
        expected = [accuracy(world, kind, file, model) for model in (bare, world.peft(kind, own), world.peft(kind, mixed))]
        assert [task.base, task.single, task.merged] == expected
        assert again.merged == task.merged
        values |= {*expected}
    assert len(values) > 2
    shown = found.tasks[0].samples[0].image or ""
    with Image.open(io.BytesIO(base64.b64decode(shown.partition(",")[2]))) as image:
        assert (image.format, image.size) == ("JPEG", (9, 12))
    if kind == "vit":
        plait.report(next((tmp_path / "live").rglob("eval_results_*.json")).parent, out=tmp_path / "page.html")
        page = (tmp_path / "page.html").read_text()
        assert shown in page
        assert "Which label was given" in page
        assert f"{found.tasks[0].task}, the merge" in page


def test_heads_that_adapters_bring_are_not_called_missing(
    world: World, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers would advise to train what the adapters have trained."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    base = world.folder / "dinov2" / "base"
    plait.evaluate(world.adapters("dinov2"), tasks=world.tasks("dinov2"), base=base, workspace=None, subset=2)
    assert not [message for message in caplog.messages if "classifier" in message]


@pytest.mark.parametrize("kind", ["vit", "dinov2", "clip"])
def test_a_live_merge_gives_the_outputs_of_the_merged_weights(world: World, tmp_path: Path, kind: str) -> None:
    """Every score of head or class, against PEFT's forward and, put into the weights, without any adapter."""
    images, pair = [picture(i) for i in range(3)], world.adapters(kind)
    merged = plait.merge(pair, weights=[0.7, -0.4], out=tmp_path / "out").folder
    mixed = merged if kind == "clip" else with_head(merged, pair["one"], tmp_path / "mixed")
    prepare, texts = world.processor(kind), [["very red", "red :"], ["very blue", "blue :"], ["very good", "good :"]]
    given = prepare(images=[decoded(i) for i in images], return_tensors="pt")
    if kind == "clip":
        given |= read([text for some in texts for text in some])
    mixture = Mixture.load(world.folder / kind / "base", [Adapter.open(p, n) for n, p in pair.items()])
    heads = False if kind == "clip" else "one"
    settings: dict[str, Any] = {"batch_size": 2, "report": lambda done: None}
    with mixture.active({"one": 0.7, "two": -0.4}, heads=heads) as acting:
        if kind == "clip":
            found = class_likeness(acting, mixture.tokenizer, prepare, images, texts, **settings)
        else:
            found = image_outputs(acting, prepare, images, outputs=3, **settings)
    model = world.peft(kind, mixed)
    for plain in (model, model.merge_and_unload()):
        with torch.no_grad():
            out = plain(**given)
        if kind == "clip":  # a class is the mean of its texts' vectors, each of length 1
            classes = out.text_embeds.reshape(3, 2, -1).mean(1)
            wanted = plain.logit_scale.exp() * out.image_embeds @ (classes / classes.norm(dim=1, keepdim=True)).T
        else:
            wanted = out.logits
        torch.testing.assert_close(torch.tensor(found), wanted, atol=1e-4, rtol=1e-4)


def folders(place: Path) -> dict[str, Any]:
    for i in range(6):
        (place / "test" / LABELS[i % 3]).mkdir(parents=True, exist_ok=True)
        (place / "test" / LABELS[i % 3] / f"{i}.jpg").write_bytes(picture(i, "JPEG"))
    return {"data": {"path": "."}, "splits": {"test": "test"}}


def parquet(place: Path) -> dict[str, Any]:
    import pyarrow as pa
    from pyarrow import parquet as written

    rows = [{"picture": {"bytes": picture(i), "path": f"{i}.png"}, "label": i % 3} for i in range(6)]
    written.write_table(pa.Table.from_pylist(rows), place / "rows.parquet")
    data = {"path": "rows.parquet"}
    return {"data": data, "splits": {"test": {"rows": [0, 6]}}, "image": "picture", "target": "{{ labels[label] }}"}


def stored(place: Path) -> dict[str, Any]:
    """Write a data set as `datasets` saves it, which its loader reads as it does one of the Hub."""
    import datasets

    (place / "hub" / "train").mkdir(parents=True)
    rows = [{"image": picture(i), "label": LABELS[i % 3]} for i in range(6)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    made = datasets.Dataset.from_dict(
        {"image": [{"bytes": r["image"], "path": None} for r in rows], "label": [r["label"] for r in rows]}, features=features
    )
    made.to_parquet(place / "hub" / "train" / "0.parquet")
    return {"data": {"hub": str(place / "hub")}, "splits": {"test": "train"}}


@pytest.mark.parametrize("form", [folders, parquet, stored])
def test_data_of_every_form(tmp_path: Path, form: Callable[[Path], dict[str, Any]]) -> None:
    examples = read_examples(load_task(write(tmp_path, "t", **form(tmp_path))), "test")
    assert sorted(e.target for e in examples.items) == sorted(LABELS * 2)
    assert len({e.id for e in examples.items}) == 6
    assert {decoded(e.image or b"").size for e in examples.items} == {(9, 12)}


def test_broken_images_are_listed_by_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, "t")
    (tmp_path / "t1.png").unlink()
    (tmp_path / "t3.png").write_text("no image")
    whole = picture(4, size=(64, 64))
    (tmp_path / "t4.png").write_bytes(whole[: len(whole) // 2])
    Image.new("1", (9000, 8000)).save(tmp_path / "t5.png")
    (tmp_path / "t6.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n")
    (tmp_path / "t7.png").write_bytes(b"")
    (tmp_path / "t8.png").unlink()
    (tmp_path / "t8.png").mkdir()
    assert exit_code("tasks", "check", str(file)) == 2
    text = " ".join(capsys.readouterr().err.split())
    for row, why in {
        1: "there is no such file",
        3: "it is none of BMP, GIF, JPEG, PNG, PPM, TIFF, WEBP",
        4: "it is damaged: ",
        5: "it has 9000 × 8000 pixels; at most 64,000,000 are decoded",
        6: "it is none of BMP",
        7: "it is none of BMP",
        8: "a folder, a pipe or a device, not a file",
    }.items():
        assert f"t{row}.png: {why}" in text
        assert f"(row {row} of split 'test')" in text
    assert "(row 0 " not in text


def test_a_check_shows_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, "t")
    (tmp_path / "t0.png").write_bytes(picture(0, "GIF", (30, 20)))
    assert exit_code("tasks", "check", str(file)) == 0
    text = capsys.readouterr().out
    assert "test: images of 9 × 12 / 9 × 12 / 30 × 20 pixels (1 GIF, 11 PNG" in text
    assert "red 4, blue 4, good 4" in text


def test_what_has_no_place_is_said(world: World, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="'prompt' has no place here"):
        load_task(write(tmp_path, "t", prompt="{{ x }}"))
    task = write(tmp_path, "one", class_prompts=PROMPTS)
    with pytest.raises(TaskError, match="there is no tokenizer"):
        plait.evaluate({"one": world.adapters("vit")["one"]}, tasks=[task], base=world.folder / "vit" / "base", workspace=None)
    (world.folder / "vit" / "base" / "preprocessor_config.json").rename(tmp_path / "kept.json")
    try:
        with pytest.raises(TaskError, match=r"there is no preprocessor_config\.json"):
            plait.evaluate(
                {"one": world.adapters("vit")["one"]},
                tasks=world.tasks("vit")[:1],
                base=world.folder / "vit" / "base",
                workspace=None,
            )
    finally:
        (tmp_path / "kept.json").rename(world.folder / "vit" / "base" / "preprocessor_config.json")
