"""What plait expects of transformers beyond its documented use. A test that fails names what a release has changed."""

from __future__ import annotations

import importlib
import warnings
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn

from plait.libraries.transformers import chats, conversion, kinds, layers, quiet, reading, senses, trainer
from tests.chat_models import byte_tokenizer
from tests.language_models import language_model
from tests.multimodal_models import fresh, save_base, tokenizer

MODERN = int(transformers.__version__.split(".")[0]) >= 5


def small(name: str, **more: object) -> nn.Module:
    sizes = {"vocab_size": 37, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    return getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**{**sizes, **more})).eval()


def test_a_models_forward_names_the_argument_that_takes_a_cache():
    argument = reading.cache_argument(language_model())
    assert argument in reading.forward_parameters(language_model())
    assert argument != "use_cache"


def test_a_cache_is_found_in_the_output_and_copies_its_rows():
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    found = reading.cache_of(language_model()(ids, use_cache=True))
    assert found is not None
    _, cache = found
    assert isinstance(cache, transformers.Cache)
    assert cache.get_seq_length() == 3
    reading.copy_rows(cache, torch.tensor([1, 1, 0]))
    assert cache.layers[0].keys.shape[0] == 3
    assert torch.equal(cache.layers[0].keys[0], cache.layers[0].keys[1])
    assert reading.why_cache_not_continued(cache) is None
    assert reading.cache_of(language_model()(ids, use_cache=False)) is None


def test_what_is_not_a_cache_is_not_taken_for_one():
    assert reading.cache_of({"past_key_values": ((1, 2),), "logits": torch.zeros(1)}) is None
    assert reading.cache_argument(SimpleNamespace(forward=lambda ids, use_cache=True: None)) is None


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Mistral", "Gemma2", "GPTNeoX"])
def test_attention_can_be_continued(name):
    assert reading.why_not_continued(small(name)) is None


def test_running_states_cannot_be_continued():
    assert reading.why_not_continued(small("Mamba", state_size=4)) is not None


def test_a_cache_of_running_states_is_known_by_what_its_layers_hold():
    layer = SimpleNamespace(keys=None, recurrent_states=None)
    assert "recurrent_states" in str(reading.why_cache_not_continued(SimpleNamespace(layers=[layer])))


def test_windows():
    assert reading.attention_window(small("Mistral", sliding_window=9)) == 9
    assert reading.attention_window(small("Gemma2", sliding_window=9)) == 9
    assert reading.attention_window(small("Mistral", sliding_window=None)) is None
    assert reading.attention_window(small("Qwen2")) is None, "it has the setting, and does not use it"
    assert reading.attention_window(small("Llama")) is None


def test_positions():
    assert not reading.counts_by_place(small("Llama"))
    assert reading.counts_by_place(small("Bloom"))
    neo = transformers.GPTNeoConfig(
        vocab_size=37, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
    )
    assert reading.counts_by_place(transformers.GPTNeoForCausalLM(neo))
    assert reading.reserved_positions(small("Roberta", is_decoder=True)) == 2
    assert reading.reserved_positions(small("Llama")) == 0


def test_conv1d_is_known_by_its_class():
    block = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=37, n_embd=32, n_layer=1, n_head=4)).transformer.h[
        0
    ]
    assert layers.is_conv1d(block.attn.c_attn)
    assert block.attn.c_attn.weight.shape == (32, 96)
    assert not layers.is_conv1d(nn.Conv1d(2, 2, 1))


def test_fused_experts_say_how_they_lie():
    config = transformers.GptOssConfig(
        vocab_size=37,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
    )
    experts = transformers.GptOssForCausalLM(config).model.layers[0].mlp.experts
    assert layers.holds_transposed(experts) is MODERN, "since version 5 they say so"
    assert experts.gate_up_proj.shape == (2, 32, 48), "(experts, d_in, d_out)"
    assert not layers.holds_transposed(small("Llama").model.layers[0].mlp)


def test_tied_parameters_are_named():
    tied = conversion.tied_parameters(small("Llama", tie_word_embeddings=True))
    assert tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert conversion.tied_parameters(small("Llama", tie_word_embeddings=False)) == {}


def test_embeddings_with_a_scale_of_their_own():
    assert layers.embedding_scale(small("Llama").model.embed_tokens) is None
    gemma = transformers.Gemma3TextConfig(
        vocab_size=37, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, head_dim=8
    )
    scale = layers.embedding_scale(transformers.Gemma3ForCausalLM(gemma).model.embed_tokens)
    assert float(scale) == pytest.approx(32**0.5, rel=1e-2)


