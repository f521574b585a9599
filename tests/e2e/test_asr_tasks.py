"""Transcripts: Whisper and CTC against transformers with PEFT; error rates; options and sounds that do not suit a model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jiwer
import pytest
import torch
import transformers
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    BartConfig,
    BartForCausalLM,
    GenerationConfig,
    MoonshineConfig,
    MoonshineForConditionalGeneration,
    SpeechEncoderDecoderModel,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2ForCTC,
    Wav2Vec2Model,
    WhisperConfig,
    WhisperForConditionalGeneration,
    WhisperTokenizerFast,
)

import plait
from plait.adapters.adapter import Adapter
from plait.errors import TaskError
from plait.evaluation.subsets import choose_subset
from plait.evaluation.transcribing import written
from plait.hub.pretrained import load_feature_extractor, load_tokenizer
from plait.mixture import Mixture
from plait.notices import PlaitWarning
from plait.recipes.evaluation import Subset
from plait.tasks.answers import Answer
from plait.tasks.examples import read_examples
from plait.tasks.loading import load_task
from plait.tasks.metrics import metric_of
from plait.tasks.normalizing import normalizer
from plait.tasks.sounds import samples
from tests.command_line import exit_code
from tests.e2e.test_audio_tasks import RATE, SPEECH, save_extractor, sound
from tests.two_adapters import redrawn

# PEFT's and torch's own
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
NAMES, LETTERS = ("one", "two"), "abcdefghijklmnopqrst"
SPECIAL = ["endoftext", "startoftranscript", "en", "fr", "translate", "transcribe", "startofprev", "notimestamps"]
END, START, EN, FR, TRANSLATE, TRANSCRIBE, BEFORE, NO_TIMES = range(len(LETTERS) + 1, len(LETTERS) + 9)
TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def whisper() -> WhisperForConditionalGeneration:
    torch.manual_seed(0)
    config = WhisperConfig(
        d_model=16,
        encoder_layers=2,  # as many as the decoder: transformers 4.56 takes the cache of one for that of the other
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        num_mel_bins=8,
        max_source_positions=50,
        max_target_positions=24,
        vocab_size=NO_TIMES + 1,
        init_std=0.6,
        pad_token_id=END,
        bos_token_id=END,
        eos_token_id=END,
        decoder_start_token_id=START,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model = WhisperForConditionalGeneration(config).eval()
    model.generation_config = GenerationConfig(
        decoder_start_token_id=START,
        eos_token_id=END,
        pad_token_id=END,
        bos_token_id=END,
        max_length=24,
        is_multilingual=True,
        lang_to_id={"<|en|>": EN, "<|fr|>": FR},
        task_to_id={"translate": TRANSLATE, "transcribe": TRANSCRIBE},
        no_timestamps_token_id=NO_TIMES,
        prev_sot_token_id=BEFORE,
        suppress_tokens=list(range(START, NO_TIMES + 1)),
        begin_suppress_tokens=[0, END],
    )
    return model


def letters(folder: Path) -> Any:
    """Return Whisper's tokenizer with a token per letter."""
    vocabulary = {letter: i for i, letter in enumerate(["Ġ", *LETTERS, *(f"<|{s}|>" for s in SPECIAL)])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return WhisperTokenizerFast.from_pretrained(folder, additional_special_tokens=[f"<|{s}|>" for s in SPECIAL[1:]])


def ctc() -> Wav2Vec2ForCTC:
    torch.manual_seed(0)
    sizes = {**SPEECH, "vocab_size": 24, "initializer_range": 0.6}
    model = redrawn(Wav2Vec2ForCTC(Wav2Vec2Config(**sizes, pad_token_id=0)).eval(), 0.6)
    for name, parameter in model.named_parameters():  # sounds are far apart then
        if name.endswith("conv.weight"):
            parameter.data.mul_(3)
    return model


def write(folder: Path, name: str, texts: list[str], **changes: Any) -> Path:
    """Write a task with a sound per transcript."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"audio": f"{name}{i}.wav", "text": text} for i, text in enumerate(texts)]
    for i, row in enumerate(rows):
        (folder / row["audio"]).write_bytes(sound(i, 0.2 + 0.1 * (i % 2)))
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {"name": name, "kind": "asr", "data": {"path": "."}, "splits": {"test": f"{name}.jsonl"}, **changes}
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


class World:
    """A Whisper and a model with CTC, and two adapters of each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        tokens = letters(folder)
        (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(["<pad>", "<s>", "</s>", "|", *LETTERS])}))
        labels = Wav2Vec2CTCTokenizer(str(folder / "vocab.json"), unk_token="<pad>")
        for kind, make, tokenizer in (("whisper", whisper, tokens), ("wav2vec2", ctc, labels)):
            make().save_pretrained(folder / kind / "base")
            tokenizer.save_pretrained(folder / kind / "base")
            save_extractor(kind, folder / kind / "base")
            for seed, name in enumerate(NAMES):
                wanted = TARGETS if kind == "whisper" else ["q_proj", "v_proj"]
                plain = make()  # sets the seed itself
                torch.manual_seed(3 + seed)
                get_peft_model(plain, LoraConfig(r=2, target_modules=wanted, init_lora_weights=False)).save_pretrained(
                    folder / kind / name
                )
        self.extractor = load_feature_extractor(folder / "whisper" / "base")
        self.tokenizer = load_tokenizer(folder / "whisper" / "base")

    def base(self, kind: str = "whisper") -> Path:
        return self.folder / kind / "base"

    def adapters(self, kind: str = "whisper") -> dict[str, Path]:
        return {name: self.folder / kind / name for name in NAMES}

    def features(self, data: bytes) -> torch.Tensor:
        found: torch.Tensor = self.extractor(samples(data, RATE), sampling_rate=RATE, return_tensors="pt").input_features
        return found

    @torch.no_grad()
    def peft_text(self, model: Any, data: bytes, prompt: str | None = None, **how: Any) -> str:
        """Return what transformers writes down, sound by sound."""
        before = {} if prompt is None else {"prompt_ids": self.tokenizer.get_prompt_ids(prompt, return_tensors="pt")}
        row = model.generate(input_features=self.features(data), max_new_tokens=9, **before, **how)
        return str(self.tokenizer.batch_decode(row, skip_special_tokens=True)[0]).strip()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("speech"))


