"""`plait verify --parity`: tiny real models, adapters by PEFT, logits compared."""

from __future__ import annotations

import json
import sys

import pytest
import torch

import plait
from plait.cli.main import main
from plait.verification.live import as_stored
from tests.command_line import exit_code

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore::UserWarning:peft")]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a bfloat16 base model, a fine-tune of it, two adapters and prompts."""
    from peft import LoraConfig, get_peft_model
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("parity")
    words = {f"w{i}": i for i in range(30)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=30, tie_word_embeddings=False, **SIZES)).to(torch.bfloat16)
    model.save_pretrained(folder / "base")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder / "base")
    for seed, targets in enumerate((["q_proj", "down_proj"], ["q_proj", "v_proj"])):
        torch.manual_seed(seed)
        base = LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        lora = get_peft_model(base, LoraConfig(r=2, lora_alpha=4, target_modules=targets, task_type="CAUSAL_LM"))
        with torch.no_grad():
            for name, parameter in lora.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape) * 0.3)
        lora.save_pretrained(folder / "ab"[seed])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape).to(torch.bfloat16) * 0.05)
    model.save_pretrained(folder / "tuned")
    (folder / "prompts.txt").write_text("w1 w2 w3\n\nw4 w5 w6 w7\n")
    return folder


def parity(folder, place, **settings):
    base = str(place / "base")
    return plait.verify(folder, rebuild=False, parity=place / "prompts.txt", base_model=base, **settings).parity


def rows(report):
    return {(row.what, row.dtype): row.overall for row in report.comparisons}


def test_a_linear_merge_is_both_adapters_active(place, tmp_path):
    merged = plait.merge({n: place / n for n in "ab"}, weights=[0.7, -0.4], scale=1.5, out=tmp_path / "out").folder
    report = parity(merged, place)
    assert report.reference == "the base model with the adapters active"
    found = rows(report)
    assert set(found) == {
        ("adapter, live result", "float32"),
        ("adapter, live result", "bfloat16"),
        ("rounding alone", "bfloat16"),
    }
    exact, rounded, rounding = found.values()
    assert exact.positions == 7
    assert exact.max_difference < 1e-5
    assert exact.top1 == 1
    assert rounded.max_difference > 1e-4, "in bfloat16 there is something to see"
    assert rounded.max_difference < 10 * rounding.max_difference


def test_a_wrong_adapter_is_seen(place, tmp_path):
    """The weights of the live result come from the lock; an adapter merged with others is another."""
    right = plait.merge({n: place / n for n in "ab"}, weights=[0.7, -0.4], out=tmp_path / "right").folder
    wrong = plait.merge({n: place / n for n in "ab"}, weights=[0.4, -0.7], out=tmp_path / "wrong").folder
    (right / "adapter_model.safetensors").write_bytes((wrong / "adapter_model.safetensors").read_bytes())
    (report,) = [c for c in parity(right, place).comparisons if c.dtype == "float32"]
    assert report.overall.max_difference > 1e-2
    assert report.worst.max_difference == report.overall.max_difference
    assert report.worst_prompt in (1, 2)


def test_policies_and_modules_left_out_are_part_of_the_live_result(place, tmp_path):
    merged = plait.merge(
        {n: place / n for n in "ab"},
        merge_mode="common",
        weights={"policy": "per_layer", "default": 1.0, "layers": {"1": {"a": 0.3, "b": 2.0}}},
        out=tmp_path / "out",
    ).folder
    assert rows(parity(merged, place))["adapter, live result", "float32"].max_difference < 1e-5


@pytest.mark.parametrize("rank", [16, 1])
def test_a_merge_that_is_not_linear_is_compared_with_the_dense_one(place, tmp_path, rank):
    merged = plait.merge({n: place / n for n in "ab"}, method="ties", density=0.5, rank=rank, out=tmp_path / "out").folder
    report = parity(merged, place)
    assert report.reference == "the base model with the dense merge added"
    difference = rows(report)["adapter, live result", "float32"].max_difference
    assert (difference < 1e-4) == (rank == 16), "truncation shows"


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_a_baked_model(place, tmp_path, method):
    adapters = {n: place / n for n in "ab"}
    baked = plait.bake(adapters, base_model=str(place / "base"), method=method, out=tmp_path / "baked").folder
    found = rows(parity(baked, place))
    exact, rounding = found["baked model, live result", "float32"], found["rounding alone", "bfloat16"]
    assert 0 < exact.max_difference < 3 * rounding.max_difference, "the weights were rounded once"
    wide = plait.bake(adapters, base_model=str(place / "base"), method=method, dtype="float32", out=tmp_path / "wide").folder
    (row,) = parity(wide, place).comparisons
    assert row.overall.max_difference < 1e-5, "not rounded to bfloat16, it is the live result"


