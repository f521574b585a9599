"""Whatever goes another way than expected says so once, with the reason: in Python as a warning, in the terminal as a note."""

from __future__ import annotations

import errno
import json
import os
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from huggingface_hub import HfApi

from plait import notices
from plait.adapters.adapter import Adapter
from plait.baking.journal import _read
from plait.calibration.texts import Texts
from plait.cli.console import warnings_as_notes
from plait.errors import OutputError
from plait.evaluation import workspace
from plait.evaluation.generation import generate
from plait.evaluation.scores import Answers, ScoreCache
from plait.notices import PlaitWarning, announce
from plait.results.records import read_earlier
from plait.tasks.encoding import Question
from plait.tasks.examples import Examples
from plait.tensorfiles.blocks import copy_range
from plait.training.job import TrainingRecord
from plait.training.preflight import move_outdated
from plait.tuning.seen import seen_in_training
from plait.verification import publish
from tests.adapters_on_disk import Linear, write_adapter
from tests.language_models import language_model, tokenizer


def test_once_about_the_same():
    with pytest.warns(PlaitWarning, match="a, since 1") as caught:
        announce("a, since 1", once="a")
    assert caught[0].filename == __file__
    announce("a, since 2", once="a")  # any warning is an error here
    notices.forget_announcements()
    with pytest.warns(PlaitWarning, match="a, since 4"):
        announce("a, since 4", once="a")


def test_notes_are_printed_at_once_and_others_warnings_are_left_alone(capsys):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with warnings_as_notes(PlaitWarning):
            announce("slower, since [x] is so")
            assert capsys.readouterr().err == "note: slower, since [x] is so\n"
            warnings.warn("of a library", FutureWarning, stacklevel=1)
        assert [str(w.message) for w in caught] == ["of a library"]
    assert capsys.readouterr().err == ""


def copied(folder: Path) -> bytes:
    (folder / "from").write_bytes(bytes(range(200)))
    with (folder / "from").open("rb") as source, (folder / "to").open("w+b") as target:
        copy_range(source.fileno(), 10, target.fileno(), 0, 100, lambda done: None)
    return (folder / "to").read_bytes()


def test_bytes_copied_through_the_process(tmp_path, monkeypatch):
    def refused(*_: object) -> int:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", refused, raising=False)
    with pytest.warns(PlaitWarning, match=r"copied the slower way.*copy_file_range fails \(Invalid cross-device link\)"):
        assert copied(tmp_path) == bytes(range(10, 110))
    notices.forget_announcements()
    monkeypatch.delattr(os, "copy_file_range")
    with pytest.warns(PlaitWarning, match="this system has no copy_file_range"):
        assert copied(tmp_path) == bytes(range(10, 110))


def test_a_journal_that_cannot_be_read_to_its_end(tmp_path):
    journal = tmp_path / "journal.jsonl"
    journal.write_text('{"digest": "x"}\n')
    assert len(_read(journal)) == 1
    assert _read(tmp_path / "none") == []
    journal.write_text('{"digest": "x"}\n{"sha')
    with pytest.warns(
        PlaitWarning, match=r"journal\.jsonl is used up to its entry 1; what was finished after it is made again"
    ):
        assert len(_read(journal)) == 1


def test_kept_answers_that_are_damaged(tmp_path):
    cache = ScoreCache(tmp_path)
    assert cache.find("k", 0) is None
    cache.keep("k", Answers(contender="c", task="t", answers=()))
    assert cache.find("k", 0) is not None
    with pytest.warns(PlaitWarning, match=r"k\.json does not hold complete answers \(0 for 1 examples\); the model"):
        assert cache.find("k", 1) is None
    changed = json.loads((tmp_path / "k.json").read_text()) | {"sha256": "0" * 64}
    (tmp_path / "k.json").write_text(json.dumps(changed))
    with pytest.warns(PlaitWarning, match=r"k\.json does not hold complete answers \(they were changed\); the model"):
        assert cache.find("k", 0) is None
    (tmp_path / "k.json").write_text(json.dumps({name: changed[name] for name in ("contender", "task", "answers")}))
    assert cache.find("k", 0) is not None, "of an earlier release"
    (tmp_path / "k.json").write_text("{")
    with pytest.warns(PlaitWarning, match=r"k\.json does not hold complete answers .*the model is asked again"):
        assert cache.find("k", 0) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"tag": "other"}'])
def test_results_that_are_damaged_are_written_again(tmp_path, text):
    file = tmp_path / "results.json"
    file.write_text(text)
    if text.startswith("{") and text.endswith("}"):
        workspace._write_once(file, {"tag": "t"})
    else:
        with pytest.warns(PlaitWarning, match=r"results\.json.*It is written again"):
            workspace._write_once(file, {"tag": "t"})
    assert json.loads(file.read_text()) == {"tag": "t"}


def test_an_index_that_leads_nowhere_is_refused(tmp_path):
    index = tmp_path / "merged" / "linear" / "a" / "eval" / "index.json"
    index.parent.mkdir(parents=True)
    index.symlink_to("gone")
    with pytest.raises(OutputError, match=r"index\.json: .*a link that leads nowhere"):
        workspace.check_index(tmp_path, "linear", ["a"])


