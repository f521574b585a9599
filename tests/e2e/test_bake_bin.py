"""A base model whose weights are stored as `.bin`: baked, trained on and described as one of safetensors is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

import plait
from plait.errors import PlaitError
from tests.baking_models import adapter_output, make_adapter, make_model, run, save_model
from tests.chat_models import questions, save_chat_model, write_rows
from tests.command_line import exit_code

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")

_LM, _SEQ = tf.AutoModelForCausalLM, tf.AutoModelForSeq2SeqLM
CASES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "gpt2, tied": ("gpt2", _LM, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "llama tied, embedding alone": ("llama tied", _LM, {"target_modules": ["q_proj", "embed_tokens"]}),
    "llama tied, token rows": ("llama tied", _LM, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 7]}),
    "llama": ("llama", _LM, {"target_modules": "all-linear"}),
    "llama, DoRA": ("llama", _LM, {"target_modules": ["q_proj"], "use_dora": True}),
    "t5, four uses of one tensor": ("t5", _SEQ, {"target_modules": ["q", "v"]}),
}


def as_bin(base: Path, folder: Path, state: dict[str, torch.Tensor], shards: int = 1) -> Path:
    """Copy a base model with its weights as `torch.save` writes them, tied tensors under every name that the model has."""
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return folder
    names = [f"pytorch_model-{i:05}-of-{shards:05}.bin" for i in range(1, shards + 1)]
    home = {key: names[i * shards // len(state)] for i, key in enumerate(state)}
    for name in names:
        torch.save({k: v for k, v in state.items() if home[k] == name}, folder / name)
    size = sum(v.nbytes for v in state.values())
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": home}))
    return folder


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("case", CASES)
def test_a_bake_equals_that_of_the_converted_base(tmp_path, case):
    kind, auto, config = CASES[case]
    base = save_model(kind, tmp_path / "base")
    pickled = as_bin(base, tmp_path / "bin", make_model(kind).state_dict())
    adapter = make_adapter(base, tmp_path / "a", 1, auto, **config)
    one = plait.bake({"a": adapter}, base=base, out=tmp_path / "one")
    two = plait.bake({"a": adapter}, base=pickled, out=tmp_path / "two")

    expected, found = all_tensors(one.folder), all_tensors(two.folder)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    model, report = auto.from_pretrained(two.folder, output_loading_info=True, dtype=torch.float32)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    torch.testing.assert_close(run(model.eval()), adapter_output(base, {"a": adapter}, {"a": 1.0}, auto), atol=1e-4, rtol=1e-4)
    assert (two.folder / "config.json").read_text() == (one.folder / "config.json").read_text()
    assert "pytorch_model.bin; safetensors are written" in " ".join(two.record.notes)
    assert list(two.folder.glob("*.bin")) == []
    assert plait.verify(two.folder).ok


def test_shards_keep_their_places_under_names_of_safetensors(tmp_path):
    base = save_model("llama", tmp_path / "base")
    state = make_model("llama").state_dict()
    pickled = as_bin(base, tmp_path / "bin", state, shards=3)
    adapter = make_adapter(base, tmp_path / "a", 1, _LM, target_modules=["q_proj", "down_proj"])
    baked = plait.bake({"a": adapter}, base=pickled, out=tmp_path / "baked").folder

    names = [f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(p.name for p in baked.iterdir() if p.suffix != ".json" and "model-" in p.name) == names
    index = json.loads((baked / "model.safetensors.index.json").read_text())
    old = json.loads((pickled / "pytorch_model.bin.index.json").read_text())["weight_map"]
    assert index["weight_map"] == {k: v.replace("pytorch_", "").replace(".bin", ".safetensors") for k, v in old.items()}
    assert not (baked / "pytorch_model.bin.index.json").exists()
    lock = json.loads((baked / "plait.lock").read_text())
    assert sorted(lock["base"]["files"]) == sorted(p.name for p in pickled.glob("*.bin"))
    whole = plait.bake({"a": adapter}, base=base, out=tmp_path / "whole").folder
    assert all(torch.equal(all_tensors(baked)[k], v) for k, v in all_tensors(whole).items())


def test_values_out_of_order_are_put_in_order(tmp_path):
    base = save_model("llama", tmp_path / "base")
    state = make_model("llama").state_dict()
    state = {k: v.T.contiguous().T if v.dim() == 2 else v for k, v in state.items()}
    pickled = as_bin(base, tmp_path / "bin", state)
    adapter = make_adapter(base, tmp_path / "a", 1, _LM, target_modules=["q_proj"])
    one = plait.bake({"a": adapter}, base=base, out=tmp_path / "one").folder
    two = plait.bake({"a": adapter}, base=pickled, out=tmp_path / "two").folder
    assert all(torch.equal(all_tensors(two)[k], v) for k, v in all_tensors(one).items())


def test_what_is_no_tensor_is_refused_before_anything_is_written(tmp_path):
    base = save_model("llama", tmp_path / "base")
    pickled = as_bin(base, tmp_path / "bin", {**make_model("llama").state_dict(), "odd": Path("x")})
    adapter = make_adapter(base, tmp_path / "a", 1, _LM, target_modules=["q_proj"])
    with pytest.raises(PlaitError, match=r"pytorch_model.bin: .*'odd' is made by"):
        plait.bake({"a": adapter}, base=pickled, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_training_and_merging_into_such_a_base(tmp_path, capsys):
    """Train, then merge into the base, with the flags that TRL's users know."""
    save_chat_model(tmp_path / "base")
    state = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).state_dict()
    pickled = as_bin(tmp_path / "base", tmp_path / "bin", state)
    write_rows(tmp_path / "rows.jsonl", questions())
    command = [
        "sft", "--model_name_or_path", str(pickled), "--dataset_name_or_path", str(tmp_path / "rows.jsonl"), "--use_peft",
        "--lora_r", "4", "--max_steps", "2", "--per_device_train_batch_size", "2", "--output_dir", str(tmp_path / "run"),
        "--merge_adapter_with_base", "--disable_tqdm", "True",
    ]  # fmt: skip
    assert exit_code(*command) == 0, capsys.readouterr().err
    merged = tmp_path / "run" / "merged_model"
    assert (merged / "model.safetensors").is_file()
    expected = adapter_output(tmp_path / "base", {"a": tmp_path / "run" / "adapter"}, {"a": 1.0}, _LM)
    torch.testing.assert_close(run(_LM.from_pretrained(merged, dtype=torch.float32).eval()), expected, atol=1e-4, rtol=1e-4)
