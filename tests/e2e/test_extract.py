"""A LoRA from a full fine-tune: the difference of two checkpoints, streamed, loaded by PEFT again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import plait
from plait.linalg import blocks
from tests.adapters_on_disk import Linear, read_deltas
from tests.command_line import exit_code
from tests.locks import write_lock

SHAPES = {"model.layers.0.q_proj": (24, 16), "model.layers.0.up_proj": (40, 16), "model.layers.1.q_proj": (24, 16)}
MODULES = {name: Linear(d_out=m, d_in=n) for name, (m, n) in SHAPES.items()}


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    made["model.norm.weight"] = torch.ones(16)
    made["model.embed_tokens.weight"] = torch.randn(12, 16, generator=generator)
    return made


def low_rank(shape: tuple[int, int], rank: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape[0], rank, generator=generator) @ torch.randn(rank, shape[1], generator=generator) * 0.1


def checkpoint(folder: Path, made: dict[str, torch.Tensor], *, shards: int = 1, **config: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "nobody-knows", **config}))
    if shards == 1:
        save_file(made, folder / "model.safetensors")
        return folder
    names = sorted(made)
    homes = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(names)}
    for file in set(homes.values()):
        save_file({n: made[n] for n in names if homes[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": homes}))
    return folder


@pytest.fixture
def base(tmp_path):
    return checkpoint(tmp_path / "base", tensors())


def tuned_with(deltas: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value + deltas[name] if name in deltas else value for name, value in tensors().items()}


@pytest.mark.parametrize("streamed", [False, True], ids=["held", "streamed"])
def test_base_plus_a_lora_gives_that_lora_back(base, tmp_path, monkeypatch, streamed):
    if streamed:
        monkeypatch.setattr(blocks, "HOLD_ELEMENTS", 0)
        monkeypatch.setattr(blocks, "MATRIX_BLOCK_ELEMENTS", 100)
    deltas = {f"{name}.weight": low_rank(shape, 3, i) for i, (name, shape) in enumerate(SHAPES.items())}
    tuned = checkpoint(tmp_path / "tuned", tuned_with(deltas), shards=3)
    result = plait.extract(base, tuned, rank=3, out=tmp_path / "out")
    found = read_deltas(result.folder, MODULES)
    for name, delta in found.items():
        np.testing.assert_allclose(delta, deltas[f"{name}.weight"].numpy(), atol=2e-6)
    assert result.record.kept == pytest.approx(1, abs=1e-6)
    assert result.record.leftovers == ()
    assert json.loads((result.folder / "adapter_config.json").read_text())["target_modules"] == ["q_proj", "up_proj"]


def test_energies_are_those_of_the_singular_values(base, tmp_path):
    deltas = {f"{name}.weight": torch.randn(shape) * 0.1 for name, shape in SHAPES.items()}
    tuned = checkpoint(tmp_path / "tuned", tuned_with(deltas))
    record = plait.extract(base, tuned, rank=5, out=tmp_path / "out").record
    for module in record.modules:
        before, after = (load_file(folder / "model.safetensors") for folder in (base, tuned))
        name = f"{module.target}.weight"
        power = np.linalg.svd(after[name].double().numpy() - before[name].double().numpy(), compute_uv=False) ** 2
        assert module.energy == pytest.approx(power.sum(), rel=1e-5)
        assert module.kept == pytest.approx(power[:5].sum() / power.sum(), rel=1e-5)
    assert record.lost == pytest.approx(1 - record.kept, rel=1e-4), "all that changed is in these modules"
    by_energy = plait.extract(base, tuned, rank="energy:0.9", layout="pattern", out=tmp_path / "energy").record
    assert all(m.kept >= 0.9 - 1e-6 for m in by_energy.modules)
    assert by_energy.rank == max(m.rank for m in by_energy.modules)


def test_what_did_not_change_is_left_out_and_what_is_no_linear_layer_is_counted(base, tmp_path):
    deltas = {
        "model.layers.0.q_proj.weight": low_rank((24, 16), 2, 1),
        "model.norm.weight": torch.full((16,), 0.5),
        "model.embed_tokens.weight": low_rank((12, 16), 2, 2),
    }
    tuned = checkpoint(tmp_path / "tuned", tuned_with(deltas))
    record = plait.extract(base, tuned, rank=2, out=tmp_path / "out").record
    assert [m.target for m in record.modules] == ["model.layers.0.q_proj"]
    assert set(record.unchanged) == {"model.layers.0.up_proj", "model.layers.1.q_proj"}
    left = {x.tensor: x for x in record.leftovers}
    assert set(left) == {"model.norm.weight", "model.embed_tokens.weight"}
    assert left["model.norm.weight"].energy == pytest.approx(4, rel=1e-5)
    energies = {name: float(delta.double().square().sum()) for name, delta in deltas.items()}
    lost = energies["model.norm.weight"] + energies["model.embed_tokens.weight"]
    assert record.lost == pytest.approx(lost / sum(energies.values()), rel=1e-4)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.0.q_proj"], "q_proj alone would name the other layer too"


def test_checkpoints_with_and_without_the_heads_prefix(tmp_path):
    plain = {name.removeprefix("model."): value for name, value in tensors().items()}
    base = checkpoint(tmp_path / "base", plain)
    delta = low_rank((24, 16), 2, 1)
    tuned = checkpoint(tmp_path / "tuned", tuned_with({"model.layers.1.q_proj.weight": delta}))
    result = plait.extract(base, tuned, rank=2, out=tmp_path / "out")
    (found,) = read_deltas(result.folder, {"model.layers.1.q_proj": MODULES["model.layers.1.q_proj"]}).values()
    np.testing.assert_allclose(found, delta.numpy(), atol=2e-6)


def test_the_same_bytes_with_any_number_of_workers(base, tmp_path):
    deltas = {f"{name}.weight": torch.randn(shape) * 0.1 for name, shape in SHAPES.items()}
    tuned = checkpoint(tmp_path / "tuned", tuned_with(deltas))
    for workers in (1, 3):
        plait.extract(base, tuned, rank=4, out=tmp_path / str(workers), workers=workers)
    for name in ("adapter_model.safetensors", "adapter_config.json", "README.md", "plait.lock"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes(), name


def test_an_extracted_adapter_joins_a_merge(base, tmp_path):
    first, second = (
        checkpoint(tmp_path / f"tuned{i}", tuned_with({"model.layers.0.q_proj.weight": low_rank((24, 16), 2, i)}))
        for i in (1, 2)
    )
    adapters = [plait.extract(base, t, rank=2, out=tmp_path / f"out{t.name}").folder for t in (first, second)]
    result = plait.merge(adapters, weights=[0.5, 2.0], out=tmp_path / "merged")
    (found,) = read_deltas(result.folder, {"model.layers.0.q_proj": MODULES["model.layers.0.q_proj"]}).values()
    expected = 0.5 * low_rank((24, 16), 2, 1) + 2 * low_rank((24, 16), 2, 2)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*lora_bias:UserWarning")  # of PEFT, for layers without a bias
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_adapter_makes_the_fine_tune_of_the_base_in_peft(name, tmp_path):
    """At full rank, with biases and norms kept, nothing is lost: the logits are the fine-tune's."""
    from peft import PeftModel
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if name == "llama":
        sizes = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = LlamaConfig(vocab_size=30, attention_bias=True, tie_word_embeddings=False, **sizes)
        model, kind = LlamaForCausalLM(config), LlamaForCausalLM
    else:
        config = GPT2Config(vocab_size=30, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
        model, kind = GPT2LMHeadModel(config), GPT2LMHeadModel
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
        if name == "gpt2":  # tied to the head, which an adapter of the embedding does not reach
            untuned = kind.from_pretrained(tmp_path / "base")
            model.transformer.wte.weight.copy_(untuned.transformer.wte.weight)
    model.save_pretrained(tmp_path / "tuned")
    result = plait.extract(tmp_path / "base", tmp_path / "tuned", rank=30, modules_to_save=True, out=tmp_path / "out")
    assert result.record.lost == pytest.approx(0, abs=1e-6)
    loaded = PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "base"), result.folder).eval()
    report = loaded.load_adapter(result.folder, "again")
    assert not report.unexpected_keys
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits, rtol=1e-4, atol=1e-4)


