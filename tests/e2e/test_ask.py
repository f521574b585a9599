"""`plait ask`: base, single adapters and a merge write to the same prompts what transformers and PEFT write."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM

import plait
from plait.cli.ask import _Screen
from plait.commands.ask import AskOrder
from plait.commands.request import Request
from plait.errors import RecipeError, TaskError
from plait.evaluation.generation import Sampling
from plait.hub.pretrained import LoadOptions
from tests.adapters_on_disk import Linear, write_adapter
from tests.chat_models import byte_tokenizer, save_chat_model, write_rows
from tests.command_line import exit_code
from tests.language_models import tokenizer, train_adapter, train_pair

# PEFT's and torch's own
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
PROMPT = "sort w3 :"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = train_pair(tmp_path_factory.mktemp("asked"), steps=20)
    plait.merge([folder / "sort", folder / "rate"], weights=[0.7, 0.6], out=folder / "merged", base_model=str(folder / "base"))
    return folder


def ask(place: Path, prompts: Any = PROMPT, source: Any = None, **settings: Any) -> dict[str, str]:
    """Return who → reply to the first prompt."""
    source = [place / "sort", place / "rate"] if source is None else source
    asked = plait.ask(prompts, source, **{"base": place / "base", "max_new_tokens": 5, **settings})
    return {name: reply.text for name, reply in asked.prompts[0].replies.items()}


def written(place: Path, adapter: str | None, prompt: str = PROMPT) -> str:
    """Return what transformers writes, greedily."""
    model = AutoModelForCausalLM.from_pretrained(place / "base")
    model = model if adapter is None else PeftModel.from_pretrained(model, place / adapter)
    ids = tokenizer()(prompt, return_tensors="pt").input_ids
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    return str(tokenizer().decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def test_everyone_writes_what_transformers_and_peft_write(place: Path) -> None:
    found = ask(place, weights=[0.7, 0.6])
    assert found == {
        "base": written(place, None),
        "sort": written(place, "sort"),
        "rate": written(place, "rate"),
        "merged": written(place, "merged"),
    }
    assert len(set(found.values())) > 2
    assert ask(place, source=str(place / "merged")) == found, "the adapters that its lock names, and it"
    assert ask(place, source=str(place / "sort")) == {name: found[name] for name in ("base", "sort")}


def test_a_full_model_replies_alone_or_beside_its_base(place: Path, tmp_path: Path) -> None:
    plait.bake([place / "sort", place / "rate"], weights=[0.7, 0.6], base=place / "base", out=tmp_path / "baked")
    found = ask(place, source=str(tmp_path / "baked"), base=None)
    assert {*found} == {"base", "sort", "rate", "baked"}
    assert found["baked"] == written(place, "merged")
    assert ask(place, source=str(place / "base"), base=None) == {"base": written(place, None)}


def test_draws_depend_on_their_seed_alone(place: Path) -> None:
    before = torch.get_rng_state()
    draw = [ask(place, temperature=3.0, sampling_seed=seed, max_new_tokens=12) for seed in (0, 0, 1)]
    assert draw[0] == draw[1]
    assert draw[0] != draw[2]
    assert torch.equal(torch.get_rng_state(), before), "a user's own draws go on as they would have"
    assert ask(place, temperature=3.0, top_p=1e-6) == ask(place), "the likeliest token alone"


def test_prompts_of_files_and_lists(place: Path, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("sort w3 :\n\nrate w4 :\n")
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "sort w3 :"}, {"prompt": "rate w4 :"}])
    given = [tmp_path / "lines.txt", str(tmp_path / "rows.jsonl"), ["sort w3 :", "rate w4 :"]]
    found = [plait.ask(p, str(place / "sort"), base=place / "base", max_new_tokens=3).prompts for p in given]
    assert found[0] == found[1] == found[2]
    assert [asked.prompt for asked in found[0]] == ["sort w3 :", "rate w4 :"]


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    save_chat_model(folder / "base", num_hidden_layers=1)
    for name in ("a", "b"):
        write_adapter(folder / name, {"model.layers.0.self_attn.q_proj": Linear(16, 16)}, r=2, base=str(folder / "base"))
    return folder


def test_chats(chat: Path, tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}]
    write_rows(tmp_path / "chats.jsonl", [{"messages": turns}])
    sources = [chat / "a", chat / "b"]
    asked = [
        plait.ask(p, sources, max_new_tokens=3, **how).prompts[0]
        for p, how in (("Hi", {"system": "Be short."}), ([turns], {}), (tmp_path / "chats.jsonl", {}), ("Hi", {"plain": True}))
    ]
    text = "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert [a.text for a in asked] == [text, text, text, "Hi"]
    assert asked[0].replies == asked[1].replies == asked[2].replies
    ids = byte_tokenizer()(text, return_tensors="pt", add_special_tokens=False).input_ids
    model = AutoModelForCausalLM.from_pretrained(chat / "base")
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    assert asked[0].replies["base"].text == byte_tokenizer().decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    with pytest.raises(TaskError, match=r"messages need a chat template, and --plain .* reads text alone"):
        plait.ask([turns], sources, plain=True)


def test_what_is_refused(place: Path, chat: Path, tmp_path: Path) -> None:
    for (key, value), message in {
        ("temperature", -1.0): "--temperature .* must be 0 or larger",
        ("max_new_tokens", 0): "--max-new-tokens .* must be at least 1",
        ("top_p", 0.5): "--top-p .* has no effect without --temperature",
        ("sources", ("x",)): "--source .* belongs to one adapter or model",
        ("load_dtype", "float13"): "float13",
    }.items():
        with pytest.raises(plait.PlaitError, match=message):
            ask(place, **{key: value})
    with pytest.raises(RecipeError, match="replies as it is; these belong to a merge: scale"):
        ask(place, source=str(place / "sort"), scale=2)
    with pytest.raises(TaskError, match=r"longer than the model's context of 64 tokens.*smaller --max-new-tokens"):
        ask(place, max_new_tokens=90)
    with pytest.raises(TaskError, match=r"messages need a chat template, and .*base has no chat template"):
        ask(place, system="Be short.")
    with pytest.raises(TaskError, match=r"sort is an adapter or a model, and the prompt comes first"):
        ask(place, str(place / "sort"), source=str(place / "rate"))
    with pytest.raises(TaskError, match="must not be empty"):
        ask(place, "")
    write_rows(tmp_path / "rows.jsonl", [{"text": "x"}])
    with pytest.raises(TaskError, match="row 1 has neither 'prompt' nor 'messages'; it has text"):
        ask(place, tmp_path / "rows.jsonl")
    with pytest.raises(TaskError, match=r"none\.txt: No such file"):
        ask(place, "none.txt")
    BertForMaskedLM(BertConfig(vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(
        tmp_path / "bert"
    )
    tokenizer().save_pretrained(tmp_path / "bert")
    with pytest.raises(TaskError, match="writes no text; only language models reply"):
        ask(place, source=str(tmp_path / "bert"), base=None)


def test_the_command_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["ask", PROMPT, place / "sort", place / "rate", "--weights", "0.7", "0.6", "--base-id", place / "base"]
    line += ["--max-new-tokens", "5"]
    assert exit_code(*line, "--json") == 0
    data = json.loads(capsys.readouterr().out)
    replies = data["prompts"][0]["replies"]
    assert {name: reply["text"] for name, reply in replies.items()} == ask(place, weights=[0.7, 0.6])
    assert all(reply["tokens"] == 5 for reply in replies.values() if not reply["complete"])
    assert exit_code(*line) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == PROMPT
    assert [text for text in lines[1:] if text.endswith(":")] == ["base:", "sort:", "rate:", "merged:"]
    assert replies["merged"]["text"] in lines[lines.index("merged:") + 1]
    assert exit_code(*line, "--temperature", "-1") == 2


@pytest.mark.parametrize(("width", "columns"), [(120, True), (60, False)])
def test_a_terminal_shows_replies_side_by_side_where_they_fit(
    place: Path, width: int, columns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(force_terminal=True, width=width, record=True, color_system=None, highlight=False)
    monkeypatch.setattr("plait.cli.console.out", lambda: console)
    source = [str(place / "sort"), str(place / "rate")]
    AskOrder(PROMPT, Request(source), Sampling(5), load=LoadOptions(base=str(place / "base"))).run(None, _Screen())
    shown = console.export_text()
    heads = [row for row in shown.splitlines() if all(name in row for name in ("base", "sort", "rate", "merged"))]
    assert bool(heads) is columns


def test_a_terminal_is_given_back_where_a_reply_breaks_off(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cursor is hidden while replies are written."""
    console = Console(force_terminal=True, width=120, file=io.StringIO())
    monkeypatch.setattr("plait.cli.console.out", lambda: console)
    cursor: list[bool] = []
    monkeypatch.setattr(console, "show_cursor", lambda show=True: cursor.append(show))
    monkeypatch.setattr("plait.evaluation.replies.write_reply", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
    assert exit_code("ask", PROMPT, place / "sort", "--base-id", place / "base") == 130
    assert cursor == [False, True]


def test_heads_that_no_prompt_belongs_to(place: Path, tmp_path: Path) -> None:
    train_adapter(tmp_path / "sort", "sort", steps=1, modules_to_save=["lm_head"])
    asked = plait.ask(PROMPT, [tmp_path / "sort", place / "rate"], base=place / "base", max_new_tokens=2)
    assert any("keeps the heads or token rows of sort apart" in note for note in asked.notes)
    taken = plait.ask(
        PROMPT, [tmp_path / "sort", place / "rate"], base=place / "base", max_new_tokens=2,
        heads={"policy": "from", "adapter": "sort"},
    )  # fmt: skip
    assert not any("apart" in note for note in taken.notes)
