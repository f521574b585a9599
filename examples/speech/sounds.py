"""Make tasks of the prompts of telephone systems that Debian ships: one human voice per language, with transcripts.

Sounds and transcripts are read where Debian's packages have put them, and copied to the user's cache folder. Sounds of more
than two seconds, transcripts with remarks in brackets and texts that are not spoken are left out. Equal transcripts
are in one split.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import soundfile
import yaml
from base_model import SECONDS, cache

#: Language → code of the packages, folder of the voice.
VOICES = {"french": ("fr", "fr_CA_f_June"), "italian": ("it", "it_IT_m_Carlo"), "spanish": ("es", "es_MX_f_Allison")}
_HELD_OUT = {"test": 60, "validation": 30}
_INSTALL = "apt-get install " + " ".join(f"asterisk-core-sounds-{c}-wav asterisk-core-sounds-{c}" for c, _ in VOICES.values())


def tasks(root: Path = Path("/")) -> dict[str, Path]:
    """Return language → task file, making them the first time.

    Args:
        root: under which Debian's packages are unpacked.

    Raises:
        FileNotFoundError: they are not there.
    """
    return {language: _task(language, *VOICES[language], root) for language in VOICES}


def _task(language: str, code: str, voice: str, root: Path) -> Path:
    folder = cache() / "asterisk-prompts"
    file = folder / f"{language}.yaml"
    if file.is_file():
        return file
    rows = _rows(language, code, root / "usr/share/asterisk/sounds" / voice, root / "usr/share/doc", folder)
    for split, some in rows.items():
        (folder / f"{language}-{split}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some))
    content: dict[str, Any] = {
        "name": language,
        "kind": "asr",
        "data": {"path": "."},
        "splits": {split: f"{language}-{split}.jsonl" for split in rows},
        "metric": "wer",
        "normalize": "whisper_basic",
        "max_new_tokens": 24,
    }
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def _rows(language: str, code: str, sounds: Path, documents: Path, folder: Path) -> dict[str, list[dict[str, str]]]:
    """Return split → rows, and copy their sounds."""
    name = f"asterisk-core-sounds-{code}"
    try:
        text = gzip.decompress((documents / name / f"core-sounds-{code}.txt.gz").read_bytes()).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error.filename} is not there. The sounds come with Debian: {_INSTALL}") from None
    spoken: dict[str, list[dict[str, str]]] = {}
    for line in text.splitlines():
        prompt, _, words = line.partition(":")
        source, words = sounds / f"{prompt.strip()}.wav", words.strip()
        if line.startswith(";") or not re.search(r"\w", words) or re.search(r"[\[\]()<>*]", words) or not source.is_file():
            continue
        info = soundfile.info(source)
        if info.frames > SECONDS * info.samplerate:
            continue
        target = folder / language / f"{prompt.strip().replace('/', '-')}.wav"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        spoken.setdefault(words.casefold(), []).append({"audio": f"{language}/{target.name}", "text": words})
    order = sorted(spoken, key=lambda words: hashlib.sha256(words.encode()).digest())
    rows: dict[str, list[dict[str, str]]] = {}
    for split, count in _HELD_OUT.items():
        rows[split] = [row for words in order[:count] for row in spoken[words]]
        order = order[count:]
    return {"train": [row for words in order for row in spoken[words]], **rows}
