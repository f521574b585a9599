"""`plait sft`: its flags, documents and plans, and what is refused before training."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from plait.commands.sft import SftOrder
from plait.errors import PlaitError, RecipeError
from plait.results import disk
from plait.training.arguments import job_of, read_flags, read_keywords
from plait.training.sft import plan_sft
from tests.chat_models import questions, write_rows
from tests.command_line import exit_code
from tests.sft_runs import LORA, files, flags, main_ok, make_place
from tests.warm import PLAIT, run_forked

#: warnings of TRL and transformers, about themselves
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("sft"))


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
    config = tmp_path / "web.yaml"
    config.write_text("model_name_or_path: https://x.y/z\ndataset_name: ./rows.jsonl\n")
    with pytest.raises(PlaitError, match="is a web address") as refused:
        SftOrder(["--config", str(config)]).plan()
    assert refused.value.__notes__ == [f"Flags were also read from --config {config}."]


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


def test_what_is_left_out_of_the_rows_held_out_is_told(place, tmp_path):
    held = [*questions(3), {"question": "Q" * 200, "answer": "A"}, {"question": "Q", "answer": ""}]
    rows = write_rows(tmp_path / "held.jsonl", held)
    measured = {"eval_dataset_name_or_path": str(rows), "eval_strategy": "steps", "max_length": 100}
    unanswered, long = plan_sft(flags(place, tmp_path / "out", **measured)).notes
    assert unanswered.startswith("held out: ")
    assert "1 of 5 rows have no answer" in unanswered
    assert long.startswith("held out: 1 example is longer than max_length 100")