def test_embeddings_as_lora_in_peft(tmp_path):
    from peft import PeftModel
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=30, tie_word_embeddings=False, **sizes))
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(torch.randn(30, 16) * 0.3)
    model.save_pretrained(tmp_path / "tuned")
    result = plait.extract(tmp_path / "base", tmp_path / "tuned", rank=16, embeddings=True, out=tmp_path / "out")
    assert [m.target for m in result.record.modules] == ["model.embed_tokens"]
    loaded = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "base"), result.folder).eval()
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_model_is_not_replaced_by_what_is_extracted_from_it(base, tmp_path):
    tuned = checkpoint(tmp_path / "tuned", tuned_with({"model.layers.0.q_proj.weight": low_rank((24, 16), 2, 1)}))
    write_lock(tuned)  # as a baked model has
    with pytest.raises(plait.OutputError, match="is an input of this extraction"):
        plait.extract(base, tuned, rank=2, out=tuned, force=True)


def test_everything_that_does_not_fit_is_said_at_once(base, tmp_path):
    other = tuned_with({})
    del other["model.layers.1.q_proj.weight"]
    other["model.layers.0.up_proj.weight"] = torch.zeros(41, 16)
    other["model.embed_tokens.weight"] = torch.zeros(14, 16)
    other["model.extra.weight"] = torch.zeros(2, 2)
    tuned = checkpoint(tmp_path / "tuned", other)
    with pytest.raises(plait.PlanError) as caught:
        plait.extract(base, tuned, rank=2, out=tmp_path / "out")
    message = str(caught.value)
    assert "4 problems" in message
    assert "lacks 1 of" in message
    assert "'model.layers.1.q_proj.weight'" in message or "model.layers.1.q_proj.weight" in message
    assert "model.extra.weight" in message
    assert "1 tensors have other shapes: 'model.layers.0.up_proj.weight' is [40, 16]" in message
    assert "the vocabulary was resized" in message
    assert "resize_token_embeddings(14)" in message
    assert not (tmp_path / "out").exists()


