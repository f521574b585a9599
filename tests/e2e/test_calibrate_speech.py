"""Sounds that are written down: what the decoder reads, moments beside PEFT's, and tuning without a transcript."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import plait
from plait.adapters.adapter import Adapter
from plait.calibration.moments import take_moments
from plait.calibration.passages import Passage
from plait.calibration.texts import read_texts
from plait.errors import PlaitError, TaskError
from plait.hub.pretrained import load_feature_extractor
from plait.merging.moments import MomentsFile
from plait.mixture import Mixture
from plait.tasks.loading import load_task
from plait.tasks.perceiving import Perceived
from plait.tasks.sounds import samples
from plait.tuning.teaching import make_lesson
from tests.calibrated import dense
from tests.e2e.test_asr_tasks import BEFORE, EN, END, FR, NAMES, NO_TIMES, RATE, START, TRANSCRIBE, World, ctc, whisper, write
from tests.e2e.test_calibrate_senses import plain_moments

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"),  # PEFT's, torch's
    pytest.mark.filterwarnings("ignore:.*transcripts reach max_new_tokens.*"),
]
ROWS = ["a b", "c", "d e", "f", "g", "h i"]
SPLITS = {"calibration": {"rows": [0, 4]}, "test": {"rows": [4, 6]}}
HOW: dict[str, dict[str, Any]] = {"one": {"language": "fr"}, "two": {"language": "en", "prompt": "{{ text[0] }}"}}


def place(folder: Path, name: str, **changes: Any) -> Path:
    given = {"data": {"path": f"{name}.jsonl"}, "splits": SPLITS, "max_new_tokens": 14, **HOW[name], **changes}
    return write(folder, name, ROWS, **given)


def speaker() -> Any:
    """Return Whisper whose transcripts end, some of them: its end is nearly as likely as a letter."""
    model = whisper()
    with torch.no_grad():
        model.model.decoder.embed_tokens.weight[END] = 1.02 * model.model.decoder.embed_tokens.weight[5]
    return model


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    found = World(tmp_path_factory.mktemp("speech"))
    speaker().save_pretrained(found.base())
    for name in NAMES:
        place(found.folder / "tasks", name)
    return found


@pytest.fixture
def given(world: World) -> dict[str, Any]:
    return {"tasks": [world.folder / "tasks" / f"{name}.yaml" for name in NAMES], "base_model": str(world.base())}


def teacher(world: World, name: str) -> Any:
    return PeftModel.from_pretrained(speaker(), str(world.adapters()[name])).eval()


def literal(world: World, name: str) -> list[tuple[dict[str, torch.Tensor], int]]:
    """Return what transformers' own `generate` writes of every sound: the model's inputs, and how many tokens are an answer."""
    model, found = teacher(world, name), []
    texts = read_texts(load_task(world.folder / "tasks" / f"{name}.yaml"), kind=None, count=None, seed=0)
    for example in texts.examples.items:
        features = world.features(example.audio or b"")
        before = [BEFORE, *world.tokenizer(f" {example.text}", add_special_tokens=False)["input_ids"]] if example.text else []
        lead = [*before, START, FR if name == "one" else EN, TRANSCRIBE, NO_TIMES]
        prompt = {"prompt_ids": torch.tensor(before)} if before else {}
        language = {"language": "<|fr|>" if name == "one" else "<|en|>"}
        with torch.no_grad():
            row = model.generate(input_features=features, max_new_tokens=14, return_timestamps=False, **language, **prompt)[0]
        written = [token for token in row.tolist() if token < END]
        answer = written if len(written) >= 14 else [*written, END]
        ids = torch.tensor([[*lead, *answer]])
        found.append(({"input_features": features, "decoder_input_ids": ids[:, :-1]}, len(answer)))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_the_decoder_reads_what_the_adapter_writes(world: World, name: str) -> None:
    """Token by token, after language, task and what was spoken before; and the teacher's distributions at its answers."""
    mixture = Mixture.load(world.base(), [Adapter.open(folder, n) for n, folder in world.adapters().items()])
    texts = read_texts(load_task(world.folder / "tasks" / f"{name}.yaml"), kind=None, count=None, seed=0)
    lesson, model = make_lesson(mixture, texts, name), teacher(world, name)
    wanted = literal(world, name)
    assert (len({count for _, count in wanted}) > 1) == (name == "two")  # those of the other are all cut
    rows = []
    for passage, (inputs, count) in zip(lesson.passages, wanted, strict=True):
        assert [*passage.lead, *passage.answer[:-1]] == inputs["decoder_input_ids"][0].tolist()
        assert len(passage.answer) == count
        with torch.no_grad():
            rows.append(model(**inputs).logits[0, -count:].double().log_softmax(-1))
    torch.testing.assert_close(lesson.answers.log_p.double(), torch.cat(rows), atol=1e-4, rtol=1e-4)
    with mixture.active({name: 1.0}) as acting:
        assert lesson.divergence(acting, range(len(rows))) == pytest.approx(0, abs=1e-6)


