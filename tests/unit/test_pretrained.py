"""Damaged files of tokenizers and models: a refusal that names the folder and the file, whatever transformers raises."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path

import pytest

from plait.cli.stopping import Stopped
from plait.errors import PlaitError, PlanError, TaskError
from plait.evaluation.generation import generate
from plait.evaluation.scoring import answer_examples
from plait.hub.pretrained import load_config, load_tokenizer, refuse_failures, with_padding_token
from plait.mixture.loading import load_base_model
from plait.tasks.encoding import PromptEncoder, Question
from plait.tasks.examples import Examples
from plait.tasks.inputs import Example
from plait.tasks.kinds.classification import Classification
from plait.tasks.schema import Data, Split
from tests.chat_models import byte_tokenizer
from tests.language_models import save_model

TASK = Classification(
    name="t",
    kind="classification",
    data=Data(path="x"),
    splits={"test": Split(source="x")},
    prompt="x",
    target="x",
    labels=("red", "blue"),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("pretrained") / "whole")


@pytest.fixture
def base(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "base"))


def changed(file: Path, **more: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **more}))


def evaluate(base: Path, *, trust: bool = False) -> None:
    """Do with a base what an evaluation does with it."""
    model, tokenizer = load_base_model(base, (), dtype="auto", device_map=None, trust_remote_code=trust)
    items = (Example.of("sort w1 : ", "red", ("red", "blue")), Example.of("sort w20 : ", "blue", ("red", "blue")))
    assert len(answer_examples(model, tokenizer, Examples(TASK, "test", items), batch_size=2)) == 2
    generate(model, tokenizer, [Question([5, 6], [])], max_new_tokens=2, stop=(), batch_size=1)


TOKENIZER = {
    "empty": b"",
    "cut": lambda data: data[:300],
    "a list": b"[]",
    "an empty object": b"{}",
    "a byte order mark": lambda data: b"\xef\xbb\xbf" + data,
    "not text": b"\xff\xfe{",
    "an unknown model": {"model": {"type": "Nope"}},
    "a vocabulary that is a list": {"model": {"type": "WordLevel", "vocab": [], "unk_token": "<unk>"}},
    "an added token whose number is a text": {"added_tokens": [{"id": "", "content": "<x>"}]},
    "a pre-tokenizer that is a number": {"pre_tokenizer": 5},
    "another version": {"version": 5},
}
TOKENIZER_CONFIG = {
    "empty": b"",
    "cut": lambda data: data[:20],
    "a list": b"[]",
    "a byte order mark": lambda data: b"\xef\xbb\xbf" + data,
    "nested": b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}",
    "an end that is an object": {"eos_token": {}},
    "an end that is a number": {"eos_token": 5},
    "an end that is a list": {"eos_token": ["</s>"]},
    "a length that is a text": {"model_max_length": "x"},
    "a length of nothing": {"model_max_length": 0},
    "a length that is a list": {"model_max_length": [1]},
    "a class that is a number": {"tokenizer_class": 5},
    "added tokens that are a text": {"added_tokens_decoder": "x"},
    "an added token without number": {"added_tokens_decoder": {"x": {"content": "y"}}},
    "special tokens that are a number": {"extra_special_tokens": 5, "additional_special_tokens": 5},
    "code of its own": {"auto_map": {"AutoTokenizer": ["own.T", "own.T"]}, "tokenizer_class": "T"},
}
CONFIG = {
    "empty": b"",
    "cut": lambda data: data[:50],
    "a list": b"[]",
    "an empty object": b"{}",
    "a byte order mark": lambda data: b"\xef\xbb\xbf" + data,
    "an unknown kind": {"model_type": "nope"},
    "a kind that is a number": {"model_type": 5},
    "a width that is a text": {"hidden_size": "x"},
    "a width below zero": {"hidden_size": -1},
    "no width": {"hidden_size": 0},
    "another width": {"hidden_size": 64},
    "layers that are a text": {"num_hidden_layers": "two"},
    "heads that are none": {"num_attention_heads": 0},
    "no vocabulary": {"vocab_size": -1},
    "a smaller vocabulary": {"vocab_size": 4},
    "an unknown activation": {"hidden_act": "nope"},
    "positions that are a text": {"rope_parameters": "x", "rope_scaling": "x"},
    "an unknown dtype": {"dtype": "floaty", "torch_dtype": "floaty"},
    "a quantization that is a text": {"quantization_config": "x"},
    "code of its own": {"auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}, "model_type": "own"},
}
GENERATION = {
    "cut": lambda data: data[:20],
    "a list": b"[]",
    "an end that is a text": {"eos_token_id": "x"},
    "an end that is a list of texts": {"eos_token_id": ["x"]},
    "a byte order mark": lambda data: b"\xef\xbb\xbf" + data,
}
FILES = {
    "tokenizer.json": TOKENIZER,
    "tokenizer_config.json": TOKENIZER_CONFIG,
    "config.json": CONFIG,
    "generation_config.json": GENERATION,
}
DAMAGES = [pytest.param(file, how, id=f"{file}: {name}") for file, kinds in FILES.items() for name, how in kinds.items()]


def damage(file: Path, how: object) -> None:
    if isinstance(how, dict):
        changed(file, **how)
    else:
        file.write_bytes(how if isinstance(how, bytes) else how(file.read_bytes()))


@pytest.mark.parametrize(("file", "how"), DAMAGES)
def test_a_damaged_file_is_a_refusal_that_names_the_folder(base, file, how):
    damage(base / file, how)
    with pytest.raises(PlaitError, match=re.escape(str(base))) as caught:
        evaluate(base)
    assert isinstance(how, dict) or file in str(caught.value), "where a file cannot be read at all, it is named"


def test_a_tokenizer_without_its_vocabulary(base):
    (base / "tokenizer.json").unlink()
    with pytest.raises(TaskError, match=rf"^{re.escape(str(base))}: the tokenizer cannot be loaded: "):
        load_tokenizer(base)


def test_code_of_its_own_runs_only_where_it_is_trusted(base, tmp_path):
    (base / "own.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
        "from transformers import PreTrainedTokenizerFast\nclass T(PreTrainedTokenizerFast):\n    pass\n"
    )
    changed(base / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "own.T"]}, tokenizer_class="T")
    with pytest.raises(TaskError, match=r"code of its own .* --trust-remote-code \(trust_remote_code=True in Python\)"):
        load_tokenizer(base)
    assert not (tmp_path / "ran").exists()
    assert type(load_tokenizer(base, trust_remote_code=True)).__name__ == "T"
    assert (tmp_path / "ran").exists()


def test_code_of_a_model_runs_only_where_it_is_trusted(base, tmp_path):
    (base / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    changed(base / "config.json", auto_map={"AutoConfig": "own.C"}, model_type="own")
    with pytest.raises(PlanError, match="code of its own"):
        load_config(base)
    assert not (tmp_path / "ran").exists()


def test_weights_that_are_damaged(base):
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(PlaitError, match=rf"^{re.escape(str(base))}: the model cannot be loaded: model\.safetensors: .*header"):
        evaluate(base)


def test_tokens_that_the_model_has_no_embeddings_for(base):
    bytes_ = byte_tokenizer()
    bytes_.save_pretrained(base)
    with pytest.raises(TaskError, match=r"gives token \d+, and the model has embeddings for tokens 0 to \d+: "):
        evaluate(base)


def test_any_token_pads_where_none_does():
    tokens = byte_tokenizer()
    assert with_padding_token(tokens).pad_token == "<|im_end|>"
    assert with_padding_token(byte_tokenizer(pad_token="<|pad|>")).pad_token == "<|pad|>"


class PanicException(BaseException):  # as tokenizers raise it
    pass


def test_a_panic_is_a_refusal_and_an_interrupt_is_not():
    with (
        pytest.raises(TaskError, match=r"^place: what is done: PanicException: index out of range"),
        refuse_failures("place", "what is done", TaskError),
    ):
        raise PanicException("index out of range")
    with pytest.raises(Stopped), refuse_failures("place", "what is done", TaskError):
        raise Stopped(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), refuse_failures("place", "what is done", TaskError):
        raise KeyboardInterrupt


class Unable:
    """A tokenizer that cannot read some texts."""

    name_or_path, chat_template, bos_token_id, eos_token_id = "the/folder", None, 1, 2

    def __call__(self, *_: object, **__: object) -> object:
        raise PanicException("no such token")


def test_a_text_that_the_tokenizer_cannot_read():
    with pytest.raises(
        TaskError, match=r"^the/folder: the tokenizer cannot read the texts of task 't': PanicException: no such"
    ):
        PromptEncoder(Unable(), TASK).question("x", ["red"])


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "additional_chat_templates/tool.jinja", "tokenizer.json", "merges.txt"]
)
def test_files_of_terabytes_are_not_read(base, name):
    (base / name).parent.mkdir(exist_ok=True)
    with (base / name).open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(TaskError, match=f"the tokenizer cannot be loaded: {Path(name).name}: larger than 256 MB"):
        load_tokenizer(base)
