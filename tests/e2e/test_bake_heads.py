"""Heads, vocabularies and tied weights: what a task adds to a model, in transformers' own words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import plait
from plait.errors import PlanError
from tests.baking_models import IDS, adapter_output, make_adapter, make_model, run, save_model

# PEFT and transformers on layers that they cover with warnings of their own
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
    pytest.mark.filterwarnings("ignore::UserWarning:transformers"),
]

_LM, _CLS = tf.AutoModelForCausalLM, tf.AutoModelForSequenceClassification


def reload(folder: Path, auto: Any) -> Any:
    model, report = auto.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not report["missing_keys"], report
    assert not report["unexpected_keys"], report
    assert not report["mismatched_keys"], report
    return model.eval()


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def test_a_head_takes_the_place_of_the_bases(tmp_path):
    base = save_model("bert", tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "a", 1, _CLS, task_type="SEQ_CLS", target_modules=["query"])
    expected = adapter_output(base, {"a": adapter}, {"a": 1.0}, _CLS)
    out = plait.bake([adapter], base=base, out=tmp_path / "out").folder
    torch.testing.assert_close(run(reload(out, _CLS)), expected, rtol=1e-5, atol=1e-5)
    assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()


def test_a_head_is_added_to_a_base_without_one(tmp_path):
    """The base is an encoder alone, its names have no prefix; the result is a classifier with the adapter's four labels."""
    encoder = tf.BertModel(make_model("bert").config, add_pooling_layer=True)
    encoder.load_state_dict(make_model("bert").bert.state_dict())
    encoder.save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    model = _CLS.from_pretrained(tmp_path / "base", num_labels=4)
    peft = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"], init_lora_weights=False))
    peft.save_pretrained(tmp_path / "a")
    expected = run(peft.eval().base_model.model)
    result = plait.bake([tmp_path / "a"], base=tmp_path / "base", out=tmp_path / "out")
    torch.testing.assert_close(run(reload(result.folder, _CLS)), expected, rtol=1e-5, atol=1e-5)
    assert config(result.folder)["architectures"] == ["BertForSequenceClassification"]
    assert len(config(result.folder)["id2label"]) == 4
    assert any("classifier.weight is not in the base model and is added" in n for n in result.plan.notes)


