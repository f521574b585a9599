"""The live mixture and PEFT on the same adapters: the same outputs, for every layout, and for what plait merged."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import plait
from plait.adapters import Adapter
from plait.errors import PlaitError, PlanError
from plait.merging.engine import Engine, MergedModule
from plait.merging.inventory import take_inventory
from plait.merging.plan import make_plan
from plait.mixture import Mixture
from plait.recipes.request import read_request
from plait.results.progress import SilentProgress
from tests.e2e.test_peft_round_trip import CASES as LAYOUTS
from tests.e2e.test_peft_round_trip import IDS
from tests.mixtures import cohort, fingerprint, part
from tests.small_models import both_active, loaded, net, peft_adapter, save_base

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning:peft"), pytest.mark.filterwarnings("ignore::UserWarning:torch")]

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
TOKENS = torch.arange(3, 19).reshape(2, 8)
SMALL = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
DECODER = {**SMALL, "num_key_value_heads": 1, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": None}
FULL = {"head_dim": 8, "layer_types": ["full_attention"] * 2}
EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 2}


def llama():
    return LlamaForCausalLM(LlamaConfig(**DECODER, tie_word_embeddings=True))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=64))


def gemma3():
    return Gemma3ForCausalLM(Gemma3TextConfig(**DECODER, **FULL))


def mixtral():
    return MixtralForCausalLM(MixtralConfig(**DECODER, **EXPERTS))


def gpt_oss():
    return GptOssForCausalLM(GptOssConfig(**{**DECODER, "intermediate_size": 16}, **FULL, **EXPERTS))


def bert():
    return BertForSequenceClassification(BertConfig(**SMALL, max_position_embeddings=64, num_labels=3))


def whisper():
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("attention_heads", 2))}
    more = {"max_source_positions": 10, "max_target_positions": 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = WhisperConfig(
        vocab_size=64,
        d_model=16,
        num_mel_bins=8,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        **sizes,
        **more,
        decoder_start_token_id=1,
    )
    return WhisperForConditionalGeneration(config)


EXPERT_PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
TEXT = {"input_ids": TOKENS}
SOUND = {"input_features": torch.linspace(-1, 1, 320).reshape(2, 8, 20), "decoder_input_ids": TOKENS}
MODELS = {
    "llama": (llama, {"target_modules": "all-linear"}, TEXT),
    "tied token rows": (llama, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}, TEXT),
    "a saved head": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, TEXT),
    "tied embedding": (llama, {"target_modules": ["embed_tokens", "q_proj"]}, TEXT),
    "tied head": (llama, {"target_modules": ["lm_head", "q_proj"]}, TEXT),
    "DoRA": (llama, {"target_modules": ["q_proj", "down_proj"], "use_dora": True}, TEXT),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc", "wte", "wpe"], "fan_in_fan_out": True}, TEXT),
    "gpt2, all biases": (gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"}, TEXT),
    "gemma 3, scaled embedding": (gemma3, {"target_modules": ["q_proj", "embed_tokens"]}, TEXT),
    "mixtral": (mixtral, {"target_modules": ["q_proj"], "target_parameters": [*EXPERT_PARAMETERS, "mlp.gate.weight"]}, TEXT),
    "gpt-oss, transposed experts": (gpt_oss, {"target_modules": ["q_proj"], "target_parameters": EXPERT_PARAMETERS}, TEXT),
    "bert with heads": (bert, {"target_modules": ["query", "value", "dense"], "task_type": "SEQ_CLS"}, TEXT),
    "whisper": (whisper, {"target_modules": ["q_proj", "fc1", "proj_out"]}, SOUND),
}


def built(build):
    torch.manual_seed(0)
    return build().eval()


def trained(build, folder: Path, seed: int, **config: object) -> Path:
    """Make an adapter with PEFT whose values are random everywhere."""
    torch.manual_seed(seed)
    model = get_peft_model(built(build), LoraConfig(**{"r": 4, "lora_alpha": 8, **config}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=generator))
            elif any(part in name for part in ("lora_", "modules_to_save", "trainable_tokens_delta", ".bias")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def by_peft(build, folder: Path, **inputs: torch.Tensor) -> torch.Tensor:
    return PeftModel.from_pretrained(built(build), folder).eval()(**inputs).logits


@pytest.fixture(scope="module", params=LAYOUTS, ids=str)
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    first, second = LAYOUTS[request.param]
    return {"a": peft_adapter(folder / "a", 10, **first), "b": peft_adapter(folder / "b", 20, **second)}


def of_net(pair: dict[str, Path]) -> Mixture:
    return Mixture(net(), [Adapter.open(folder, name) for name, folder in pair.items()])


@torch.no_grad()
def test_every_layout_equals_peft_alone_and_weighted(pair):
    mixture, base = of_net(pair), net()(IDS)
    for weights in ({"a": 1.0}, {"b": 1.0}, {"a": 0.7, "b": -0.4}):
        with mixture.active(weights) as model:
            torch.testing.assert_close(model(IDS), both_active({n: pair[n] for n in weights}, weights, IDS), **CLOSE)
    assert torch.equal(mixture.model(IDS), base)


def merged_in_memory(sources: dict[str, Path], settings: dict[str, object]) -> list[MergedModule]:
    recipe, _ = read_request(None, sources, settings)
    inventory = take_inventory(recipe)
    engine = Engine(inventory, make_plan(inventory, workers=1), workers=1, progress=SilentProgress())
    combiner = engine.prepare()
    return list(engine.run(combiner, engine.ranks(combiner)))


@torch.no_grad()
@pytest.mark.parametrize(
    "settings",
    [
        {"weights": [0.7, -0.4]},
        {"method": "ties", "density": 0.5, "rank": 3},
        {"method": "ties", "density": 0.5, "space": "core", "layout": "pattern"},
    ],
    ids=["linear", "ties, rank 3", "ties, core"],
)
def test_an_attached_merge_is_the_saved_adapter(pair, tmp_path, settings):
    """Bit for bit what the saved adapter does in a mixture of its own, and what PEFT makes of it to 1e-5."""
    folder = plait.merge(pair, out=tmp_path / "out", **settings).folder
    mixture = of_net(pair)
    with mixture.attached(merged_in_memory(pair, settings)) as model:
        attached = model(IDS)
    with of_net({"saved": folder}).active({"saved": 1.0}) as model:
        assert torch.equal(model(IDS), attached)
    torch.testing.assert_close(attached, loaded(folder, IDS), **CLOSE)
    assert torch.equal(mixture.model(IDS), net()(IDS))


@torch.no_grad()
def test_dora_alone_weighted_and_merged(tmp_path):
    base = save_base(tmp_path / "base")
    targets = ["q_proj", "v_proj", "embed", "c_attn", "conv2"]
    trio = {
        "a": peft_adapter(tmp_path / "a", 1, target_modules=targets, use_dora=True, fan_in_fan_out=True),
        "b": peft_adapter(tmp_path / "b", 2, target_modules=["q_proj", "v_proj"], r=2),
        "c": peft_adapter(tmp_path / "c", 3, target_modules=targets[:3], use_dora=True, r=3),
    }
    mixture = of_net(trio)
    for name, folder in trio.items():
        with mixture.active({name: 1.0}) as model:
            torch.testing.assert_close(model(IDS), loaded(folder, IDS), **CLOSE)
    weights = {"a": 0.6, "b": -0.3, "c": 0.5}
    settings = {"weights": weights, "base_model": str(base)}
    folder = plait.merge(trio, out=tmp_path / "out", **settings).folder
    with mixture.active(weights) as model:
        torch.testing.assert_close(model(IDS), loaded(folder, IDS), **CLOSE)
    with mixture.attached(merged_in_memory(trio, settings)) as model:
        torch.testing.assert_close(model(IDS), loaded(folder, IDS), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("case", MODELS)
def test_every_kind_of_model_equals_peft(tmp_path, case):
    build, config, inputs = MODELS[case]
    pair = {n: trained(build, tmp_path / n, seed, **config) for seed, n in enumerate("ab", 1)}
    mixture = Mixture(built(build), [Adapter.open(folder, n) for n, folder in pair.items()])
    bits, base = fingerprint(mixture.model), mixture.model(**inputs).logits
    for name, folder in pair.items():
        expected = by_peft(build, folder, **inputs)
        with mixture.active({name: 1.0}) as model:
            torch.testing.assert_close(model(**inputs).logits, expected, **CLOSE)
        assert not torch.allclose(expected, base, atol=1e-3)
    assert torch.equal(mixture.model(**inputs).logits, base)
    assert fingerprint(mixture.model) == bits


@torch.no_grad()
def test_weighted_sums_equal_pefts_exact_combination(tmp_path):
    pair = {n: trained(llama, tmp_path / n, seed, target_modules="all-linear") for seed, n in enumerate("ab", 1)}
    reference = PeftModel.from_pretrained(built(llama), pair["a"], adapter_name="a")
    reference.load_adapter(pair["b"], "b")
    reference.add_weighted_adapter(["a", "b"], [0.7, -0.4], "cat", combination_type="cat")
    reference.set_adapter("cat")
    mixture = Mixture(built(llama), [Adapter.open(folder, n) for n, folder in pair.items()])
    with mixture.active({"a": 0.7, "b": -0.4}) as model:
        torch.testing.assert_close(model(TOKENS).logits, reference.eval()(TOKENS).logits, **CLOSE)


@pytest.mark.parametrize("cache", [True, False])
def test_generation_equals_peft(tmp_path, cache):
    folder = trained(llama, tmp_path / "a", 1, target_modules="all-linear", lora_alpha=32)
    mixture = Mixture(built(llama), [Adapter.open(folder, "a")])
    prompt = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}
    settings = {"max_new_tokens": 12, "do_sample": False, "use_cache": cache, "pad_token_id": 0}
    expected = PeftModel.from_pretrained(built(llama), folder).generate(**prompt, **settings)
    with mixture.active({"a": 1.0}) as model:
        assert torch.equal(model.generate(**prompt, **settings), expected)
    assert not torch.equal(mixture.model.generate(**prompt, **settings), expected)
    both = torch.tensor([[1.0], [0.0]])
    with mixture.candidates(both) as model:  # beams: every row of the batch becomes three
        beams = model.generate(**prompt, **settings, num_beams=3)
    with mixture.active({"a": 1.0}) as model:
        assert torch.equal(beams[0], model.generate(**prompt, **settings, num_beams=3)[0])
    assert torch.equal(beams[1], mixture.model.generate(**prompt, **settings, num_beams=3)[1])


def test_gradients_to_coefficients_equal_those_to_pefts_scaling(tmp_path):
    """PEFT multiplies by `scaling`, which may be a tensor: its gradient is ours, times the scaling as trained."""
    pair = {n: trained(llama, tmp_path / n, seed, target_modules="all-linear") for seed, n in enumerate("ab", 1)}
    reference = PeftModel.from_pretrained(built(llama), pair["a"], adapter_name="a")
    reference.load_adapter(pair["b"], "b")
    reference.base_model.set_adapter(["a", "b"])
    theirs = torch.tensor([0.5, -0.25], requires_grad=True)
    for module in reference.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling.update({n: 2.0 * theirs[i] for i, n in enumerate("ab")})  # alpha / r is 2
    reference.eval()(TOKENS, labels=TOKENS).loss.backward()
    ours = torch.tensor([0.5, -0.25], requires_grad=True)
    mixture = Mixture(built(llama), [Adapter.open(folder, n) for n, folder in pair.items()])
    with mixture.mixed(ours) as model:
        model(TOKENS, labels=TOKENS).loss.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, **CLOSE)


def test_gradient_checkpointing_changes_no_gradient(tmp_path):
    folder = trained(llama, tmp_path / "a", 1, target_modules="all-linear")
    mixture, gradients = Mixture(built(llama), [Adapter.open(folder, "a")]), []
    for checkpointing in (False, True):
        if checkpointing:
            model = mixture.model  # its name since version 5, or before
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
            mixture.model.train()  # transformers checkpoints in training mode only
        values = torch.full((3, 1), 0.5, requires_grad=True)  # lm_head is in no layer
        with mixture.mixed(values[: len(mixture.axes.layers)], "layer") as model:
            model(TOKENS, labels=TOKENS).loss.backward()
        gradients.append(values.grad)
    torch.testing.assert_close(*gradients)


@torch.no_grad()
def test_bfloat16_is_as_near_to_float32_as_peft_is(tmp_path):
    """PEFT keeps float32 factors on a bfloat16 base; ours have the base's dtype, and the output's rounding hides it."""
    folder = trained(llama, tmp_path / "a", 1, target_modules="all-linear")
    exact = by_peft(llama, folder, **TEXT)
    theirs = PeftModel.from_pretrained(built(llama).bfloat16(), folder).eval()(TOKENS).logits
    with Mixture(built(llama).bfloat16(), [Adapter.open(folder, "a")]).active({"a": 1.0}) as model:
        ours = model(TOKENS).logits
    assert ours.dtype == torch.bfloat16
    assert float((ours - exact).abs().mean()) < 1.25 * float((theirs - exact).abs().mean())


@torch.no_grad()
def test_offloaded_weights_work_where_they_are_not_read(tmp_path):
    """accelerate keeps weights elsewhere and brings them for each call, as `device_map` does for a model that does not fit."""
    from accelerate import cpu_offload

    folder = trained(llama, tmp_path / "a", 1, target_modules="all-linear", modules_to_save=None)
    adapter = Adapter.open(folder, "a")
    expected = by_peft(llama, folder, **TEXT)
    model = cpu_offload(built(llama), torch.device("cpu"))
    assert next(model.parameters()).is_meta
    mixture = Mixture(model, [adapter])
    with mixture.active({"a": 1.0}) as live:
        torch.testing.assert_close(live(TOKENS).logits, expected, **CLOSE)
    torch.testing.assert_close(model(TOKENS).logits, built(llama)(TOKENS).logits, **CLOSE)
    dora = Adapter.open(trained(llama, tmp_path / "d", 1, target_modules=["q_proj"], use_dora=True), "d")
    with pytest.raises(PlaitError, match=r"DoRA needs the base's weights\. .* its weight is offloaded"):
        Mixture(model, [dora])
    fused = Adapter.open(
        trained(gpt_oss, tmp_path / "m", 1, target_modules=[], target_parameters=["mlp.experts.down_proj"]), "m"
    )
    with pytest.raises(PlanError, match=r"'model\.layers\.0\.mlp\.experts\.down_proj': its weight is offloaded"):
        Mixture(cpu_offload(built(gpt_oss), torch.device("cpu")), [fused])


def test_a_compiled_model_takes_part(tmp_path):
    held = cohort(tmp_path, {n: part("layers.0.v_proj") for n in "ab"})
    mixture = Mixture(net().layers[0], [Adapter.open(w.folder, n) for n, w in held.items()])
    layer = mixture.model.v_proj
    compiled, x = torch.compile(layer, backend="eager", fullgraph=True), torch.randn(5, 8)
    for values in (torch.tensor([1.0, 0.5]), torch.tensor([0.3, -2.0], requires_grad=True)):
        with mixture.mixed(values):
            torch.testing.assert_close(compiled(x), layer(x), **CLOSE)
    torch.testing.assert_close(compiled(x), layer(x), **CLOSE)


# loading


def test_load_chooses_the_class_by_the_task(tmp_path):
    built(llama).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    folder = trained(llama, tmp_path / "a", 1, target_modules=["q_proj"], task_type="CAUSAL_LM")
    mixture = Mixture.load(tmp_path / "base", [Adapter.open(folder, "a")])
    assert type(mixture.model) is LlamaForCausalLM
    assert (mixture.model.dtype, mixture.tokenizer) == (torch.bfloat16, None)
    assert Mixture.load(tmp_path / "base", [], dtype="float32", device_map="cpu").model.dtype == torch.float32


@torch.no_grad()
def test_load_classifiers_with_heads_of_their_own(tmp_path):
    """The base has no classifier: alone it says nothing, each adapter brings its own."""
    built(bert).bert.save_pretrained(tmp_path / "base")
    pair = {n: trained(bert, tmp_path / n, s, target_modules=["query"], task_type="SEQ_CLS") for s, n in enumerate("ab", 1)}
    mixture = Mixture.load(tmp_path / "base", [Adapter.open(folder, n) for n, folder in pair.items()])
    assert type(mixture.model) is BertForSequenceClassification
    assert not mixture.model(TOKENS).logits.any()
    for name, folder in pair.items():
        with mixture.active({name: 1.0}) as model:
            torch.testing.assert_close(model(TOKENS).logits, by_peft(bert, folder, **TEXT), **CLOSE)


def test_load_refuses_a_mix_of_tasks_and_a_random_rest(tmp_path):
    built(bert).bert.save_pretrained(tmp_path / "base")
    a = trained(bert, tmp_path / "a", 1, target_modules=["query"], task_type="SEQ_CLS")
    b = trained(bert, tmp_path / "b", 1, target_modules=["query"], task_type="TOKEN_CLS", modules_to_save=["classifier"])
    types = r"\(.*a/adapter_config\.json: 'SEQ_CLS', .*b/adapter_config\.json: 'TOKEN_CLS'\)"
    with pytest.raises(PlanError, match=rf"different task types {types}"):
        Mixture.load(tmp_path / "base", [Adapter.open(a, "a"), Adapter.open(b, "b")])
    headless = peft_only_lora(a, tmp_path / "headless")
    with pytest.raises(PlanError, match=r"the base lacks classifier\.bias, classifier\.weight, and no adapter brings it"):
        Mixture.load(tmp_path / "base", [Adapter.open(headless, "a")])


def peft_only_lora(folder: Path, out: Path) -> Path:
    out.mkdir()
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({n: t for n, t in tensors.items() if "lora_" in n}, out / "adapter_model.safetensors")
    shutil.copy(folder / "adapter_config.json", out)
    return out


def test_transformers_missing_is_said_with_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(PlaitError, match=r"a live model needs the package 'transformers': .* 'plait\[eval\]'"):
        Mixture.load("anywhere", [])
