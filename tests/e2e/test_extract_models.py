"""`plait extract` of real models: experts, convolutions, embeddings, heads; PEFT and a bake give the fine-tune back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import plait
from plait.linalg import blocks
from tests.extracted import checkpoint, tensors


@pytest.fixture
def base(tmp_path):
    return checkpoint(tmp_path / "base", tensors())


def tuned_models(tmp_path: Path, kind: str) -> tuple[Path, Path]:
    """Save a model of many layers and the same with every value changed."""
    from tests.baking_models import make_model

    model = make_model(kind)
    model.save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_" not in name:  # which may be tied
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.save_pretrained(tmp_path / "tuned")
    return tmp_path / "base", tmp_path / "tuned"


def in_peft(kind: str, base: Path, adapter: Path) -> torch.Tensor:
    """Return the logits of the adapter on the base, loaded by PEFT with nothing missing."""
    import transformers as tf
    from peft import PeftModel

    auto = {"vit": tf.AutoModelForImageClassification, "whisper": tf.AutoModelForSpeechSeq2Seq}.get(
        kind, tf.AutoModelForCausalLM
    )
    from tests.baking_models import run

    loaded = PeftModel.from_pretrained(auto.from_pretrained(base), adapter)
    assert not loaded.load_adapter(adapter, "again").unexpected_keys
    loaded.set_adapter("default")
    return run(loaded.merge_and_unload().eval())  # Whisper asks its convolutions for what PEFT's wrappers do not have


@pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::RuntimeWarning:peft")
@pytest.mark.parametrize("kind", ["qwen3 moe", "mixtral", "gpt oss"])
def test_fused_experts(kind, tmp_path, monkeypatch):
    """Stored one by one and fused by the code, or stored as they are and transposed: at full rank PEFT gives the fine-tune."""
    import transformers as tf

    from tests import baking_models
    from tests.baking_models import run

    if kind == "gpt oss":
        config = tf.GptOssConfig(
            vocab_size=32, hidden_size=16, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, num_local_experts=3, num_experts_per_tok=2, max_position_embeddings=32,
            pad_token_id=0, eos_token_id=1,
        )  # fmt: skip
        monkeypatch.setitem(baking_models.MODELS, kind, lambda: tf.GptOssForCausalLM(config))
    base, tuned = tuned_models(tmp_path, kind)
    result = plait.extract(base, tuned, rank=32, out=tmp_path / "out", targets=["*.experts.*"])
    found = [m.target.partition("layers.0.")[2] for m in result.record.modules if "layers.0." in m.target]
    assert found == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    assert all(m.result == "exact" for m in result.record.modules)
    config = json.loads((result.folder / "adapter_config.json").read_text())
    assert config["target_modules"] == []
    assert config["target_parameters"] == [m.target for m in result.record.modules]
    only_experts = mixed(base, tuned, tmp_path / "mixed", lambda name: ".experts." in name and "bias" not in name)
    expected = run(tf.AutoModelForCausalLM.from_pretrained(only_experts).eval())
    torch.testing.assert_close(in_peft(kind, base, result.folder), expected, rtol=1e-4, atol=1e-4)


def mixed(base: Path, tuned: Path, folder: Path, is_tuned) -> Path:
    """Save a model whose tensors are the fine-tune's where a function of their names says so, and the base's else."""
    import shutil

    shutil.copytree(base, folder)
    one, two = (load_file(f / "model.safetensors") for f in (base, tuned))
    save_file({n: (two if is_tuned(n) else one)[n] for n in one}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize(("kind", "layers"), [("vit", "projection"), ("whisper", "conv?")])
def test_convolutions(kind, layers, tmp_path):
    import transformers as tf

    from tests.baking_models import run

    auto = {"vit": tf.AutoModelForImageClassification, "whisper": tf.AutoModelForSpeechSeq2Seq}[kind]
    base, tuned = tuned_models(tmp_path, kind)
    result = plait.extract(base, tuned, rank=64, out=tmp_path / "out", targets=[f"*.{layers}"])
    modules = [m.target for m in result.record.modules]
    assert modules
    chosen = mixed(base, tuned, tmp_path / "mixed", lambda n: n.removesuffix(".weight") in modules)
    expected = run(auto.from_pretrained(chosen).eval())
    assert not torch.allclose(expected, run(auto.from_pretrained(base).eval()), atol=1e-3), "the convolutions matter"
    torch.testing.assert_close(in_peft(kind, base, result.folder), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["qwen3 moe", "vit"])
def test_a_truncated_stack_is_as_near_as_its_rank_allows(kind, tmp_path):
    """Per expert, and per convolution seen as a matrix, the energies are those of the singular values; verify repeats it."""
    base, tuned = tuned_models(tmp_path, kind)
    result = plait.extract(base, tuned, rank=2, out=tmp_path / "out")
    one, two = (load_file(f / "model.safetensors") for f in (base, tuned))
    deltas = {n: (two[n].double() - one[n].double()).numpy() for n in one}
    records = {m.target: m for m in result.record.modules}
    if kind == "vit":
        (target,) = (t for t in records if t.endswith("projection"))
        matrices = [deltas[f"{target}.weight"].reshape(len(deltas[f"{target}.weight"]), -1)]
    else:
        target = "model.layers.1.mlp.experts.gate_up_proj"
        names = [f"model.layers.1.mlp.experts.{i}" for i in range(4)]
        matrices = [np.concatenate([deltas[f"{n}.{half}_proj.weight"] for half in ("gate", "up")]) for n in names]
    power = [np.linalg.svd(m, compute_uv=False) ** 2 for m in matrices]
    assert records[target].energy == pytest.approx(sum(p.sum() for p in power), rel=1e-5)
    kept = sum(p[:2].sum() for p in power) / sum(p.sum() for p in power)
    assert records[target].kept == pytest.approx(kept, rel=1e-4)
    every = sum((d**2).sum() for d in deltas.values())
    lost = sum((m.energy or 0) * (1 - m.kept) for m in records.values()) + sum(x.energy for x in result.record.leftovers)
    assert result.record.lost == pytest.approx(lost / every, rel=1e-4)
    assert plait.verify(result.folder).ok


def test_experts_join_a_merge_and_a_bake(tmp_path):
    """An extracted adapter is one like any other: baked at full rank it is the fine-tune, up to rounding."""
    base, tuned = tuned_models(tmp_path, "qwen3 moe")
    adapter = plait.extract(base, tuned, rank=32, out=tmp_path / "adapter", modules_to_save=True).folder
    baked = plait.bake([adapter], base=base, out=tmp_path / "baked").folder
    one, two = (load_file(f / "model.safetensors") for f in (baked, tuned))
    for name, tensor in two.items():
        torch.testing.assert_close(one[name], tensor, rtol=1e-4, atol=1e-4, msg=name)


def save_pair(model: torch.nn.Module, tmp_path: Path, *, is_tuned=lambda name: True) -> tuple[Path, Path]:
    """Save a model with random values, and the same with those changed that a function of their names says."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_tuned(name):
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.save_pretrained(tmp_path / "tuned")
    return tmp_path / "base", tmp_path / "tuned"


