"""`plait sft` on small models: what is learned, written, resumed, refused; uploads are in `test_sft_push.py`."""

from __future__ import annotations

import fcntl
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from plait import commands
from plait.errors import OutputError, PlaitError, PlanError, RecipeError
from plait.results import disk
from plait.training import causal, running, sft
from plait.training.arguments import job_of, read_flags, read_keywords
from plait.training.encoding import IGNORED
from plait.training.folder import checkpoint_step
from plait.training.job import LoraSettings, TrainingData, TrainingJob
from plait.training.running import run_job
from plait.training.sft import plan_sft, run_sft
from tests.chat_models import byte_tokenizer, questions, save_chat_model, write_rows
from tests.command_line import exit_code
from tests.warm import PLAIT, killed_at_a_checkpoint, run_forked

#: warnings of TRL and transformers, about themselves
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

QUICK = {"max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1, "disable_tqdm": True, "learning_rate": 1e-2}
LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_target_modules": "all-linear"}
IDS = torch.tensor([[10, 20, 30, 40, 50, 60]])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    save_chat_model(folder / "base")
    write_rows(folder / "rows.jsonl", questions())
    return folder


def flags(place, out, **changes):
    given = {
        "model_name_or_path": str(place / "base"), "dataset_name_or_path": str(place / "rows.jsonl"), "output_dir": str(out),
        **QUICK, **LORA, **changes,
    }  # fmt: skip
    return read_keywords(given)


def train(place, out, **changes):
    return run_sft(plan_sft(flags(place, out, **changes)))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def base_model(place):
    return AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32)


def files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def trainers(monkeypatch):
    """Keep the trainers that are made."""
    made = []
    make = causal.make_trainer
    monkeypatch.setattr(causal, "make_trainer", lambda *a, **k: made.append(make(*a, **k)) or made[-1])
    return made


# What is learned.


@pytest.mark.parametrize("pad", ["", "<|im_end|>", "<|pad|>"], ids=["no pad", "pad is end", "pad"])
def test_only_answers_and_their_ends_carry_loss_in_the_batches_of_the_trainer(place, tmp_path, trainers, pad):
    shutil.copytree(place / "base", tmp_path / "base")
    byte_tokenizer(**({"pad_token": pad} if pad else {})).save_pretrained(tmp_path / "base")
    turns = [("user", "Hi?"), ("assistant", "Yes."), ("user", "And now, for longer?"), ("assistant", "Still.")]
    rows = [
        {"messages": [{"role": r, "content": c} for r, c in turns]},
        {"messages": [{"role": r, "content": c} for r, c in turns[:2]]},
    ]
    write_rows(tmp_path / "chats.jsonl", rows)
    train(
        place, tmp_path / "out", model_name_or_path=str(tmp_path / "base"), dataset_name_or_path=str(tmp_path / "chats.jsonl")
    )
    (batch,) = trainers[0].get_train_dataloader()
    tokens = AutoTokenizer.from_pretrained(tmp_path / "base")
    learned = {tokens.decode(labels[labels != IGNORED]) for labels in batch["labels"]}
    assert learned == {"Yes.<|im_end|>Still.<|im_end|>", "Yes.<|im_end|>"}
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()
    assert (batch["labels"][batch["labels"] != IGNORED] == batch["input_ids"][batch["labels"] != IGNORED]).all()


def test_an_adapter_learns_the_answers(place, tmp_path):
    result = train(place, tmp_path / "out", max_steps=40)
    losses = [loss for _, loss in result.record.losses]
    assert losses[-1] < losses[0] / 2
    assert (result.record.steps, result.record.examples, len(losses)) == (40, 12, 40)


# What is written.

