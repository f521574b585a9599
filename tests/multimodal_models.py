"""Small language models that see images or hear sounds, with processors and chat templates: every token is a character."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from plait.tasks.images import decoded
from plait.tasks.sounds import samples
from tests.chat_models import byte_tokenizer
from tests.two_adapters import write_yaml

TEXT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
TEXT |= {"max_position_embeddings": 512, "pad_token_id": None, "bos_token_id": None}
_ADDED = {
    "qwen2_vl": ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"],
    "idefics3": [
        "<fake_token_around_image>",
        "<image>",
        "<end_of_utterance>",
        "<global-img>",
        "<row_1_col_1>",
        "<row_1_col_2>",
    ],
    "llava": ["<image>"],
    "qwen2_audio": ["<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>"],
    "qwen2_5_omni": [
        f"<|{name}|>" for name in ("audio_bos", "AUDIO", "audio_eos", "vision_bos", "IMAGE", "VIDEO", "vision_eos")
    ],
}
_MARKS = {"qwen2_vl": "<|vision_start|><|image_pad|><|vision_end|>", "idefics3": "<image>", "llava": "<image>"}
_MARKS["qwen2_audio"] = _MARKS["qwen2_5_omni"] = "<|audio_bos|><|AUDIO|><|audio_eos|>"
#: How the tests find modules of language, of what perceives, and between both, to adapt.
TARGETS = {
    "qwen2_vl": r".*(q_proj|v_proj|visual.*(qkv|fc1|mlp\.[02]))",
    "idefics3": r".*(text_model.*(q_proj|v_proj)|vision_model.*(q_proj|fc1)|connector.*proj)",
    "llava": r".*(language_model.*(q_proj|v_proj)|vision_tower.*(q_proj|fc1)|multi_modal_projector.linear_1)",
    "qwen2_audio": r".*(language_model.*(q_proj|v_proj)|audio_tower.*(q_proj|fc1)|multi_modal_projector.linear)",
    "qwen2_5_omni": r".*(language_model.*(q_proj|v_proj)|audio_tower.*(q_proj|fc1|proj))",
}


def template(mark: str, kind: str = "image") -> str:
    return (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}"
        f"{{% if part.type == '{kind}' %}}{mark}{{% else %}}{{{{ part.text }}}}{{% endif %}}"
        "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a kind of model; that of LLaVA begins every text with a token."""
    special = {"bos_token": "<s>"} if kind == "llava" else {}
    found = byte_tokenizer(None, pad_token="<|pad|>", **special)
    found.add_special_tokens({"additional_special_tokens": _ADDED[kind]})
    if kind == "qwen2_5_omni":
        found._set_model_specific_special_tokens({f"{name.strip('<|>').lower()}_token": name for name in _ADDED[kind]})
    if kind == "llava":
        begin = ("<s>", found.convert_tokens_to_ids("<s>"))
        found.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[begin])
    return found


