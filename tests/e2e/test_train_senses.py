"""`plait train` on sounds and images: transcripts, heads; what a decoder is given and what it learns; killed and resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file

import plait
from plait.evaluation.scoring import answer_examples
from plait.evaluation.transcribing import written
from plait.hub.pretrained import load_feature_extractor, load_image_processor, load_tokenizer
from plait.tasks.examples import read_examples
from plait.tasks.loading import load_task
from plait.training.kinds import KINDS
from plait.training.preflight import resolve_phases
from plait.training.reading import read_phases
from tests.command_line import exit_code
from tests.e2e.test_asr_tasks import (
    EN,
    END,
    FR,
    NO_TIMES,
    START,
    TRANSCRIBE,
    TRANSLATE,
    letters,
    other_model,
    whisper,
    write,
)
from tests.e2e.test_audio_tasks import fresh as hearing
from tests.e2e.test_audio_tasks import save_extractor, sound
from tests.e2e.test_audio_tasks import write as write_sounds
from tests.e2e.test_image_tasks import fresh as seeing
from tests.e2e.test_image_tasks import save_processor
from tests.e2e.test_image_tasks import write as write_images
from tests.phase_files import rewrite

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # PEFT's and torch's own
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"),
]
PHASES = """\
base_model: base
lora: {r: 4, alpha: 8, dropout: 0}
arguments:
  {learning_rate: 1e-2, lr_scheduler_type: constant, max_steps: 40, per_device_train_batch_size: 4, save_strategy: 'no'}