@pytest.mark.parametrize(
    ("kind", "task"),
    [("llama", "SEQ_CLS"), ("llama", "TOKEN_CLS"), ("llama tied", "SEQ_CLS"), ("mixtral", "SEQ_CLS"), ("gpt2", "SEQ_CLS")],
)
def test_a_classifier_of_a_language_model_has_no_head_of_words(tmp_path, kind, task):
    auto = {"SEQ_CLS": _CLS, "TOKEN_CLS": tf.AutoModelForTokenClassification}[task]
    model = make_model(kind)
    model.config.pad_token_id = 0
    model.save_pretrained(tmp_path / "base", max_shard_size="3KB")
    if kind == "llama":  # as older code wrote it: no class has it
        path = tmp_path / "base" / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        save_file({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, tmp_path / "base" / "more.safetensors")
        index["weight_map"]["model.layers.0.self_attn.rotary_emb.inv_freq"] = "more.safetensors"
        path.write_text(json.dumps(index))
    torch.manual_seed(0)
    classifier = auto.from_pretrained(tmp_path / "base", num_labels=3)
    targets = ["c_attn"] if kind == "gpt2" else ["q_proj"]
    peft = get_peft_model(classifier, LoraConfig(task_type=task, r=2, target_modules=targets, init_lora_weights=False))
    peft.save_pretrained(tmp_path / "a")
    expected = run(peft.eval().base_model.model)
    result = plait.bake([tmp_path / "a"], base=tmp_path / "base", out=tmp_path / "out")
    baked = reload(result.folder, auto)
    torch.testing.assert_close(run(baked), expected, rtol=1e-5, atol=1e-5)
    assert config(result.folder)["architectures"] == [type(classifier).__name__]
    assert (baked.config.num_labels, sorted(baked.config.id2label)) == (3, [0, 1, 2])
    left = [note for note in result.plan.notes if "does not have" in note]
    assert bool(left) is (kind in ("llama", "mixtral"))
    assert not left or "lm_head.weight" in left[0]


def test_a_classifier_whose_values_nobody_has_is_refused(tmp_path):
    tf.BertForMaskedLM(make_model("bert").config).save_pretrained(tmp_path / "base")
    settings = {"task_type": "SEQ_CLS", "r": 2, "target_modules": ["query"], "init_lora_weights": False}
    for name, saved in (("bad", None), ("good", ["pooler"])):
        model = _CLS.from_pretrained(tmp_path / "base")
        peft = get_peft_model(model, LoraConfig(**settings, modules_to_save=saved))
        peft.save_pretrained(tmp_path / name)
    with pytest.raises(
        PlanError, match=r"which also has bert\.pooler\.dense\.bias, bert\.pooler\.dense\.weight; neither the base"
    ):
        plait.bake([tmp_path / "bad"], base=tmp_path / "base", out=tmp_path / "out")
    out = plait.bake([tmp_path / "good"], base=tmp_path / "base", out=tmp_path / "out").folder
    torch.testing.assert_close(run(reload(out, _CLS)), run(peft.eval().base_model.model), rtol=1e-5, atol=1e-5)
    assert not any(name.startswith("cls.") for name in load_file(out / "model.safetensors"))


def test_a_head_of_no_dimensions_is_refused(tmp_path):
    base = save_model("llama", tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "a", 1, _LM, target_modules=["q_proj"], modules_to_save=["lm_head"])
    file = adapter / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.model.lm_head.weight": torch.tensor(1.0)}, file)
    with pytest.raises(PlanError, match=r"lm_head.weight: the adapter's tensor is \[\]"):
        plait.bake([adapter], base=base, out=tmp_path / "out")


@pytest.mark.parametrize("tied", [True, False])
def test_a_resized_vocabulary(tied, tmp_path):
    base = save_model("llama tied" if tied else "llama", tmp_path / "base")
    torch.manual_seed(1)
    model = _LM.from_pretrained(base)
    model.resize_token_embeddings(36)
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"))
    peft.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    expected = run(peft.eval().base_model.model)
    out = plait.bake([tmp_path / "a"], base=base, out=tmp_path / "out").folder
    baked = reload(out, _LM)
    assert baked.get_input_embeddings().weight.shape[0] == 36
    assert config(out)["vocab_size"] == 36
    assert config(out)["tie_word_embeddings"] is tied
    torch.testing.assert_close(run(baked), expected, rtol=1e-5, atol=1e-5)


def test_a_resized_vocabulary_with_lora_on_the_embedding(tmp_path):
    base = save_model("llama tied", tmp_path / "base")
    torch.manual_seed(1)
    model = _LM.from_pretrained(base)
    model.resize_token_embeddings(36)
    settings = {"r": 2, "target_modules": ["q_proj", "embed_tokens"], "init_lora_weights": False}
    peft = get_peft_model(model, LoraConfig(**settings))
    peft.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    expected = run(peft.eval().base_model.model)
    out = plait.bake([tmp_path / "a"], base=base, out=tmp_path / "out").folder
    torch.testing.assert_close(run(reload(out, _LM)), expected, rtol=1e-5, atol=1e-5)
    assert config(out)["tie_word_embeddings"] is False


@pytest.mark.parametrize("kind", ["llama tied", "llama"])
def test_resized_vocabularies_of_two_adapters_need_a_word(kind, tmp_path):
    """PEFT saves the embedding that LoRA adapts, not the head beside it: a tensor of its own lacks rows then."""
    base = save_model(kind, tmp_path / "base")
    for name in "ab":
        model = _LM.from_pretrained(base)
        model.resize_token_embeddings(36)
        peft = get_peft_model(model, LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=False))
        peft.save_pretrained(tmp_path / name, save_embedding_layers=True)
    pair = [tmp_path / "a", tmp_path / "b"]
    with pytest.raises(PlanError, match=r"heads: \{policy: from, adapter: NAME\}"):
        plait.bake(pair, base=base, out=tmp_path / "out")
    heads = {"policy": "from", "adapter": "a"}
    if kind == "llama":
        with pytest.raises(PlanError, match=r"36 rows in 'a', but lm_head\.weight keeps the base's 32"):
            plait.bake(pair, base=base, out=tmp_path / "out", heads=heads)
        return
    out = plait.bake(pair, base=base, out=tmp_path / "out", heads=heads).folder
    assert reload(out, _LM).get_input_embeddings().weight.shape[0] == 36


def test_the_same_resized_vocabulary_of_two_adapters_needs_none(tmp_path):
    base = save_model("llama tied", tmp_path / "base")
    for seed, name in enumerate("ab"):
        model = _LM.from_pretrained(base)
        torch.manual_seed(9)
        model.resize_token_embeddings(36)
        torch.manual_seed(seed)
        peft = get_peft_model(model, LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=False))
        peft.save_pretrained(tmp_path / name, save_embedding_layers=True)
    pair = [tmp_path / "a", tmp_path / "b"]
    plait.bake(pair, base=base, out=tmp_path / "out")
    plait.bake(pair, base=base, out=tmp_path / "chosen", heads={"policy": "from", "adapter": "b"})
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "chosen"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    tensors = load_file(tmp_path / "b" / "adapter_model.safetensors")
    tensors["base_model.model.model.embed_tokens.base_layer.weight"][35, 0] += 1
    save_file(tensors, tmp_path / "b" / "adapter_model.safetensors")
    with pytest.raises(PlanError, match=r"heads: \{policy: from, adapter: NAME\}"):
        plait.bake(pair, base=base, out=tmp_path / "other")