def regnet() -> torch.nn.Module:
    import transformers as tf

    # blocks with 3 × 3 convolutions in 2 groups
    config = tf.RegNetConfig(embedding_size=8, hidden_sizes=[16, 16], depths=[1, 1], groups_width=8, num_labels=3)
    return tf.RegNetForImageClassification(config)


def see(model: torch.nn.Module) -> torch.Tensor:
    """Return the logits of an image classifier."""
    with torch.no_grad():
        return model.eval()(pixel_values=torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)).logits


@pytest.mark.filterwarnings("ignore::UserWarning:peft")  # which cannot merge grouped convolutions, and says so
def test_grouped_convolutions(tmp_path):
    """At full rank PEFT gives the fine-tune, and so does a bake; the weights do not mix their groups."""
    import transformers as tf
    from peft import PeftModel

    base, tuned = save_pair(regnet(), tmp_path, is_tuned=lambda name: "convolution" in name)
    result = plait.extract(base, tuned, rank=64, out=tmp_path / "out")
    config = json.loads((result.folder / "adapter_config.json").read_text())
    grouped = "regnet.encoder.stages.0.layers.0.layer.1.convolution"
    assert grouped in [m.target for m in result.record.modules]
    assert config["r"] % 2 == 0
    assert result.record.lost == pytest.approx(0, abs=1e-9)
    expected = see(tf.RegNetForImageClassification.from_pretrained(tuned))
    untuned = tf.RegNetForImageClassification.from_pretrained(base)
    assert not torch.allclose(see(untuned), expected, atol=1e-3), "the convolutions matter"
    torch.testing.assert_close(see(PeftModel.from_pretrained(untuned, result.folder)), expected, rtol=1e-4, atol=1e-4)
    baked = plait.bake([result.folder], base=base, out=tmp_path / "baked").folder
    one, two = (load_file(f / "model.safetensors") for f in (baked, tuned))
    for name, tensor in two.items():
        torch.testing.assert_close(one[name], tensor, rtol=1e-5, atol=1e-5, msg=name)
    # r is PEFT's: 4 in two groups are 2 in each, as near as 2 allow
    record = plait.extract(base, tuned, rank=4, out=tmp_path / "four", targets=[grouped]).record
    assert (record.rank, record.modules[0].rank) == (4, 2)
    before = load_file(base / "model.safetensors")
    delta = (two[f"{grouped}.weight"].double() - before[f"{grouped}.weight"].double()).reshape(2, 8, -1).numpy()
    power = np.linalg.svd(delta, compute_uv=False) ** 2
    assert record.modules[0].kept == pytest.approx(power[:, :2].sum() / power.sum(), rel=1e-4)


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_a_norm_that_counts_is_kept_with_its_count(tmp_path):
    """Batch norms have integers beside their weights; PEFT looks for them in the file, and a bake takes them over exactly."""
    import transformers as tf
    from peft import PeftModel

    base, tuned = save_pair(regnet(), tmp_path)
    tensors = load_file(tuned / "model.safetensors")
    name = next(n for n in tensors if n.endswith("num_batches_tracked"))
    tensors[name] = torch.tensor(2**24 + 1)  # which float32 does not have
    save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})
    result = plait.extract(base, tuned, rank=64, modules_to_save=True, out=tmp_path / "out")
    assert result.record.lost == pytest.approx(0, abs=1e-9)
    loaded = PeftModel.from_pretrained(tf.RegNetForImageClassification.from_pretrained(base), result.folder)
    expected = see(tf.RegNetForImageClassification.from_pretrained(tuned))
    torch.testing.assert_close(see(loaded), expected, rtol=1e-4, atol=1e-4)
    baked = plait.bake([result.folder], base=base, out=tmp_path / "baked").folder
    assert int(load_file(baked / "model.safetensors")[name]) == 2**24 + 1


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_a_convolution_whose_lora_would_be_larger_than_it_is(tmp_path):
    """PEFT lets every group read all channels: depthwise ones are kept whole, or become a LoRA where that is asked for."""
    import transformers as tf
    from peft import PeftModel

    config = tf.ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], num_labels=3)
    base, tuned = save_pair(tf.ConvNextForImageClassification(config), tmp_path, is_tuned=lambda n: "layer_scale" not in n)
    plain = plait.extract(base, tuned, rank=8, out=tmp_path / "plain").record
    left = {x.tensor: (x.kind, x.kept) for x in plain.leftovers}
    assert left["convnext.encoder.stages.0.layers.0.dwconv.weight"] == ("conv", False)
    assert any("4 grouped convolutions have changed" in note for note in plain.notes)
    expected = see(tf.ConvNextForImageClassification.from_pretrained(tuned))
    for name, targets in (
        ("whole", None),
        ("factors", ["pwconv1", "pwconv2", "dwconv", "*.1", "*.patch_embeddings", "classifier"]),
    ):
        result = plait.extract(base, tuned, rank=64, out=tmp_path / name, modules_to_save=True, targets=targets)
        assert result.record.lost == pytest.approx(0, abs=1e-9)
        assert any("dwconv" in m.target for m in result.record.modules) == (name == "factors")
        loaded = PeftModel.from_pretrained(tf.ConvNextForImageClassification.from_pretrained(base), result.folder)
        torch.testing.assert_close(see(loaded), expected, rtol=1e-4, atol=1e-4)