def test_moments_of_encoder_and_decoder(world: World, tmp_path: Path, given: dict[str, Any]) -> None:
    folder = plait.calibrate(world.adapters(), out=tmp_path / "moments", **given).folder
    for name in NAMES:
        wanted = plain_moments(teacher(world, name), [inputs for inputs, _ in literal(world, name)])
        assert {target.split(".")[1] for target in wanted} == {"encoder", "decoder"}
        file = MomentsFile(folder / f"{name}.safetensors")
        for target, gram in wanted.items():
            torch.testing.assert_close(dense(file.read(target, None)), gram, rtol=1e-4, atol=1e-5, msg=target)
    assert plait.verify(folder).ok
    merged = plait.merge(world.adapters(), method="regmean", moments=folder, out=tmp_path / "merged").folder
    assert (merged / "adapter_model.safetensors").is_file()


def test_a_share_of_a_sound_is_no_share_of_what_is_written(world: World) -> None:
    """Of the encoder's many inputs twice the limit are looked at, of the decoder's few all."""
    model = speaker()
    sounds = [Perceived({"input_features": torch.randn(1, 8, 100, generator=torch.manual_seed(i))}) for i in range(4)]
    passages = [Passage(answer=(3, 4), lead=(START, FR, NO_TIMES), perceived=one) for one in sounds]
    modules = {
        f"{part}.{n}": getattr(model.model, part).layers[1].get_submodule(n)
        for part in ("encoder", "decoder")
        for n in ("fc1", "fc2")
    }
    found = take_moments(model, modules, passages, most_rows=16)
    assert found.sampled.keys() == {"encoder.fc1", "encoder.fc2"}
    kept, seen = found.sampled["encoder.fc1"]
    assert seen == found.seen == 4 * 50
    assert 24 <= kept <= 40


def test_a_tuning_of_transcripts_starts_bad_and_ends_better(world: World, tmp_path: Path, given: dict[str, Any]) -> None:
    """By its own record, and by PEFT's models of the adapters on what each own adapter writes, in float64."""
    learn = {"steps": 12, "learning_rate": 0.02, "held_out": 0, "tolerance": 0}
    result = plait.tune(world.adapters(), method="linear", out=tmp_path / "tuned", tune=learn, **given)
    found = result.record
    assert found.start.share > 0.2
    assert found.kept.share < 0.7 * found.start.share
    assert not any("labels were read" in note for note in found.notes)
    tuned = PeftModel.from_pretrained(speaker(), str(result.folder)).eval()
    for name in NAMES:
        values = []
        for inputs, count in literal(world, name):
            with torch.no_grad():
                p, q = (m(**inputs).logits[0, -count:].double().log_softmax(-1) for m in (teacher(world, name), tuned))
            values.append((p.exp() * (p - q)).sum(-1))
        assert found.kept.divergence[name] == pytest.approx(float(torch.cat(values).mean()), rel=1e-3, abs=1e-6)


def test_right_transcripts_are_read_where_an_objective_needs_them(world: World) -> None:
    mixture = Mixture.load(world.base(), [Adapter.open(folder, n) for n, folder in world.adapters().items()])
    texts = read_texts(load_task(world.folder / "tasks" / "one.yaml"), kind=None, count=2, seed=0)
    lesson = make_lesson(mixture, texts, "one", right=["b c", "t"])
    tokens = {letter: i for i, letter in enumerate(" abcdefghijklmnopqrst")}
    answers = [(tokens["b"], 0, tokens["c"], END), (tokens["t"], END)]  # a blank by itself is not written first
    assert [p.answer for p in lesson.passages] == answers
    with mixture.active({"two": 1.0}) as acting, torch.no_grad():
        outputs = lesson.outputs(acting, [0, 1])
    assert outputs.targets is not None
    assert outputs.targets.tolist() == [token for answer in answers for token in answer]


