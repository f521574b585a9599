"""Push a result to the Hub: exactly the files that its lock names, and only when they are as it records."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from plait.errors import OutputError, listed
from plait.hub.client import explain_failure
from plait.hub.upload import check_push, push_folder
from plait.libraries.huggingface_hub import without_progress_bars
from plait.notices import announce
from plait.parsing import read_object, shown
from plait.recipes.documents import read_front_matter
from plait.records import ShortRepr
from plait.results.checks import FileCheck, check_files
from plait.results.lock import CARD, LOCK, Lock, read_lock
from plait.results.public import home_paths, place_name
from plait.results.staging import scratch
from plait.tensorfiles.formats import TENSOR_FORMATS
from plait.verification.public import public_copy

#: Weights of another result in the repository would be loaded instead of these, or with them, as its configuration says.
REPLACED = (
    "adapter_config.json",
    "adapter_model*",
    "config.json",
    "delta.safetensors",
    "model.safetensors",
    "model-?????-of-?????.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*",
)
_SHOWN = 6


@dataclass(frozen=True, repr=False)
class PushResult(ShortRepr):
    """What became of a push.

    Attributes:
        url: of the repository, the branch, or the pull request.
        left_out: files of the folder that do not belong to the result, and were not uploaded.
        notes: what the card lacks.
    """

    url: str
    left_out: tuple[str, ...]
    notes: tuple[str, ...]


def push_result(
    folder: Path,
    repo: str,
    *,
    revision: str | None = None,
    create_pr: bool = False,
    private: bool = False,
    message: str | None = None,
) -> PushResult:
    """Upload a finished result: an adapter, a dense delta or a baked model.

    The same commit removes what an older result left in the repository: every file that its `plait.lock` names and this one
    does not have, and weights and configurations of any origin. Local paths stay here (`public.py`). The card may have been
    edited; every other file must be as it was written.

    Args:
        folder: of a merge, a bake, a compression or an extraction.
        repo: `org/name`, or `name` for the user's own; created when it does not exist.
        revision: the branch to write to, created when missing.
        create_pr: open a pull request instead.
        private: make the repository private; a public one is refused.
        message: title of the commit or pull request; describes the result when None.

    Raises:
        AdapterError: the folder has no lock: it is not a complete result.
        OutputError: a file is missing or was changed, or the Hub refuses.
    """
    lock = read_lock(folder)
    if lock.kind == "calibrate":
        raise OutputError(
            f"cannot push {folder}: it holds second moments of inputs, which are not a model. Push what is merged with them."
        )
    files = check_files(folder, lock)
    _check_complete(folder, lock, files)
    left_out = tuple(f.name for f in files if f.state == "extra")
    replaced = (*REPLACED, *(glob.escape(name) for name in _earlier_files(repo, revision)))
    with public_copy(folder, lock) as place:
        url = push_folder(
            place,
            repo,
            private=private,
            revision=revision,
            create_pr=create_pr,
            message=message or _message(lock),
            replaces=replaced,
        )
    published = [f.name for f in files if f.state != "extra"]
    return PushResult(url, left_out, (*_notes(folder), *_named_folders(folder, published)))


def _earlier_files(repo: str, revision: str | None) -> tuple[str, ...]:
    """Return the files that an older result in the repository has, as its lock there says; none where there is no lock.

    Raises:
        OutputError: the repository cannot be pushed to, or the Hub does not answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    full = check_push(repo)
    with scratch("push") as place, without_progress_bars():
        for branch in dict.fromkeys((revision, None)):  # a branch that is not there yet begins with the default one's files
            try:
                path = HfApi().hf_hub_download(full, LOCK, revision=branch, local_dir=place)
                outputs = read_object(Path(path), OutputError).get("outputs")
                return tuple(outputs) if isinstance(outputs, dict) else ()
            except RevisionNotFoundError:
                continue
            except (EntryNotFoundError, RepositoryNotFoundError):
                break
            except OutputError as error:
                why = str(error).removeprefix(f"{place}/").rstrip(".")
                announce(f"{full}: {why}. What an older result left there besides weights and configurations stays.")
                break
            except Exception as error:  # which classes can come depends on the transport library below huggingface_hub
                raise OutputError(f"pushing to {full!r} failed: {explain_failure(error, full, None)}") from error
    return ()


def _check_complete(folder: Path, lock: Lock, files: tuple[FileCheck, ...]) -> None:
    outside = [f.name for f in files if f.state == "outside"]
    if outside:
        raise OutputError(
            f"cannot push {folder}: {listed(outside, _SHOWN)}: a link out of the folder, or not a file. Only files inside the "
            "folder are uploaded: put the file itself there, or make the result again."
        )
    wrong = [f"{f.name} ({f.state})" for f in files if f.state in ("changed", "missing") and f.name != CARD]
    if wrong:
        raise OutputError(
            f"cannot push {folder}: {listed(wrong, _SHOWN)}: not what "
            "plait.lock says was written. A stale or half-written result is never uploaded; make it again (`plait verify` "
            "shows what differs)."
        )
    suffixes = (*(kind.suffix for kind in TENSOR_FORMATS), ".gguf")
    if lock.kind != "convert" and not any(name.endswith(suffixes) for name in lock.outputs):  # a format may have any names
        raise OutputError(
            f"cannot push {folder}: its {LOCK} names no weights, and what the repository has would be removed. Make the "
            "result again."
        )


def _message(lock: Lock) -> str:
    if lock.kind == "extract":
        return f"LoRA extracted from {place_name(lock.recipe['finetuned'])}"
    if lock.kind == "train":
        return f"Trained on {place_name(lock.recipe['base'])}"
    if lock.kind == "convert":
        return f"Converted to {lock.recipe['to']} from {place_name(lock.recipe['adapter'])}"
    names = ", ".join(entry["name"] for entry in lock.recipe["adapters"])
    done = {"bake": "Bake", "tune": "Merge and tune"}.get(lock.kind, "Merge")
    return f"{done} {names} with {lock.recipe['method']['name']}"


def _notes(folder: Path) -> Iterator[str]:
    """Return notes on what the Hub cannot show of the result."""
    front = read_front_matter(folder / CARD)
    if not front.get("base_model"):
        yield f"{CARD} names no base model on the Hub: add base_model: org/name, and the Hub links the two."
    elif "license" not in front:
        named = front["base_model"]
        base = named[0] if isinstance(named, list) and named else named
        stated = _license_on_hub(str(base))
        known = f"{base} states {stated!r}" if stated else "its sources state none, or not the same"
        yield f"{CARD} states no license ({known}): add license: to it and push again."


def _named_folders(folder: Path, names: Sequence[str]) -> Iterator[str]:
    """Return notes on folders of people's machines in files whose every letter counts, and which are published as they are."""
    for name in names:
        if name.endswith((".jinja", ".py")):
            found = home_paths((folder / name).read_text(encoding="utf-8", errors="replace"))
            if found:
                yield (
                    f"{name} names {listed(map(shown, found), 3)}, and was published as it is: every letter of it counts. "
                    "Take that out of the adapter's or the base's file, make the result again, and push it."
                )


def _license_on_hub(repo: str) -> str | None:
    """Return the license that a repository's card states; None where it states none, or cannot be asked."""
    from huggingface_hub import HfApi

    try:
        card = HfApi().model_info(repo).card_data
    except Exception:  # a note is all that is lost
        return None
    found = getattr(card, "license", None)
    return found if isinstance(found, str) else None