def test_conversion_says_where_experts_of_a_checkpoint_go():
    with torch.device("meta"):
        model = small("Mixtral", num_local_experts=2, num_key_value_heads=2)
    found = conversion.checkpoint_conversion(model)
    assert (found is not None) is MODERN, "since version 5"
    if found is None:
        return
    name, pattern = found.rename("model.layers.0.block_sparse_moe.experts.1.w1.weight")
    assert name in dict(model.named_parameters())
    assert conversion.steps_of(found.by_pattern[pattern]) == [("MergeModulelist", 0), ("Concatenate", 1)]
    name, pattern = found.rename("model.layers.0.self_attn.q_proj.weight")
    assert (name, pattern) == ("model.layers.0.self_attn.q_proj.weight", None)
    assert sorted(["a.10.w", "a.9.w"], key=found.order) == ["a.9.w", "a.10.w"]


def test_quiet_keeps_bars_logs_and_warnings_back_and_gives_them_back():
    logging = transformers.utils.logging
    before = logging.is_progress_bar_enabled(), logging.get_verbosity()
    with quiet.silence():
        assert not logging.is_progress_bar_enabled()
        assert logging.get_verbosity() == logging.ERROR
        warnings.warn("of its own affairs", UserWarning, stacklevel=1)  # any warning that comes through is an error here
    assert (logging.is_progress_bar_enabled(), logging.get_verbosity()) == before


def test_the_trainer_takes_back_its_best_checkpoint_by_a_method_of_this_name():
    assert callable(transformers.Trainer._load_best_model)


def small_trainer(folder, **changes: object) -> transformers.Trainer:
    quick = {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "per_device_train_batch_size": 1}
    arguments = transformers.TrainingArguments(str(folder), **{**quick, "max_steps": 3, "save_steps": 1, **changes})
    rows = [{"input_ids": torch.tensor([1, 2]), "labels": torch.tensor([1, 2])} for _ in range(4)]
    return transformers.Trainer(small("Llama"), arguments, train_dataset=rows)


@pytest.mark.filterwarnings("ignore")  # of transformers, about itself
def test_steps_are_reported_and_none_is_taken_after_the_last(tmp_path):
    seen: list[object] = []
    report = {"start": lambda *n: seen.append(n), "step": lambda: seen.append("step"), "end": lambda: seen.append("end")}
    first = small_trainer(tmp_path)
    trainer.report_steps(first, **report)
    trainer.take_steps(first, None)
    assert seen == [(3, 0), "step", "step", "step", "end"]
    seen.clear()
    again = small_trainer(tmp_path)
    trainer.report_steps(again, **report)
    trainer.take_steps(again, str(tmp_path / "checkpoint-3"))
    assert again.state.global_step == 3
    assert "step" not in seen
    assert seen[-1] == "end"
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name


def test_chats_are_rendered_in_one_place():
    assert chats.renders_chats_by_a_function()
    tokens = byte_tokenizer("{{ messages }}")
    with chats.chats_rendered_by(lambda source: SimpleNamespace(render=lambda **columns: f"{source}: {sorted(columns)}")):
        found = tokens.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert found.startswith("{{ messages }}: ")
    assert "'messages'" in found
    assert tokens.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False).startswith("[")


def test_tasks_are_told_by_the_names_of_classes():
    known = transformers.models.auto.modeling_auto
    assert all(hasattr(transformers, name) for name in kinds.AUTO_MODELS.values())
    for task, table in kinds._HEADS.items():
        assert kinds.head_class("bert", task) == getattr(known, table)["bert"]
        assert kinds.task_of({"architectures": [getattr(known, table)["bert"]]}) == task
    assert kinds.head_class("bert", "CAUSAL_LM") is None
    for name in ("LlamaForCausalLM", "GPT2LMHeadModel"):
        assert hasattr(transformers, name)
        assert kinds.task_of({"architectures": [name]}) == "CAUSAL_LM"
    assert kinds.task_of({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}) == "SEQ_2_SEQ_LM"
    assert kinds.task_of({"architectures": ["BertModel"]}) is None
    assert kinds.task_of({}) is None