def fresh(kind: str) -> Any:
    """Return a model of random weights."""
    tokens = tokenizer(kind)
    text: dict[str, Any] = {**TEXT, "vocab_size": len(tokens), "eos_token_id": tokens.eos_token_id}
    torch.manual_seed(0)
    if kind == "qwen2_vl":
        rotary = {"mrope_section": [2, 1, 1], "rope_theta": 100.0}
        text["rope_parameters"] = {"rope_type": "default", **rotary}
        if not hasattr(transformers.Qwen2Config(), "rope_parameters"):  # before version 5
            text |= {"rope_scaling": {"type": "mrope", **rotary}, "rope_theta": 100.0}
        vision = {"depth": 1, "embed_dim": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4, "hidden_size": 16}
        ids = {f"{name}_token_id": tokens.convert_tokens_to_ids(f"<|{name}_pad|>") for name in ("image", "video")}
        ids |= {f"vision_{end}_token_id": tokens.convert_tokens_to_ids(f"<|vision_{end}|>") for end in ("start", "end")}
        config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, **ids)
        model = transformers.Qwen2VLForConditionalGeneration(config)
    elif kind == "qwen2_audio":
        sound = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 24, "num_mel_bins": 8}
        text["model_type"], sound["max_source_positions"] = "qwen2", 50
        audio = tokens.convert_tokens_to_ids("<|AUDIO|>")
        config = transformers.Qwen2AudioConfig(text_config=text, audio_config=sound, audio_token_index=audio)
        model = transformers.Qwen2AudioForConditionalGeneration(config)
    elif kind == "qwen2_5_omni":
        text["rope_parameters"] = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 100.0}
        sound = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 24, "num_mel_bins": 8}
        sound |= {"output_dim": 16, "n_window": 25, "max_source_positions": 50}
        vision = {
            "depth": 1,
            "hidden_size": 16,
            "num_heads": 2,
            "intermediate_size": 24,
            "patch_size": 4,
            "out_hidden_size": 16,
        }
        named = {f"{name}_token_index": f"<|{name.upper()}|>" for name in ("audio", "image", "video")}
        named |= {"audio_start_token_id": "<|audio_bos|>", "audio_end_token_id": "<|audio_eos|>"}
        named |= {"vision_start_token_id": "<|vision_bos|>", "vision_end_token_id": "<|vision_eos|>"}
        ids = {name: tokens.convert_tokens_to_ids(token) for name, token in named.items()}
        config = transformers.Qwen2_5OmniThinkerConfig(text_config=text, audio_config=sound, vision_config=vision, **ids)
        model = transformers.Qwen2_5OmniThinkerForConditionalGeneration(config)
    else:
        vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        vision |= {"image_size": 8, "patch_size": 4}
        text["model_type"], image = "llama", tokens.convert_tokens_to_ids("<image>")
        if kind == "idefics3":
            config = transformers.Idefics3Config(
                text_config=text, vision_config=vision, scale_factor=2, image_token_id=image, pad_token_id=text["pad_token_id"]
            )
            model = transformers.Idefics3ForConditionalGeneration(config)
        else:
            vision["model_type"] = "clip_vision_model"
            config = transformers.LlavaConfig(
                text_config=text, vision_config=vision, image_token_index=image, vision_feature_layer=-1
            )
            model = transformers.LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)  # the initialization is so small that all images look alike
    return model.eval()


def save_base(kind: str, folder: Path, model: Any = None) -> Path:
    """Write a model, its tokenizer, its processor's settings and its chat template."""
    model = model or fresh(kind)
    model.generation_config.eos_token_id = tokenizer(kind).eos_token_id
    model.save_pretrained(folder)
    tokenizer(kind).save_pretrained(folder)
    size: dict[str, Any]
    if kind == "qwen2_vl":
        size = {"patch_size": 4, "merge_size": 2, "min_pixels": 64, "max_pixels": 400}
        settings = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor", **size}
    elif kind == "idefics3":
        size = {"size": {"longest_edge": 16}, "max_image_size": {"longest_edge": 8}}
        settings = {"image_processor_type": "Idefics3ImageProcessor", "processor_class": "Idefics3Processor", **size}
        (folder / "processor_config.json").write_text(json.dumps({"processor_class": "Idefics3Processor", "image_seq_len": 1}))
    elif kind == "qwen2_5_omni":
        _enclose(model, folder)
        heard = {"feature_size": 8, "chunk_length": 1, "sampling_rate": 16000}
        seen = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 4, "merge_size": 2}
        settings = {
            "feature_extractor_type": "WhisperFeatureExtractor",
            "processor_class": "Qwen2_5OmniProcessor",
            **seen,
            **heard,
        }
    elif kind == "qwen2_audio":
        heard = {"feature_size": 8, "chunk_length": 1, "sampling_rate": 16000}  # one second
        settings = {"feature_extractor_type": "WhisperFeatureExtractor", "processor_class": "Qwen2AudioProcessor", **heard}
    else:
        size = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
        settings = {"image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor", **size}
        own = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        (folder / "processor_config.json").write_text(json.dumps({"processor_class": "LlavaProcessor", **own}))
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    heard_alone = kind in ("qwen2_audio", "qwen2_5_omni")
    (folder / "chat_template.jinja").write_text(template(_MARKS[kind], "audio" if heard_alone else "image"))
    return folder


