"""Chats with images: Qwen2-VL, Idefics3 and LLaVA against transformers and PEFT, number by number; what does not fit."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText

import plait
from plait import notices
from plait.adapters.adapter import Adapter
from plait.errors import TaskError
from plait.evaluation import readers
from plait.evaluation.model_calls import perceived_of
from plait.evaluation.scoring import answer_examples
from plait.hub.pretrained import load_chat_processor
from plait.libraries.transformers import reading
from plait.mixture import Mixture
from plait.notices import PlaitWarning
from plait.tasks import perceiving
from plait.tasks.encoding import Question
from plait.tasks.examples import read_examples
from plait.tasks.inputs import PLACE
from plait.tasks.loading import load_task
from plait.tasks.perceiving import Perceived
from tests.chat_models import save_chat_model
from tests.command_line import exit_code
from tests.language_models import language_model
from tests.multimodal_models import TARGETS, fresh, likelihoods, save_base, write_chats, written
from tests.two_adapters import NAMES, Folder, save_drawn, write_yaml

# PEFT's and torch's own
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
KINDS = ("qwen2_vl", "idefics3", "llava")
LABELS = ["red", "reddish", "b", "green"]
SIZES = [(12, 9), (20, 20), (9, 12), (12, 9), (20, 20), (12, 9)]


def picture(number: int, size: tuple[int, int] = (12, 9)) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def write(folder: Path, name: str, **changes: Any) -> Path:
    """Write a task of chats with pictures of several sizes."""
    first = 30 if name == "two" else 10
    contents = [picture(first + i, size) for i, size in enumerate(SIZES)]
    asked = {"labels": LABELS, "messages": [{"role": "user", "content": "Which color, {{ who }}?"}]}
    return write_chats(folder, name, "image", contents, asked, changes)


class World(Folder):
    """A base of every kind, two adapters of each on what sees, reads and is between both, and the tasks."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        for kind in KINDS:
            save_base(kind, self.base(kind))
            for name in NAMES:
                seed = 3 + 17 * (name == "two")
                typed = {"task_type": "CAUSAL_LM"} if kind == "qwen2_vl" else {}  # as TRL writes it, or none
                save_drawn(folder / kind / name, fresh(kind), seed, target_modules=TARGETS[kind], **typed)
                write(folder / kind / "tasks", name)

    def base(self, kind: str) -> Path:
        return self.folder / kind / "base"

    def processor(self, kind: str) -> Any:
        return load_chat_processor(self.base(kind))

    def peft(self, kind: str, adapter: Path | None) -> Any:
        model = AutoModelForImageTextToText.from_pretrained(self.base(kind)).eval()
        return model if adapter is None else PeftModel.from_pretrained(model, str(adapter)).eval()

    def live(self, kind: str) -> Mixture:
        pair = [Adapter.open(place, name) for name, place in self.adapters(kind).items()]
        return Mixture.load(self.base(kind), pair, dtype="float32")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("seen"))


@contextmanager
def images_read(model: Any) -> Iterator[list[int]]:
    """Count the prompts that a model reads with images."""
    found: list[int] = []

    def count(_: Any, given: Any, keywords: dict[str, Any]) -> None:
        if keywords.get("pixel_values") is not None:
            found.append(len(keywords["input_ids"]))

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    yield found
    handle.remove()


def asked(world: World, kind: str, model: Any, file: Path, batch_size: int = 3) -> Any:
    examples = read_examples(load_task(file), "test")
    return answer_examples(model, None, examples, processor=world.processor(kind), batch_size=batch_size)