@pytest.mark.parametrize(("name", "sizes"), [
    ("GPT2", {"n_embd": 32, "n_layer": 1, "n_head": 4}),
    ("OpenAIGPT", {"n_embd": 32, "n_layer": 1, "n_head": 4}),
    ("ImageGPT", {"n_embd": 32, "n_layer": 1, "n_head": 4}),
    ("DecisionTransformer", {"hidden_size": 32, "n_layer": 1, "n_head": 4}),
])  # fmt: skip
def test_models_whose_layers_are_conv1d(name, sizes):
    config = getattr(transformers, f"{name}Config")(**sizes)
    assert config.model_type in layers.CONV1D_MODELS
    with torch.device("meta"):
        model = getattr(transformers, f"{name}Model")(config)
    for path, module in model.named_modules():
        named = path.rpartition(".")[2] in layers.CONV1D_LAYERS
        assert layers.is_conv1d(module) is named, path


@pytest.mark.skipif(
    not MODERN, reason="version 4 compiles this model's functions, which the watched warnings cannot be part of"
)
def test_layers_of_these_names_are_linear_elsewhere():
    config = transformers.GPTBigCodeConfig(vocab_size=37, n_embd=32, n_layer=1, n_head=4)
    assert config.model_type not in layers.CONV1D_MODELS
    with torch.device("meta"):
        model = transformers.GPTBigCodeForCausalLM(config)
    assert isinstance(model.get_submodule("transformer.h.0.attn.c_attn"), nn.Linear)


@pytest.mark.skipif(not MODERN, reason="experts are fused since version 5")
@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe"])
def test_fused_experts_declare_their_parameters_in_this_order(name):
    with torch.device("meta"):
        model = small(name, num_local_experts=2, num_experts=2, num_key_value_heads=2)
    experts = [p for p, _ in model.named_parameters() if ".experts." in p]
    names = [p.rpartition(".")[2] for p in experts]
    assert names
    assert names == sorted(names, key=layers.EXPERT_PARAMETERS.index)


def test_a_processor_is_made_without_its_part_for_videos_and_no_trace_is_left(tmp_path):
    processing = importlib.import_module("transformers.processing_utils")
    home = importlib.import_module("transformers.models.auto.video_processing_auto")

    def state():
        places = [vars(place).get("AutoVideoProcessor") for place in (home, processing.transformers_module)]
        return [processing.ProcessorMixin.check_argument_for_proper_class, *places]

    before = state()
    with senses.without_videos():
        made = transformers.AutoProcessor.from_pretrained(save_base("qwen2_vl", tmp_path))
    assert made.video_processor is None
    assert made.image_processor is not None
    assert state() == before


def test_language_models_that_see_or_hear_have_a_class():
    assert kinds.multimodal_class("qwen2_vl") == "Qwen2VLForConditionalGeneration"
    assert kinds.multimodal_class("qwen2_audio") == "Qwen2AudioForConditionalGeneration"
    assert kinds.multimodal_class("llama") is None
    assert kinds.text_class("llama") == "LlamaForCausalLM"
    assert kinds.text_class("qwen2_vl") is None


@pytest.mark.skipif(not MODERN, reason="its parts have other names before version 5")
def test_a_model_that_speaks_too_has_a_part_that_writes():
    part = kinds.writing_part(transformers.Qwen2_5OmniConfig())
    assert part.architectures == ["Qwen2_5OmniThinkerForConditionalGeneration"]
    assert hasattr(transformers, part.architectures[0])
    config = language_model().config
    assert kinds.writing_part(config) is config


def test_tokens_of_images_and_sounds_are_named_by_a_configuration():
    for kind, names in {"llava": ["<image>"], "idefics3": ["<image>"], "qwen2_audio": ["<|AUDIO|>"]}.items():
        assert senses.media_tokens(fresh(kind)) == set(tokenizer(kind).convert_tokens_to_ids(names))
    names = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    assert senses.media_tokens(fresh("qwen2_vl")) == set(tokenizer("qwen2_vl").convert_tokens_to_ids(names))
    assert senses.media_tokens(language_model()) == set()


def test_positions_after_an_image_are_shifted_by_what_the_model_keeps():
    model = fresh("qwen2_vl")
    with pytest.raises(LookupError, match="not known"):
        reading.position_shift(model)
    model.model.rope_deltas = torch.tensor([[-2]])
    assert reading.position_shift(model).item() == -2
    assert reading.position_shift(language_model()) is None
