"""Read what a user writes for an adapter: a folder, or a place on the Hub.

    [name=]PATH                              ./adapters/code    ~/runs/7/final    code=/data/code
    [name=]org/repo[@revision][/subfolder]   code=org/repo@v2/checkpoint-2874
    [name=]TASK                              a word, where no folder is called so: the task's best adapter (`task_adapters.py`)

Independent of networks, caches or what an adapter holds: it looks at the disk only to distinguish a folder, a task and a
repository.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import unicodedata
from pathlib import Path
from typing import Self

from pydantic import field_validator, model_validator

from plait.errors import AddressError, collect, did_you_mean
from plait.folders import absolute, expanded, working_folder
from plait.hub.task_adapters import task_adapter, task_of
from plait.records import Record

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_REPO_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
_REVISION = re.compile(r"refs/pr/[0-9]+|(?:refs/convert/)?[A-Za-z0-9_][A-Za-z0-9._+-]*")
# A revision ends at the next slash, except for the two kinds of reference in which the Hub itself uses slashes.
_HUB = re.compile(
    r"(?P<repo>[^/@]*/[^/@]*)(?:@(?P<revision>refs/pr/[0-9]+|refs/convert/[^/]*|[^/]*))?(?:/(?P<sub>.*))?", re.DOTALL
)
_BARE = re.compile(r"(?P<repo>[^/@]+)(?:@(?P<revision>[^/]*))?")
_WEB = re.compile(r"https?://[^/]+/(?P<repo>[^/]+/[^/]+)(?:/tree/(?P<revision>[^/]+)(?:/(?P<sub>.+?))?)?/?")
# Names that trainers give to the folders and files of every run, so that they do not identify the adapter.
_GENERIC = re.compile(
    r"(?:(?:pytorch[-_])?lora[-_])?(?:adapters?|checkpoints?|final|best|last|latest|outputs?|model|lora|weights)"
    r"(?:[-_](?:adapter|checkpoint|model|weights))?|(?:checkpoint|epoch|step)[-_]?[0-9]+",
    re.IGNORECASE,
)
_FILE = re.compile(r"\.(?:safetensors|gguf|bin|pt|ckpt)$", re.IGNORECASE)  # of adapters that are a single file
FORMS = "[name=]PATH (a folder, as ./a, /a, ~/a) or [name=]org/repo[@revision][/subfolder] (on the Hub)"


class Reference(Record):
    """Where an adapter is: either `path` or `repo` is set, never both.

    Attributes:
        name: what the user calls the adapter, or None.
        path: a local folder, as the user wrote it; one without a leading `.`, `/` or `~` gets `./`, so that the
            text stays a path wherever it is read again.
        repo: `org/repo` on the Hub.
        revision: branch, tag, commit, `refs/pr/N` or `refs/convert/NAME`; None is the default branch.
        subfolder: the folder inside the repository, without leading or trailing slash.
    """

    name: str | None = None
    path: str | None = None
    repo: str | None = None
    revision: str | None = None
    subfolder: str | None = None

    @field_validator("path")
    @classmethod
    def _mark_path(cls, path: str | None) -> str | None:
        return f"./{path}" if path and not path.startswith((".", "/", "~")) else path

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.path is None) == (self.repo is None):
            raise ValueError("a reference has either a path or a repo")
        if self.path is not None and (self.revision is not None or self.subfolder is not None):
            raise ValueError("a local path has no revision and no subfolder: write the complete path")
        if self.name is not None and not _NAME.fullmatch(self.name):
            raise ValueError(adapter_name_problem(self.name))
        problems = _problems(self.repo, self.revision, self.subfolder)
        if self.path is not None and (not self.path or "\0" in self.path):
            problems.append("the path is empty or holds a NUL character")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def spec(self) -> str:
        """The canonical text, which `parse_reference` reads back to an equal reference."""
        name = f"{self.name}=" if self.name is not None else ""
        return name + self.address

    @property
    def address(self) -> str:
        """The canonical text without the name."""
        if self.path is not None:
            return self.path
        revision = f"@{self.revision}" if self.revision is not None else ""
        subfolder = f"/{self.subfolder}" if self.subfolder is not None else ""
        return f"{self.repo}{revision}{subfolder}"

    def __str__(self) -> str:
        return self.spec

    def default_name(self, base: Path | None = None) -> str:
        """Return the user's name for the adapter, or one made from the last distinctive parts of its address.

        A last part that identifies nothing (`checkpoint-123`, `final`, `adapter`, …) keeps the part before it:
        `org/repo/checkpoint-123` is `repo-checkpoint-123`; `style.safetensors` is `style`. In `artifacts/<task>/adapters/…`
        it is the task, and in `phases/<name>/adapter`, where `plait train` writes one, the phase.

        Args:
            base: the folder that a relative `path` starts from; the working directory when absent.
        """
        if self.name is not None:
            return self.name
        below = self.subfolder.split("/") if self.subfolder else []
        parts = [(self.repo or "").rpartition("/")[2], *below] if self.path is None else _path_parts(self.path, base)
        parts = [*parts[:-1], _FILE.sub("", parts[-1])]
        task = None if self.path is None else task_of(parts)
        kept = parts[-1:] if task is None else [task]
        for part in reversed(parts[:-1] if task is None else ()):
            if not _GENERIC.fullmatch(kept[0]):
                break
            kept.insert(0, part)
        text = unicodedata.normalize("NFKD", "-".join(kept))
        text = "".join(c for c in text if not unicodedata.combining(c))
        name = re.sub(r"-{2,}", "-", re.sub(r"[^A-Za-z0-9._-]", "-", text)).lstrip("._-").rstrip("-") or "adapter"
        if not any(c.isalnum() and not c.isascii() for c in text):
            return name
        # letters that a name cannot hold: a hash of them distinguishes two such names
        return f"{name}-{hashlib.sha256(text.encode(errors='surrogatepass')).hexdigest()[:6]}"


def parse_reference(text: str, *, base: Path | None = None, allow_bare: bool = False, allow_task: bool = True) -> Reference:
    """Read `[name=]PATH` or `[name=]org/repo[@revision][/subfolder]`.

    The name is the text before the first `=`, when it can be a name. The rest is a path when it starts with `.`,
    `/` or `~`, or when it exists on disk; a word may be a task with an adapter in `artifacts/`; anything else must be a place
    on the Hub. A folder `org/repo` therefore hides the repository of that name; `org/repo@main` still reaches it.

    Args:
        text: what the user wrote.
        base: the folder that relative paths start from (a recipe's own); the working directory when absent.
        allow_bare: also take a repository without an owner (`gpt2`), as the Hub's oldest models have none; and no task.
        allow_task: take a task.

    Raises:
        AddressError: the text is neither form, its subfolder climbs out of the repository, or a task has not one best adapter.
    """
    head, equals, tail = text.partition("=")
    name, address = (head, tail) if equals and _NAME.fullmatch(head) else (None, text)
    if not address.strip() or "\0" in address:
        raise AddressError(f"{text!r} names no place. Allowed: {FORMS}.")
    if address.startswith((".", "/", "~")) or _exists(address, base):
        return Reference(name=name, path=address)
    if "://" in address:
        raise AddressError(f"{text!r} is a web address.{_write_instead(address)} Allowed: {FORMS}.")
    if allow_task and not allow_bare and (found := task_adapter(address, base)) is not None:
        return Reference(name=name, path=Path(os.path.relpath(found, absolute(base or Path()))).as_posix())
    match = _HUB.fullmatch(address) or (_BARE.fullmatch(address) if allow_bare else None)
    if match is None:
        raise AddressError(_neither(text, address, base))
    repo, revision, subfolder = match["repo"], match["revision"], match.groupdict().get("sub")
    problems = _problems(repo, revision, subfolder)
    if "=" in repo:  # the text before it was meant as a name, so that an explanation of the repository would not help
        problems = [adapter_name_problem(head)]
    start = f"{text!r}: " if len(problems) == 1 else ""
    collect(AddressError, [f"{start}{problem}." for problem in problems], f"{text!r} is not a reference")
    return Reference(name=name, repo=repo, revision=revision, subfolder=subfolder)


def adapter_name_problem(name: str) -> str:
    """Report why `name` cannot name an adapter."""
    return f"the name {name!r} must start with a letter or digit and hold only letters, digits, '.', '_' and '-'"


def repo_problem(repo: str) -> str:
    """Report why the Hub cannot have a repository called `repo`, or return an empty string."""
    parts = repo.split("/")
    if len(parts) > 2 or not all(_REPO_PART.fullmatch(part) for part in parts):
        return (
            f"{repo!r} cannot be a repository: owner and name are each 1 to 96 letters, digits, '.', '_' or '-', "
            "and neither starts nor ends with '.' or '-'"
        )
    if "--" in repo or ".." in repo or repo.endswith(".git"):
        return f"{repo!r} cannot be a repository: the Hub allows no '--', no '..' and no '.git' at the end"
    return ""


def _revision_problem(revision: str) -> str:
    if revision == "refs" or not _REVISION.fullmatch(revision) or ".." in revision:
        return (
            f"{revision!r} cannot be a revision: give a branch, tag or commit without slashes, refs/pr/N or refs/convert/NAME"
        )
    return ""


def _subfolder_problem(subfolder: str) -> str:
    parts = subfolder.split("/")
    if "" in parts:
        return f"the subfolder {subfolder!r} has an empty part (a doubled, leading or trailing slash)"
    if "." in parts or ".." in parts:
        return f"the subfolder {subfolder!r} must not hold '.' or '..': it has to stay inside the repository"
    if any(c in "\\~" or not c.isprintable() for c in subfolder):
        return f"the subfolder {subfolder!r} must not hold backslashes, '~' or control characters"
    if "@" in subfolder:
        return f"the subfolder {subfolder!r} holds '@': the revision comes before it, as in org/repo@revision/subfolder"
    return ""


def _problems(repo: str | None, revision: str | None, subfolder: str | None) -> list[str]:
    found = [
        repo_problem(repo) if repo is not None else "",
        _revision_problem(revision) if revision is not None else "",
        _subfolder_problem(subfolder) if subfolder is not None else "",
    ]
    return [problem for problem in found if problem]


def _exists(address: str, base: Path | None) -> bool:
    try:
        return ((base or Path()) / address).exists()
    except OSError as error:  # what cannot be looked at is refused as a folder, and not asked for on the Hub
        return error.errno != errno.ENAMETOOLONG


def _neither(text: str, address: str, base: Path | None) -> str:
    folder = base or working_folder()
    try:
        near = did_you_mean(address, sorted(entry.name for entry in folder.iterdir() if entry.is_dir()))
    except OSError:
        near = ""
    return f"{text!r}: there is no {address!r} in {folder}, and a repository needs its owner.{near} Allowed: {FORMS}."


def _write_instead(address: str) -> str:
    if address.startswith("hf://"):
        return f" Write {address.removeprefix('hf://')!r}."
    if match := _WEB.fullmatch(address):
        revision, subfolder = match["revision"], match["sub"]
        spec = match["repo"] + (f"@{revision}" if revision else "") + (f"/{subfolder}" if subfolder else "")
        return f" Write {spec!r}."
    return ""


def _path_parts(path: str, base: Path | None) -> list[str]:
    parts: list[str] = []
    for part in absolute(expanded(path), base).parts[1:]:
        # `..` is taken away by name: following a link would call `latest` by the run it points to.
        if part != "..":
            parts.append(part)
        elif parts:
            parts.pop()
    return parts or ["adapter"]
