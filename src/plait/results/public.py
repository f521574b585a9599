"""What of a result may be known elsewhere: everything but the folders of this machine.

All that is published passes here: cards are written with `place_name`, and a push rewrites run record, lock and configurations
with `public_file`. The result on disk keeps its paths, which are needed to make it again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from plait.results.lock import LOCK, RUN_RECORD, SUMMARY

#: What begins like a path on a machine and not like a name on the Hub.
_LOCAL = re.compile(r"(?:/|~|\.{1,2}(?:[/\\]|$)|[A-Za-z]:[\\/]|\\\\|file:)")
_FAR = re.compile(r"(?:file:/*|~[^\s/]*|[A-Za-z]:|\\)?[/\\][^/\\\n]+[/\\][^\n]*")  # at least two parts: `/` may be a token
_WITHIN = re.compile(r"(?<![\w:/\\.~*>)\]-])(?:file://|~[\w.-]*|[A-Za-z]:)?(?:[/\\][^\s/\\'\"`:;,()<>|*]+){2,}")
# Within a text of a configuration: where people's files are. Machines that rebuild a result must replace the same.
_HOMES = re.compile(
    r"(?<![\w:/\\.~])(?:file://)?(?:/(?:home|Users|root|tmp|mnt|data|scratch|work|workspace|content)/|~/|[A-Za-z]:\\)"
    r"[^\s'\"`:;,()<>|*]+"
)
_CACHED = re.compile(r"models--([^/\\]+?)--([^/\\]+)[/\\]snapshots[/\\]")
#: Keys that name a file or folder, whatever their value looks like.
_PATH_KEYS = frozenset(
    {"_name_or_path", "name_or_path", "base_model_name_or_path", "model_name_or_path", "tokenizer_name_or_path",
     "tokenizer_file", "vocab_file", "merges_file", "special_tokens_map_file", "output_dir", "logging_dir",
     "best_model_checkpoint"}
)  # fmt: skip
_LABELS = frozenset({"id2label", "label2id"})  # whose texts may look like paths (`/m/09x0r` of AudioSet)
_RECORDS = (LOCK, RUN_RECORD, SUMMARY)
#: Files of a tokenizer in which every text may be a token, and an index, which names no place.
_TOKENS = re.compile(r"(tokenizer|vocab|added_tokens|special_tokens_map|chat_template|.*\.index)\.json")


def place_name(text: str) -> str:
    """Return a reference without the folders of this machine: the repository of one in the Hub's cache, else the last part."""
    return _last(text) if _LOCAL.match(text) else text


def home_paths(text: str) -> list[str]:
    """Return the paths within a text that begin as people's folders do, each once."""
    return list(dict.fromkeys(_HOMES.findall(text)))


def public_values(value: Any, hidden: Sequence[str] = ()) -> Any:
    """Return plain values of a record in which every local path is its last part alone.

    Args:
        value: of JSON.
        hidden: folders that are replaced wherever they occur in a text, the longest first.
    """
    if isinstance(value, dict):
        return {key: public_values(item, hidden) for key, item in value.items()}
    if isinstance(value, list):
        return [public_values(item, hidden) for item in value]
    if not isinstance(value, str):
        return value
    return _last(value) if _LOCAL.match(value) and "\n" not in value else public_text(value, hidden)


def public_text(text: str, hidden: Iterable[str] = ()) -> str:
    """Return a text in which local paths are their last part alone."""
    for folder in hidden:
        text = re.sub(rf"{re.escape(folder)}(?=$|[/\\\s'\"`:;,.)])", lambda found: _last(found[0]), text)
    return _WITHIN.sub(lambda found: _last(found[0]), text)


def public_file(name: str, data: bytes, hidden: Sequence[str] = ()) -> bytes:
    """Return what is published of a JSON file; the same bytes where nothing in it is a local path.

    Of the records every path goes. In a configuration goes what a key calls a file or folder, and what is an absolute path of
    several parts, or one within a text that begins as people's folders do: other texts there have a meaning.

    Args:
        name: of the file.
        data: in it.
        hidden: as `public_values` has it; for records.

    Raises:
        ValueError: a record is not JSON.
    """
    if not name.endswith(".json") and name not in _RECORDS:
        return data
    try:
        found = json.loads(data.decode("utf-8"))
        changed = public_values(found, hidden) if name in _RECORDS else _configuration(name, found)
    except (ValueError, RecursionError):
        if name in _RECORDS:
            raise ValueError(f"{name} is not JSON that can be read") from None
        return data
    if changed == found:
        return data
    return (json.dumps(changed, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")


def public_metadata(texts: Mapping[str, str]) -> dict[str, str]:
    """Return the texts of a tensor file's header without local paths, as a configuration's are."""
    return {
        key: _last(text) if _FAR.fullmatch(text) else _HOMES.sub(lambda found: _last(found[0]), text)
        for key, text in texts.items()
    }


def _configuration(name: str, value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {k: item if k in _LABELS else _configuration(name, item, k) for k, item in value.items()}
    if isinstance(value, list):
        return [_configuration(name, item, key) for item in value]
    if not isinstance(value, str) or "\n" in value or _TOKENS.fullmatch(Path(name).name):
        return value
    is_path = _FAR.fullmatch(value) or (key in _PATH_KEYS and _LOCAL.match(value))
    if key == "chat_template":
        return value
    return _last(value) if is_path else _HOMES.sub(lambda found: _last(found[0]), value)


def _last(path: str) -> str:
    if found := _CACHED.search(path):
        return f"{found[1]}/{found[2]}"
    parts = [part for part in re.split(r"[/\\]", path) if part not in ("", ".", "..", "~", "file:")]
    return parts[-1] if parts and not parts[-1].startswith("~") else "local"
