"""Chats with sounds: Qwen2-Audio against transformers and PEFT, number by number; sounds that do not fit."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import Qwen2AudioForConditionalGeneration

import plait
from plait.adapters.adapter import Adapter
from plait.errors import TaskError
from plait.evaluation.scoring import answer_examples
from plait.hub.pretrained import load_chat_processor
from plait.mixture import Mixture
from plait.notices import PlaitWarning, forget_announcements
from plait.tasks.examples import read_examples
from plait.tasks.loading import load_task
from plait.tasks.normalizing import normalizer
from plait.tasks.sounds import waveform
from tests.command_line import exit_code
from tests.e2e.test_audio_tasks import sound
from tests.multimodal_models import TARGETS, fresh, likelihoods, save_base, write_chats, written
from tests.two_adapters import NAMES, save_drawn

soundfile = pytest.importorskip("soundfile")
# PEFT's and torch's own
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
LABELS = ["play", "player", "b", "stop"]
MODERN = int(transformers.__version__.split(".")[0]) >= 5
SECONDS = [0.3, 0.52, 0.3, 0.9, 0.3]


def write(folder: Path, name: str, rate: int = 16000, **changes: Any) -> Path:
    """Write a task of chats with sounds of several lengths."""
    first = 15 if name == "two" else 5
    contents = [sound(first + i, seconds, rate) for i, seconds in enumerate(SECONDS)]
    asked = {"labels": LABELS, "messages": [{"role": "user", "content": "{{ who }} {{ audio }}?"}]}
    return write_chats(folder, name, "audio", contents, asked, changes)


class World:
    """A base, two adapters on what hears, reads and is between both, and the tasks."""

    def __init__(self, folder: Path) -> None:
        self.base = save_base("qwen2_audio", folder / "base")
        self.adapters = {name: folder / name for name in NAMES}
        for name, place in self.adapters.items():
            targets = TARGETS["qwen2_audio"]
            save_drawn(place, fresh("qwen2_audio"), 3 + 17 * (name == "two"), target_modules=targets, task_type="CAUSAL_LM")
        self.tasks = [write(folder / "tasks", name) for name in NAMES]
        self.processor = load_chat_processor(self.base)

    def peft(self, adapter: Path | None) -> Any:
        model = Qwen2AudioForConditionalGeneration.from_pretrained(self.base).eval()
        return model if adapter is None else PeftModel.from_pretrained(model, str(adapter)).eval()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("heard"))


def test_likelihoods_are_those_of_transformers_with_peft(world: World, tmp_path: Path) -> None:
    """Base, single and merge, in a forward pass and in the weights; sounds of several lengths, answers of several tokens."""
    merged = plait.merge(world.adapters, weights=[0.7, -0.4], out=tmp_path / "out").folder
    examples = read_examples(load_task(world.tasks[0]), "test")
    mixture = Mixture.load(world.base, [Adapter.open(place, name) for name, place in world.adapters.items()], dtype="float32")
    everything = []
    for weights, place in (({}, None), ({"one": 1.0}, world.adapters["one"]), ({"one": 0.7, "two": -0.4}, merged)):
        with mixture.active(weights) as acting:
            answers = answer_examples(acting, None, examples, processor=world.processor, batch_size=2)
        model = world.peft(place)
        for plain in [model, model.merge_and_unload()] if place == merged else [model]:
            wanted = [
                likelihoods(world.processor, plain, [f"{'ab'[i % 2]} ", None, "?"], e.sounds, LABELS)
                for i, e in enumerate(examples.items)
            ]
            found = torch.tensor([a.scores for a in answers])
            torch.testing.assert_close(found, torch.tensor(wanted), atol=2e-4, rtol=2e-5)
        everything.append(found)
    assert torch.pdist(torch.cat(everything)).min() > 0.01  # every sound, question and adapter counts


@pytest.mark.skipif(not MODERN, reason="modules of Qwen2.5-Omni have other names since version 5")
def test_a_model_that_speaks_too_is_read_by_the_part_that_writes(tmp_path: Path) -> None:
    """Qwen2.5-Omni's checkpoint and its thinker: adapters under the names of both generations, live and baked."""
    base, kind = save_base("qwen2_5_omni", tmp_path / "base"), "qwen2_5_omni"
    adapters = {name: tmp_path / name for name in NAMES}
    for name, place in adapters.items():
        save_drawn(place, fresh(kind), 3 + 17 * (name == "two"), target_modules=TARGETS[kind], task_type="CAUSAL_LM")
    examples, processor = read_examples(load_task(write(tmp_path / "tasks", "one")), "test"), load_chat_processor(base)
    thinker = transformers.Qwen2_5OmniThinkerForConditionalGeneration
    wanted = []
    for place in adapters.values():
        model = PeftModel.from_pretrained(thinker.from_pretrained(base), str(place)).eval()
        parts = [[f"{'ab'[i % 2]} ", None, "?"] for i in range(len(examples.items))]
        wanted.append([likelihoods(processor, model, p, e.sounds, LABELS) for p, e in zip(parts, examples.items, strict=True)])
    file = adapters["two"] / "adapter_model.safetensors"
    names = {"model.model.audio_tower": "model.audio_tower", "model.model.language_model": "model.model"}  # now and before
    tensors = {re.sub("|".join(names), lambda m: names[m[0]], key): value for key, value in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    mixture = Mixture.load(base, [Adapter.open(place, name) for name, place in adapters.items()], dtype="float32")
    for name, scores in zip(NAMES, wanted, strict=True):
        with mixture.active({name: 1.0}) as acting:
            answers = answer_examples(acting, None, examples, processor=processor, batch_size=2)
            torch.testing.assert_close(torch.tensor([a.scores for a in answers]), torch.tensor(scores), atol=2e-4, rtol=2e-5)
            baked = plait.bake({name: adapters[name]}, base_model=str(base), weights=[1.0], out=tmp_path / f"baked {name}")
            ids = torch.tensor([[65, 66, 67]])
            with torch.no_grad():
                torch.testing.assert_close(
                    thinker.from_pretrained(baked.folder).eval()(ids).logits, acting(ids).logits, atol=1e-4, rtol=1e-4
                )
    assert not torch.allclose(*map(torch.tensor, wanted), atol=0.1)


def test_an_evaluation_is_that_of_peft(world: World, tmp_path: Path) -> None:
    """What is written and what is likeliest, for base, single and merge."""
    free = write(tmp_path, "free", kind="generation", labels=None, adapter="one", max_new_tokens=5, metric="wer")
    files = [*world.tasks, free]
    settings: dict[str, Any] = {"weights": [0.5, 0.5], "workspace": tmp_path / "kept", "batch_size": 4}
    found = plait.evaluate(world.adapters, tasks=files, base=world.base, **settings)
    merged = plait.merge(world.adapters, weights=[0.5, 0.5], out=tmp_path / "out").folder
    rows, asked = (read_examples(load_task(file), "test").items for file in (files[0], free))
    sides = []
    for place in (None, world.adapters["one"], merged):
        model, parts = world.peft(place), [[f"{'ab'[i % 2]} ", None, "?"] for i in range(len(rows))]
        scores = [likelihoods(world.processor, model, p, e.sounds, LABELS) for p, e in zip(parts, rows, strict=True)]
        share = float(np.mean([LABELS[int(np.argmax(s))] == e.target for s, e in zip(scores, rows, strict=True)]))
        sides.append((share, [written(world.processor, model, p, e.sounds, 5) for p, e in zip(parts, asked, strict=True)]))
    task, generated = found.tasks[0], found.tasks[2]
    assert [task.base, task.single, task.merged] == [share for share, _ in sides]
    for sample in generated.samples:
        i = next(i for i, e in enumerate(asked) if e.id == sample.id)
        assert [sample.base, sample.single, sample.merged] == [texts[i] for _, texts in sides]
    assert len({text for _, texts in sides for text in texts}) > 3
    assert "⟨audio of 0.3 seconds, 16000 Hz WAV" in generated.samples[0].prompt
    plait.report(next((tmp_path / "kept").rglob("eval_results_*.json")).parent, out=tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count('<svg class="wave"') == sum(len(task.samples) for task in found.tasks)
    assert f"<pre>{generated.samples[0].prompt}</pre>" in page


def test_a_waveform_is_how_loud_a_sound_is_from_part_to_part() -> None:
    stream, samples = io.BytesIO(), np.zeros(9600)
    samples[4800:], samples[-1] = 0.25, -0.5
    soundfile.write(stream, samples, 16000, format="WAV")
    assert waveform(stream.getvalue()) == (*[0.0] * 48, *[0.25] * 47, 0.5)


def test_transcripts_are_asked_by_a_chat(world: World, tmp_path: Path) -> None:
    """What the kind is for: Whisper's normalizers, and errors per word over all rows."""
    asks = {"kind": "asr", "labels": None, "max_new_tokens": 6, "normalize": "whisper_basic", "metric": "cer"}
    file = write(tmp_path, "one", **asks)
    forget_announcements()
    with pytest.warns(PlaitWarning, match="one: 5 of 5 transcripts reach max_new_tokens"):
        found = plait.evaluate({"one": world.adapters["one"]}, tasks=[file], base=world.base, workspace=None).tasks[0]
    assert not found.samples[0].judged
    model, rows = world.peft(world.adapters["one"]), read_examples(load_task(file), "test").items
    texts = [written(world.processor, model, [f"{'ab'[i % 2]} ", None, "?"], e.sounds, 6) for i, e in enumerate(rows)]
    clean = normalizer(["whisper_basic"])
    assert found.single == pytest.approx(jiwer.cer([clean(e.target) for e in rows], [clean(text) for text in texts]))
    for changes, why in (
        ({"max_new_tokens": None}, "'max_new_tokens' is missing"),
        ({"language": "fr"}, "'language' is for Whisper"),
        ({"beams": 2}, "'beams' has no place"),
        ({"messages": [{"role": "system", "content": "x"}]}, "needs a turn of the user"),
    ):
        with pytest.raises(TaskError, match=why):
            load_task(write(tmp_path, "one", **{**asks, **changes}))


def test_sounds_are_resampled_and_this_is_announced(world: World, tmp_path: Path) -> None:
    forget_announcements()
    with pytest.warns(PlaitWarning, match="sounds of 8000 Hz are resampled to 16000 Hz"):
        checked = plait.check_tasks([write(tmp_path, "one", rate=8000)], model=world.base)[0].splits["test"]
    assert checked.tokens is not None
    assert checked.tokens.longest - checked.tokens.shortest == 15  # 0.6 seconds at 25 tokens per second
    assert "<|audio_bos|><|AUDIO|><|audio_eos|>?" in checked.rendered[0].prompt


def test_a_sound_that_would_be_cut_is_refused_before_the_model_is_loaded(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Mixture, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    file = write(tmp_path, "one")
    (tmp_path / "one3.wav").write_bytes(sound(0, 1.2))
    cut = r"1 of 5 sounds are longer than the 1 seconds that the model hears \(split 'test': row 3 has 1.2 seconds\)"
    with pytest.raises(TaskError, match=cut):
        plait.evaluate({"one": world.adapters["one"]}, tasks=[file], base=world.base, workspace=None)
    with pytest.raises(TaskError, match=cut):
        plait.check_tasks([file], model=world.base)


def test_a_model_that_hears_sees_nothing(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plait.tasks.attached._READERS", {"image": lambda *_: b"x"})
    file = write(tmp_path, "one", image="audio", audio=None, messages=[{"role": "user", "content": "x"}])
    with pytest.raises(TaskError, match=r"has a column 'image', and Qwen2AudioProcessor of .* takes none"):
        plait.evaluate({"one": world.adapters["one"]}, tasks=[file], base=world.base, workspace=None)


def test_broken_sounds_are_listed_by_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, "one")
    (tmp_path / "one1.wav").unlink()
    (tmp_path / "one3.wav").write_text("no sound")
    assert exit_code("tasks", "check", str(file)) == 2
    text = " ".join(capsys.readouterr().err.split())
    for row, why in {1: "no such file", 3: "cannot be decoded"}.items():
        assert f"(row {row} of split 'test')" in text
        assert why in text