@torch.no_grad()
def test_a_mixture_of_whisper_is_what_peft_makes_of_it(world: World, tmp_path: Path) -> None:
    """Every logit of encoder, cross attention and decoder, alone and merged; the decoder's cache changes nothing."""
    merged = plait.merge(world.adapters(), weights=[0.7, -0.4], out=tmp_path / "out").folder
    mixture = Mixture(whisper(), [Adapter.open(folder, name) for name, folder in world.adapters().items()])
    given = {"input_features": world.features(sound(1, 0.3)), "decoder_input_ids": torch.tensor([[START, FR, 3, 5, 1]])}
    sides = {"one": ({"one": 1.0}, world.adapters()["one"]), "merged": ({"one": 0.7, "two": -0.4}, merged)}
    bare, found = whisper()(**given).logits, {}
    for side, (weights, folder) in sides.items():
        expected = PeftModel.from_pretrained(whisper(), str(folder)).eval()(**given).logits
        with mixture.active(weights) as model:
            found[side] = model(**given, use_cache=False).logits
            torch.testing.assert_close(found[side], expected, atol=1e-4, rtol=1e-4)
            out = model(**{**given, "decoder_input_ids": given["decoder_input_ids"][:, :3]}, use_cache=True)
            rest = model(
                encoder_outputs=(out.encoder_last_hidden_state,),
                past_key_values=out.past_key_values,
                decoder_input_ids=given["decoder_input_ids"][:, 3:],
            )
            torch.testing.assert_close(rest.logits, expected[:, 3:], atol=1e-4, rtol=1e-4)
        assert not torch.allclose(found[side], bare, atol=1e-2)
    assert not torch.allclose(found["one"], found["merged"], atol=1e-2)
    assert torch.equal(mixture.model(**given).logits, bare)


