"""Chats with images or sounds: moments, merges and tunings beside transformers and PEFT; what is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import plait
from plait.adapters.adapter import Adapter
from plait.calibration.inputs import load_for_texts
from plait.calibration.texts import read_texts
from plait.errors import PlaitError, TaskError
from plait.hub import pretrained
from plait.hub.pretrained import LoadOptions, load_chat_processor
from plait.libraries.transformers.senses import media_tokens
from plait.merging.moments import MomentsFile
from plait.mixture import Mixture
from plait.results.progress import SilentProgress
from plait.tasks.inputs import PLACE, Example
from plait.tasks.loading import load_task
from plait.tuning.teaching import make_lesson
from plait.tuning.working import WorkingState
from tests.calibrated import dense
from tests.chat_models import save_chat_model
from tests.command_line import exit_code
from tests.e2e import test_audio_chats as sounds
from tests.e2e import test_image_chats as images
from tests.e2e.test_calibrate_senses import plain_moments
from tests.multimodal_models import TARGETS, fresh, prepared, save_base
from tests.two_adapters import NAMES, Folder, redrawn, save_drawn

# PEFT's and torch's own
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
SPLITS = {"calibration": {"rows": [0, 4]}, "test": {"rows": [4, 5]}}
#: A kind of model → a kind of task: every way in which an answer is found.
ASKED: dict[str, dict[str, Any]] = {
    "qwen2_vl": {},
    "idefics3": {"kind": "perplexity", "labels": None},
    "llava": {"kind": "generation", "labels": None, "max_new_tokens": 4},
    "qwen2_audio": {"kind": "asr", "labels": None, "max_new_tokens": 34},
}
KINDS = tuple(ASKED)


def plain(kind: str) -> Any:
    return redrawn(fresh(kind))


def write(folder: Path, kind: str, name: str, **changes: Any) -> Path:
    module = sounds if kind == "qwen2_audio" else images
    return module.write(folder, name, **{"splits": SPLITS, **ASKED[kind], **changes})


class World(Folder):
    """A base of every kind, two adapters of each on what perceives, reads and is between both, and the tasks."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        for kind in KINDS:
            save_base(kind, self.base(kind), plain(kind))
            for name in NAMES:
                save_drawn(folder / kind / name, plain(kind), 3 + 17 * (name == "two"), target_modules=TARGETS[kind])
                write(folder / kind / "tasks", kind, name)

    def base(self, kind: str) -> Path:
        return self.folder / kind / "base"

    def given(self, kind: str) -> dict[str, Any]:
        return {"tasks": self.tasks(kind), "base_model": str(self.base(kind))}

    def live(self, kind: str) -> Mixture:
        return Mixture.load(self.base(kind), [Adapter.open(place, name) for name, place in self.adapters(kind).items()])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("chats"))


def examples(file: Path) -> Sequence[Example]:
    return read_texts(load_task(file), kind=None, count=None, seed=0).examples.items


def asked(processor: Any, example: Example) -> dict[str, torch.Tensor]:
    """Return what transformers gives the model of one chat."""
    (turn,) = example.messages or ()
    before, after = turn[1].split(PLACE)
    prompt, files = prepared(processor, [part for part in (before, None, after) if part != ""], example.files)
    return {k: v for k, v in processor(text=[prompt], **files).items() if k != "token_type_ids"}


def followed(given: dict[str, torch.Tensor], answer: Sequence[int]) -> dict[str, torch.Tensor]:
    """Return a chat with all but the last token of an answer."""
    more = torch.tensor([[*answer][:-1]], dtype=torch.long)
    longer = {"input_ids": more, "attention_mask": torch.ones_like(more), "mm_token_type_ids": torch.zeros_like(more)}
    return {k: torch.cat([v, longer[k]], 1) if k in longer else v for k, v in given.items()}