KINDS = {
    "LoRA": {"lora_target_modules": ["q_proj", "v_proj"]},
    "all-linear": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "bfloat16": {"dtype": "bfloat16", "bf16": True},
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_adapter_reloads_and_the_merged_model_is_adapter_on_base(place, tmp_path, trainers, kind):
    result = train(place, tmp_path / "out", max_steps=5, merge_adapter_with_base=True, **kind)
    assert not result.failures
    reloaded = PeftModel.from_pretrained(base_model(place), result.adapter)
    adapted = logits(reloaded)
    assert (adapted - logits(base_model(place))).abs().max() > 1e-3
    if "dtype" not in kind:
        assert torch.equal(adapted, logits(trainers[0].model.cpu()))
    merged = AutoModelForCausalLM.from_pretrained(result.merged_model, dtype=torch.float32)
    assert torch.allclose(logits(merged), adapted, atol=1e-5)
    for folder in (result.adapter, result.final_model, result.merged_model):
        assert AutoTokenizer.from_pretrained(folder).chat_template
        assert {oct(p.stat().st_mode & 0o444) for p in folder.iterdir()} == {"0o444"}
    assert (
        load_file(result.final_model / "adapter_model.safetensors").keys()
        == load_file(result.adapter / "adapter_model.safetensors").keys()
    )


def test_a_full_fine_tune_is_a_whole_model(place, tmp_path, trainers):
    changes = dict.fromkeys(("use_peft", "lora_r", "lora_alpha", "lora_target_modules"))
    result = train(place, tmp_path / "out", **changes)
    assert result.adapter is None
    assert not (tmp_path / "out" / "adapter").exists()
    model = AutoModelForCausalLM.from_pretrained(result.final_model)
    assert torch.equal(logits(model), logits(trainers[0].model))
    assert not torch.equal(logits(model), logits(base_model(place)))
    assert result.record.trainable == model.num_parameters()


def test_the_record_says_what_happened(place, tmp_path):
    result = train(place, tmp_path / "out", test_split_size=0.25, eval_strategy="steps", eval_steps=1, max_length=50)
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    assert record == result.record.model_dump(mode="json")
    assert (record["examples"], record["steps"], record["folder"]) == (9, 2, "adapter")
    assert [step for step, _ in record["eval_losses"]] == [1, 2]
    assert record["tokens"] > 0
    assert record["versions"]["trl"]
    names = {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "plait.lock",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert files(result.adapter) == names | {"chat_template.jinja"}
    lock = json.loads((result.adapter / "plait.lock").read_text())
    assert (lock["kind"], lock["recipe"]["seed"]) == ("train", 42)
    card = (result.adapter / "README.md").read_text()
    assert "rows.jsonl, 9 examples; loss on the answers only" in card
    assert str(place) not in card


def test_the_card_says_that_plain_text_is_learned_whole(place, tmp_path):
    rows = write_rows(tmp_path / "text.jsonl", [{"text": "some words"}] * 4)
    card = (train(place, tmp_path / "out", dataset_name_or_path=str(rows)).adapter / "README.md").read_text()
    assert "text.jsonl, 4 examples; loss on every token." in card


def test_trained_adapters_are_merged_like_any_other(place, tmp_path):
    import plait

    a = train(place, tmp_path / "a").adapter
    b = train(place, tmp_path / "b", seed=1).adapter
    assert not torch.equal(*(next(iter(load_file(f / "adapter_model.safetensors").values())) for f in (a, b)))
    merged = plait.merge({"a": a, "b": b}, out=tmp_path / "merged").folder
    assert logits(PeftModel.from_pretrained(base_model(place), merged)).isfinite().all()
    found = plait.verify(a)
    assert all(file.state == "equal" for file in found.files)
    assert "repeated by training again" in found.not_rebuilt


def test_a_is_drawn_from_its_own_seed(place, tmp_path):
    """So that phases may differ in A and in nothing else, or in everything else."""
    base, rows = str(place / "base"), TrainingData(place=str(place / "rows.jsonl"))

    def drawn(name, init_seed, seed):
        lora = LoraSettings(r=2, init_seed=init_seed, dropout=0.5)
        quick = {"max_steps": 2, "logging_steps": 1, "disable_tqdm": True, "learning_rate": 0.0}
        job = TrainingJob(base=base, data=rows, lora=lora, seed=seed, arguments=quick)
        losses = run_job(job, tmp_path / name).losses
        tensors = load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
        return losses, torch.cat([t.flatten() for n, t in sorted(tensors.items()) if "lora_A" in n])

    losses, a = drawn("1", 1, 5)
    other_losses, same_a = drawn("2", 1, 6)
    same_losses, other_a = drawn("3", 2, 5)
    assert torch.equal(a, same_a)
    assert losses != other_losses, "other order of the data"
    assert not torch.equal(a, other_a)
    assert losses == same_losses, "the same order of the data"


# Saying it: the command line, YAML, Python.

DOCUMENT = [
    "--use_peft", "--merge_adapter_with_base", "--lora_r", "16", "--lora_alpha", "32", "--lora_dropout", "0.1",
    "--num_train_epochs", "1", "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2",
    "--learning_rate", "2e-4", "--warmup_ratio", "0.03", "--logging_steps", "1", "--save_steps", "500", "--eval_steps", "500",
]  # fmt: skip


def test_the_documented_command_line(place, tmp_path):
    """Every flag of the document, in a process of its own."""
    out = tmp_path / "out"
    words = ["--model_name_or_path", "base", "--dataset_name_or_path", "rows.jsonl", "--output_dir", str(out), *DOCUMENT]
    done = run_forked(PLAIT, "sft", *words, "--json", folder=place)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["failures"] == []
    assert found["record"]["job"]["lora"]["r"] == 16
    assert found["record"]["job"]["arguments"]["warmup_ratio"] == 0.03
    assert found["record"]["steps"] == 2
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (16, 32, 0.1)
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert (
        files(out / "final_model") == files(out / "adapter") >= {"adapter_config.json", "adapter_model.safetensors", *tokenizer}
    )
    assert files(out / "merged_model") >= {"config.json", "model.safetensors", *tokenizer}
    assert "first example; the loss is on the text in ⟦ ⟧:" in done.stderr
    assert "<|im_start|>user\nWhat is 0 + 0?<|im_end|>\n<|im_start|>assistant\n⟦0<|im_end|>⟧" in done.stderr


def test_yaml_and_python_say_the_same(place, tmp_path):
    message = {
        "model_name_or_path": str(place / "base"), "dataset_name_or_path": str(place / "rows.jsonl"), "use_peft": True,
        "learning_rate": "1e-4", "lora_target_modules": ["q_proj", "v_proj"], "packing": False, "max_steps": 3,
        "lr_scheduler_kwargs": {"num_cycles": 2},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**message, "env": {"PLAIT_TEST_SAID": 1}, "max_steps": 9}))
    words = [
        "--model_name_or_path",
        message["model_name_or_path"],
        "--dataset_name",
        message["dataset_name_or_path"],
        "--use_peft",
    ]
    words += ["--learning_rate", "0.0001", "--lora_target_modules", "q_proj", "v_proj", "--packing", "False"]
    words += ["--max_steps", "3", "--lr_scheduler_kwargs", '{"num_cycles": 2}']
    spelled = job_of(read_flags(words))
    assert spelled.arguments["learning_rate"] == 1e-4
    assert job_of(read_flags(["--config", str(tmp_path / "run.yaml"), "--max_steps", "3"])) == spelled
    assert job_of(read_keywords(message)) == spelled
    import os

    assert os.environ.pop("PLAIT_TEST_SAID") == "1"


