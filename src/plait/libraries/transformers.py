"""Uses of transformers beyond its documented API.

How a model takes up what it has already read is asked of the model, not known by name: its `forward` has had an argument
`past_key_values` (4.x) and `cache` (5.x); its output has a field that holds a cache.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

from plait.extras import optional
from plait.notices import announce

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
#: What the parts of a head are called in classifiers of images and sounds.
MEDIA_HEADS = ("projector", "classifier")
HEADED_TASKS = frozenset(_HEADS)  #: PEFT's task types whose head a model has or not
#: The layers whose output is one value per label.
LABEL_LAYERS = ("classifier", "score", "out_proj")
#: What Conv1D layers are called in the models that have them. In others (GPT-BigCode, Qwen 1) layers of these names are Linear.
CONV1D_LAYERS = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})
CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "decision_transformer", "imagegpt", "clvp", "clvp_decoder"})
#: The order in which modules of fused experts declare their parameters.
EXPERT_PARAMETERS = ("gate_up_proj", "gate_proj", "w1", "up_proj", "w3", "down_proj", "w2")
_CONVERTS_FROM = 5  # the version since which parameters are not called as in a checkpoint
_MEDIA_TOKEN = re.compile(r".*(image|video|vision|audio).*token_(id|index)")  # of configurations
_KNOWN_ARGUMENTS = ("cache", "past_key_values")
_MASKED_ATTENTION = frozenset({"sdpa", "eager"})  # implementations that add a mask (B, 1, L, L) to what they compute
_CONTINUED_LAYERS = frozenset({"full_attention", "sliding_attention"})


def forward_parameters(model: Any) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a model's `forward`, decorators looked through."""
    return inspect.signature(model.forward).parameters


def takes_any_keyword(model: Any) -> bool:
    """Whether a model's `forward` takes keywords that it does not name."""
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in forward_parameters(model).values())


def cache_argument(model: Any) -> str | None:
    """Return the parameter of a model's `forward` that takes a cache, by its annotation or by a known name."""
    parameters = forward_parameters(model)
    annotated = [name for name, p in parameters.items() if p.annotation is not p.empty and "Cache" in str(p.annotation)]
    return next(iter([*annotated, *(name for name in _KNOWN_ARGUMENTS if name in parameters)]), None)


def cache_of(output: Any) -> tuple[str, Any] | None:
    """Return the field of a model's output that holds a cache, and the cache; None where there is none.

    A cache is an instance of `transformers.Cache`: it has a length and can copy its rows.
    """
    fields = output.items() if isinstance(output, Mapping) else vars(output).items()
    for name, value in fields:
        if callable(getattr(value, "get_seq_length", None)) and _row_copier(value) is not None:
            return name, value
    return None


def copy_rows(cache: Any, rows: Any) -> None:
    """Make a cache hold these rows of its own, in this order, each as often as it is named.

    Args:
        cache: a cache of transformers; changed in place.
        rows: indices, int64 (n,).
    """
    copier = _row_copier(cache)
    if copier is None:
        raise TypeError(f"the rows of a {type(cache).__name__} cannot be copied")
    copier(rows)


def _row_copier(cache: Any) -> Any:
    return getattr(cache, "reorder_cache", None) or getattr(cache, "batch_select_indices", None)


def why_not_continued(model: Any) -> str | None:
    """Return why what a model has read cannot be kept, copied for several rows and continued; None where it can."""
    text_config = model.config.get_text_config()
    if getattr(model, "_is_stateful", False):
        return "it keeps a running state of what it has read, which padding would change"
    other = sorted(set(getattr(text_config, "layer_types", None) or ()) - _CONTINUED_LAYERS)
    if other:
        return f"plait does not know how to continue its layers of type {', '.join(other)}"
    if not getattr(model, "_supports_cache_class", True):
        return "its code has a cache of its own, not one of transformers' cache classes"
    return None


