"""Find the folder that a reference leads to, and fetch it where it is on the Hub.

Of an adapter only its own few files are fetched, never the weights of a base model. Everything goes through
`huggingface_hub`, so its cache and HF_HUB_OFFLINE, HF_ENDPOINT and HF_TOKEN mean what they mean elsewhere. Knows
nothing of what the files hold.
"""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from plait.errors import AddressError, did_you_mean, join_words, listed
from plait.folders import absolute, expanded, working_folder
from plait.hub.client import explain_failure
from plait.hub.pipelines import PIPELINE_INDEX, pipeline_files
from plait.hub.references import Reference, parse_reference
from plait.libraries.huggingface_hub import status_of
from plait.notices import announce
from plait.parsing import DOCUMENT_SUFFIXES, is_document
from plait.records import Record
from plait.tensorfiles.formats import TENSOR_FORMATS
from plait.tensorfiles.reader import SafetensorsFile

ADAPTER_CONFIG = "adapter_config.json"
#: What may be next to an adapter and is wanted next to the merge: the card, the tokenizer and the chat template.
FILES_NEXT_TO_ADAPTER = (
    "README.md",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
#: What is fetched of a base model unless the caller asks for more.
MODEL_FILES = (SafetensorsFile.model_files, "*.json")
#: What a full model needs next to its weights and its json files; `resolve_model(files=...)` takes both together.
COMPANION_FILES = ("*.jinja", "*.model", "*.txt", "LICENSE*", "README.md")
#: Ends of names of single files that are adapters.
ADAPTER_SUFFIXES = (SafetensorsFile.suffix, ".gguf")
_OF_MLX = "adapters.safetensors"
_SHOWN = 12


class Located(Record):
    """A folder on this machine, or one file in it, and where it came from.

    Attributes:
        folder: absolute; for the Hub inside the snapshot of `commit` in the cache.
        file: name of the file there that the reference leads to; None where it is the folder.
        repo: `org/repo`, or None for a local folder.
        revision: as it was asked for, or None.
        commit: the 40 hexadecimal digits that `revision` resolved to, or None for a local folder.
        subfolder: as it was asked for, or None.
    """

    folder: Path
    file: str | None = None
    repo: str | None = None
    revision: str | None = None
    commit: str | None = None
    subfolder: str | None = None

    @property
    def path(self) -> Path:
        """The folder, or the file in it."""
        return self.folder if self.file is None else self.folder / self.file


def resolve(reference: Reference, *, base: Path | None = None) -> Located:
    """Return the folder of an adapter, fetched from the Hub when the reference leads there.

    A local folder, or file of tensors, is only checked to be one; what it holds is for the reader of adapters to judge. When
    the Hub does not answer, an adapter that is in the cache is taken from there.

    Args:
        reference: from `parse_reference`.
        base: the folder that a relative path starts from (a recipe's own); the working directory when absent.

    Raises:
        AddressError: the reference leads nowhere, or may not be read. The message says what to do.
    """
    if reference.path is not None:
        return _local_place(reference, base, ADAPTER_SUFFIXES)
    if (reference.subfolder or "").endswith(ADAPTER_SUFFIXES):
        return _single_file(reference, base)
    known = [kind.adapter_name for kind in TENSOR_FORMATS]
    tensors = [*known, _OF_MLX]
    prefix = _prefix(reference)
    commit, names, error = _listing(reference)
    if error is not None:
        snapshot = _from_cache(error, reference, [glob.escape(prefix + ADAPTER_CONFIG)], base=base)
        held = {path.name for path in (snapshot / prefix).glob("*")}
        if ADAPTER_CONFIG not in held or held.isdisjoint(tensors):
            raise AddressError(_offline_reason(error, reference, base)) from error
    else:
        if prefix + ADAPTER_CONFIG not in names:
            raise AddressError(_no_config(reference, commit, names))
        weights = [name for name in tensors if prefix + name in names][:1]
        if not weights:
            raise AddressError(
                f"{reference.address!r} has {ADAPTER_CONFIG}, but neither {' nor '.join(known)}. It holds: "
                f"{listed(names, _SHOWN)}."
            )
        wanted = [prefix + name for name in (ADAPTER_CONFIG, *weights, *FILES_NEXT_TO_ADAPTER) if prefix + name in names]
        snapshot = _fetch(reference, commit, wanted, base=base)
    return _located(reference, snapshot)


def _single_file(reference: Reference, base: Path | None) -> Located:
    """Return an adapter that is one file of a repository, named by the reference as a subfolder would be."""
    name = reference.subfolder or ""
    commit, names, error = _listing(reference)
    if error is not None:
        snapshot = _from_cache(error, reference, [glob.escape(name)], base=base)
        if not (snapshot / name).is_file():
            raise AddressError(_offline_reason(error, reference, base)) from error
    elif name not in names:
        files = [n for n in names if n.endswith(ADAPTER_SUFFIXES)]
        near = did_you_mean(name, files)
        raise AddressError(f"{reference.address!r}: there is no such file.{near} It holds: {listed(files or names, _SHOWN)}.")
    else:
        snapshot = _fetch(reference, commit, [name], base=base)
    file = snapshot / name
    _check_contained(file.parent, snapshot)
    return Located(
        folder=file.parent,
        file=file.name,
        repo=reference.repo,
        revision=reference.revision,
        commit=snapshot.name,
        subfolder=name,
    )


def folder_at_hand(text: str, *, commit: str | None = None) -> Path | None:
    """Return the folder of an adapter that this machine has: a local one, or one in the Hub's cache. No network is asked.

    Args:
        text: a reference; relative paths start from the working directory.
        commit: of the repository, in place of the reference's revision.

    Returns:
        The folder; None where there is none, or the text is not a reference.
    """
    try:
        reference = parse_reference(text, allow_task=False)
        if reference.path is not None:
            folder = absolute(expanded(reference.path))
            return folder if folder.is_dir() else None
        if commit is not None:
            reference = Reference(repo=reference.repo, revision=commit, subfolder=reference.subfolder)
        snapshot = _cached(reference, [glob.escape(_prefix(reference) + ADAPTER_CONFIG)])
        return None if snapshot is None else _located(reference, snapshot).folder
    except (AddressError, OSError, ValueError):
        return None


def resolve_model(
    text: str, *, base: Path | None = None, files: Sequence[str] = MODEL_FILES, any_form: bool = False
) -> Located:
    """Return the folder of a base model: a local one, or `org/repo[@revision][/subfolder]` fetched from the Hub.

    Args:
        text: a path or a place on the Hub. A repository without owner (`gpt2`) is one of the Hub's oldest and allowed.
        base: the folder that a relative path starts from; the working directory when absent.
        files: shell patterns of the files to fetch, of that folder alone and not of those below it; at least one file
            has to match the first. Where a model has no safetensors, its tensors in another format are fetched in their place.
            Second copies of the weights in another layout (`consolidated*`) are never fetched.
        any_form: it may also be a pipeline of diffusers, of whose weights one copy is fetched, or a `.safetensors` file.

    Raises:
        AddressError: the reference leads nowhere, may not be read, or nothing there matches the first pattern.
    """
    reference = parse_reference(text, base=base, allow_bare=True)
    if reference.name is not None:
        raise AddressError(f"{text!r}: a base model has no name. Write {reference.address!r}.")
    if reference.path is not None:
        return _local_place(reference, base, (SafetensorsFile.suffix,) if any_form else ())
    if any_form and (reference.subfolder or "").endswith(SafetensorsFile.suffix):
        return _single_file(reference, base)
    safetensors, *others = (kind.model_files for kind in TENSOR_FORMATS)
    prefix = _prefix(reference)
    commit, names, error = _listing(reference)
    if error is not None:
        patterns = [glob.escape(prefix) + pattern for pattern in (*files, *others)]
        of_pipeline = [glob.escape(prefix + PIPELINE_INDEX)]
        held = _cached(reference, of_pipeline) if any_form else None
        if held is not None and (held / prefix / PIPELINE_INDEX).is_file():
            patterns = of_pipeline  # not all weights that the repository has were fetched
        snapshot = _from_cache(error, reference, patterns, base=base)
        first = (safetensors, *others) if files[0] == safetensors else files[:1]  # of which one has to match
        first = (*first, PIPELINE_INDEX) if any_form else first
        if not any(path for pattern in first for path in (snapshot / prefix).glob(pattern)):
            raise AddressError(_offline_reason(error, reference, base)) from error
    else:
        here = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        if any_form and PIPELINE_INDEX in here:
            return _located(reference, _fetch(reference, commit, [prefix + n for n in pipeline_files(here)], base=base))
        here = [name for name in here if "/" not in name and not name.startswith("consolidated")]
        wanted = {pattern: fnmatch.filter(here, pattern) for pattern in files}
        if not wanted.get(safetensors, True):
            wanted[safetensors] = next(filter(None, (fnmatch.filter(here, pattern) for pattern in others)), [])
        if not wanted[files[0]]:
            raise AddressError(
                f"{reference.address!r} has no {files[0]}. It holds: {listed(names, _SHOWN) or 'nothing'}. Give a model that "
                "has, or convert this one and give the local folder."
            )
        paths = sorted({prefix + name for found in wanted.values() for name in found})
        snapshot = _fetch(reference, commit, paths, base=base)
    return _located(reference, snapshot)


def _prefix(reference: Reference) -> str:
    return f"{reference.subfolder}/" if reference.subfolder else ""


def _located(reference: Reference, snapshot: Path) -> Located:
    folder = snapshot / (reference.subfolder or "")
    for place in (folder, *(p for p in sorted(folder.iterdir()) if p.is_dir() and (folder / PIPELINE_INDEX).exists())):
        _check_contained(place, snapshot)
    return Located(
        folder=folder,
        repo=reference.repo,
        revision=reference.revision,
        commit=snapshot.name,
        subfolder=reference.subfolder,
    )


def _local_place(reference: Reference, base: Path | None, suffixes: tuple[str, ...]) -> Located:
    """Return a local folder, or a file whose name ends in one of some suffixes."""
    try:
        place = absolute(expanded(reference.path or ""), base)
        if place.suffix in suffixes and place.is_file():
            return Located(folder=place.parent, file=place.name)
    except OSError as error:
        raise AddressError(f"{reference.path!r} cannot be read: {error.strerror or error}.") from error
    return Located(folder=_local_folder(reference, base, recipe=suffixes == ADAPTER_SUFFIXES))


def _local_folder(reference: Reference, base: Path | None, *, recipe: bool) -> Path:
    """Return a local folder; `recipe`: a recipe might be meant."""
    path = reference.path or ""
    try:
        folder = absolute(expanded(path), base)
        if folder.is_dir():
            return folder
        exists = folder.exists()
    except OSError as error:
        raise AddressError(f"{path!r} cannot be read: {error.strerror or error}.") from error
    if exists and recipe and is_document(folder):
        ends = join_words(DOCUMENT_SUFFIXES, "or")
        raise AddressError(
            f"{path!r} is taken for an adapter, and is a file of text. If it is a recipe, rename it: recipes end in {ends}."
        )
    if exists:
        raise AddressError(f"{path!r} is a file. Give the folder that holds it: {str(Path(path).parent)!r}.")
    parent = folder.parent
    near = did_you_mean(folder.name, _folders(parent)) if parent.is_dir() else f" {str(parent)!r} does not exist either."
    raise AddressError(f"{path!r}: there is no folder {str(folder)!r}.{near}{_if_hub(path, base)}")


def _folders(parent: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in parent.iterdir() if entry.is_dir())
    except OSError:
        return []


def _if_hub(path: str, base: Path | None) -> str:
    bare = path.removeprefix("./")
    if bare.startswith((".", "/", "~")) or "/" not in bare.strip("/"):
        return ""
    try:
        spec = parse_reference(bare.strip("/"), base=base).spec
    except AddressError:
        return ""
    return f" If you mean the repository on the Hub, write {spec!r}."


def _listing(reference: Reference) -> tuple[str, list[str], Exception | None]:
    """Ask the Hub which commit the reference means, and which files that holds; return why it does not answer, if so."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(reference.repo or "", revision=reference.revision)
    except Exception as error:  # which classes can come depends on the transport library below huggingface_hub
        return "", [], error
    return info.sha or "", sorted(sibling.rfilename for sibling in info.siblings or []), None


def _fetch(reference: Reference, commit: str, names: list[str], *, base: Path | None) -> Path:
    """Bring the files of that commit into the cache, and return the folder that holds them."""
    from huggingface_hub import snapshot_download

    patterns = [glob.escape(name) for name in names]
    try:
        # By the revision as it was asked for: only so does the cache record what it resolves to, for use offline.
        snapshot = Path(snapshot_download(reference.repo or "", revision=reference.revision, allow_patterns=patterns))
        if snapshot.name != commit:  # the branch has moved since it was asked about
            snapshot = Path(snapshot_download(reference.repo or "", revision=commit, allow_patterns=patterns))
    except Exception as error:  # which classes can come depends on the transport library below huggingface_hub
        raise AddressError(_offline_reason(error, reference, base)) from error
    return snapshot


def _from_cache(error: Exception, reference: Reference, patterns: list[str], *, base: Path | None) -> Path:
    """Return the snapshot that the cache holds, when `error` says that the Hub did not answer rather than refused.

    It may be older than what the Hub holds, so it is announced, unless the user has asked for offline mode.
    """
    from huggingface_hub import constants

    status = status_of(error)
    if status is None or status == 429 or status >= 500:
        cached = _cached(reference, patterns)
        if cached is not None:
            if not constants.HF_HUB_OFFLINE:
                why = explain_failure(error, reference.repo or "", reference.revision, cached=True)
                announce(f"{reference.address!r} is taken from the cache, as of commit {cached.name}: {why}")
            return cached
    raise AddressError(_offline_reason(error, reference, base)) from error


def _cached(reference: Reference, patterns: list[str]) -> Path | None:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(reference.repo or "", revision=reference.revision, allow_patterns=patterns, local_files_only=True)
        )
    except Exception:  # what has to be reported is why the Hub could not be asked
        return None


def _offline_reason(error: Exception, reference: Reference, base: Path | None) -> str:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    repo = reference.repo or ""
    if "/" not in repo:  # a folder that is not there, far more likely than one of the Hub's few models without an owner
        where = working_folder() / (base or Path())
        answer = "has no such model either" if isinstance(error, RepositoryNotFoundError) else "could not be asked for one"
        found = f"{reference.address!r}: there is no folder {str(where / repo)!r}.{did_you_mean(repo, _folders(where))}"
        return f"{found} (Models of the Hub are called org/name; it {answer}.)"
    message = f"{reference.address!r}: {explain_failure(error, repo, reference.revision)}"
    if isinstance(error, RevisionNotFoundError):
        return message + _revisions(repo, reference.revision or "")
    if isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError):
        return f"{message} Nor is there a folder {reference.address!r} in {base or working_folder()}."
    return message


def _revisions(repo: str, revision: str) -> str:
    from huggingface_hub import HfApi

    try:
        refs = HfApi().list_repo_refs(repo)
    except Exception:  # only the list of what there is instead is lost
        return ""
    names = [ref.name for ref in (*refs.branches, *refs.tags)]
    return f"{did_you_mean(revision, names)} It has: {listed(names, _SHOWN)}."


def _no_config(reference: Reference, commit: str, names: list[str]) -> str:
    place = "in this subfolder" if reference.subfolder else "at the top of this repository"
    found = f"{reference.address!r}: there is no {ADAPTER_CONFIG} {place} (commit {commit[:12]})."
    folders = [name.removesuffix(ADAPTER_CONFIG).rstrip("/") for name in names if name.split("/")[-1] == ADAPTER_CONFIG]
    if folders:
        specs = [
            reference.model_copy(update={"name": None, "subfolder": folder or None}).spec
            for folder in sorted(folders, key=_natural)
        ]
        return f"{found} Give a place that has one: {listed(specs, _SHOWN)}."
    if any(name.endswith(".safetensors") for name in names):
        return f"{found} It looks like a full model, which plait takes as a base model. It holds: {listed(names, _SHOWN)}."
    return f"{found} No other folder has one. It holds: {listed(names, _SHOWN) or 'nothing'}."


def _natural(text: str) -> list[tuple[int, str]]:
    """Sort key by which checkpoint-500 comes before checkpoint-1000."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", text)]


def _check_contained(folder: Path, snapshot: Path) -> None:
    """Refuse a cache in which a link leads out of the snapshot to anywhere but the cache's own blobs."""
    storage = snapshot.parent.parent
    inside = snapshot.resolve()
    blobs = [(storage / "blobs").resolve(), (storage.parent / "blobs").resolve()]
    if not folder.resolve().is_relative_to(inside):
        raise AddressError(f"{folder} is a link to {folder.resolve()}, outside the snapshot. Delete {storage} and retry.")
    for entry in sorted(folder.iterdir()):
        target = Path(os.path.realpath(entry))  # Path.resolve raises RuntimeError where links lead in a circle
        if not any(target.is_relative_to(root) for root in (inside, *blobs)):
            raise AddressError(f"{entry} is a link to {target}, outside the cache. Delete {storage} and retry.")