@pytest.mark.parametrize("kind", KINDS)
def test_likelihoods_are_those_of_transformers_with_peft(world: World, tmp_path: Path, kind: str) -> None:
    """Base, single and merge, in a forward pass and in the weights; images of several sizes, answers of several tokens."""
    file, pair, processor = world.tasks(kind)[0], world.adapters(kind), world.processor(kind)
    merged = plait.merge(pair, weights=[0.7, -0.4], out=tmp_path / "out").folder
    states = {"base": {}, "one": {"one": 1.0}, "merge": {"one": 0.7, "two": -0.4}}
    places = {"base": None, "one": pair["one"], "merge": merged}
    examples, mixture, everything = read_examples(load_task(file), "test").items, world.live(kind), []
    for name, weights in states.items():
        with mixture.active(weights) as acting, images_read(acting) as read:
            answers = asked(world, kind, acting, file)
        tried = 2 * (name == "base")  # whether answers may be read on from what was seen, once
        assert sum(read) == tried + len(examples)  # every prompt once, whatever its answers
        model = world.peft(kind, places[name])
        forms = [model] if name != "merge" else [model, model.merge_and_unload()]
        for plain in forms:
            wanted = [
                likelihoods(processor, plain, [None, f"Which color, {'ab'[i % 2]}?"], e.images, LABELS)
                for i, e in enumerate(examples)
            ]
            found = torch.tensor([a.scores for a in answers])
            torch.testing.assert_close(found, torch.tensor(wanted), atol=2e-4, rtol=2e-5)
        everything.append(found)
    rows = torch.cat(everything)
    assert torch.pdist(rows).min() > 0.01  # every image, question and adapter counts


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_what_peft_writes(world: World, tmp_path: Path, kind: str) -> None:
    """Base, single and merge; the page shows what was seen."""
    file = write(tmp_path, "one", kind="generation", labels=None, max_new_tokens=5, metric="cer")
    place = {"base": world.base(kind), "workspace": tmp_path / "kept"}
    found = plait.evaluate(world.adapters(kind), tasks=[file], weights=[0.5, 0.5], batch_size=4, **place).tasks[0]
    merged = plait.merge(world.adapters(kind), weights=[0.5, 0.5], out=tmp_path / "out").folder
    rows, processor, sides = read_examples(load_task(file), "test").items, world.processor(kind), []
    for adapter in (None, world.adapters(kind)["one"], merged):
        model = world.peft(kind, adapter)
        texts = [written(processor, model, [None, e.prompt[0][1][1:]], e.images, 5) for e in rows]
        sides.append({e.id: text for e, text in zip(rows, texts, strict=True)})
    for sample in found.samples:
        assert [sample.base, sample.single, sample.merged] == [texts[sample.id] for texts in sides]
    assert len({text for texts in sides for text in texts.values()}) > 3
    assert all((sample.image or "").startswith("data:image/jpeg") for sample in found.samples)
    assert "user: ⟨image of " in found.samples[0].prompt
    plait.report(next((tmp_path / "kept").rglob("eval_results_*.json")).parent, out=tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert found.samples[0].image in page
    assert f"<pre>{found.samples[0].prompt}</pre>" in page


def test_the_likeliest_label_is_that_of_peft(world: World, tmp_path: Path) -> None:
    """Base, single and merge, in memory and from files."""
    file, pair, base = world.tasks("qwen2_vl")[0], world.adapters("qwen2_vl"), world.base("qwen2_vl")
    merged = plait.merge(pair, weights=[0.5, 0.5], out=tmp_path / "out").folder
    found = plait.evaluate(pair, tasks=[file], weights=[0.5, 0.5], base=base, workspace=None).tasks[0]
    saved = plait.evaluate(str(merged), tasks=[file], sources=pair, base=base, workspace=None).tasks[0]
    expected = []
    for place in (None, pair["one"], merged):
        model, rows = world.peft("qwen2_vl", place), read_examples(load_task(file), "test").items
        scores = [likelihoods(world.processor("qwen2_vl"), model, [None, e.prompt[0][1][1:]], e.images, LABELS) for e in rows]
        expected.append(float(np.mean([LABELS[int(np.argmax(s))] == e.target for s, e in zip(scores, rows, strict=True)])))
    assert [found.base, found.single, found.merged] == expected
    assert saved.merged == found.merged


def unknown(_: Any) -> None:
    raise LookupError("its positions are not known")


@pytest.mark.parametrize(
    ("shift", "why"), [(unknown, "its positions are not known"), (lambda _: None, "its answers are not what they are")]
)
def test_what_is_read_again_is_announced_and_the_same(
    world: World, monkeypatch: pytest.MonkeyPatch, shift: Callable[[Any], None], why: str
) -> None:
    with world.live("qwen2_vl").active({"one": 1.0}) as acting:
        quick = asked(world, "qwen2_vl", acting, world.tasks("qwen2_vl")[0])
        monkeypatch.setattr(reading, "position_shift", shift)
        readers._reasons.clear()
        notices.forget_announcements()
        with images_read(acting) as read, pytest.warns(PlaitWarning, match=f"the slower way.*{why}"):
            slow = asked(world, "qwen2_vl", acting, world.tasks("qwen2_vl")[0], batch_size=2)
    assert sum(read) > len(SIZES)
    both = [torch.tensor([a.scores for a in answers]) for answers in (slow, quick)]
    torch.testing.assert_close(*both, atol=2e-4, rtol=0)


@pytest.mark.parametrize("kind", ["qwen2_vl", "idefics3"])
@pytest.mark.parametrize(
    ("content", "parts", "order"),
    [
        ("so {{ image[1] }} or {{ image[0] }}?", ["so ", None, " or ", None, "?"], [1, 0]),
        ("so {{ image }}?", ["so ", None, None, "?"], [0, 1]),
        ("so?", [None, None, "so?"], [0, 1]),
    ],
)
def test_several_images_are_where_templates_name_them(
    world: World, tmp_path: Path, kind: str, content: str, parts: list[str | None], order: list[int]
) -> None:
    write(tmp_path, "one")
    rows = [{"image": ["one0.png", "one1.png"], "label": "b"}, {"image": ["one1.png", "one2.png"], "label": "red"}]
    (tmp_path / "one.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asks = {"messages": [{"role": "user", "content": content}], "splits": {"test": {"rows": [0, 2]}}, "delimiter": " "}
    file = write_yaml(tmp_path, "t", yaml.safe_load((tmp_path / "one.yaml").read_text()) | asks)
    with world.live(kind).active({"one": 1.0}) as acting:
        answers = asked(world, kind, acting, file)
    model, processor = world.peft(kind, world.adapters(kind)["one"]), world.processor(kind)
    pictures = [[(tmp_path / row["image"][i]).read_bytes() for i in order] for row in rows]
    wanted = [likelihoods(processor, model, parts, shown, LABELS, " ") for shown in pictures]
    torch.testing.assert_close(torch.tensor([a.scores for a in answers]), torch.tensor(wanted), atol=2e-4, rtol=2e-5)


def test_choices_and_targets_of_rows_are_scored_too(world: World, tmp_path: Path) -> None:
    chosen = write(tmp_path, "one", kind="multiple_choice", labels=None, choices=["{{ label }}", "{{ who }}x"])
    text = write(tmp_path, "two", kind="perplexity", labels=None, adapter="one")
    found = plait.evaluate(
        {"one": world.adapters("qwen2_vl")["one"]}, tasks=[chosen, text], base=world.base("qwen2_vl"), workspace=None
    )
    model, processor = world.peft("qwen2_vl", world.adapters("qwen2_vl")["one"]), world.processor("qwen2_vl")
    rows = read_examples(load_task(text), "test").items
    total = sum(likelihoods(processor, model, [None, e.prompt[0][1][1:]], e.images, [e.target])[0] for e in rows)
    assert found.tasks[1].single == pytest.approx(np.exp(-total / sum(len(e.target) for e in rows)), rel=1e-4)
    assert found.tasks[0].examples == len(SIZES)


def test_a_check_shows_the_chat_as_the_model_reads_it(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, "one")
    assert exit_code("tasks", "check", str(file), "--model", str(world.base("qwen2_vl"))) == 0
    text = capsys.readouterr().out
    assert "<|vision_start|><|image_pad|><|vision_end|>Which color, a?" in text
    assert "20 × 20 pixels (6 PNG" in text
    tokens = plait.check_tasks([file], model=world.base("qwen2_vl"))[0].splits["test"].tokens
    assert tokens is not None
    assert (tokens.shortest, tokens.longest) == (36 + 2, 36 + 4)  # those of the text, and one for every 8 × 8 pixels
    assert exit_code("tasks", "check", str(file)) == 0
    assert "user: ⟨image of " in capsys.readouterr().out


def test_broken_images_are_listed_by_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, "one")
    (tmp_path / "one1.png").unlink()
    (tmp_path / "one3.png").write_text("no image")
    rows = [json.loads(line) for line in (tmp_path / "one.jsonl").read_text().splitlines()]
    rows[4]["who"], rows[5]["image"] = f"x{PLACE}y", []
    (tmp_path / "one.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert exit_code("tasks", "check", str(file)) == 2
    text = " ".join(capsys.readouterr().err.split())
    for row, why in {1: "no such file", 3: "none of BMP", 4: "holds U+FFFC", 5: "lists no file"}.items():
        assert f"(row {row} of split 'test')" in text
        assert why in text
    assert "(row 0 " not in text


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"messages": None, "prompt": "{{ who }}"}, "'image' needs 'messages' with a turn of the user"),
        ({"messages": [{"role": "system", "content": "x"}]}, "'image' needs 'messages' with a turn of the user"),
        ({"max_tokens": 9}, "'max_tokens' would cut the beginning off prompts with 'image'"),
        ({"calibrated": True}, "'calibrated' asks without content"),
        ({"audio": "sound"}, "give 'image' or 'audio', not both"),
    ],
)
def test_what_has_no_place_is_refused(tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    with pytest.raises(TaskError, match=re.escape(why)):
        load_task(write(tmp_path, "one", **changes))


def test_a_template_that_names_one_image_twice_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path, "one", messages=[{"role": "user", "content": "{{ image }} {{ image }}"}])
    with pytest.raises(TaskError, match=r"the row has 1 image files, and the templates name 2: .*\(row 5 of split 'test'\)"):
        read_examples(load_task(file), "test")