def why_cache_not_continued(cache: Any) -> str | None:
    """Return why a cache cannot be copied for several rows and continued: a layer holds more than keys and values."""
    for layer in getattr(cache, "layers", ()):
        held = [name for name in ("conv_states", "recurrent_states") if hasattr(layer, name)]
        if held:
            return f"its cache holds {' and '.join(held)}, a running state that padding would change"
    return None


def attention_window(model: Any) -> int | None:
    """Return how many tokens back a model's layers look, where some of them do not see the complete text; else None."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    slides = "sliding_attention" in kinds or (not kinds and getattr(config, "use_sliding_window", True))
    window = getattr(config, "sliding_window", None)
    return int(window) if slides and window else None


def counts_by_place(model: Any) -> bool:
    """Whether a model takes the distance of two tokens from where they are in its memory, padding included.

    So do models that cannot be given positions (MPT's ALiBi, models of an encoder-decoder's decoder) and local attention
    (GPT-Neo).
    """
    return "position_ids" not in forward_parameters(model) or "local" in (getattr(model.config, "attention_layers", None) or ())


def why_not_packed(model: Any, longest: int) -> str | None:
    """Return why several texts cannot be read in one row, with a mask of which token sees which; None where they can.

    Args:
        model: causal.
        longest: tokens of the longest text.
    """
    reason = why_not_continued(model)
    if reason is not None:
        return reason
    if "attention_mask" not in forward_parameters(model) or counts_by_place(model):
        return "its forward takes no positions, or no mask"
    attention = getattr(model.config, "_attn_implementation", None)
    if attention not in _MASKED_ATTENTION:
        return f"its attention ({attention}) takes no mask of which token sees which"
    window = attention_window(model)
    if window is not None and longest >= window:
        return f"its layers look {window} tokens back only"
    return None


def reserved_positions(model: Any) -> int:
    """Return how many of a model's positions no token uses: RoBERTa and its variants count from after the padding's."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.padding_idx) + 1
    return 0


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Keep transformers and PEFT from drawing bars and warning while they load a model inside the block.

    They would hide plait's own messages.
    """
    logging = import_module("transformers.utils.logging")
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def silence() -> Iterator[None]:
    """As `quiet_loading`, and keep transformers from logging of its own affairs too; errors are shown."""
    logging = import_module("transformers.utils.logging")
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with quiet_loading():
            yield
    finally:
        logging.set_verbosity(level)


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


def media_class(model_type: str) -> str | None:
    """Return the Auto class of classifiers of images, or of sounds, for a kind of model; None where there is none.

    Raises:
        MissingPackageError: transformers is not installed.
    """
    known = optional("transformers.models.auto.modeling_auto", "eval", "a live model")
    return next((name for name, table in _MEDIA_HEADS.items() if model_type in getattr(known, table, {})), None)


_MOONSHINE = ((127, 64), (7, 3), (3, 2))  #: Kernel and stride of its convolutions, which its configuration does not have.


def fewest_samples(model: Any) -> int:
    """Return how many samples of a sound the convolutions at the beginning of a model need; 1 where it has none."""
    least, config = 1, getattr(model.config, "encoder", model.config)
    named = tuple(zip(getattr(config, "conv_kernel", ()), getattr(config, "conv_stride", ()), strict=True))
    for kernel, stride in reversed(_MOONSHINE if config.model_type == "moonshine" else named):
        least = (least - 1) * stride + kernel
    return int(least)


#: What says, in Whisper's generation configuration, what languages and tasks are and what is never written.
_WHISPER_SETTINGS = (
    "alignment_heads", "begin_suppress_tokens", "bos_token_id", "decoder_start_token_id", "eos_token_id", "forced_decoder_ids",
    "is_multilingual", "lang_to_id", "language", "no_timestamps_token_id", "pad_token_id", "prev_sot_token_id",
    "suppress_tokens", "task", "task_to_id",
)  # fmt: skip


def is_whisper(model: Any) -> bool:
    """Whether a model writes down sounds by Whisper's own code."""
    return hasattr(model, "detect_language")


