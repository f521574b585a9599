"""Sounds: heads of wav2vec 2.0, HuBERT and Whisper's encoder against PEFT; data of every form, broken and unfit files."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from sklearn.metrics import confusion_matrix
from transformers import (
    HubertConfig,
    HubertForSequenceClassification,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
    WhisperConfig,
    WhisperForAudioClassification,
)

import plait
from plait.errors import TaskError
from plait.hub.pretrained import load_feature_extractor
from plait.tasks.examples import read_examples
from plait.tasks.loading import load_task
from plait.tasks.sounds import sample_count, samples
from tests.command_line import exit_code
from tests.text_classifiers import with_head
from tests.two_adapters import NAMES, Folder, save_drawn, write_labeled_files

soundfile = pytest.importorskip("soundfile")
# PEFT's and torch's own
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
KINDS = ("wav2vec2", "hubert", "whisper")
LABELS = ["play", "stop", "next"]
RATE = 16000
SPEECH = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "conv_dim": (8, 8),
    "conv_kernel": (10, 8),
    "conv_stride": (5, 4),
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 8,
    "vocab_size": 12,
    "initializer_range": 0.3,
}


def fresh(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "whisper":
        sizes = {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 24, "num_mel_bins": 8}
        more = {"max_source_positions": 50, "classifier_proj_size": 8, "vocab_size": 12, "init_std": 0.3, "decoder_layers": 1}
        tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
        config = WhisperConfig(**sizes, **more, **tokens, num_labels=3, suppress_tokens=None, begin_suppress_tokens=None)
        return WhisperForAudioClassification(config).eval()
    kinds = {
        "wav2vec2": (Wav2Vec2Config, Wav2Vec2ForSequenceClassification),
        "hubert": (HubertConfig, HubertForSequenceClassification),
    }
    config_class, model_class = kinds[kind]
    return model_class(config_class(**SPEECH, num_labels=3)).eval()


def save_extractor(kind: str, folder: Path) -> None:
    """Write how the model hears sounds: Whisper one second of them, filled up."""
    settings: dict[str, Any] = {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "sampling_rate": RATE}
    if kind == "whisper":
        settings |= {"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 8, "chunk_length": 1}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def sound(number: int, seconds: float = 0.05, rate: int = RATE, channels: int = 1, form: str = "WAV") -> bytes:
    time = np.arange(int(seconds * rate)) / rate
    tone = 0.3 * np.sin(2 * np.pi * (200 + 170 * number) * time) + 0.01 * np.random.default_rng(number).normal(size=len(time))
    stream = io.BytesIO()
    soundfile.write(stream, np.stack([tone] * channels, axis=1), rate, format=form)
    return stream.getvalue()


def write(folder: Path, name: str, **changes: Any) -> Path:
    """Write a task with sounds of three lengths."""
    sounds = [sound(i, 0.04 + 0.01 * (i % 3)) for i in range(9)]
    return write_labeled_files(folder, name, "audio_classification", sounds, LABELS, **changes)


class World(Folder):
    """A base without a head of every kind, two adapters of each, and the tasks."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        for kind in KINDS:
            model = fresh(kind)
            state = {k: v for k, v in model.state_dict().items() if not k.startswith(("classifier", "projector"))}
            model.save_pretrained(folder / kind / "base", state_dict=state)
            save_extractor(kind, folder / kind / "base")
            layers, saved = ["q_proj", "v_proj"], ["projector", "classifier"]
            for name in NAMES:
                seed = 3 + 17 * (name == "two")
                save_drawn(folder / kind / name, fresh(kind), seed, target_modules=layers, modules_to_save=saved)
                write(folder / kind / "tasks", name)

    def peft(self, kind: str, adapter: Path) -> Any:
        return PeftModel.from_pretrained(fresh(kind), str(adapter)).eval()

    def evaluate(self, kind: str, tasks: list[Path], **settings: Any) -> plait.Evaluation:
        pair = {name: self.adapters(kind)[name] for name in NAMES[: len(tasks)]}
        return plait.evaluate(pair, tasks=tasks, base=self.folder / kind / "base", **{"workspace": None, **settings})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("sounds"))


