"""Tokenizers, configurations and models as transformers reads them from files: whatever it raises on the way is a refusal.

Every such call of plait is here. Files may be damaged in any way, and transformers, its Rust tokenizers and torch raise any
class of error then; each becomes one that names the folder, the file where one is at fault, and the reason.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from plait.errors import PlaitError, PlanError, TaskError
from plait.extras import require
from plait.libraries.transformers.senses import image_processors, pil_backend, without_videos
from plait.parsing import MAX_TEXT_BYTES, is_there, kind_of, open_bytes, parse_json, read_text

_TRUST = "--trust-remote-code (trust_remote_code=True in Python)"
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
_GENERATION = "generation_config.json"
_PREPROCESSOR = "preprocessor_config.json"
_PROCESSOR = ("processor_config.json", _PREPROCESSOR)
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
_MODEL = ("config.json", _GENERATION, "model.safetensors.index.json")
_TEXTS = (  # what transformers reads completely, beyond its tensors
    "*config.json", "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model",
    "*.tiktoken", "chat_template.*", "additional_chat_templates/*", "*.index.json",
)  # fmt: skip
_TENSORS = ("*.safetensors", "*.bin")
_LARGEST = 4 * MAX_TEXT_BYTES
_TOKENS = ("eos_token_id", "pad_token_id", "bos_token_id", "decoder_start_token_id", "forced_bos_token_id")
_PANIC = "PanicException"  # of libraries written in Rust, which is not a kind of Exception
_WORDS = 300  # characters of a library's message


@dataclass(frozen=True)
class LoadOptions:
    """How a base model is loaded that reads texts.

    Attributes:
        dtype: of the base in memory, as transformers takes it; `stored` is the checkpoint's; `auto` too, but where that is slow
            (see `evaluation.loaded_base.with_used_dtype`).
        device_map: as transformers takes it; `auto` is the first accelerator, or the processor.
        trust_remote_code: let transformers run code that comes with the weights.
        base: its reference, in place of the one that recipe or adapters name.
    """

    dtype: str = "auto"
    device_map: str = "auto"
    trust_remote_code: bool = False
    base: str | None = None


def load_tokenizer(
    place: str | Path,
    *,
    trust_remote_code: bool = False,
    revision: str | None = None,
    folder: Path | None = None,
    error: type[PlaitError] = TaskError,
) -> Any:
    """Return a tokenizer that has tokenized a text.

    Args:
        place: a folder, or a repository on the Hub.
        trust_remote_code: run code that is next to its files.
        revision: of a repository.
        folder: where the files of a repository are on this machine.
        error: what a refusal raises.

    Raises:
        PlaitError: (`error`) it cannot be loaded, or does not tokenize.
    """
    with refuse_failures(place, "the tokenizer cannot be loaded", error, folder=folder, files=_TOKENIZER):
        tokenizer = import_module("transformers").AutoTokenizer.from_pretrained(
            place, revision=revision, trust_remote_code=trust_remote_code
        )
        _try(tokenizer)
    return tokenizer


def load_image_processor(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Return what makes a model's input of images, by PIL.

    Args:
        folder: of the model.
        trust_remote_code: run code that is next to its files.

    Raises:
        TaskError: there is none, or it cannot be loaded.
    """
    return _processor(image_processors, "image processor", folder, trust_remote_code=trust_remote_code, **pil_backend())