def whisper_settings(model: Any) -> dict[str, Any]:
    """Return the parts of Whisper's own generation configuration that its transcripts depend on, sampling and beams aside."""
    own = model.generation_config
    return {name: value for name in _WHISPER_SETTINGS if (value := getattr(own, name, None)) is not None}


def whisper_beginning(model: Any, language: str | None = None, task: str | None = None) -> list[int] | None:
    """Return the tokens that Whisper's `generate` puts before a transcript without times, the first included.

    Args:
        model: a Whisper; its weights are not used.
        language: as its generation configuration calls it (`<|fr|>`); None for the configuration's own.
        task: `transcribe` or `translate`; likewise.

    Returns:
        The tokens; None where it would first hear what language is spoken.
    """
    own = model.generation_config
    language, task = language or getattr(own, "language", None), task or getattr(own, "task", None)
    found: list[int | None] = [own.decoder_start_token_id]
    if language is None and task is None:  # an older form, which the newer one replaces
        forced = getattr(own, "forced_decoder_ids", None) or getattr(model.config, "forced_decoder_ids", None) or []
        for place, token in forced:
            found += [token] * (place == len(found))
    languages, tasks = getattr(own, "lang_to_id", None), getattr(own, "task_to_id", None) or {}
    if language is not None and languages:
        found[1:2] = [languages[language if language in languages else f"<|{language_code(language)}|>"]]
    elif languages and found[1:2] in ([], [None]):
        return None
    if task is not None or (language is not None and tasks):
        found.append(tasks[task or "transcribe"])
    end = getattr(own, "no_timestamps_token_id", None)
    if end is not None and found[-1] != end:
        found.append(end)
    return [token for token in found if token is not None]


def language_code(language: str) -> str:
    """Return Whisper's code of a language that is given by its name or its code."""
    known = import_module("transformers.models.whisper.tokenization_whisper").TO_LANGUAGE_CODE
    return str(known.get(language.lower(), language.lower()))


def writes_sounds_down(model_type: str) -> bool:
    """Whether a kind of model has an encoder of sounds and a decoder of texts, and no class of texts alone.

    Raises:
        MissingPackageError: transformers is not installed.
    """
    known = optional("transformers.models.auto.modeling_auto", "eval", "a live model")
    tables = ("MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES")
    speech, texts = (getattr(known, table, {}) for table in tables)
    return model_type in speech and model_type not in texts


def newly_made(report: Mapping[str, Any]) -> list[str]:
    """Return the parameters that were not loaded, by what `from_pretrained` reports: missing, or of another shape."""
    others = (key if isinstance(key, str) else key[0] for key in report["mismatched_keys"])  # 5.x has the shapes with them
    return list(dict.fromkeys([*report["missing_keys"], *others]))


def features_of(out: Any) -> Any:
    """Return the vectors of `get_image_features` or `get_text_features`, which transformers 5 puts into an output."""
    return getattr(out, "pooler_output", out)


def image_processors() -> Any:
    """Return `AutoImageProcessor` from where it is: in some versions the package's own name asks for torchvision."""
    return import_module("transformers.models.auto.image_processing_auto").AutoImageProcessor


def pil_backend() -> dict[str, Any]:
    """Return the keywords with which an image processor uses PIL, whether or not torchvision is there: the same pixels."""
    return {"backend": "pil"} if find_spec("transformers.image_processing_backends") is not None else {"use_fast": False}


class _NoVideos:
    """What loads a processor's part for videos."""

    @staticmethod
    def from_pretrained(*_: Any, **__: Any) -> None:
        """Load nothing."""


@contextmanager
def without_videos() -> Iterator[None]:
    """Let processors of transformers be loaded without their part for videos, which needs torchvision, inside the block."""
    processing = import_module("transformers.processing_utils")
    mixin, name = processing.ProcessorMixin, "AutoVideoProcessor"
    checks = mixin.check_argument_for_proper_class

    def check(processor: Any, argument: str, part: Any) -> Any:
        return None if part is None and argument == "video_processor" else checks(processor, argument, part)

    # where releases since version 5, and those before, look for it
    homes = (import_module("transformers.models.auto.video_processing_auto"), processing.transformers_module)
    before = [vars(home).get(name) for home in homes]
    mixin.check_argument_for_proper_class = check
    for home in homes:
        setattr(home, name, _NoVideos)
    try:
        yield
    finally:
        mixin.check_argument_for_proper_class = checks
        for home, own in zip(homes, before, strict=True):
            if own is None:
                delattr(home, name)
            else:
                setattr(home, name, own)


