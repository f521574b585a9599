"""`plait sft` on small models: what is learned, written, resumed, refused; uploads are in `test_sft_push.py`."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from plait.errors import PlaitError
from plait.training.encoding import IGNORED
from plait.training.job import LoraSettings, TrainingData, TrainingJob
from plait.training.running import run_job
from plait.training.sft import plan_sft, run_sft
from tests.chat_models import byte_tokenizer, write_rows
from tests.sft_runs import base_model, files, flags, kept_trainers, logits, make_place, train

#: warnings of TRL and transformers, about themselves
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("sft"))


@pytest.fixture
def trainers(monkeypatch):
    return kept_trainers(monkeypatch)


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
        quick = {"max_steps": 2, "logging_steps": 1, "disable_tqdm": True, "learning_rate": 0.0, "save_strategy": "no"}
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