def test_every_option_of_trl_is_a_flag():
    from dataclasses import fields

    from trl import ModelConfig, ScriptArguments, SFTConfig

    from plait.training.arguments import all_flags

    known = all_flags()
    for kind in (SFTConfig, ModelConfig, ScriptArguments):
        for field in fields(kind):
            assert f"--{field.name}" in known


def test_every_flag_and_format_of_the_documents_is_there():
    from typing import get_args

    from plait.cli.sft import sft as command
    from plait.training.arguments import all_flags
    from plait.training.formats import FormatName

    known = set(re.findall(r"--\w+", all_flags())) | {"--config", "--help_all"}
    page = (Path(__file__).parents[2] / "docs" / "sft.md").read_text()
    assert set(re.findall(r"--[a-z]\w+", page)) <= known
    assert set(re.findall(r"--[a-z]\w+", command.__doc__)) <= known
    assert all(f"| `{name}` |" in page for name in get_args(FormatName) if name != "auto")


def test_unknown_flags_and_wrong_values(tmp_path):
    with pytest.raises(RecipeError, match=r"--lora_alph: there is no such flag. Did you mean '--lora_alpha'\?"):
        read_flags(["--lora_alph", "4"])
    with pytest.raises(RecipeError, match=r"argument --max_steps\S*: invalid int value: 'many'"):
        read_flags(["--max_steps", "many"])
    with pytest.raises(RecipeError, match=r"argument --dataset_format\S*: invalid choice"):
        read_flags(["--dataset_format", "csv"])
    with pytest.raises(RecipeError, match=r"no\.yaml: No such file or directory\. Give --config a YAML file\."):
        read_flags(["--config", str(tmp_path / "no.yaml")])
    (tmp_path / "bad.yaml").write_text("learning_rat: 1\n")
    with pytest.raises(RecipeError, match=r"--learning_rat: there is no such flag. Did you mean '--learning_rate'\?"):
        read_flags(["--config", str(tmp_path / "bad.yaml")])


