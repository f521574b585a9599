"""What `plait train` knows before anything is trained: what would happen, and everything that is wrong."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import plait
from plait.errors import OutputError, RecipeError
from plait.training import cohort
from plait.training.phases import phase_seed
from plait.training.preflight import resolve_phases
from plait.training.reading import read_phases
from tests.language_models import save_model
from tests.phase_files import CHECKPOINTS, PHASES, command, rewrite

pytestmark = pytest.mark.usefixtures("one_thread")


def test_what_would_happen(phases, capsys):
    Path("base").unlink()
    save_model(Path("base"))
    code, out, _ = command(capsys, "phases.yaml", "--dry-run", "--json", "--set", "arguments.num_train_epochs=2",
                           "--set", "arguments.max_steps=-1")  # fmt: skip
    assert code == 0
    sort, rate = json.loads(out)["phases"]
    # <s>? no: 3 words, the answer, the end
    assert (sort["state"], sort["examples"], sort["steps"]) == ("to do", 24, 6)
    assert sort["tokens"] == 24 * 5 * 2
    shapes = sum(t.numel() for t in lora_of("base", r=4).values())
    assert sort["parameters"] == rate["parameters"] == shapes
    assert sort["init_seed"] == phase_seed(0, "sort")
    assert not Path("artifacts").exists()
    code, out, _ = command(capsys, "phases.yaml", "--dry-run")
    assert code == 0
    assert "then: merge by ties in core, evaluate on 2 tasks" in out


@pytest.mark.parametrize("width", ["20", "40", "60", "80"])
def test_a_narrow_terminal_splits_no_word(phases, width, capsys, monkeypatch):
    Path("base").unlink()
    save_model(Path("base"))
    monkeypatch.setenv("COLUMNS", "200")
    _, wide, _ = command(capsys, "phases.yaml", "--dry-run")
    monkeypatch.setenv("COLUMNS", width)
    _, out, _ = command(capsys, "phases.yaml", "--dry-run")
    words = {word.removesuffix(":") for word in out.split()}
    assert {word.removesuffix(":") for word in wide.split()} - words <= {"phase"}, "a word is split"
    assert all(len(line) <= int(width) for line in out.splitlines()[1:-1])  # but for lines that end in a path
    assert ("  examples: 24" in out) is (int(width) < 60)


def lora_of(base: str, r: int) -> dict[str, torch.Tensor]:
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    model = AutoModelForCausalLM.from_pretrained(base)
    return get_peft_model_state_dict(get_peft_model(model, LoraConfig(r=r, target_modules="all-linear", task_type="CAUSAL_LM")))


def test_what_is_wrong_is_said_before_anything_is_trained(phases, capsys):
    (phases / "rows.jsonl").write_text('{"nothing": 1}\n')
    text = PHASES.replace("phases: [sort.yaml, rate.yaml]", """\
phases:
  - {task: sort.yaml, arguments: {learning_rat: 1}}
  - {task: rate.yaml, arguments: {seed: 1}}
  - {name: rows, data: rows.jsonl}
  - {name: gone, data: ./gone.jsonl}""")  # fmt: skip
    Path("phases.yaml").write_text(text)
    code, _, message = command(capsys, "phases.yaml", "-o", "out")
    assert code == 2
    assert "4 problems" in message
    assert "phases.yaml:6: phases.1.arguments: arguments: seed: a key of its own, not one of 'arguments'." in message
    assert "phases.yaml:5: phases.0.arguments: arguments: learning_rat: SFTConfig has none of that name." in message
    assert "phases.yaml:7: phases.2.data:" in message
    assert "phases.yaml:8: phases.3.data:" in message
    assert "gone.jsonl: there is no such file" in message
    assert not Path("out").exists()
    rewrite(("all-linear", "nowhere"))
    code, _, message = command(capsys, "phases.yaml", "-o", "out")
    assert code == 2
    assert "cannot be trained so" in message
    with pytest.raises(RecipeError, match="--cluster 'slurm': it must be 'ray'"):
        plait.train("phases.yaml", out="out", cluster="slurm")
    with pytest.raises(RecipeError, match="--workers 0"):
        plait.train("phases.yaml", out="out", workers=0)


def test_what_is_in_the_way_is_said_before_anything_is_trained(phases, capsys):
    Path("out/merged").mkdir(parents=True)
    Path("out/merged/mine.txt").write_text("mine")
    for words in ([], ["--dry-run"]):
        code, _, message = command(capsys, "phases.yaml", "-o", "out", *words)
        assert code == 2
        assert "out/merged was not written by plait (it has no plait.lock)" in message
    assert not Path("out/phases").exists()


def test_a_template_is_tried_before_anything_is_trained(phases, capsys):
    Path("chat.jinja").write_text("{{ raise_exception('not this') }}")
    Path("chats.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    rewrite(("rate.yaml]", "{name: chats, data: chats.jsonl, arguments: {chat_template_path: chat.jinja}}]"))
    (phases / "elsewhere").mkdir()
    os.chdir("elsewhere")
    code, _, message = command(capsys, "../phases.yaml", "-o", "out")
    assert code == 2
    assert "phases.1.arguments: " in message
    assert f"{Path('../chat.jinja').absolute()}: the chat template: it refuses this chat: not this" in message
    assert not Path("out").exists()


@pytest.mark.parametrize(("workers", "enough"), [(None, True), (2, False)])
def test_checkpoints_need_room_only_while_their_phase_is_trained(phases, monkeypatch, workers, enough):
    rewrite(CHECKPOINTS)
    phases = resolve_phases(read_phases("phases.yaml", out=Path("out")))
    found = cohort.estimate(phases[0], Path("out"), examples=24)
    free = cohort._SPARE + 2 * (found.bytes - found.passing) + found.passing
    monkeypatch.setattr(cohort, "estimate", lambda *_, **__: replace(found, free=free))
    with nullcontext() if enough else pytest.raises(OutputError, match=r"are needed \(2 adapters and their checkpoints\)"):
        cohort._check_space(Path("out"), phases, cohort.Scheduling(workers))
