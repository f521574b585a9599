"""`plait sft` again: finished, stopped, killed, failed and damaged runs."""

from __future__ import annotations

import fcntl
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from plait import commands
from plait.errors import OutputError, PlanError, RecipeError
from plait.notices import PlaitWarning
from plait.results import disk
from plait.training import running, sft
from plait.training.folder import checkpoint_step, last_checkpoint
from plait.training.sft import plan_sft, run_sft
from tests.chat_models import questions, write_rows
from tests.command_line import exit_code
from tests.sft_runs import base_model, flags, kept_trainers, logits, main_ok, make_place, train
from tests.warm import killed_at_a_checkpoint

#: warnings of TRL and transformers, about themselves
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("sft"))


def test_the_same_command_again_does_nothing_twice(place, tmp_path, monkeypatch):
    trainers = kept_trainers(monkeypatch)
    first = train(place, tmp_path / "out", merge_adapter_with_base=True)
    written = (first.merged_model / "model.safetensors").stat().st_mtime_ns
    again = train(place, tmp_path / "out", merge_adapter_with_base=True)
    assert len(trainers) == 1
    assert (first.found, again) == (False, replace(first, found=True))
    assert (first.merged_model / "model.safetensors").stat().st_mtime_ns == written
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    plan = plan_sft(flags(place, tmp_path / "out", merge_adapter_with_base=True))  # nothing of it is left to write
    assert "2 steps, seed 42; finished already" in "\n".join(sft.describe_plan(plan))


def test_a_finished_run_is_found_not_trained(place, tmp_path, capsys):
    words = ["sft", "--model_name_or_path", str(place / "base"), "--dataset_name_or_path", str(place / "rows.jsonl")]
    words += ["--output_dir", str(tmp_path / "out"), "--max_steps", "1", "--use_peft", "--disable_tqdm", "True"]
    main_ok(words)
    assert "trained 1 steps on 12 examples" in capsys.readouterr().err
    main_ok(words)
    message = capsys.readouterr().err
    assert "found what an earlier run trained: 1 steps on 12 examples" in message
    assert "\ntrained 1 steps" not in message


def test_rows_to_measure_on_are_a_test_split_where_there_is_one(place, tmp_path):
    (tmp_path / "rows").mkdir()
    write_rows(tmp_path / "rows" / "train.jsonl", questions(9))
    write_rows(tmp_path / "rows" / "validation.jsonl", questions(2))
    measured = {"eval_dataset_name_or_path": str(tmp_path / "rows"), "eval_strategy": "steps"}
    plan = plan_sft(flags(place, tmp_path / "out", **measured))
    printed = "\n".join(sft.describe_plan(plan))
    assert f"2 examples to measure the loss on: {tmp_path}/rows/validation.jsonl, question_answer" in printed
    plan = plan_sft(flags(place, tmp_path / "out", **measured, dataset_test_split="train"))
    assert f"9 examples to measure the loss on: {tmp_path}/rows/train.jsonl" in "\n".join(sft.describe_plan(plan))


def test_stopped_by_hand(place, tmp_path, monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands.sft, "run_sft", stop)
    words = ["sft", "--model_name_or_path", str(place / "base"), "--dataset_name_or_path", str(place / "rows.jsonl")]
    assert exit_code(*words, "--use_peft", "--output_dir", str(tmp_path / "out")) == 130
    assert "stopped\nThe same command starts from the beginning." in capsys.readouterr().err


def test_a_stopped_training_says_which_checkpoint_there_is(tmp_path):
    def stop(folder: Path) -> list[str]:
        with pytest.raises(KeyboardInterrupt) as caught, running._error_context(folder):
            raise KeyboardInterrupt
        return caught.value.__notes__

    assert stop(tmp_path) == [f"No checkpoint was saved yet in {tmp_path}; the same command starts from the beginning."]
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "optimizer.pt").write_text("")
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text('{"global_step": 2}')
    with pytest.warns(PlaitWarning, match="checkpoint-10 is left aside: trainer_state.json: No such file or directory"):
        last_checkpoint(tmp_path)
    assert stop(tmp_path) == [f"{tmp_path / 'checkpoint-2'} is kept; the same command continues from there."], "10 is not whole"


