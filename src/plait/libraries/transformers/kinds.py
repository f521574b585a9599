"""Which class of transformers loads a kind of model, with which head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plait.extras import optional

#: PEFT's task type → the Auto class that loads a model for it.
AUTO_MODELS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
_ARCHITECTURES = {  # how the names of classes end → PEFT's task type
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
_HEADS = {
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
}
_MEDIA_HEADS = {
    "AutoModelForImageClassification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForAudioClassification": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
}
HEADED_TASKS = frozenset(_HEADS)  #: PEFT's task types whose head a model has or not
_MULTIMODAL = (  # before version 5 those that hear are among the encoder-decoder models
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
)


def auto_class(task_type: str | None) -> str:
    """Return the Auto class that loads a model for PEFT's task type; `AutoModel` where it has none for it."""
    return AUTO_MODELS.get(task_type or "", "AutoModel")


def task_of(config: Mapping[str, Any]) -> str | None:
    """Return PEFT's task type for a model, as the name of its class ends; None where it is not known.

    Args:
        config: its `config.json`.
    """
    architectures = config.get("architectures") or [""]
    if config.get("is_encoder_decoder") and "ForConditionalGeneration" in architectures[0]:
        return "SEQ_2_SEQ_LM"
    return next((task for end, task in _ARCHITECTURES.items() if architectures[0].endswith(end)), None)


def head_class(model_type: str, task_type: str) -> str | None:
    """Return the name of the class of a model with a task's head; None where there is none.

    Raises:
        MissingPackageError: transformers is not installed.
    """
    table = _HEADS.get(task_type)
    if table is None:
        return None
    known = optional("transformers.models.auto.modeling_auto", "eval", f"a model with a head ({task_type})")
    name = getattr(known, table, {}).get(model_type)
    return name if isinstance(name, str) else None


def media_classes(model_type: str) -> tuple[str, str] | None:
    """Return the Auto class of classifiers of images or sounds for a kind of model, and the class that it loads; else None.

    Raises:
        MissingPackageError: transformers is not installed.
    """
    known = optional("transformers.models.auto.modeling_auto", "eval", "a live model")
    named = ((auto, getattr(known, table, {}).get(model_type)) for auto, table in _MEDIA_HEADS.items())
    return next(((auto, name) for auto, name in named if isinstance(name, str)), None)


def writes_sounds_down(model_type: str) -> bool:
    """Whether a kind of model has an encoder of sounds and a decoder of texts, and no class of texts alone.

    Raises:
        MissingPackageError: transformers is not installed.
    """
    known = optional("transformers.models.auto.modeling_auto", "eval", "a live model")
    tables = ("MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES")
    speech, texts = (getattr(known, table, {}) for table in tables)
    return model_type in speech and model_type not in texts


def multimodal_class(model_type: str) -> str | None:
    """Return the class of a kind of language model that sees images or hears sounds; None for other kinds.

    Raises:
        MissingPackageError: transformers is not installed.
    """
    known = optional("transformers.models.auto.modeling_auto", "eval", "a live model")
    name = next((found for table in _MULTIMODAL if (found := getattr(known, table, {}).get(model_type))), None)
    return name if isinstance(name, str) else None


def text_class(model_type: str) -> str | None:
    """Return the class of a kind of model that `AutoModelForCausalLM` loads; None where it loads none.

    Raises:
        MissingPackageError: transformers is not installed.
    """
    known = optional("transformers.models.auto.modeling_auto", "eval", "a live model")
    name = known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    return name if isinstance(name, str) else None


def writing_part(config: Any) -> Any:
    """Return the configuration of what writes texts, of a model that speaks too (Qwen2.5-Omni's thinker); of others the same.

    The class of that part loads it from the complete checkpoint.
    """
    part = getattr(config, "thinker_config", None)
    if part is None or (name := multimodal_class(str(part.model_type))) is None:
        return config
    part.architectures = [name]
    return part