phases: [one.yaml, two.yaml]
merge: linear
"""


@pytest.fixture
def speech(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Lay out a Whisper and two tasks: French, and English after a prompt."""
    whisper().save_pretrained(tmp_path / "base")
    letters(tmp_path).save_pretrained(tmp_path / "base")
    save_extractor("whisper", tmp_path / "base")
    texts = {"one": ["a b", "c", "d e", "f"], "two": ["g h", "i", "k", "l m"]}
    how = {"one": {"language": "French"}, "two": {"language": "en", "task": "translate", "prompt": "a {{ text }}"}}
    for name in texts:
        splits = {split: f"{name}.jsonl" for split in ("train", "test")}
        write(tmp_path, name, texts[name], splits=splits, max_new_tokens=6, **how[name])
    (tmp_path / "phases.yaml").write_text(PHASES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def first_read(model: Any, tokenizer: Any, extractor: Any, examples: Any) -> list[int]:
    """Return the tokens that a decoder is given before it writes down the first of some sounds."""
    seen: list[list[int]] = []
    hook = model.base_model.model.model.decoder.register_forward_pre_hook(
        lambda _, args, given: seen.append((given["input_ids"] if "input_ids" in given else args[0])[0].tolist()),
        with_kwargs=True,
    )
    written(model, tokenizer, extractor, examples.take([0]), examples.task.ask, batch_size=1)
    hook.remove()
    return seen[0]


def test_transcripts_are_learned_as_they_are_asked_for(speech: Path) -> None:
    """The decoder is given in training what `generate` gives it, and learns the transcript and its end."""
    result = plait.train("phases.yaml", out="out")
    assert result.ok, result.failed
    assert all(task.single < task.base for task in result.evaluation.tasks)
    losses = [json.loads(Path(f"out/phases/{name}/training.json").read_text())["losses"] for name in ("one", "two")]
    assert all(points[-1][1] < points[0][1] / 3 for points in losses)
    config = json.loads(Path("out/phases/one/adapter/adapter_config.json").read_text())
    assert config["task_type"] is None
    assert {"q_proj", "fc1"} <= {name.rpartition(".")[2] for name in config["target_modules"]}
    assert {"preprocessor_config.json", "tokenizer_config.json"} <= {p.name for p in Path("out/phases/one/adapter").iterdir()}
    card = Path("out/phases/one/adapter/README.md").read_text()
    assert "pipeline_tag: automatic-speech-recognition" in card
    assert "loss on the transcripts" in card
    adapted = PeftModel.from_pretrained(whisper(), "out/phases/two/adapter").eval()
    extractor, tokenizer = load_feature_extractor(speech / "base"), load_tokenizer(speech / "base")
    begins = {"one": [START, FR, TRANSCRIBE, NO_TIMES]}
    begins["two"] = [*tokenizer.get_prompt_ids("a g h").tolist(), START, EN, TRANSLATE, NO_TIMES]
    for phase in resolve_phases(read_phases("phases.yaml", out=Path("fresh"))):
        name, (encoded, _) = phase.phase.name, phase.encoded
        examples = read_examples(load_task(f"{name}.yaml"), "test")
        assert first_read(adapted, tokenizer, extractor, examples) == begins[name]
        for item, example in zip(encoded.items, examples.items, strict=True):
            text = [*tokenizer(example.target, add_special_tokens=False)["input_ids"], END]
            given = len(item["labels"]) - len(text)
            assert item["labels"] == [-100] * given + text
            assert item["decoder_input_ids"][given + 1 :] == text[:-1]
        assert encoded.items[0]["decoder_input_ids"][: len(begins[name])] == begins[name]


@pytest.mark.parametrize("kind", ["whisper", "moonshine"])
def test_losses_are_of_the_transcripts_alone(speech: Path, kind: str) -> None:
    """What a batch is filled up with changes nothing; tokens count alike, whatever transcript they are in."""
    if kind == "moonshine":
        shutil.rmtree("base")
        other_model(kind, NO_TIMES + 1).save_pretrained("base")
        letters(speech).save_pretrained("base")
        save_extractor("wav2vec2", speech / "base")
        write(speech, "one", ["a b", "c", "d e", "f"], splits={"train": "one.jsonl", "test": "one.jsonl"}, max_new_tokens=6)
        rewrite(("[one.yaml, two.yaml]", "[one.yaml]"), text=PHASES)
    phase = resolve_phases(read_phases("phases.yaml", out=Path("fresh")))[0]
    trainer = KINDS["speech_to_text"].make_trainer(phase.opened, phase.settings, phase.encoded)
    items, model = (
        phase.encoded[0].items[:: 2 if kind == "moonshine" else 1],
        trainer.model.eval(),
    )  # of one length without a window
    with torch.no_grad():
        found = trainer.compute_loss(model, trainer.data_collator(items))
        total = tokens = 0
        for item in items:
            given = trainer.data_collator([item])
            labels = given.pop("labels")[0]
            assert given["decoder_input_ids"][0, 0] == (START if kind == "whisper" else 1), "the model's first token"
            rows = model(**given).logits[0].log_softmax(-1)
            learned = (labels >= 0).nonzero().flatten()
            total -= rows[learned, labels[learned]].sum()
            tokens += len(learned)
    torch.testing.assert_close(found, total / tokens)


def test_what_a_model_cannot_hear_or_learn_is_known_before_training(speech: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = yaml.safe_load(Path("one.yaml").read_text())
    rows = [json.loads(line) for line in Path("one.jsonl").read_text().splitlines()]
    Path("long.wav").write_bytes(sound(1, 1.5))
    Path("long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"audio": "long.wav", "text": "a"}]))
    Path("words.jsonl").write_text("".join(json.dumps({**row, "text": "a" * 21}) + "\n" for row in rows))

    def refused(why: str, *changes: tuple[str, str], **fields: Any) -> None:
        Path("one.yaml").write_text(yaml.safe_dump({**task, **fields}))
        rewrite(*changes, text=PHASES)
        assert exit_code("train", "phases.yaml", "-o", "out") == 2
        assert why in " ".join(capsys.readouterr().err.split())
        assert not Path("out/phases").exists()

    splits = task["splits"]
    refused("row 4 has 1.5 seconds); nothing is cut in silence", splits={**splits, "test": "long.jsonl"})
    refused("transcripts are learned of a known one. Give 'language' in the task.", language=None)
    refused("language 'German' is none of the model's: en, fr", language="German")
    refused("sounds and images are not cut", ("merge: linear", "merge: linear\nlong_examples: truncate"))
    every = "4 transcripts are left out: more tokens than the decoder's 24 places."
    refused(f"no example is left. {every}", splits={**splits, "train": "words.jsonl"})
    write_images(speech, "image", splits={split: {"rows": [0, 9]} for split in ("train", "test")})
    refused("'image' is image_classification, 'one' is asr: they are learned by different", ("two.yaml", "image.yaml"))
    Path("one.yaml").write_text(yaml.safe_dump({**task, "splits": {**splits, "train": "long.jsonl"}}))
    rewrite(("max_steps: 40", "max_steps: 1"), ("[one.yaml, two.yaml]", "[one.yaml]"), text=PHASES)
    (phase,) = plait.train("phases.yaml", out="out").phases
    assert phase.examples == 4
    assert phase.notes == ("1 sounds are left out: longer than the 1 seconds that the model hears.",)


def loaded_as_said(folder: str) -> Any:
    """Return what the code on an adapter's card loads."""
    code = Path(folder, "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {}
    exec(code.replace("PATH_OR_REPO", folder), names)
    return names["model"]


@pytest.mark.parametrize("kind", ["vit", "dinov2", "wav2vec2", "whisper"])
def test_heads_are_learned_and_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """A head per task with the LoRA, which leaves it alone; what is judged is what transformers and PEFT make of it."""
    monkeypatch.chdir(tmp_path)
    images = kind in ("vit", "dinov2")
    fresh, write, save = (seeing, write_images, save_processor) if images else (hearing, write_sounds, save_extractor)
    model = fresh(kind)
    lacking = ("classifier", "projector")
    kept = {k: v for k, v in model.state_dict().items() if not k.startswith(lacking)}
    model.save_pretrained("base", state_dict=kept)
    save(kind, tmp_path / "base")
    for name in ("one", "two"):
        write(tmp_path, name, splits={split: {"rows": [0, 9]} for split in ("train", "test")})
    rewrite(("max_steps: 40", "max_steps: 30"), ("batch_size: 4", "batch_size: 9"), text=PHASES)
    result = plait.train("phases.yaml", out="out")
    assert result.ok, result.failed
    assert all(task.single > task.base for task in result.evaluation.tasks)
    tensors = load_file("out/phases/two/adapter/adapter_model.safetensors")
    full = {key.removeprefix("base_model.model.") for key in tensors if "lora_" not in key}
    assert full == {key for key in model.state_dict() if key.startswith(lacking)}
    assert not [key for key in tensors if "lora_" in key and ("classifier" in key or "projector" in key)]
    assert [key for key in tensors if "lora_" in key]
    own = loaded_as_said("out/phases/two/adapter").eval()
    merged = loaded_as_said("out/merged")
    assert type(merged.base_model.model) is type(own.base_model.model)
    assert all(bool(tensor.any()) for key, tensor in merged.named_parameters() if "lora_B" in key)
    examples = read_examples(load_task("two.yaml"), "test")
    reader = (load_image_processor if images else load_feature_extractor)(tmp_path / "base")
    asked = {"task": examples, "processor": reader, "batch_size": 1}
    answers = answer_examples(own, None, asked.pop("task"), **asked)
    right = sum(a.given == a.target for a in answers) / len(answers)
    assert right == next(task.single for task in result.evaluation.tasks if task.task == "two")