@torch.no_grad()
def scores(world: World, kind: str, task: Path, model: Any) -> list[list[float]]:
    """Return the head's outputs as transformers has them, sound by sound."""
    extractor, found = load_feature_extractor(world.folder / kind / "base"), []
    for example in read_examples(load_task(task), "test").items:
        values, _ = soundfile.read(io.BytesIO(example.audio or b""), dtype="float32")
        given = extractor(values, sampling_rate=RATE, return_tensors="pt")
        found.append(model(**{key: given[key] for key in extractor.model_input_names[:1]}).logits[0].tolist())
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_side_is_what_peft_makes_of_it(world: World, tmp_path: Path, kind: str) -> None:
    """Base, single and merge, every output of the head; convolutions, which no adapter has, are left alone."""
    found = world.evaluate(kind, world.tasks(kind), weights=[0.5, 0.5], batch_size=2, workspace=tmp_path / "work")
    kept = [json.loads(f.read_text()) for f in (tmp_path / "work" / ".scores").glob("*.json")]
    merged = plait.merge(world.adapters(kind), weights=[0.5, 0.5], out=tmp_path / "out").folder
    for task, file in zip(found.tasks, world.tasks(kind), strict=True):
        own = world.adapters(kind)[task.task]
        bare = world.peft(kind, own)
        for parameter_name, parameter in bare.named_parameters():
            if "lora_B" in parameter_name:
                parameter.data.zero_()
        sides = {
            "base": bare,
            task.task: world.peft(kind, own),
            "merged": world.peft(kind, with_head(merged, own, tmp_path / "mixed")),
        }
        rows = {}
        for side, model in sides.items():
            rows[side] = scores(world, kind, file, model)
            (answers,) = (k["answers"] for k in kept if k["contender"] == side and k["task"] == task.task)
            np.testing.assert_allclose([a["scores"] for a in answers], rows[side], atol=1e-4, rtol=1e-4)
        assert task.confusion is not None
        for side, counts in ((task.task, task.confusion.single), ("merged", task.confusion.merged)):
            given = [LABELS[int(np.argmax(row))] for row in rows[side]]
            right = [example.target for example in read_examples(load_task(file), "test").items]
            np.testing.assert_array_equal(counts, confusion_matrix(right, given, labels=LABELS))
        assert not np.allclose(rows["base"], rows["merged"], atol=1e-2)
        assert not np.allclose(rows[task.task], rows["merged"], atol=1e-2)


def test_sounds_are_mixed_and_resampled(tmp_path: Path, world: World, capsys: pytest.CaptureFixture[str]) -> None:
    """A tone at another rate is the same tone, in as many samples as are announced."""
    for rate in (8000, 22050, 44100):
        data = sound(2, 0.2, rate, channels=2, form="FLAC")
        found, plain = samples(data, RATE), samples(sound(2, 0.2), RATE)
        assert len(found) == sample_count(data, RATE)
        middle = slice(400, 2800)
        assert np.corrcoef(found[middle], plain[middle])[0, 1] > 0.99
    task = write(tmp_path, "one")
    (tmp_path / "one0.wav").write_bytes(sound(0, 0.05, 8000))
    given = [str(world.adapters("wav2vec2")["one"]), "--tasks", str(task), "--base-id", str(world.folder / "wav2vec2" / "base")]
    assert exit_code("eval", *given, "--workspace", str(tmp_path / "work")) == 0
    printed = capsys.readouterr()
    assert "sounds of 8000 Hz are resampled to 16000 Hz" in " ".join((printed.out + printed.err).split())


def test_a_folder_per_class(tmp_path: Path) -> None:
    for i, label in enumerate(LABELS):
        (tmp_path / "test" / label).mkdir(parents=True)
        (tmp_path / "test" / label / "a.flac").write_bytes(sound(i, form="FLAC"))
    task = write(tmp_path, "t", data={"path": "."}, splits={"test": "test"})
    assert [e.target for e in read_examples(load_task(task), "test").items] == sorted(LABELS)
    (tmp_path / "test" / "play" / "notes.txt").touch()
    with pytest.raises(TaskError, match=r"notes\.txt: by its name this is not an audio file"):
        read_examples(load_task(task), "test")


def test_broken_sounds_are_listed_by_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, "t")
    (tmp_path / "t1.wav").unlink()
    (tmp_path / "t3.wav").write_text("no sound")
    (tmp_path / "t4.wav").write_bytes(sound(4, 601, 100))
    soundfile.write(tmp_path / "t5.wav", np.zeros(0), RATE)
    soundfile.write(tmp_path / "t6.wav", np.full(100, np.nan), RATE, subtype="FLOAT")
    assert exit_code("tasks", "check", str(file)) == 2
    text = " ".join(capsys.readouterr().err.split())
    for row, why in {
        1: "there is no such file",
        3: "it cannot be decoded: ",
        4: "it has 601 seconds; at most 600 are decoded",
        5: "it holds no sample",
        6: "it holds samples that are not finite",
    }.items():
        assert f"t{row}.wav: {why}" in text
        assert f"(row {row} of split 'test')" in text
    assert "(row 0 " not in text


def test_a_check_shows_lengths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("tasks", "check", str(write(tmp_path, "t"))) == 0
    assert "test: sounds of 0.0 / 0.1 / 0.1 seconds (9 of 16000 Hz)" in capsys.readouterr().out


def test_nothing_is_cut(world: World, tmp_path: Path) -> None:
    task = write(tmp_path, "one")
    (tmp_path / "one2.wav").write_bytes(sound(2, 1.5))
    with pytest.raises(
        TaskError, match=r"1 of 9 sounds are longer than the 1 seconds .* \(split 'test': row 2 has 1\.5 seconds"
    ):
        world.evaluate("whisper", [task])
    (tmp_path / "one2.wav").write_bytes(sound(2, 0.0025))
    with pytest.raises(TaskError, match="1 of 9 sounds are shorter than the 45 samples"):
        world.evaluate("hubert", [task])
