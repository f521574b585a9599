"""A base model and its tokenizer, loaded with transformers as the adapters' task wants it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from plait.adapters.adapter import Adapter
from plait.checkpoints.files import find_weights
from plait.errors import PlanError, collect
from plait.extras import require
from plait.hub import pretrained
from plait.hub.download import resolve_model
from plait.inspection.compatibility import replication_problems
from plait.libraries.accelerate import PLACEMENTS
from plait.libraries.peft import LABELED_TASKS, TASK_HEADS
from plait.libraries.transformers.conversion import newly_made
from plait.libraries.transformers.kinds import (
    AUTO_MODELS,
    media_classes,
    multimodal_class,
    text_class,
    writes_sounds_down,
    writing_part,
)
from plait.linalg.devices import device_problem
from plait.parsing import shown

_CLASSES = {**AUTO_MODELS, "FEATURE_EXTRACTION": "AutoModel"}
_SPEECH = "AutoModelForSpeechSeq2Seq"
_LABELED_WEIGHTS = tuple(f"{layer}.weight" for layer in (*TASK_HEADS["SEQ_CLS"], "classifier.out_proj"))


def require_libraries(device_map: Any = None) -> None:
    """Make sure that a model can be loaded, before any work is done for it.

    Raises:
        MissingPackageError: transformers is not installed, or accelerate, which a `device_map` needs.
    """
    require("a live model", {"eval": ["transformers", *["accelerate"] * (device_map is not None)]})


def load_base_model(
    base: str | Path, adapters: Sequence[Adapter], *, dtype: str, device_map: Any, trust_remote_code: bool
) -> tuple[nn.Module, Any]:
    """Return the base model and its tokenizer (None where the base has none).

    The class is that of the adapters' `task_type`; without one, a classifier of images or sounds where adapters bring one for
    a base that sees or hears, else the class that the base's configuration names. A head that the checkpoint lacks, or has for
    other labels (a classifier that every adapter brings for itself), is zero, so that a bare base predicts nothing rather than
    something random.

    Raises:
        MissingPackageError: transformers is not installed, or accelerate, which `device_map` needs.
        AddressError: the base cannot be found.
        AdapterError: its index is damaged, or names a file in another folder.
        PlanError: adapters of different task types, no model, or a dtype or device that cannot be used.
        TaskError: the tokenizer's files are damaged.
    """
    collect(PlanError, replication_problems(adapters), "these adapters do not fit the base")
    require_libraries(device_map)
    import transformers

    folder = resolve_model(str(base)).folder
    find_weights(folder)  # transformers follows an index out of its folder
    keywords: dict[str, Any] = {"dtype": "auto" if dtype == "stored" else dtype}
    if device_map is not None:
        keywords["device_map"] = device_map
    check_loading(dtype, device_map)
    config = writing_part(pretrained.load_config(folder, trust_remote_code=trust_remote_code))
    name = _class_name(transformers, adapters, config)
    labels = _labels(adapters, untyped=name in (media_classes(str(config.model_type)) or ())[:1])
    if labels is not None:
        config.num_labels = labels
        keywords["ignore_mismatched_sizes"] = True  # the base's own head may have other labels
    loader = getattr(transformers, name)
    tokenizer = _tokenizer(folder, trust_remote_code=trust_remote_code)
    model, report = pretrained.load_model(
        loader, folder, trust_remote_code=trust_remote_code, config=config, output_loading_info=True, **keywords
    )
    _zero(model, newly_made(report), adapters)
    return model, tokenizer


def check_loading(dtype: Any, device_map: Any) -> None:
    """Refuse a dtype or device with which no model can be loaded, before any work is done for it.

    Args:
        dtype: as `LoadOptions` has it.
        device_map: as transformers takes it.

    Raises:
        PlanError: one of them cannot be used here.
    """
    known = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype not in ("auto", "stored") and not (isinstance(known, torch.dtype) and known.is_floating_point):
        raise PlanError(f"dtype {dtype!r} is not allowed; it must be one of auto, stored, float32, bfloat16, float16, float64.")
    if not isinstance(device_map, str) or device_map in PLACEMENTS:
        return
    if problem := device_problem(device_map):
        raise PlanError(
            f"device_map {device_map!r} cannot be used here: {problem}. Allowed are {', '.join(PLACEMENTS)}, or a device "
            "(cpu, cuda:0)."
        )


def _class_name(transformers: Any, adapters: Sequence[Adapter], config: Any) -> str:
    kinds = {str(a.config.raw["task_type"]): a for a in adapters if a.config.raw.get("task_type")}
    if len(kinds) > 1:
        listed = ", ".join(f"{a.config.path}: {shown(kind)}" for kind, a in kinds.items())
        raise PlanError(
            f"the adapters have different task types ({listed}), which are different model classes. Evaluate those of one "
            "type together, or load the model yourself and give it to Mixture(model, adapters)."
        )
    for kind, adapter in kinds.items():
        if kind not in _CLASSES:
            raise PlanError(f"{adapter.config.path}: task_type {shown(kind)} is not known; known are {', '.join(_CLASSES)}.")
        if kind == "CAUSAL_LM" and (seeing := _multimodal(adapters, config)) is not None:
            return seeing
        speech = kind == "SEQ_2_SEQ_LM" and writes_sounds_down(str(config.model_type))
        return _SPEECH if speech else _CLASSES[kind]
    seen_or_heard = media_classes(str(config.model_type))
    if seen_or_heard is not None and any(_label_tensors(a) for a in adapters):
        return seen_or_heard[0]  # PEFT has no task type for them
    named = next(iter(config.architectures or ()), "")
    if named and hasattr(transformers, named):
        return named
    # a checkpoint with code of its own registers it with the Auto classes
    return _SPEECH if writes_sounds_down(str(config.model_type)) else "AutoModelForCausalLM"


def _multimodal(adapters: Sequence[Adapter], config: Any) -> str | None:
    """Return the class of a language model that sees or hears, where the checkpoint is of it and the adapters may be."""
    own = multimodal_class(str(config.model_type))
    if own is None or own not in (config.architectures or ()) or config.is_encoder_decoder:
        return None
    text = text_class(str(config.model_type))
    if text in (None, own):
        return own
    # of these the texts' part is a model of its own, without the other's names
    named = [path for a in adapters for path in a.targets if "language_model." in path or "vis" in path]
    return own if named else None


def _labels(adapters: Sequence[Adapter], *, untyped: bool) -> int | None:
    """Return the number of labels of the first adapter that brings a classification head."""
    for adapter in adapters:
        if untyped or adapter.config.raw.get("task_type") in LABELED_TASKS:
            for tensor in _label_tensors(adapter):
                return adapter.file.tensors[tensor].shape[0]
    return None


def _label_tensors(adapter: Adapter) -> list[str]:
    """Return the full tensors that are weights of classification heads, as the file names them."""
    return [tensor for path, tensor in adapter.full_tensors.items() if path.endswith(_LABELED_WEIGHTS)]


def _zero(model: nn.Module, missing: Sequence[str], adapters: Sequence[Adapter]) -> None:
    """Zero the parameters that the checkpoint lacks and adapters bring.

    Raises:
        PlanError: one that no adapter brings; the model would be partly random.
    """
    brought = {path for a in adapters for path in a.full_tensors}
    alone = [key for key in missing if key not in brought]
    if alone:
        raise PlanError(
            f"the base lacks {', '.join(sorted(alone))}, and no adapter brings it: a {type(model).__name__} would be partly "
            "random. Is it the right base?"
        )
    with torch.no_grad():
        for key in missing:
            model.get_parameter(key).zero_()


def _tokenizer(folder: Path, *, trust_remote_code: bool) -> Any:
    if not any(folder.glob("*token*")) and not any(folder.glob("vocab*")):
        return None  # audio and image models
    return pretrained.with_padding_token(pretrained.load_tokenizer(folder, trust_remote_code=trust_remote_code))