def test_every_side_writes_what_transformers_writes(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Base, own adapter and merge with language, prompt and beams; a smaller error rate is the better one."""
    how = {"one": {"language": "French"}, "two": {"language": "en", "task": "translate", "beams": 2, "prompt": "{{ before }}"}}
    plain = {"one": {"language": "<|fr|>"}, "two": {"language": "<|en|>", "task": "translate", "num_beams": 2}}
    merged = plait.merge(world.adapters(), weights=[0.5, 0.5], out=tmp_path / "out").folder
    expected: dict[str, dict[str, list[str]]] = {}
    for name in NAMES:
        sounds = [sound(i, 0.2 + 0.1 * (i % 2)) for i in range(4)]
        prompts = [["a b", "c"][i // 2] if name == "two" else None for i in range(4)]
        sides = {"base": whisper(), name: world.adapters()[name], "merged": merged}
        expected[name] = {}
        for side, model in sides.items():
            live = model if side == "base" else PeftModel.from_pretrained(whisper(), str(model)).eval()
            expected[name][side] = [
                world.peft_text(live, data, prompt, **plain[name]) for data, prompt in zip(sounds, prompts, strict=True)
            ]
        write(tmp_path, name, expected[name][name], max_new_tokens=9, metric="cer" if name == "two" else "wer", **how[name])
        file = tmp_path / f"{name}.jsonl"
        rows = [{**json.loads(line), "before": before} for line, before in zip(file.open(), prompts, strict=True)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [*world.adapters().values(), "--weights", "0.5,0.5", "--tasks", tmp_path / "one.yaml", tmp_path / "two.yaml"]
    options = ["--base-id", world.base(), "--workspace", tmp_path / "work", "--batch-size", "3"]
    logger = transformers.utils.logging.get_logger("transformers")
    logger.addHandler(caplog.handler)
    caplog.clear()
    try:
        assert exit_code("eval", *given, *options) == 0
    finally:
        logger.removeHandler(caplog.handler)
    assert not [r.message for r in caplog.records if r.name.startswith("transformers")], "nothing of transformers' own affairs"
    printed = " ".join(capsys.readouterr().err.split())
    cut = re.findall(r"task '(\w+)': (\w+): \d of \d transcripts reach max_new_tokens", printed)
    assert len(set(cut)) == len(cut) > len(set(task for task, _ in cut)), "each side is announced, once"
    kept = [json.loads(f.read_text()) for f in (tmp_path / "work" / ".scores").glob("*.json")]
    results = json.loads(next((tmp_path / "work").rglob("eval_results_*.json")).read_text())["tasks"]
    for result in results:
        name, rate = result["task"], jiwer.cer if result["metric"] == "cer" else jiwer.wer
        for side, texts in expected[name].items():
            (answers,) = (k["answers"] for k in kept if k["contender"] == side and k["task"] == name)
            assert [a["given"] for a in answers] == texts
        base, own, both = (rate(expected[name][name], expected[name][side]) for side in ("base", name, "merged"))
        assert (result["base"], result["single"], result["merged"]) == pytest.approx((base, own, both))
        assert own == 0 < base
        assert result["recovery"] == pytest.approx((base - both) / (base - own))
        low, high = result["recovery_interval"]
        assert low <= result["recovery"] <= high
        assert not result["higher_is_better"]
        assert result["below_base"] == (both > base)
    page = plait.report(next((tmp_path / "work").rglob("eval_results_*.json")).parent, out=tmp_path / "page.html")
    shown = page.read_text() if isinstance(page, Path) else (tmp_path / "page.html").read_text()
    assert "⟨audio of 0.2 seconds, 16000 Hz WAV" in shown
    assert f"<b>right answer</b>{expected['one']['one'][0]}</div>" in shown


@torch.no_grad()
def test_ctc_writes_what_transformers_writes(world: World, tmp_path: Path) -> None:
    task = write(tmp_path, "one", ["a b", "c d", "e"])
    model = PeftModel.from_pretrained(ctc(), str(world.adapters("wav2vec2")["one"])).eval()
    extractor, tokenizer = load_feature_extractor(world.base("wav2vec2")), load_tokenizer(world.base("wav2vec2"))
    texts = []
    for example in read_examples(load_task(task), "test").items:
        given = extractor(samples(example.audio or b"", RATE), sampling_rate=RATE, return_tensors="pt").input_values
        texts += [text.strip() for text in tokenizer.batch_decode(model(given).logits.argmax(-1))]
    adapters = {"one": world.adapters("wav2vec2")["one"]}
    work = tmp_path / "work"
    found = plait.evaluate(adapters, tasks=[task], base=world.base("wav2vec2"), workspace=work, batch_size=2)
    (kept,) = (k for f in (work / ".scores").glob("*.json") if (k := json.loads(f.read_text()))["contender"] == "one")
    assert [a["given"] for a in kept["answers"]] == texts
    assert len(set(texts)) > 1
    assert found.tasks[0].single == pytest.approx(jiwer.wer(["a b", "c d", "e"], texts))
    for changes, why in (
        ({"beams": 2}, "'beams' and 'max_new_tokens' are for models that generate; Wav2Vec2ForCTC labels every moment"),
        ({"language": "fr"}, "'language' is for Whisper; Wav2Vec2ForCTC has no such setting"),
    ):
        with pytest.raises(TaskError, match=why):
            plait.evaluate(
                adapters, tasks=[write(tmp_path, "one", ["a"], **changes)], base=world.base("wav2vec2"), workspace=None
            )


class Letters:
    """A tokenizer of the letters alone."""

    eos_token_id = pad_token_id = 2

    def batch_decode(self, rows: list[list[int]], **_: Any) -> list[str]:
        return ["".join(LETTERS[token - 3] for token in row if token > 2) for row in rows]


def other_model(kind: str, tokens: int = len(LETTERS) + 3) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": tokens, "max_position_embeddings": 32}
    if kind == "moonshine":
        heads = {f"{side}_num_{what}_heads": 2 for side in ("encoder", "decoder") for what in ("attention", "key_value")}
        layers = {"encoder_num_hidden_layers": 1, "decoder_num_hidden_layers": 1}
        config = MoonshineConfig(hidden_size=32, intermediate_size=48, initializer_range=0.5, **heads, **layers, **sizes)
        return MoonshineForConditionalGeneration(config).eval()
    narrow = {"d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 24, "init_std": 0.5}
    decoder = BartForCausalLM(
        BartConfig(is_decoder=True, add_cross_attention=True, forced_eos_token_id=None, **narrow, **sizes)
    )
    model = SpeechEncoderDecoderModel(encoder=Wav2Vec2Model(Wav2Vec2Config(**SPEECH)), decoder=decoder).eval()
    model.generation_config.decoder_start_token_id = 1
    return model


@pytest.mark.parametrize(("kind", "fewest"), [("moonshine", 895), ("wav2vec2 and BART", 45)])
def test_other_models_write_as_by_their_generate(world: World, tmp_path: Path, kind: str, fewest: int) -> None:
    """The shortest sound that their convolutions take is taken, and one sample less refused."""
    model, extractor, letters = other_model(kind), load_feature_extractor(world.base("wav2vec2")), Letters()
    task = load_task(write(tmp_path, "t", ["a"] * 3, max_new_tokens=31))
    (tmp_path / "t0.wav").write_bytes(sound(0, fewest / RATE))
    examples = read_examples(task, "test")
    expected = []
    for example in examples.items:
        given = extractor(samples(example.audio or b"", RATE), sampling_rate=RATE, return_tensors="pt").input_values
        row = model.generate(given, max_new_tokens=31, do_sample=False, eos_token_id=2, pad_token_id=2)[0, 1:].tolist()
        expected += letters.batch_decode([row[: row.index(2)] if 2 in row else row])
    with pytest.warns(PlaitWarning, match="transcripts reach max_new_tokens"):
        found = written(model, letters, extractor, examples, task.ask, batch_size=2)
    assert [one.text for one in found] == expected
    assert len(set(expected)) > 1
    (tmp_path / "t0.wav").write_bytes(sound(0, (fewest - 1) / RATE))
    with pytest.raises(TaskError, match=f"1 of 3 sounds are shorter than the {fewest} samples"):
        written(model, letters, extractor, read_examples(task, "test"), task.ask, batch_size=2)
    places = getattr(model.config, "decoder", model.config).max_position_embeddings
    (tmp_path / "t0.wav").write_bytes(sound(0, 0.2))
    task = load_task(write(tmp_path, "t", ["a"] * 3, max_new_tokens=places))
    why = f"max_new_tokens is {places}, but the decoder has {places} places, of which the beginning leaves {places - 1}"
    with pytest.raises(TaskError, match=why):
        written(model, letters, extractor, read_examples(task, "test"), task.ask, batch_size=2)


SPELLINGS = {"colour": "color"}


@pytest.mark.parametrize(
    ("normalize", "pairs", "errors"),
    [
        ([], [("Hello, World", "hello world"), ("a b", "a b")], 2 / 4),
        (["lower", "punctuation"], [("Hello, World", "hello world"), ("a b", "a x b")], 1 / 4),
        ("whisper_basic", [("«Où est-il?»", "où est il"), ("a (noise) b", "a b")], 0),
        ("whisper_english", [("It's twenty colours of colour.", "it is 20 colours of color"), ("a", "b")], 1 / 7),
    ],
)
def test_errors_are_counted_over_all_words(tmp_path: Path, normalize: Any, pairs: list[tuple[str, str]], errors: float) -> None:
    (tmp_path / "normalizer.json").write_text(json.dumps(SPELLINGS))
    spellings = {"spellings": "normalizer.json"} if normalize == "whisper_english" else {}
    task = load_task(write(tmp_path, "t", [target for target, _ in pairs], normalize=normalize, **spellings))
    metric = metric_of(task)
    answers = [Answer(id=str(i), target=target, given=given) for i, (target, given) in enumerate(pairs)]
    assert metric.value(answers) == pytest.approx(errors)
    assert not metric.higher_is_better


def test_spellings_are_those_that_the_file_holds_now(tmp_path: Path) -> None:
    file = tmp_path / "normalizer.json"
    task = load_task(write(tmp_path, "t", ["x"], normalize="whisper_english", spellings="normalizer.json"))
    seen = []
    for spellings in ({"colour": "color"}, {"colour": "hue"}):
        file.write_text(json.dumps(spellings))
        seen.append((normalizer(["whisper_english"], str(file))("colour"), str(task.own_digest())))
    assert [word for word, _ in seen] == ["color", "hue"]
    assert seen[0][1] != seen[1][1]
    assert f"'transformers': '{transformers.__version__}'" in seen[0][1]
    file.write_text('{"colour": ["color"]}')
    with pytest.raises(TaskError, match=r"must be a mapping of words to words, .* got a list for a word"):
        normalizer(["whisper_english"], str(file))


def test_characters_are_counted_too(tmp_path: Path) -> None:
    metric = metric_of(load_task(write(tmp_path, "t", ["x"], metric="cer")))
    answers = [Answer(id="0", target="abcd", given="abxd"), Answer(id="1", target="ab", given=None)]
    assert metric.value(answers) == pytest.approx(3 / 6)


def test_transcripts_without_words_are_listed_by_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = write(tmp_path, "t", ["a", " ", "...", "b"], normalize="punctuation")
    (tmp_path / "t3.wav").write_text("no sound")
    assert exit_code("tasks", "check", task) == 2
    text = " ".join(capsys.readouterr().err.split())
    assert "target ' ' is empty; wer needs one. Leave the row out. (row 1 of split 'test')" in text
    assert "target '...' is empty after 'normalize'; wer needs one. Leave the row out. (row 2 of split 'test')" in text
    assert "t3.wav: it cannot be decoded" in text


def test_a_check_shows_lengths_and_an_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = write(tmp_path, "t", ["a b", "c", "d", "e", "f"], prompt="before {{ text }}")
    assert exit_code("tasks", "check", task) == 0
    printed = capsys.readouterr().out
    assert "test: sounds of 0.2 / 0.2 / 0.3 seconds (5 of 16000 Hz)  █        ▆" in printed
    assert "⟨audio of 0.2 seconds, 16000 Hz WAV, sha256 " in printed
    assert "before a b\n⟦a b⟧" in printed


def test_subsets_are_not_divided_by_transcripts(tmp_path: Path) -> None:
    """Frequent transcripts have no share of their own: the same rows are taken with `stratified` and without."""
    examples = read_examples(load_task(write(tmp_path, "t", ["yes"] * 9 + ["no"] * 3)), "test")
    chosen = [choose_subset(examples, Subset(max_samples=4, stratified=how)) for how in (True, False)]
    assert chosen[0] == chosen[1]


def test_what_does_not_suit_is_refused(world: World, tmp_path: Path) -> None:
    def evaluate(seconds: float, **changes: Any) -> None:
        task = write(tmp_path, "one", ["a"] * 3, **changes)
        (tmp_path / "one2.wav").write_bytes(sound(2, seconds))
        plait.evaluate({"one": world.adapters()["one"]}, tasks=[task], base=world.base(), workspace=None)

    def refused(why: str, seconds: float = 0.2, **changes: Any) -> None:
        with pytest.raises(TaskError, match=why):
            evaluate(seconds, **changes)

    refused(r"1 of 3 sounds are longer than the 1 seconds .*\(split 'test': row 2 has 1\.5 seconds\)", seconds=1.5)
    refused("language 'German' is none of the model's: en, fr", language="German")
    refused(
        "max_new_tokens is 21, but the decoder has 24 places, of which the beginning and 'prompt' leave 20", max_new_tokens=21
    )
    refused("the prompt 'a a a a a a'… has 13 tokens; Whisper takes 11", prompt="a a a a a a")
    refused("'whisper_basic' does all by itself; give it alone", normalize=["whisper_basic", "lower"])
    refused("'spellings' belongs to 'normalize: whisper_english'", spellings="normalizer.json")


def test_broken_outputs_are_no_transcripts(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "one"
    model = get_peft_model(whisper(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data.fill_(1e30)
    model.save_pretrained(folder)
    with pytest.raises(TaskError, match="outputs are NaN"):
        plait.evaluate(
            {"one": folder}, tasks=[write(tmp_path, "one", ["a"], max_new_tokens=3)], base=world.base(), workspace=None
        )