def test_a_base_that_cannot_read_it_is_refused_before_it_is_loaded(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Mixture, "load", lambda *_, **__: pytest.fail("the model was loaded"))

    def refused(base: Path) -> str:
        with pytest.raises(TaskError) as error:
            plait.evaluate({"one": world.adapters("llava")["one"]}, tasks=world.tasks("llava")[:1], base=base, workspace=None)
        return str(error.value)

    assert "has no processor of chats with images or sounds" in refused(save_chat_model(tmp_path / "text"))
    base = shutil.copytree(world.base("llava"), tmp_path / "base")
    template = base / "chat_template.jinja"
    kept = template.read_text()
    template.write_text(kept.replace("<image>", ""))
    assert f"{base}: the chat template has no place for image files" in refused(base)
    template.unlink()
    assert f"{base} has no chat template" in refused(base)
    template.write_text(kept)
    (base / "preprocessor_config.json").write_text("{")
    assert "the processor cannot be loaded: preprocessor_config.json" in refused(base)


def test_a_processor_of_another_model_is_refused(world: World, tmp_path: Path) -> None:
    base = shutil.copytree(world.base("llava"), tmp_path / "base")
    settings = json.loads((base / "processor_config.json").read_text())
    (base / "processor_config.json").write_text(json.dumps(settings | {"patch_size": 2}))
    for kind in ({}, {"kind": "generation", "labels": None}):
        file = write(tmp_path, "one", **kind)
        with pytest.raises(TaskError, match="the two do not belong together"):
            plait.evaluate({"one": world.adapters("llava")["one"]}, tasks=[file], base=base, workspace=None)