@torch.no_grad()
def answered(model: Any, processor: Any, kind: str, example: Example) -> list[int]:
    """Return the tokens that a task is decided at: its likeliest label's, its text's, or those that the model writes."""
    given, tokens = asked(processor, example), partial(processor.tokenizer.encode, add_special_tokens=False)
    if kind == "idefics3":
        return list(tokens(example.target))
    if kind == "qwen2_vl":
        totals = {}
        for label in images.LABELS:
            scores = model(**followed(given, tokens(label))).logits[0, given["input_ids"].shape[1] - 1 :].log_softmax(-1)
            totals[label] = float(scores.gather(1, torch.tensor(tokens(label))[:, None]).sum())
        return list(tokens(max(totals, key=lambda label: totals[label])))
    most = ASKED[kind]["max_new_tokens"]
    row = model.generate(**given, max_new_tokens=most, do_sample=False)[0, given["input_ids"].shape[1] :].tolist()
    ends = {processor.tokenizer.eos_token_id, *media_tokens(model)}
    return row[: next((i for i, token in enumerate(row, 1) if token in ends), len(row))]


@pytest.mark.parametrize("kind", KINDS)
def test_moments_are_those_of_each_adapter_on_its_own_chats(world: World, tmp_path: Path, kind: str) -> None:
    """Of what sees or hears, of what reads, and of what is between both; images of several sizes, sounds of several lengths."""
    folder = plait.calibrate(world.adapters(kind), out=tmp_path / "moments", **world.given(kind)).folder
    processor, found = load_chat_processor(world.base(kind)), {}
    for name, task in zip(NAMES, world.tasks(kind), strict=True):
        model = PeftModel.from_pretrained(plain(kind), str(world.adapters(kind)[name])).eval()
        given = [asked(processor, e) for e in examples(task)]
        if kind == "idefics3":  # the text itself is read as well
            given = [followed(g, answered(model, processor, kind, e)) for g, e in zip(given, examples(task), strict=True)]
        wanted = plain_moments(model, given)
        file = MomentsFile(folder / f"{name}.safetensors")
        found[name] = {target: dense(file.read(target, None)) for target in wanted}
        assert any("language" in t or "text" in t for t in wanted)
        assert any("vis" in t or "audio_tower" in t for t in wanted)
        for target, gram in wanted.items():
            torch.testing.assert_close(found[name][target], gram, rtol=1e-4, atol=1e-5, msg=target)
    assert not any(torch.allclose(found["one"][t], found["two"][t], rtol=1e-2) for t in found["one"])
    assert plait.verify(folder).ok


@pytest.mark.parametrize("kind", KINDS)
def test_a_tuning_starts_bad_and_ends_better(world: World, tmp_path: Path, kind: str) -> None:
    """By its own record, and by PEFT's models of the adapters where the task is decided, one chat at a time in float64."""
    learn = {"steps": 10, "learning_rate": 0.012, "held_out": 0, "restore_best": False}
    result = plait.tune(world.adapters(kind), method="linear", out=tmp_path / "tuned", tune=learn, **world.given(kind))
    found = result.record
    assert found.kept.share < 0.8 * found.start.share
    assert not any("labels were read" in note for note in found.notes)
    processor = load_chat_processor(world.base(kind))
    tuned = PeftModel.from_pretrained(plain(kind), str(result.folder)).eval()
    for name, task in zip(NAMES, world.tasks(kind), strict=True):
        teacher = PeftModel.from_pretrained(plain(kind), str(world.adapters(kind)[name])).eval()
        values = []
        for example in examples(task):
            answer = answered(teacher, processor, kind, example)
            given = followed(asked(processor, example), answer)
            with torch.no_grad():
                p, q = (m(**given).logits[0, -len(answer) :].double().log_softmax(-1) for m in (teacher, tuned))
            values.append((p.exp() * (p - q)).sum(-1))
        assert found.kept.divergence[name] == pytest.approx(float(torch.cat(values).mean()), rel=2e-3, abs=1e-6)