def load_feature_extractor(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Return what makes a model's input of sounds; arguments and errors as `load_image_processor`."""
    return _processor(
        lambda: import_module("transformers").AutoFeatureExtractor,
        "feature extractor",
        folder,
        trust_remote_code=trust_remote_code,
    )


def load_chat_processor(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Return what makes a language model's inputs of chats with images (by PIL) or sounds, with its tokenizer.

    Args:
        folder: of the model.
        trust_remote_code: run code that is next to its files.

    Raises:
        TaskError: the model reads texts alone, or its processor cannot be loaded.
    """
    with refuse_failures(folder, "the processor cannot be loaded", TaskError, files=_PROCESSOR), without_videos():
        found = import_module("transformers").AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if getattr(found, "image_processor", None) is not None:
            found.image_processor = image_processors().from_pretrained(
                folder, trust_remote_code=trust_remote_code, **pil_backend()
            )
    tokenizer = getattr(found, "tokenizer", None)
    if tokenizer is None:
        raise TaskError(
            f"{folder}: the model has no processor of chats with images or sounds, only a {type(found).__name__}: it reads "
            "texts alone, or its processor_config.json or preprocessor_config.json is missing."
        )
    found.tokenizer = with_padding_token(tokenizer)
    if getattr(found, "chat_template", None) is None:
        found.chat_template = getattr(tokenizer, "chat_template", None)
    return found


class Processors:
    """What makes a model's inputs of images, of sounds, and of chats with them; each is loaded once, when it is asked for.

    Args:
        folder: of the model.
        trust_remote_code: run code that is next to its files.
    """

    def __init__(self, folder: Path, *, trust_remote_code: bool = False) -> None:
        self._folder, self._trust_remote_code = folder, trust_remote_code
        self._loaded: dict[str, Any] = {}

    def find(self, kind: Literal["image", "audio"], *, chats: bool = False) -> Any:
        """Return what makes inputs of files, as transformers has it.

        Args:
            kind: of the files.
            chats: what makes those of chats with such, its tokenizer included.

        Raises:
            TaskError: the model has none, or it cannot be loaded.
            MissingPackageError: what decodes such files is not installed.
        """
        what, needed = ("images", {"vision": ["PIL"]}) if kind == "image" else ("sounds", {"audio": ["soundfile"]})
        require(f"a chat with {what}" if chats else f"a model of {what}", needed)
        name = "chats" if chats else kind
        if name not in self._loaded:
            load = load_chat_processor if chats else load_image_processor if kind == "image" else load_feature_extractor
            self._loaded[name] = load(self._folder, trust_remote_code=self._trust_remote_code)
        return self._loaded[name]


def _processor(kind: Callable[[], Any], called: str, folder: Path, **keywords: Any) -> Any:
    if not (folder / _PREPROCESSOR).is_file():
        raise TaskError(f"{folder}: there is no {_PREPROCESSOR}, which says how the model sees images or hears sounds.")
    with refuse_failures(folder, f"the {called} cannot be loaded", TaskError, files=(_PREPROCESSOR,)):
        return kind().from_pretrained(folder, **keywords)


def with_padding_token(tokenizer: Any) -> Any:
    """Return a tokenizer that has a token to pad with, whichever: batches are masked."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def load_config(
    place: str | Path, *, trust_remote_code: bool = False, revision: str | None = None, folder: Path | None = None
) -> Any:
    """Return a model's configuration; arguments as `load_tokenizer` has them.

    Raises:
        PlanError: it cannot be loaded.
    """
    with refuse_failures(place, "the model's configuration cannot be loaded", PlanError, folder=folder, files=_MODEL[:1]):
        return import_module("transformers").AutoConfig.from_pretrained(
            place, revision=revision, trust_remote_code=trust_remote_code
        )


def load_model(
    kind: Any,
    place: str | Path,
    *,
    trust_remote_code: bool = False,
    folder: Path | None = None,
    error: type[PlaitError] = PlanError,
    **keywords: Any,
) -> Any:
    """Return what a class of transformers loads.

    Args:
        kind: the class, a model's or an Auto class.
        place: a folder, or a repository on the Hub.
        trust_remote_code: run code that is next to the weights.
        folder: where the files of a repository are on this machine.
        error: what a refusal raises.
        **keywords: of its `from_pretrained`.

    Raises:
        PlaitError: (`error`) it cannot be loaded.
    """
    with refuse_failures(place, "the model cannot be loaded", error, folder=folder, files=_MODEL):
        found = kind.from_pretrained(place, trust_remote_code=trust_remote_code, **keywords)
        _check_generation(Path(place if folder is None else folder), found[0] if isinstance(found, tuple) else found)
    return found


@contextmanager
def refuse_failures(
    place: str | Path, what: str, error: type[PlaitError], *, folder: Path | None = None, files: Sequence[str] = ()
) -> Iterator[None]:
    """Turn whatever a library raises inside the block into a refusal.

    Args:
        place: whose files are read.
        what: does not happen, such as `the tokenizer cannot be loaded`.
        error: what is raised.
        folder: where the files are; `place` when None.
        files: that are read, for the message where none of them is known to be at fault.

    Raises:
        PlaitError: (`error`) something was raised, a file is larger than any such file, or is something else, such as a pipe,
            for which the libraries would wait.
    """
    home = Path(place if folder is None else folder)
    for file in sorted(file for pattern in (*_TEXTS, *_TENSORS) for file in home.glob(pattern)):
        if not file.is_dir() or file.name in (*_TOKENIZER, *_MODEL):
            is_there(file, error)
    if large := [
        p.name for pattern in _TEXTS for p in sorted(home.glob(pattern)) if p.is_file() and p.stat().st_size > _LARGEST
    ]:
        raise error(f"{place}: {what}: {', '.join(large)}: larger than {_LARGEST >> 20} MB, the limit for such a file.")
    try:
        yield
    except PlaitError:
        raise
    except BaseException as found:
        if not isinstance(found, Exception) and type(found).__name__ != _PANIC:
            raise  # a signal
        why = _foreign_code(str(found)) or _damage(home, found) or f"{_words(found)}{_among(home, files)}"
        raise error(f"{place}: {what}: {why.rstrip('.')}.") from found


def _check_generation(folder: Path, model: Any) -> None:
    """Look at what transformers takes as it is, or leaves out without a word where it cannot be read.

    Raises:
        ValueError: `generation_config.json` is damaged.
    """
    file = folder / _GENERATION
    if file.is_file() and (wrong := json_problem(file)):
        raise ValueError(wrong)
    for name in _TOKENS:
        value = getattr(getattr(model, "generation_config", None), name, None)
        some = value if isinstance(value, list) else [value]
        if any(isinstance(v, bool) or not isinstance(v, int | None) for v in some):
            raise TypeError(f"{_GENERATION}: {name} must be a token's number, got {value!r}")


def _foreign_code(text: str) -> str | None:
    if "trust_remote_code" not in text:
        return None
    return f"it names code of its own (auto_map), which runs only where you trust it. Read it, then give {_TRUST}"


def _damage(folder: Path, raised: BaseException) -> str | None:
    """Return which JSON or safetensors file of a folder is damaged, and how, and what was raised."""
    for file in sorted(folder.glob("*.json")):
        if wrong := json_problem(file):
            return wrong if wrong in str(raised) else f"{wrong} ({_words(raised)})"
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with import_module("safetensors").safe_open(file, "pt"):
                pass
        except Exception as error:  # of the library, or of the file system
            return f"{file.name}: {_words(error)}"
    return None


def damaged_files(folder: Path, *, tokenizer: bool = True) -> list[str]:
    """Return what is wrong with the JSON files of a folder that transformers reads, as `json_problem` reports it.

    Args:
        folder: of a model.
        tokenizer: look at its tokenizer's files too.
    """
    there = (folder / name for name in dict.fromkeys((*_MODEL, *(_TOKENIZER if tokenizer else ()))))
    return [problem for file in there if os.path.lexists(file) and (problem := json_problem(file))]


def json_problem(file: Path) -> str | None:
    """Report why a JSON file of a model cannot be read, by transformers or under the limits; None where it can.

    Returns:
        The file's name, and what is wrong, without a full stop.
    """
    try:
        with open_bytes(file) as data:
            if data.read(3) == b"\xef\xbb\xbf":
                return f"{file.name} begins with a byte order mark; save it as UTF-8 without one"
        text = read_text(file, PlanError, most=_LARGEST)
        found = parse_json(text, file.name, PlanError, constants=True, nul=True)  # a token may be U+0000
    except PlaitError as error:
        return str(error).removeprefix(f"{file.parent}/").rstrip(".")
    except OSError as error:
        return f"{file.name}: {error.strerror or error}"
    if file.name in (*_TOKENIZER, *_MODEL) and not isinstance(found, dict):
        return f"{file.name}: expected a JSON object, found {kind_of(found)}"
    return None


def _among(folder: Path, files: Sequence[str]) -> str:
    there = [name for name in files if (folder / name).is_file()]
    return f" (while {', '.join(there)} were read)" if there else ""


def _words(error: BaseException) -> str:
    text = " ".join(str(error).split())[:_WORDS]
    return text if isinstance(error, (ValueError, OSError)) and text else f"{type(error).__name__}: {text}".rstrip(".")


def _try(tokenizer: Any) -> None:
    """Use a tokenizer once: types that nothing has looked at fail here."""
    longest = tokenizer.model_max_length
    if isinstance(longest, bool) or not isinstance(longest, (int, float)) or longest <= 0:
        raise TypeError(f"tokenizer_config.json: model_max_length must be a number above 0, got {longest!r}")
    for name in _SPECIAL:
        token, number = getattr(tokenizer, name, None), getattr(tokenizer, f"{name}_id", None)
        if not isinstance(token, str | None) or not isinstance(number, int | None):
            raise TypeError(f"tokenizer_config.json: {name} must be a token, got {token!r}")
    vocabulary = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)
    # transformers makes an empty tokenizer of a model's kind where there are no files; T5's has one token then
    if len(vocabulary) <= 1:
        raise ValueError(
            "it has no tokens: the files of a tokenizer (tokenizer.json, vocab.json, *.model) are missing or empty"
        )
    ids = tokenizer(["a b", "c"])["input_ids"]
    tokenizer.decode(ids[0])