_MULTIMODAL = (  # before version 5 those that hear are among the encoder-decoder models
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
)


def multimodal_class(model_type: str) -> str | None:
    """Return the class of a kind of language model that sees images or hears sounds; None for other kinds.

    Raises:
        MissingPackageError: transformers is not installed.
    """
    known = optional("transformers.models.auto.modeling_auto", "eval", "a live model")
    name = next((found for table in _MULTIMODAL if (found := getattr(known, table, {}).get(model_type))), None)
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


def text_class(model_type: str) -> str | None:
    """Return the class of a kind of model that `AutoModelForCausalLM` loads; None where it loads none.

    Raises:
        MissingPackageError: transformers is not installed.
    """
    known = optional("transformers.models.auto.modeling_auto", "eval", "a live model")
    name = known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    return name if isinstance(name, str) else None


def media_tokens(model: Any) -> frozenset[int]:
    """Return the tokens of images, videos and sounds in a text, and those around them, as a configuration names them."""
    named = (value for name, value in vars(model.config).items() if _MEDIA_TOKEN.fullmatch(name))
    return frozenset(value for value in named if isinstance(value, int))


def position_shift(model: Any) -> Any:
    """Return how far the positions after what a model has read are from the count of its tokens, (rows, 1); None: they are it.

    With multimodal rotary positions (Qwen2-VL and others) an image takes fewer positions than tokens; the model keeps the
    difference of what it read last.

    Raises:
        LookupError: it has such positions, and keeps no difference.
    """
    shifts = [module.rope_deltas for module in model.modules() if hasattr(module, "rope_deltas")]
    if shifts and shifts[0] is not None:
        return shifts[0]
    text = model.config.get_text_config()
    rotary = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    if "mrope_section" in str(rotary):
        raise LookupError("its positions of images are not known after it has read them")
    return None


def is_conv1d(module: Any) -> bool:
    """Whether a module is transformers' Conv1D, a linear layer with a matrix (d_in, d_out); torch's Conv1d is another thing."""
    return type(module).__name__ == "Conv1D"


def holds_transposed(module: Any) -> bool:
    """Whether a module of fused experts holds its matrices as (d_in, d_out); PEFT reads the same flag."""
    return bool(getattr(module, "is_transposed", False))


def tied_parameters(model: Any) -> dict[str, str]:
    """Return parameter → the parameter that it shares its values with."""
    named = getattr(model, "all_tied_weights_keys", None)
    if named is not None:
        return dict(named)
    model.tie_weights()  # before version 5 only the objects know it
    first: dict[int, str] = {}
    owners = {name: first.setdefault(id(p), name) for name, p in model.named_parameters(remove_duplicate=False)}
    return {name: owner for name, owner in owners.items() if name != owner}


def embedding_scale(module: Any) -> Any:
    """Return what an embedding multiplies its rows with (Gemma, BART), a number or a tensor; None where nothing."""
    return getattr(module, "embed_scale", None)


class Conversion(NamedTuple):
    """How transformers itself makes a model's parameters of a checkpoint's tensors, since version 5.

    Attributes:
        order: sorts tensors as loading does.
        rename: tensor → the parameter that it goes to, and the pattern of the converter that takes it (None: as it is).
        by_pattern: pattern → the converter, with `source_patterns`, `target_patterns` and `operations`.
    """

    order: Any
    rename: Any
    by_pattern: Mapping[str, Any]

    def renamed(self, name: str) -> str:
        """Return the name that a parameter of an older version of the model's code has now.

        It is the same where nothing was renamed, and where the parameter has become a part of another one.
        """
        found, pattern = self.rename(name)
        return str(found) if pattern is None else name