def test_a_forward_is_given_what_it_names(world: World) -> None:
    """Some tokenizers give a value per token that their model does not take; pixels that a model does not take are an error."""
    tensors = {"token_type_ids": torch.zeros(1, 3, dtype=torch.long), "pixel_values": torch.zeros(1, 3, 8, 8)}
    question = Question([1, 2, 3], [], perceived=Perceived(tensors))
    assert [*perceived_of([question], fresh("llava"))] == ["pixel_values"]
    with pytest.raises(TaskError, match="LlamaForCausalLM reads texts alone: it takes no 'pixel_values'"):
        perceived_of([question], language_model())


def test_what_is_not_kept_is_made_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    with world.live("qwen2_vl").active({"one": 1.0}) as acting:
        kept = asked(world, "qwen2_vl", acting, world.tasks("qwen2_vl")[0])
        monkeypatch.setattr(perceiving, "_ROOM", 10_000)
        assert asked(world, "qwen2_vl", acting, world.tasks("qwen2_vl")[0]) == kept


def test_a_missing_package_is_named(world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    assert exit_code("tasks", "check", str(world.tasks("llava")[0])) == 2
    assert "python -m pip install 'plait[vision]'" in " ".join(capsys.readouterr().err.split())


def test_training_refuses_what_it_would_not_see(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("trl", reason="training's libraries are not installed")
    phases = [{"name": "one", "task": str(world.tasks("llava")[0])}]
    job = write_yaml(tmp_path, "job", {"base_model": str(world.base("llava")), "phases": phases})
    assert exit_code("train", str(job), "-o", str(tmp_path / "out"), "--dry-run") == 2
    assert "training on chats with image files is not covered" in " ".join(capsys.readouterr().err.split())