def test_an_extraction_is_compared_with_the_fine_tune(place, tmp_path):
    out = plait.extract(
        place / "base", place / "tuned", rank=30, modules_to_save=True, embeddings=False, out=tmp_path / "out"
    ).folder
    report = parity(out, place)
    assert report.reference == "the fine-tune"
    assert rows(report)["adapter, live result", "float32"].max_difference < 1e-4


def test_prompts(place, tmp_path):
    from plait.verification.parity import read_prompts

    lines = tmp_path / "p.jsonl"
    lines.write_text('{"prompt": "w1 w2", "answer": "w3"}\n\n{"prompt": "w3"}\n')
    assert read_prompts(lines) == ["w1 w2", "w3"]
    assert read_prompts(place / "prompts.txt") == ["w1 w2 w3", "w4 w5 w6 w7"]
    lines.write_text('{"prompt": "w1"}\n{"text": "w2"}\n')
    with pytest.raises(plait.RecipeError, match='line 2: expected a JSON object with a text under "prompt"'):
        read_prompts(lines)
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(plait.RecipeError, match="there are no prompts"):
        read_prompts(tmp_path / "empty.txt")
    with pytest.raises(plait.RecipeError, match=r"nowhere\.txt: No such file or directory. Give a file of prompts"):
        read_prompts(tmp_path / "nowhere.txt")


def test_adapters_of_other_programs_are_run_by_peft(place, tmp_path):
    """Result and sources are converted for it: the logits are those of the live merge."""
    for name in "ab":
        plait.convert(place / name, to="mlx", base_model=str(place / "base"), out=tmp_path / name)
    merged = plait.merge(
        [tmp_path / n for n in "ab"], weights=[0.7, -0.4], base_model=str(place / "base"), out=tmp_path / "out"
    ).folder
    found = rows(parity(merged, place))
    assert found["adapter, live result", "float32"].max_difference < 1e-5
    assert found["rounding alone", "bfloat16"].max_difference > 1e-4


def test_what_cannot_be_run(place, tmp_path, monkeypatch):
    dense = plait.merge({n: place / n for n in "ab"}, kind="delta", out=tmp_path / "dense").folder
    with pytest.raises(plait.PlanError, match="bake it first"):
        parity(dense, place)
    merged = plait.merge({"a": place / "a"}, out=tmp_path / "out").folder
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(plait.MissingPackageError, match=r"needs the package 'peft': python -m pip install 'plait\[parity\]'"):
        parity(merged, place)


def test_the_command_line(place, tmp_path, capsys):
    merged = plait.merge({"a": place / "a"}, out=tmp_path / "out").folder
    prompts = ["--parity", str(place / "prompts.txt"), "--base-id", str(place / "base"), "--no-rebuild"]
    assert exit_code("verify", str(merged), *prompts) == 0
    message = " ".join(capsys.readouterr().out.split())
    assert "parity 2 prompts, 7 positions; live result: the base model with the adapters active" in message
    assert "rounding alone: the live result against itself in float32" in message
    with pytest.raises(SystemExit):
        main(["verify", str(merged), *prompts, "--json"])
    report = json.loads(capsys.readouterr().out)["parity"]
    assert [c["dtype"] for c in report["comparisons"]] == ["float32", "bfloat16", "bfloat16"]


def test_square_experts_that_are_stored_transposed(place, tmp_path):
    """Their shape does not tell; the reference is turned as the model's code says, and the bake agrees with it."""
    import shutil

    import transformers as tf

    from tests.baking_models import make_adapter

    sizes = {**SIZES, "intermediate_size": 16, "num_key_value_heads": 2, "head_dim": 8}
    config = tf.GptOssConfig(
        vocab_size=30, num_local_experts=3, num_experts_per_tok=2, max_position_embeddings=32, pad_token_id=0, eos_token_id=1,
        tie_word_embeddings=False, **sizes,
    )  # fmt: skip
    torch.manual_seed(0)
    tf.GptOssForCausalLM(config).save_pretrained(tmp_path / "base")
    for path in (place / "base").glob("tokenizer*"):
        shutil.copy(path, tmp_path / "base")
    targets = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"], "task_type": "CAUSAL_LM"}
    adapter = make_adapter(tmp_path / "base", tmp_path / "a", 0, tf.AutoModelForCausalLM, **targets)
    baked = plait.bake([adapter], base=tmp_path / "base", out=tmp_path / "out").folder
    report = plait.verify(baked, rebuild=False, parity=place / "prompts.txt").parity
    assert report.comparisons[0].overall.max_difference < 1e-5


def test_the_delta_of_a_grouped_convolution_is_cut_to_its_groups():
    delta = torch.zeros(4, 6, 3)
    own = torch.randn(4, 3, 3)
    delta[:2, :3], delta[2:, 3:] = own[:2], own[2:]
    assert torch.equal(as_stored(delta, own.shape, transposed=False), own)
    plain = torch.randn(4, 6, 3)
    assert torch.equal(as_stored(plain, plain.shape, transposed=False), plain)
    assert torch.equal(as_stored(plain, torch.Size((4, 3, 6)), transposed=False), plain.mT)