def test_trained_token_rows_of_a_tied_model_stay_tied(tmp_path):
    base = save_model("llama tied", tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "a", 1, _LM, target_modules=["q_proj"], trainable_token_indices=[2, 5])
    expected = adapter_output(base, {"a": adapter}, {"a": 1.0}, _LM)
    out = plait.bake([adapter], base=base, out=tmp_path / "out").folder
    torch.testing.assert_close(run(reload(out, _LM)), expected, rtol=1e-5, atol=1e-5)
    assert config(out)["tie_word_embeddings"] is True


def test_equal_deltas_on_both_uses_stay_tied(tmp_path):
    base = save_model("llama tied", tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "a", 1, _LM, target_modules=["embed_tokens", "lm_head"])
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    start = "base_model.model."
    embed_a, embed_b = (tensors[f"{start}model.embed_tokens.lora_embedding_{x}"] for x in "AB")
    tensors[f"{start}lm_head.lora_A.weight"] = embed_b.mT.contiguous()
    tensors[f"{start}lm_head.lora_B.weight"] = embed_a.mT.contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    expected = adapter_output(base, {"a": adapter}, {"a": 1.0}, _LM)
    out = plait.bake([adapter], base=base, out=tmp_path / "out").folder
    assert config(out)["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_file(out / "model.safetensors")
    torch.testing.assert_close(run(reload(out, _LM)), expected, rtol=1e-5, atol=1e-5)


def test_one_of_more_than_two_uses(tmp_path):
    """T5's tensor is input of encoder and decoder and output head; what is changed is written apart, and nothing else is."""
    base = save_model("t5", tmp_path / "base")
    auto = tf.AutoModelForSeq2SeqLM
    adapter = make_adapter(base, tmp_path / "a", 1, auto, target_modules=["q", "lm_head"])
    result = plait.bake([adapter], base=base, out=tmp_path / "out")
    before, after = (load_file(f / "model.safetensors") for f in (base, result.folder))
    assert after.keys() - before.keys() == {"lm_head.weight"}
    assert torch.equal(after["shared.weight"], before["shared.weight"])
    assert config(result.folder)["tie_word_embeddings"] is True, "T5 scales the head's input where it is tied"
    assert any("transformers 5 loads that; older ones tie them again" in n for n in result.plan.notes)


def test_a_vocabulary_that_only_some_uses_of_a_tensor_would_have_is_refused(tmp_path):
    base = save_model("t5", tmp_path / "base")
    auto = tf.AutoModelForSeq2SeqLM
    adapter = make_adapter(base, tmp_path / "a", 1, auto, target_modules=["q"], modules_to_save=["lm_head"])
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({n: torch.cat([t, t[:3]]) if "lm_head" in n else t for n, t in tensors.items()}, path, metadata={"format": "pt"})
    with pytest.raises(PlanError, match="give only some of them a vocabulary of another size"):
        plait.bake([adapter], base=base, out=tmp_path / "out")


def test_dora_on_a_real_model(tmp_path):
    base = save_model("llama", tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "a", 1, _LM, target_modules="all-linear", use_dora=True)
    expected = adapter_output(base, {"a": adapter}, {"a": 1.0}, _LM)
    out = plait.bake([adapter], base=base, out=tmp_path / "out").folder
    torch.testing.assert_close(run(reload(out, _LM)), expected, rtol=1e-5, atol=1e-5)


def test_a_merged_adapter_bakes_to_the_same_model(tmp_path):
    """merge, then bake the adapter; or bake at once: one model."""
    base = save_model("gpt2", tmp_path / "base", max_shard_size="3KB")
    options = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
    pair = {n: make_adapter(base, tmp_path / n, s, _LM, **options) for s, n in enumerate("ab")}
    merged = plait.merge(pair, weights=[0.3, 0.9], out=tmp_path / "merged").folder
    one = plait.bake([merged], base=base, out=tmp_path / "one").folder
    two = plait.bake(pair, weights=[0.3, 0.9], base=base, out=tmp_path / "two").folder
    assert len(list(two.glob("*.safetensors"))) > 2
    torch.testing.assert_close(run(reload(one, _LM)), run(reload(two, _LM)), rtol=1e-5, atol=1e-5)
    direct = PeftModel.from_pretrained(_LM.from_pretrained(base), merged).eval()
    with torch.no_grad():
        torch.testing.assert_close(run(reload(two, _LM)), direct(IDS).logits, rtol=1e-5, atol=1e-5)


_SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
_HEARD = {"conv_dim": [8, 8], "conv_kernel": [10, 3], "conv_stride": [5, 2], "num_conv_pos_embeddings": 4}
_IMAGES, _SOUNDS = tf.AutoModelForImageClassification, tf.AutoModelForAudioClassification


def backbone(kind: str, folder: Path) -> Path:
    """Write a model of images, or of sounds, without a classification head; ViT's has a pooler, which no classifier has."""
    torch.manual_seed(0)
    sizes = {"image_size": 8, "patch_size": 4}
    models = {
        "vit": lambda: tf.ViTModel(tf.ViTConfig(**_SMALL, **sizes)),
        "dinov2": lambda: tf.Dinov2Model(tf.Dinov2Config(**_SMALL, **sizes)),
        "wav2vec2": lambda: tf.Wav2Vec2Model(
            tf.Wav2Vec2Config(**_SMALL, **_HEARD, num_conv_pos_embedding_groups=2, classifier_proj_size=8)
        ),
    }
    models[kind]().save_pretrained(folder)
    return folder


def labeled_adapter(base: Path, folder: Path, seed: int, auto: Any, labels: int = 3) -> tuple[Path, torch.Tensor]:
    """Write an adapter with a head of some labels; return the logits of PEFT's model with it too."""
    torch.manual_seed(seed)
    model = auto.from_pretrained(base, num_labels=labels, ignore_mismatched_sizes=True)
    heads = [name for name in ("projector", "classifier") if hasattr(model, name)]
    settings = LoraConfig(r=2, target_modules="all-linear", modules_to_save=heads, init_lora_weights=False)
    peft = get_peft_model(model, settings)
    peft.save_pretrained(folder)
    return folder, run(peft.eval().base_model.model)


@pytest.mark.parametrize(("kind", "auto"), [("vit", _IMAGES), ("dinov2", _IMAGES), ("wav2vec2", _SOUNDS)])
def test_a_head_of_images_or_sounds_is_added_to_a_base_without_one(tmp_path, kind, auto):
    base = backbone(kind, tmp_path / "base")
    adapter, expected = labeled_adapter(base, tmp_path / "a", 1, auto)
    result = plait.bake([adapter], base=base, out=tmp_path / "out")
    baked = reload(result.folder, auto)
    torch.testing.assert_close(run(baked), expected, rtol=1e-5, atol=1e-5)
    named = type(baked).__name__
    assert (config(result.folder)["architectures"], len(config(result.folder)["id2label"])) == ([named], 3)
    assert f"from transformers import {named}\n" in (result.folder / "README.md").read_text()
    assert any("pooler.dense.weight: left out" in note for note in result.plan.notes) is (kind == "vit")
    assert plait.verify(result.folder).ok


def test_heads_of_several_images_adapters_are_kept_apart_but_for_the_one_that_is_chosen(tmp_path):
    base = backbone("dinov2", tmp_path / "base")
    (one, _), (two, expected) = (labeled_adapter(base, tmp_path / n, i, _IMAGES, 2 + i) for i, n in enumerate(["one", "two"]))
    apart = plait.bake([one, two], base=base, out=tmp_path / "apart")
    assert any("heads and other full tensors of one, two are kept" in note for note in apart.plan.notes)
    assert config(apart.folder)["architectures"] == ["Dinov2Model"]
    chosen = {"weights": [0, 1], "heads": {"policy": "from", "adapter": "two"}}
    out = plait.bake([one, two], base=base, out=tmp_path / "out", **chosen).folder
    torch.testing.assert_close(run(reload(out, _IMAGES)), expected, rtol=1e-5, atol=1e-5)


def test_a_head_of_other_labels_takes_the_place_of_the_bases(tmp_path):
    base = save_model("vit", tmp_path / "base")
    adapter, expected = labeled_adapter(base, tmp_path / "a", 1, _IMAGES, 5)
    out = plait.bake([adapter], base=base, out=tmp_path / "out").folder
    torch.testing.assert_close(run(reload(out, _IMAGES)), expected, rtol=1e-5, atol=1e-5)
    assert len(config(out)["id2label"]) == 5


def test_a_head_that_lacks_a_part_is_refused(tmp_path):
    """PEFT had put in a random projector; nobody has its values."""
    base = backbone("wav2vec2", tmp_path / "base")
    adapter, _ = labeled_adapter(base, tmp_path / "a", 1, _SOUNDS)
    file = adapter / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if "projector" not in name}, file)
    with pytest.raises(PlanError, match=r"which also has projector\.bias, projector\.weight; neither the base"):
        plait.bake([adapter], base=base, out=tmp_path / "out")