def small(**more: object) -> dict[str, object]:
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return {**sizes, "max_position_embeddings": 32, "pad_token_id": 0, **more}


def whole_models() -> dict[str, torch.nn.Module]:
    """Models with what PEFT treats in its own way; made when asked for."""
    import transformers as tf

    moe = {"num_experts_per_tok": 2, "num_key_value_heads": 2}
    latent = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "qk_nope_head_dim": 4}
    deepseek = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 12, "first_k_dense_replace": 1}
    return {
        "biases of some layers": lambda: tf.Qwen2ForCausalLM(
            tf.Qwen2Config(**small(num_key_value_heads=1, tie_word_embeddings=False))
        ),
        "tied head": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**small(tie_word_embeddings=True))),
        "router": lambda: tf.GraniteMoeForCausalLM(
            tf.GraniteMoeConfig(**small(num_local_experts=4, tie_word_embeddings=False), **moe)
        ),
        "dense layers beside experts": lambda: tf.DeepseekV3ForCausalLM(
            tf.DeepseekV3Config(**small(tie_word_embeddings=False), **moe, **latent, **deepseek)
        ),
        "kernels": lambda: tf.MambaForCausalLM(
            tf.MambaConfig(vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=1, tie_word_embeddings=False)
        ),
        "head": lambda: tf.BertForSequenceClassification(tf.BertConfig(**small(num_labels=3))),
        "head of two layers": lambda: tf.RobertaForTokenClassification(tf.RobertaConfig(**small(num_labels=3))),
        "head called alike": lambda: tf.DistilBertForSequenceClassification(
            tf.DistilBertConfig(vocab_size=32, dim=16, n_layers=1, n_heads=2, hidden_dim=24, max_position_embeddings=32)
        ),
    }


@pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::RuntimeWarning:peft")
@pytest.mark.parametrize("kind", list(whole_models()))
def test_peft_and_a_bake_give_the_whole_fine_tune(kind, tmp_path):
    """With everything kept nothing is lost, in PEFT and in a bake, whatever layers PEFT has its own way with."""
    from peft import PeftModel

    model = whole_models()[kind]()
    names = ("A_log", "mixer.D", "e_score_correction_bias")  # parameters of no layer, which no adapter holds
    base, tuned = save_pair(model, tmp_path, is_tuned=lambda name: not name.endswith(names))
    result = plait.extract(base, tuned, rank=32, modules_to_save=True, out=tmp_path / "out")
    assert result.record.lost == pytest.approx(0, abs=1e-9)
    auto = type(model)
    loaded = PeftModel.from_pretrained(auto.from_pretrained(base), result.folder)
    assert not loaded.load_adapter(result.folder, "again").unexpected_keys
    loaded.set_adapter("default")
    ids = torch.arange(12).reshape(2, 6) + 2
    with torch.no_grad():
        expected = auto.from_pretrained(tuned).eval()(ids).logits
        assert not torch.allclose(auto.from_pretrained(base).eval()(ids).logits, expected, atol=1e-3)
        torch.testing.assert_close(loaded.eval()(ids).logits, expected, rtol=1e-4, atol=1e-4)
    baked = plait.bake([result.folder], base=base, out=tmp_path / "baked").folder
    one, two = (load_file(f / "model.safetensors") for f in (baked, tuned))
    assert one.keys() == two.keys()
    for name, tensor in two.items():
        torch.testing.assert_close(one[name], tensor, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_a_head_is_kept_even_where_nothing_else_is(tmp_path):
    """PEFT looks for it in the file, changed or not."""
    import transformers as tf
    from peft import PeftModel

    base, tuned = save_pair(whole_models()["head"](), tmp_path, is_tuned=lambda name: "query.weight" in name)
    result = plait.extract(base, tuned, rank=16, out=tmp_path / "out")
    assert (result.record.notes, result.record.saved) == ((), ("classifier",))
    assert "vLLM" not in (result.folder / "README.md").read_text()
    assert [m.target.rpartition(".")[2] for m in result.record.modules] == ["query", "query"]
    loaded = PeftModel.from_pretrained(tf.BertForSequenceClassification.from_pretrained(base), result.folder).eval()
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        expected = tf.BertForSequenceClassification.from_pretrained(tuned).eval()(ids).logits
        torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_what_is_kept_whole_is_copied_by_rows(tmp_path, monkeypatch):
    """The bytes are the fine-tune's, and no tensor is in memory at once."""
    from plait.tensorfiles.reader import SafetensorsFile

    base, tuned = save_pair(whole_models()["tied head"](), tmp_path)
    monkeypatch.setattr(blocks, "MATRIX_BLOCK_ELEMENTS", 5 * 16)
    read_rows, most = SafetensorsFile.read_rows, 0

    def watched(self: SafetensorsFile, name: str, start: int, stop: int) -> torch.Tensor:
        nonlocal most
        most = max(most, stop - start)
        return read_rows(self, name, start, stop)

    monkeypatch.setattr(SafetensorsFile, "read_rows", watched)
    monkeypatch.setattr(SafetensorsFile, "read", lambda *_: pytest.fail("a tensor was read whole"))
    out = plait.extract(base, tuned, rank=4, modules_to_save=True, out=tmp_path / "out").folder
    assert 5 <= most <= 16, "five rows of an embedding, all of a norm"
    monkeypatch.undo()
    found, expected = load_file(out / "adapter_model.safetensors"), load_file(tuned / "model.safetensors")
    for use in ("lm_head", "model.embed_tokens"):
        assert torch.equal(found[f"base_model.model.{use}.weight"], expected["model.embed_tokens.weight"])


def test_an_embedding_that_is_the_head_too_stays_one(tmp_path):
    """As a LoRA both uses get it; the bake has one tensor again."""
    from peft import PeftModel

    model = whole_models()["tied head"]()
    base, tuned = save_pair(model, tmp_path, is_tuned=lambda name: "embed" in name)
    result = plait.extract(base, tuned, rank=16, embeddings=True, out=tmp_path / "out")
    assert [m.target for m in result.record.modules] == ["lm_head", "model.embed_tokens"]
    loaded = PeftModel.from_pretrained(type(model).from_pretrained(base), result.folder).eval()
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits, rtol=1e-4, atol=1e-4)
    baked = plait.bake([result.folder], base=base, out=tmp_path / "baked").folder
    one, two = (load_file(f / "model.safetensors") for f in (baked, tuned))
    assert one.keys() == two.keys()
    torch.testing.assert_close(one["model.embed_tokens.weight"], two["model.embed_tokens.weight"], rtol=1e-5, atol=1e-5)