def checkpoint_conversion(model: Any) -> Conversion | None:
    """Return how a model is loaded; None before version 5, when a checkpoint had the parameters' own names."""
    try:
        mapping = import_module("transformers.conversion_mapping").get_model_conversion_mapping(model)
        loading = import_module("transformers.core_model_loading")
    except ImportError as error:
        if int(import_module("transformers").__version__.split(".")[0]) >= _CONVERTS_FROM:
            announce(
                f"this transformers does not say how it renames and fuses the tensors of a checkpoint ({error}): they are "
                "taken to have the names of the model's parameters."
            )
        return None
    renamings = [m for m in mapping if isinstance(m, loading.WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, loading.WeightConverter)]
    prefix, meta = model.base_model_prefix, model.state_dict()
    return Conversion(
        loading.dot_natural_key,
        lambda tensor: loading.rename_source_key(tensor, renamings, converters, prefix, meta),
        {pattern: c for c in converters for pattern in c.source_patterns},
    )


def steps_of(converter: Any) -> list[tuple[str, int | None]]:
    """Return the operations of a converter: the name of each, and the dimension that it works along."""
    return [(type(operation).__name__, getattr(operation, "dim", None)) for operation in converter.operations]


class _NoStepsLeft(Exception):
    """A run was ended after its last step, before its result was written."""


class CheckpointError(Exception):
    """A checkpoint could not be loaded; its cause says why."""


def take_steps(trainer: Any, checkpoint: str | None) -> None:
    """Train from a checkpoint on. From that of the last step transformers would take one more; here none is left to take.

    Args:
        trainer: a `Trainer`, at whose end is the state that it has at the end of a training.
        checkpoint: its folder; None for the beginning.

    Raises:
        CheckpointError: anything went wrong between the checkpoint and the first step.
    """
    begun = checkpoint is None

    class ResumeGuard(_callback_class()):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            nonlocal begun
            begun = True

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step >= state.max_steps:
                raise _NoStepsLeft  # weights and state are loaded

    trainer.add_callback(ResumeGuard())
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except _NoStepsLeft:
        if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint is not None:
            trainer._load_best_model()
        trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
    except Exception as error:  # a damaged file fails in as many ways as there are readers
        if begun or isinstance(error, import_module("torch").OutOfMemoryError):
            raise
        raise CheckpointError from error


def report_steps(
    trainer: Any, start: Callable[[int, int], object], step: Callable[[], object], end: Callable[[], object]
) -> None:
    """Call functions as a `Trainer` takes its steps, in place of its own bar and lines.

    Args:
        trainer: a `Trainer`.
        start: takes the number of steps in all, and of those that are done already.
        step: called after each.
        end: called after the last.
    """
    callbacks = import_module("transformers")

    class Steps(_callback_class()):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            start(state.max_steps, state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            step()

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            end()

    for shown in (callbacks.ProgressCallback, callbacks.PrinterCallback):
        trainer.remove_callback(shown)
    trainer.add_callback(Steps())


def _callback_class() -> Any:
    return import_module("transformers").TrainerCallback


#: Where transformers makes a chat template's text an object with a method `render`.
_CHATS, _COMPILE = "transformers.utils.chat_template_utils", "_compile_jinja_template"


def renders_chats_by_a_function() -> bool:
    """Whether chat templates are rendered in the one place that `chats_rendered_by` replaces."""
    return hasattr(import_module(_CHATS), _COMPILE)


@contextmanager
def chats_rendered_by(make: Callable[[str], Any]) -> Iterator[None]:
    """Let transformers render chat templates by other objects inside the block; not for several threads at a time.

    Args:
        make: template's text → what has a method `render(**columns)`, in place of Jinja's object.
    """
    module = import_module(_CHATS)
    original = getattr(module, _COMPILE)
    setattr(module, _COMPILE, make)
    try:
        yield
    finally:
        setattr(module, _COMPILE, original)