def test_quantized_models_are_refused(base, tmp_path):
    config = {"quantization_config": {"quant_method": "gptq"}}
    tuned = checkpoint(tmp_path / "tuned", tensors(), **config)
    with pytest.raises(plait.PlanError, match="quantized"):
        plait.extract(base, tuned, rank=2, out=tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "'rank'|rank: 0 is no rank|rank: .*number from 1"),
        ({"rank": "auto"}, "has no rank of its own"),
        ({"rank": 2, "dtype": "int8"}, "dtype: "),
        ({"rank": 2, "targets": ["q_porj"]}, "q_porj.*Did you mean 'q_proj'"),
        ({"rank": 2, "targets": ["embed_tokens"]}, "add --embeddings"),
        ({"rank": 2, "targets": ["up_proj"]}, "nothing to extract"),
    ],
)
def test_wrong_requests(base, tmp_path, settings, message):
    tuned = checkpoint(tmp_path / "tuned", tuned_with({"model.layers.0.q_proj.weight": low_rank((24, 16), 2, 1)}))
    with pytest.raises(plait.PlaitError, match=message):
        plait.extract(base, tuned, out=tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_nan_in_the_fine_tune(base, tmp_path):
    broken = tuned_with({"model.norm.weight": torch.tensor([float("nan")] * 16)})
    with pytest.raises(plait.PlanError, match=r"model\.norm\.weight.*NaN"):
        plait.extract(base, checkpoint(tmp_path / "tuned", broken), rank=2, out=tmp_path / "out")


def test_the_command_line(base, tmp_path, capsys, monkeypatch):
    deltas = {f"{name}.weight": torch.randn(shape) * 0.1 for name, shape in SHAPES.items()}
    checkpoint(tmp_path / "tuned", tuned_with({**deltas, "model.norm.weight": torch.ones(16)}))
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, code: int = 0) -> str:
        assert exit_code("extract", "./base", "./tuned", *arguments) == code
        return " ".join(capsys.readouterr().out.split())

    message = run("--rank", "4", "--targets", "q_proj", "--dtype", "bfloat16", "-o", "out", "--base-id", "org/base")
    assert "2 target modules · rank 4" in message
    assert "truncated" in message
    assert "q_proj (2)" in message
    assert "--modules-to-save and --targets would keep more" in message
    assert "base_model: org/base" in (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"
    assert json.loads(run("--energy", "0.5", "-o", "json", "--json"))["modules"][0]["kept"] >= 0.5
    run("-o", "neither", code=2)
    run("--rank", "4", "-o", "out", code=2)


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
    assert "vLLM does not serve it" in (result.folder / "README.md").read_text()
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