def _enclose(thinker: Any, folder: Path) -> None:
    """Write a model that writes as a part of one that speaks too, as checkpoints have it."""
    config = transformers.Qwen2_5OmniConfig(
        thinker_config=thinker.config.to_dict(), talker_config={}, token2wav_config={}, enable_audio_output=False
    )
    complete = transformers.Qwen2_5OmniForConditionalGeneration(config)
    complete.thinker.load_state_dict(thinker.state_dict())
    complete.save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "architectures": ["Qwen2_5OmniModel"]}))


def turns(parts: Sequence[str | None], kind: str = "image") -> list[dict[str, Any]]:
    """Return a user's turn as transformers has it, with a file in place of None."""
    content = [{"type": kind} if part is None else {"type": "text", "text": part} for part in parts]
    return [{"role": "user", "content": content}]


def prepared(processor: Any, parts: Sequence[str | None], files: Sequence[bytes]) -> tuple[str, dict[str, Any]]:
    """Return a chat as transformers renders it, and what its processor is given besides."""
    kind = "audio" if hasattr(processor, "feature_extractor") else "image"
    prompt = processor.apply_chat_template(turns(parts, kind), add_generation_prompt=True)
    if kind == "image":
        return prompt, {"images": [[*map(decoded, files)]], "return_tensors": "pt"}
    rate = processor.feature_extractor.sampling_rate
    return prompt, {"audio": [samples(f, rate) for f in files], "sampling_rate": rate, "return_tensors": "pt"}


def write_chats(
    folder: Path, name: str, column: str, contents: Sequence[bytes], asked: Mapping[str, Any], changes: Mapping[str, Any]
) -> Path:
    """Write a task of chats with a file per row, as it is asked but for changes; labels go round, for `two` the other way."""
    folder.mkdir(parents=True, exist_ok=True)
    turn, ending, labels = 3 if name == "two" else 1, {"image": "png", "audio": "wav"}[column], asked["labels"]
    rows = [{column: f"{name}{i}.{ending}", "who": "ab"[i % 2], "label": labels[i * turn % 4]} for i in range(len(contents))]
    for row, data in zip(rows, contents, strict=True):
        (folder / row[column]).write_bytes(data)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "name": name,
        "kind": "classification",
        "data": {"path": f"{name}.jsonl"},
        "splits": {"test": {"rows": [0, len(rows)]}},
        column: column,
        "target": "{{ label }}",
        **asked,
        **changes,
    }
    return write_yaml(folder, name, {key: value for key, value in task.items() if value is not None})


def _taken(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what processors make without the types of tokens, which older ones make too and none of these models takes."""
    return {name: value for name, value in given.items() if name != "token_type_ids"}


@torch.no_grad()
def likelihoods(
    processor: Any, model: Any, parts: Sequence[str | None], files: Sequence[bytes], labels: Sequence[str], delimiter: str = ""
) -> list[float]:
    """Return log p of every label after a chat as transformers has it: the complete text read anew for each."""
    prompt, files_given = prepared(processor, parts, files)
    start = processor(text=[prompt], **files_given)["input_ids"].shape[1]
    found = []
    for label in labels:
        given = _taken(processor(text=[prompt + delimiter + label], **files_given))
        scores = model(**given).logits[0, start - 1 : -1].log_softmax(-1)
        found.append(float(scores.gather(1, given["input_ids"][0, start:, None]).sum()))
    return found


@torch.no_grad()
def written(processor: Any, model: Any, parts: Sequence[str | None], files: Sequence[bytes], tokens: int) -> str:
    """Return what a model writes after a chat, greedily, as transformers has it."""
    prompt, files_given = prepared(processor, parts, files)
    given = _taken(processor(text=[prompt], **files_given))
    out = model.generate(**given, max_new_tokens=tokens, do_sample=False)[0, given["input_ids"].shape[1] :]
    return str(processor.tokenizer.decode(out, skip_special_tokens=True))