def test_merges_calibrate_by_themselves(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`regmean` is that of moments that were taken before; its other form, and a scale, are found without a label."""
    monkeypatch.chdir(tmp_path)
    pair, given, name = world.adapters("qwen2_vl"), world.given("qwen2_vl"), "adapter_model.safetensors"
    taken = plait.calibrate(pair, out=tmp_path / "moments", **given).folder
    before = plait.merge(pair, method="regmean", moments=taken, out=tmp_path / "before").folder
    own = plait.merge(pair, method="regmean", out=tmp_path / "own", **given).folder
    assert (own / name).read_bytes() == (before / name).read_bytes()
    layered = plait.merge(pair, method="regmean_sequential", out=tmp_path / "layered", **given).folder
    assert (layered / name).read_bytes() != (own / name).read_bytes()
    scaled = plait.merge(pair, method="linear", scale="auto", out=tmp_path / "scaled", **given)
    assert "no label was read" in " ".join(scaled.record.notes)


@pytest.mark.parametrize(("kind", "objective"), [("qwen2_vl", "gradient"), ("idefics3", "hidden")])
def test_objectives(world: World, tmp_path: Path, kind: str, objective: str) -> None:
    learn = {"steps": 4, "objective": objective, "granularity": "module", "held_out": 0, "restore_best": False}
    result = plait.tune(world.adapters(kind), method="linear", out=tmp_path / "out", tune=learn, **world.given(kind))
    assert any("labels were read: 8 in all" in note for note in result.record.notes) == (objective == "gradient")
    assert result.record.losses[-1] < result.record.losses[0]


def test_right_labels_are_the_answers_of_an_objective_that_reads_them(world: World) -> None:
    texts = read_texts(load_task(world.tasks("qwen2_vl")[0]), kind=None, count=None, seed=0)
    mixture, labels = world.live("qwen2_vl"), ["b", "green", "red", "b"]
    lesson = make_lesson(mixture, texts, "one", right=labels)
    tokenizer = load_chat_processor(world.base("qwen2_vl")).tokenizer
    assert [list(p.answer) for p in lesson.passages] == [tokenizer.encode(label) for label in labels]
    assert lesson.labels == (tuple(dict.fromkeys(tokenizer.encode(label)[0] for label in images.LABELS)),) * 4
    with mixture.active({"two": 1.0}) as acting, torch.no_grad():  # some of them, in another order
        some = lesson.outputs(acting, [3, 0, 1]).logits
        alone = torch.cat([lesson.outputs(acting, [i]).logits for i in (3, 0, 1)])
    torch.testing.assert_close(some, alone, atol=1e-4, rtol=1e-4)


def test_the_processor_that_a_check_has_loaded_is_the_one_that_reads(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = read_texts(load_task(world.tasks("llava")[0]), kind=None, count=None, seed=0)
    loaded: list[Path] = []
    own = pretrained.load_chat_processor
    monkeypatch.setattr(pretrained, "load_chat_processor", lambda place, **more: loaded.append(place) or own(place, **more))
    mixture = load_for_texts(world.base("llava"), [], LoadOptions(), [texts], SilentProgress())
    assert mixture.processor("image", chats=True).tokenizer is not None
    assert loaded == [world.base("llava")]


def test_an_answer_ends_where_it_names_an_image(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The token of an image, written by a model, has no image to be read."""
    mixture = world.live("llava")
    (mark,) = media_tokens(mixture.model)
    monkeypatch.setattr("plait.calibration.inputs.generate_tokens", lambda *_, **__: [[65, mark, 66], [65], [mark, 65], [66]])
    texts = read_texts(load_task(world.tasks("llava")[0]), kind=None, count=None, seed=0)
    lesson = make_lesson(mixture, texts, "one")
    assert [p.answer for p in lesson.passages] == [(65, mark), (65,), (mark,), (66,)]
    assert len(lesson.answers.log_p) == 5


def test_no_label_is_read_and_files_are_known_by_their_content(world: World, tmp_path: Path) -> None:
    """Rows of the user's own with the task's columns; another image is another text."""
    rows = [json.loads(line) for line in (world.folder / "llava" / "tasks" / "one.jsonl").open()][:2]
    file = tmp_path / "mine.jsonl"
    found = []
    for contents in ((0, 1), (0, 1), (0, 2)):
        own = [{"image": f"{i}.png", "who": row["who"]} for i, row in enumerate(rows)]
        for row, number in zip(own, contents, strict=True):
            (tmp_path / row["image"]).write_bytes(images.picture(number))
        file.write_text("".join(json.dumps(row) + "\n" for row in own))
        found.append(read_texts(load_task(world.tasks("llava")[0]), kind=None, count=None, seed=0, file=file).digest)
    assert found[0] == found[1] != found[2]
    targets = [write(tmp_path / label, "idefics3", "one", target=label) for label in ("red", "blue")]
    first, second = (read_texts(load_task(task), kind=None, count=None, seed=0).digest for task in targets)
    assert first != second  # the text of a perplexity task is read
    result = plait.calibrate(
        world.adapters("llava"), out=tmp_path / "out", files=dict.fromkeys(NAMES, str(file)), **world.given("llava")
    )
    assert [(t.source, t.count) for t in result.record.texts] == [("mine.jsonl", 2)] * 2
    assert plait.verify(result.folder).ok


@pytest.mark.parametrize("command", ["calibrate", "tune", "merge --method regmean", "merge --method linear --scale auto"])
def test_what_has_no_image_is_refused_at_once(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    """A split or a file is needed; all tasks are named, before the base is loaded."""
    monkeypatch.setattr(Mixture, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    tasks = [str(write(tmp_path / "tasks", "llava", name, splits={"test": {"rows": [4, 5]}})) for name in NAMES]
    given = [*map(str, world.adapters("llava").values()), "--tasks", *tasks, "--base-id", str(world.base("llava"))]
    texts = [[], ["--texts", "lines"], ["--texts", "template"]] if command in ("calibrate", "tune") else [[]]
    for how in texts:
        assert exit_code(*command.split(), *given, *how, "-o", str(tmp_path / "out")) == 2
        text = " ".join(capsys.readouterr().err.split())
        for name in NAMES:
            assert f"task '{name}' (generation): no text can replace an image file" in text
            assert f"--texts {name}=FILE: rows with the columns 'image', 'who'." in text


def test_what_does_not_suit_the_base_or_the_objective_is_refused(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Mixture, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    text = save_chat_model(tmp_path / "text")
    for command in (plait.calibrate, plait.tune):
        with pytest.raises(TaskError, match=r"(?s)'one'.* has no processor of chats.*'two'.* has no processor of chats"):
            command(world.adapters("llava"), out=tmp_path / "out", **{**world.given("llava"), "base_model": str(text)})
    learn = {"objective": "adamerging", "granularity": "task"}
    with pytest.raises(PlaitError, match="the first token of a transcript decides nothing"):
        plait.tune(world.adapters("qwen2_audio"), out=tmp_path / "out", tune=learn, **world.given("qwen2_audio"))


def test_modules_that_no_text_reaches(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What sees has nothing to see in tasks of text: no moments, and nothing to learn, also where a tuning goes on."""
    changes: dict[str, Any] = {"image": None, "messages": None, "prompt": "{{ who }} {{ label }}:"}
    changes["splits"] = {"calibration": {"rows": [0, 4]}}
    tasks = [write(tmp_path / "tasks", "qwen2_vl", name, **changes) for name in NAMES]
    pair, given = world.adapters("qwen2_vl"), {**world.given("qwen2_vl"), "tasks": tasks}
    with pytest.raises(TaskError, match=r"adapter 'one': its texts do not reach \d of its modules \(.*visual\.blocks"):
        plait.calibrate(pair, out=tmp_path / "refused", **given)
    learn = {"steps": 2, "look_every": 1, "learning_rate": 0.012, "held_out": 0, "patience": 0}
    how = {"method": "linear", "scale": 1.0, "tune": learn, **given}
    plain = plait.tune(pair, out=tmp_path / "plain", **how)
    assert plain.record.looks[-1].share < plain.record.start.share

    save = WorkingState.save

    def last(state: WorkingState, name: str, tensors: dict[str, torch.Tensor], info: dict[str, Any]) -> None:
        save(state, name, tensors, info)
        if "updates" in info:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(WorkingState, "save", last)
        with pytest.raises(KeyboardInterrupt):
            plait.tune(pair, out=tmp_path / "again", **how)
    assert (tmp_path / ".again.tuning").is_dir()
    again = plait.tune(pair, out=tmp_path / "again", **how)
    assert again.record.losses == plain.record.losses
    name = "adapter_model.safetensors"
    assert (again.folder / name).read_bytes() == (plain.folder / name).read_bytes()