def test_a_run_with_other_settings_is_not_overwritten(place, tmp_path):
    first = train(place, tmp_path / "out", merge_adapter_with_base=True)
    before = (first.adapter / "adapter_model.safetensors").read_bytes()
    with pytest.raises(RecipeError, match=r"holds a run with other settings \(learning_rate, lora.r\)"):
        plan_sft(flags(place, tmp_path / "out", lora_r=2, learning_rate=1e-3))
    assert (first.adapter / "adapter_model.safetensors").read_bytes() == before
    forced = train(place, tmp_path / "out", lora_r=2, learning_rate=1e-3, force=True)
    assert json.loads((forced.adapter / "adapter_config.json").read_text())["r"] == 2
    assert not first.merged_model.exists(), "it was of the run that was given up"


def test_a_folder_in_use(place, tmp_path):
    out = tmp_path / "out"
    train(place, out)
    with (out / ".in-use").open("w") as held:
        held.write("process 1 on there")
        held.flush()
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(RecipeError, match="out is in use by process 1 on there: a model is trained there"):
            plan_sft(flags(place, out))


def test_a_changed_adapter_is_made_again(place, tmp_path):
    result = train(place, tmp_path / "out")
    whole = (result.adapter / "adapter_model.safetensors").read_bytes()
    (result.adapter / "adapter_model.safetensors").write_bytes(whole[:-4] + b"\0\1\2\3")
    train(place, tmp_path / "out")
    assert (result.adapter / "adapter_model.safetensors").read_bytes() == whole


def test_killed_it_goes_on_to_the_same_bytes(place, tmp_path):
    long = {"max_steps": 30, "save_steps": 4, "learning_rate": 1e-3, "lora_dropout": 0.1}
    words = []
    for name, value in flags(place, tmp_path / "out", **long).given.items():
        words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    killed_at_a_checkpoint(["sft", *words], "/checkpoint-8/")
    assert not (tmp_path / "out" / "training.json").exists()
    half = tmp_path / "out" / "checkpoint-99"  # killed while it was written
    half.mkdir()
    (half / "adapter_model.safetensors").write_bytes(b"")
    plan = plan_sft(flags(place, tmp_path / "out", **long))
    printed = "\n".join(sft.describe_plan(plan))
    resumed = run_sft(plan)
    assert "30 steps, seed 42; continues at step 8\n" in printed
    assert resumed.record.resumed_from == 8
    assert resumed.record.steps == 30
    whole = train(place, tmp_path / "whole", **long)
    assert whole.record.resumed_from is None
    assert resumed.record.tokens == whole.record.tokens
    assert resumed.record.losses == whole.record.losses
    got, expected = (load_file(r.adapter / "adapter_model.safetensors") for r in (resumed, whole))
    assert all(torch.equal(got[name], expected[name]) for name in expected)


BEST = {
    "load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True,
    "eval_strategy": "steps", "eval_steps": 1, "test_split_size": 0.2,
}  # fmt: skip