def test_a_dry_run_shows_everything_and_writes_nothing(place, tmp_path, capsys):
    out = tmp_path / "out"
    rows = write_rows(
        tmp_path / "rows.jsonl", [*questions(3), {"question": "Q" * 200, "answer": "A"}, {"question": "Q", "answer": ""}]
    )
    words = ["--model_name_or_path", str(place / "base"), "--dataset_name_or_path", str(rows), "--output_dir", str(out)]
    main_ok(["sft", *words, "--use_peft", "--max_length", "100", "--dry_run", "--json"])
    captured = capsys.readouterr()
    plan = json.loads(captured.out)
    assert plan["example"] == {
        "given": "<|im_start|>user\nWhat is 0 + 0?<|im_end|>\n<|im_start|>assistant\n", "learnt": "0<|im_end|>",
    }  # fmt: skip
    assert (plan["examples"], plan["left_out"]) == (3, 1)
    assert "question_answer (question → answer)" in plan["data"]
    assert "1 of 5 rows have no answer and are left out" in plan["notes"][0]
    assert "1 example is longer than max_length 100" in plan["notes"][1]
    assert plan["estimate"]["trainable"] > 0
    assert "note: " in captured.err
    assert not out.exists()


def main_ok(words):
    assert exit_code(*words) == 0


# What is refused.