@pytest.mark.parametrize("objective", ["gradient", "hidden"])
def test_objectives_of_transcripts(world: World, tmp_path: Path, given: dict[str, Any], objective: str) -> None:
    learn = {"steps": 4, "objective": objective, "granularity": "module", "held_out": 0, "restore_best": False}
    result = plait.tune(world.adapters(), method="linear", out=tmp_path / "out", tune=learn, **given)
    assert any("labels were read: 8 in all" in note for note in result.record.notes) == (objective == "gradient")
    assert result.record.losses[-1] < result.record.losses[0]


def test_what_a_model_of_speech_does_not_take_is_refused(world: World, tmp_path: Path, given: dict[str, Any]) -> None:
    def refused(command: Any, why: str, **changes: Any) -> None:
        tasks = [place(tmp_path, "one", **changes), given["tasks"][1]]
        with pytest.raises(PlaitError, match=why):
            command(world.adapters(), out=tmp_path / "out", **{**given, "tasks": tasks})

    both = (plait.calibrate, partial(plait.tune, tune={"steps": 1}))
    for command in both:
        refused(command, "task 'one', split 'calibration': .* would first hear which language is spoken", language=None)
        refused(command, "no text can replace an audio file", splits={"test": {"rows": [4, 6]}})
        refused(command, "language 'German' is none of the model's", language="German")
    refused(
        partial(plait.tune, tune={"objective": "adamerging", "granularity": "task"}),
        "the first token of a transcript decides nothing",
    )
    rows = [{"audio": f"one{i}.wav", "text": "a b c d e f g h i j k l m"} for i in range(6)]
    task = place(tmp_path, "one")
    (tmp_path / "one.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = [task, given["tasks"][1]]
    with pytest.raises(TaskError, match="a transcript has 30 tokens with its beginning; the decoder has 24 places"):
        plait.tune(world.adapters(), out=tmp_path / "out", tune={"objective": "gradient"}, **{**given, "tasks": tasks})


def test_a_label_for_every_moment(world: World, tmp_path: Path) -> None:
    """CTC answers at every moment of a sound; by its own record, and by PEFT's models, one sound at a time in float64."""
    tasks = [place(tmp_path, name, language=None, prompt=None, max_new_tokens=None) for name in NAMES]
    adapters, options = world.adapters("wav2vec2"), {"tasks": tasks, "base_model": str(world.base("wav2vec2"))}
    merged = plait.merge(adapters, method="regmean", out=tmp_path / "merged", **options)
    assert (merged.folder / "adapter_model.safetensors").is_file()
    learn = {"steps": 12, "learning_rate": 0.02, "held_out": 0, "tolerance": 0}
    result = plait.tune(adapters, method="linear", out=tmp_path / "tuned", tune=learn, **options)
    found = result.record
    assert found.kept.share < 0.7 * found.start.share
    extractor = load_feature_extractor(world.base("wav2vec2"))
    sides = {name: PeftModel.from_pretrained(ctc(), str(folder)).eval() for name, folder in adapters.items()}
    tuned = PeftModel.from_pretrained(ctc(), str(result.folder)).eval()
    for name, task in zip(NAMES, tasks, strict=True):
        values = []
        for example in read_texts(load_task(task), kind=None, count=None, seed=0).examples.items:
            given = extractor(samples(example.audio or b"", RATE), sampling_rate=RATE, return_tensors="pt").input_values
            with torch.no_grad():
                p, q = (m(given).logits[0].double().log_softmax(-1) for m in (sides[name], tuned))
            values.append((p.exp() * (p - q)).sum(-1))
        assert len({len(v) for v in values}) > 1
        assert found.kept.divergence[name] == pytest.approx(float(torch.cat(values).mean()), rel=1e-3, abs=1e-6)
    with pytest.raises(TaskError, match="a transcript does not say which moment is which"):
        plait.tune(adapters, out=tmp_path / "out", tune={"objective": "gradient"}, **options)