@pytest.mark.parametrize("text", ["", "{", "[]", '{"plait": 1}'])
def test_a_record_of_an_earlier_run_that_cannot_be_read(tmp_path, text):
    (tmp_path / "training.json").write_text(text)
    with pytest.warns(PlaitWarning, match=r"training\.json.*what an earlier run wrote there does not count"):
        assert read_earlier(TrainingRecord, tmp_path / "training.json") is None
    assert read_earlier(TrainingRecord, tmp_path / "none.json") is None


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"job": 1}', '{"job": {"data": {"split": "train"}}}'])
def test_a_record_that_does_not_say_what_was_trained_on(tmp_path, text):
    folder = write_adapter(tmp_path / "run" / "adapter", {"q": Linear(4, 4)}).folder
    (tmp_path / "run" / "training.json").write_text(text)
    with pytest.warns(PlaitWarning, match=r"training\.json.*; whether a was trained on these texts is not known"):
        assert seen_in_training(Texts(None, "lines", "", Examples(None, "lines", ())), Adapter.open(folder, "a")) is None


def test_data_of_a_training_that_cannot_be_read(tmp_path):
    folder = write_adapter(tmp_path / "run" / "adapter", {"q": Linear(4, 4)}).folder
    data = {"split": "train", "task": None, "place": str(tmp_path / "gone.jsonl"), "limit": None, "text_field": "text"}
    (tmp_path / "run" / "training.json").write_text(json.dumps({"job": {"data": data}}))
    with pytest.warns(PlaitWarning, match=r"gone\.jsonl: No such file.*whether a was trained on these texts is not known"):
        assert seen_in_training(Texts(None, "lines", "", Examples(None, "lines", ())), Adapter.open(folder, "a")) is None


def test_an_adapter_whose_record_is_damaged_is_not_replaced_by_an_earlier_one(tmp_path):
    (tmp_path / "phases" / "a").mkdir(parents=True)
    (tmp_path / "earlier" / "a-0123456789ab").mkdir(parents=True)
    phase = SimpleNamespace(
        phase=SimpleNamespace(folder=tmp_path / "phases" / "a"), opened=SimpleNamespace(digest="0123456789abc")
    )
    (tmp_path / "phases" / "a" / "training.json").write_text("{")
    with pytest.raises(OutputError, match=r"training\.json cannot be read, and .*a-0123456789ab holds an adapter"):
        move_outdated(SimpleNamespace(out=tmp_path), [phase])
    (tmp_path / "phases" / "a" / "training.json").unlink()
    assert "restored from earlier/" in move_outdated(SimpleNamespace(out=tmp_path), [phase])[0]


def test_a_lock_in_a_repository_that_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "plait.lock").write_text("{")
    monkeypatch.setattr(HfApi, "hf_hub_download", lambda *_, **__: str(tmp_path / "plait.lock"))
    monkeypatch.setattr(publish, "check_push", lambda repo: repo)
    with pytest.warns(PlaitWarning, match=r"org/name: .*plait\.lock.*not JSON.*What an older result left there .* stays"):
        assert publish._earlier_files("org/name", None) == ()


def test_results_without_links(tmp_path, monkeypatch):
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(Path, "symlink_to", refused)
    with pytest.warns(PlaitWarning, match="hold copies of results, not links"):
        workspace._link(tmp_path / "a" / "link", tmp_path / "file")
    assert (tmp_path / "a" / "link").read_text() == "x"


class Rereading(transformers.LlamaForCausalLM):
    """Its generation gives all of the text to every call."""

    def prepare_inputs_for_generation(self, input_ids, *args, **kwargs):
        return {"input_ids": input_ids, "use_cache": False}


def test_generation_that_reads_everything_again():
    tokens = tokenizer()
    model = language_model()
    asked = [Question(tokens(text)["input_ids"], []) for text in ("sort w1 :", "rate w2 :")]
    expected = generate(model, tokens, asked, max_new_tokens=4, stop=(), batch_size=2)
    slow = Rereading(model.config).eval()
    slow.load_state_dict(model.state_dict())
    with pytest.warns(PlaitWarning, match="Rereading generates the slower way"):
        assert generate(slow, tokens, asked, max_new_tokens=4, stop=(), batch_size=2) == expected


def test_generation_reads_prompts_once_and_then_token_by_token():
    tokens, model, shapes = tokenizer(), language_model(), []
    model.config.use_cache = False  # as training leaves it in a checkpoint
    model.generation_config.use_cache = False
    model.register_forward_pre_hook(lambda _, a, k: shapes.append(tuple(k["input_ids"].shape)), with_kwargs=True)
    asked = [Question(tokens(text)["input_ids"], []) for text in ("sort w1 :", "w3", "rate w2 : very w4")]
    with torch.no_grad():
        generate(model, tokens, asked, max_new_tokens=5, stop=(), batch_size=4)
    width = max(len(q.prompt) for q in asked)
    assert shapes[0] == (3, width)
    assert set(shapes[1:]) == {(3, 1)}
    assert len(shapes) <= 5