CONTRADICTIONS = {
    "merge without adapter": (
        {"use_peft": None, "lora_r": None, "lora_alpha": None, "lora_target_modules": None, "merge_adapter_with_base": True},
        "--merge_adapter_with_base without --use_peft",
    ),
    "lora flags without adapter": ({"use_peft": None}, "--lora_r, --lora_alpha, --lora_target_modules without --use_peft"),
    "upload of a merged model alone": (
        {"upload_merged_model": True},
        "--upload_merged_model needs --merge_adapter_with_base and --push_to_hub as well",
    ),
    "push to nowhere": ({"push_to_hub": True}, "--push_to_hub needs to know where: --hub_repo_id org/name"),
    "push to a malformed place": ({"push_to_hub": True, "hub_repo_id": "a/b/c"}, "'a/b/c' cannot be a repository"),
    "a place and no push": ({"hub_repo_id": "org/x"}, "--hub_repo_id org/x without --push_to_hub"),
    "save steps between eval steps": (
        {"load_best_model_at_end": True, "eval_strategy": "steps", "save_steps": 100, "eval_steps": 70, "test_split_size": 0.2},
        "--save_steps 100 is not a multiple of --eval_steps 70, so that some checkpoints would have no loss. "
        "Give --save_steps 70",
    ),
    "best without evaluation": ({"load_best_model_at_end": True}, "--load_best_model_at_end needs --eval_strategy"),
    "best with two rhythms": (
        {"load_best_model_at_end": True, "eval_strategy": "epoch", "test_split_size": 0.2},
        "--save_strategy is steps and --eval_strategy epoch; they must be the same",
    ),
    "evaluation without rows": ({"eval_strategy": "steps"}, "is one file and has no split 'test'"),
    "rows without evaluation": ({"test_split_size": 0.1}, "--test_split_size without --eval_strategy"),
    "two kinds of rows": (
        {"test_split_size": 0.1, "eval_dataset_name_or_path": "x", "eval_strategy": "steps"},
        "--eval_dataset_name_or_path and --test_split_size: give one of them",
    ),
    "no rows wanted": ({"dataset_limit": 0}, "--dataset_limit 0: Input should be greater than 0"),
    "a cut at the beginning": ({"truncation_mode": "keep_end"}, "long examples always lose their end"),
    "a rank of nothing": ({"lora_r": 0}, "--lora_r 0: Input should be greater than 0"),
    "a tracker that is not here": ({"report_to": ["swanlab"]}, "--report_to swanlab needs the package swanlab"),
    "streaming": ({"dataset_streaming": True}, "plait sft reads all rows before training"),
    "both precisions": ({"fp16": True, "bf16": True}, "SFTConfig: At most one of fp16 and bf16 can be True"),
    "no such layers": ({"lora_target_modules": ["q_prj"]}, "cannot be trained so: Target modules"),
    "no such end": ({"eos_token": "<nothing>"}, "eos_token '<nothing>' is not in the tokenizer's vocabulary"),
    "no such template": ({"chat_template_path": "./no.jinja"}, "chat_template_path: ./no.jinja is not a file with a template"),
    "no rows to measure on": ({"eval_strategy": "steps"}, "has no split 'test'; a folder with test.jsonl has. Name others"),
    "no model": ({"model_name_or_path": None}, "--model_name_or_path is missing"),
    "another model": ({"model_name_or_path": "./nowhere"}, "model_name_or_path: './nowhere': there is no folder"),
    "a long system prompt in plain text": (
        {"dataset_name_or_path": "TEXT", "system_prompt": "Be brief."},
        "a system prompt has no place in plain text",
    ),
    "answers of plain text": (
        {"dataset_name_or_path": "TEXT", "assistant_only_loss": True},
        "rows of plain text have no answer",
    ),
    "an unknown format": ({"dataset_name_or_path": "ODD"}, "the columns that every row has are left, right"),
    "no rows": ({"dataset_name_or_path": "EMPTY"}, "there are no rows"),
    "examples that are all too long": ({"max_length": 3}, "no example is left"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_what_is_refused_before_training(place, tmp_path, changes, message):
    odd = {
        "TEXT": write_rows(tmp_path / "text.jsonl", [{"text": "some"}]),
        "ODD": write_rows(tmp_path / "odd.jsonl", [{"left": "a", "right": "b"}]),
        "EMPTY": write_rows(tmp_path / "empty.jsonl", []),
    }
    (tmp_path / "empty.jsonl").write_text("")
    changes = {k: str(odd[v]) if v in tuple(odd) else v for k, v in changes.items()}
    with pytest.raises(RecipeError) as caught:
        plan_sft(flags(place, tmp_path / "out", **changes))
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_everything_is_refused_at_once_with_exit_code_2(place, tmp_path, capsys):
    words = ["--model_name_or_path", str(place / "base"), "--dataset_name_or_path", str(place / "no.jsonl")]
    words += ["--merge_adapter_with_base", "--push_to_hub", "--upload_merged_model", "--output_dir", str(place)]
    assert exit_code("sft", *words) == 2
    message = capsys.readouterr().err
    assert "plait sft cannot begin: 4 problems" in message
    for problem in (
        "without --use_peft",
        "needs to know where",
        "no.jsonl: there is no such file",
        "which no run of plait wrote",
    ):
        assert problem in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_quantized_training_is_refused_without_cuda(place, tmp_path):
    with pytest.raises(RecipeError, match=r"--load_in_4bit: quantized training \(QLoRA\) needs a CUDA device"):
        plan_sft(flags(place, tmp_path / "out", load_in_4bit=True))
    with pytest.raises(RecipeError, match="--load_in_4bit without --use_peft"):
        plan_sft(flags(place, tmp_path / "out", load_in_4bit=True, **dict.fromkeys(LORA)))


def test_a_disk_that_is_too_small(place, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(RecipeError, match=r"about 0.00 GB are needed \(1 checkpoints among them\)"):
        plan_sft(flags(place, tmp_path / "out"))


def test_a_quantized_base_is_not_merged_into(place, tmp_path):
    shutil.copytree(place / "base", tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(RecipeError, match=r"the base model is quantized \(gptq"):
        plan_sft(flags(place, tmp_path / "out", model_name_or_path=str(tmp_path / "base"), merge_adapter_with_base=True))


# The folder of a run.


def test_what_is_left_out_of_the_rows_held_out_is_told(place, tmp_path):
    held = [*questions(3), {"question": "Q" * 200, "answer": "A"}, {"question": "Q", "answer": ""}]
    rows = write_rows(tmp_path / "held.jsonl", held)
    measured = {"eval_dataset_name_or_path": str(rows), "eval_strategy": "steps", "max_length": 100}
    unanswered, long = plan_sft(flags(place, tmp_path / "out", **measured)).notes
    assert unanswered.startswith("held out: ")
    assert "1 of 5 rows have no answer" in unanswered
    assert long.startswith("held out: 1 example is longer than max_length 100")


def test_the_same_command_again_does_nothing_twice(place, tmp_path, trainers, monkeypatch):
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


# A merge that fails.


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


def test_packing_and_chat_templates_from_elsewhere(place, tmp_path):
    (tmp_path / "short.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    plan = plan_sft(flags(place, tmp_path / "out", chat_template_path=str(tmp_path / "short.jinja")))
    assert plan.example == ("[user]What is 0 + 0?<|im_end|>[assistant]", "0<|im_end|>")
    result = run_sft(plan)
    assert AutoTokenizer.from_pretrained(result.adapter).chat_template.startswith("{% for m in messages %}[")
    packed = train(place, tmp_path / "packed", packing=True, packing_strategy="wrapped", max_length=64)
    assert packed.record.steps == 2


def test_python_says_the_same(place, tmp_path):
    import plait

    given = {k: v for k, v in flags(place, tmp_path / "out").given.items()}
    result = plait.sft(**given)
    assert result.adapter == tmp_path / "out" / "adapter"
    with pytest.raises(PlaitError, match="there is no such flag"):
        plait.sft(lora_rank=3)
