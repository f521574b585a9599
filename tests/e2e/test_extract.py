"""A LoRA from a full fine-tune: the difference of two checkpoints, streamed, loaded by PEFT again."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import plait
from plait.linalg import blocks
from tests.adapters_on_disk import Linear, read_deltas
from tests.command_line import exit_code
from tests.extracted import SHAPES, checkpoint, tensors
from tests.locks import write_lock

MODULES = {name: Linear(d_out=m, d_in=n) for name, (m, n) in SHAPES.items()}


def low_rank(shape: tuple[int, int], rank: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape[0], rank, generator=generator) @ torch.randn(rank, shape[1], generator=generator) * 0.1


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
    with pytest.raises(plait.PlanError, match=r"tuned/model\.safetensors: 'model\.norm\.weight': holds NaN"):
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