@pytest.mark.parametrize("kept", [{}, BEST], ids=["last", "best"])
def test_killed_behind_the_last_step_it_takes_none_more(place, tmp_path, kept):
    """In the middle of an epoch, where a trainer that goes on would take another."""
    asked = {"save_steps": 1, "max_steps": 2, "lr_scheduler_type": "constant", **kept}
    whole = train(place, tmp_path / "out", **asked)
    expected = load_file(whole.adapter / "adapter_model.safetensors")
    (tmp_path / "out" / "training.json").unlink()
    shutil.rmtree(whole.adapter)
    resumed = train(place, tmp_path / "out", **asked).record
    assert (resumed.steps, resumed.resumed_from) == (2, 2)
    assert (resumed.tokens, resumed.losses, resumed.eval_losses) == (
        whole.record.tokens, whole.record.losses, whole.record.eval_losses,
    )  # fmt: skip
    got = load_file(whole.adapter / "adapter_model.safetensors")
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_a_failed_merge_leaves_the_adapter_and_says_what_to_do(place, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    out = tmp_path / "out"
    monkeypatch.setattr(sft, "run_bake", full)
    words = []
    for name, value in flags(place, out, merge_adapter_with_base=True).given.items():
        words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    assert exit_code("sft", *words) == 1
    message = capsys.readouterr().err
    assert "merge failed: OSError: [Errno 28] No space left on device" in message
    command = f"plait bake {out}/adapter --base-id {place}/base -o {out}/merged_model --force"
    assert command in message
    assert not (out / "merged_model").exists()
    assert logits(PeftModel.from_pretrained(base_model(place), out / "adapter")).isfinite().all()
    monkeypatch.undo()
    main_ok(command.split()[1:])
    merged = AutoModelForCausalLM.from_pretrained(out / "merged_model")
    assert torch.allclose(logits(merged), logits(PeftModel.from_pretrained(base_model(place), out / "adapter")), atol=1e-5)
    again = train(place, out, merge_adapter_with_base=True)
    assert not again.failures, "what the command made is taken up"


def test_training_that_fails_leaves_no_result(place, tmp_path, monkeypatch):
    from trl import SFTTrainer

    errors = [torch.OutOfMemoryError("tried to allocate 2 GiB."), OSError(28, "No space left on device")]

    def fail(*_, **__):
        raise errors.pop(0)

    monkeypatch.setattr(SFTTrainer, "training_step", fail)
    with pytest.raises(PlanError, match=r"tried to allocate 2 GiB. Give a smaller per_device_train_batch_size"):
        train(place, tmp_path / "out")
    with pytest.raises(OutputError, match=r"Free some space\. .*; the same command"):
        train(place, tmp_path / "out")
    assert not (tmp_path / "out" / "adapter").exists()
    assert not (tmp_path / "out" / "training.json").exists()
    monkeypatch.undo()
    assert train(place, tmp_path / "out").record.steps == 2


def test_best_model_at_the_end(place, tmp_path):
    """The weights written are those of the best checkpoint, not the last ones; best is here the worst, the first."""
    result = train(
        place, tmp_path / "out", max_steps=4, eval_strategy="steps", eval_steps=1, save_steps=1, test_split_size=0.25,
        load_best_model_at_end=True, greater_is_better=True,
    )  # fmt: skip
    losses = dict(result.record.eval_losses)
    best = max(losses, key=losses.__getitem__)
    assert best < 4
    kept = load_file(tmp_path / "out" / f"checkpoint-{best}" / "adapter_model.safetensors")
    written = load_file(result.adapter / "adapter_model.safetensors")
    assert all(torch.equal(kept[name], written[name]) for name in kept)


def test_a_checkpoint_may_be_named(place, tmp_path):
    first = train(place, tmp_path / "a", max_steps=4, save_steps=2)
    (tmp_path / "a" / "checkpoint-2").rename(tmp_path / "kept")
    again = train(place, tmp_path / "b", max_steps=4, resume_from_checkpoint=str(tmp_path / "kept"))
    assert (again.record.resumed_from, again.record.steps) == (2, 4)
    assert again.record.losses == first.record.losses
    with pytest.raises(RecipeError, match="nowhere is not a complete checkpoint"):
        plan_sft(flags(place, tmp_path / "c", resume_from_checkpoint=str(tmp_path / "nowhere")))


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors"])
def test_a_damaged_checkpoint_is_named(place, tmp_path, name):
    train(place, tmp_path / "a", max_steps=4, save_steps=2)
    checkpoint = (tmp_path / "a" / "checkpoint-2").rename(tmp_path / "kept")
    data = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(OutputError, match=f"^{checkpoint} cannot be continued from .*Delete it: the same command"):
        train(place, tmp_path / "b", max_steps=4, resume_from_checkpoint=str(checkpoint))
    assert not (tmp_path / "b" / "adapter").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("global_step", "2"),
        ("num_input_tokens_seen", None),
        ("log_history", {}),
        ("log_history", [{"step": 1, "loss": "x"}]),
        ("log_history", [{"loss": 1.0}]),
    ],
)
def test_a_state_that_no_trainer_wrote(tmp_path, name, value):
    state = {"global_step": 2, "num_input_tokens_seen": 3, "log_history": [{"step": 1, "loss": 0.5}]}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    assert checkpoint_step(tmp_path) == 2
    (tmp_path / "trainer_state.json").write_text(json.dumps(state | {name: value}))
    with pytest.raises(RecipeError, match=f"trainer_state.json: '{name}' must "):
        checkpoint_step(tmp_path)
