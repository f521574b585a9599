"""Publish a folder on the Hub.

Everything that can be refused is refused before the first byte leaves. Independent of what the folder holds; that it is
complete is for the caller to make sure of.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from plait.errors import OutputError
from plait.hub.client import explain_failure, login_hint
from plait.hub.references import repo_problem
from plait.libraries.huggingface_hub import status_of


def check_push(repo: str) -> str:
    """Check that `repo` can be pushed to, as far as that can be known without writing anything.

    The name is one that the Hub allows; a token is set, valid and not read-only; a repository that does not exist yet
    would belong to the user or to one of the user's organizations. Meant to be called before hours of work.

    Args:
        repo: `org/name`, or `name` for the user's own.

    Returns:
        The full `org/name`.

    Raises:
        OutputError: it cannot be pushed to. The message says what to do.
    """
    from huggingface_hub import HfApi, constants, get_token

    problem = repo_problem(repo)
    if problem:
        raise OutputError(f"cannot push: {problem}. Give org/name, or name alone for your own account.")
    if constants.HF_HUB_OFFLINE:
        raise OutputError(f"cannot push to {repo!r}: offline mode is on. Unset HF_HUB_OFFLINE.")
    api = HfApi()
    try:
        if get_token() is None:
            raise OutputError(f"cannot push to {repo!r}. {login_hint()}")
        account = api.whoami()
        owners = [account["name"], *(org["name"] for org in account.get("orgs", []))]
        full = repo if "/" in repo else f"{owners[0]}/{repo}"
        may_create = full.split("/")[0] in owners
        missing = not may_create and not api.repo_exists(full)
    except OutputError:
        raise
    except Exception as error:  # which classes can come depends on the transport library below huggingface_hub
        raise OutputError(f"cannot push to {repo!r}: {_refusal(error, repo)}") from error
    if ((account.get("auth") or {}).get("accessToken") or {}).get("role") == "read":
        raise OutputError(
            f"cannot push to {full!r}: the token of {owners[0]!r} may only read. Make one that may write at "
            f"{constants.ENDPOINT}/settings/tokens, and log in with `hf auth login --force`."
        )
    if missing:
        raise OutputError(
            f"cannot push to {full!r}: it does not exist, and {owners[0]!r} can create repositories only under: "
            f"{', '.join(owners)}."
        )
    return full


def push_folder(
    folder: Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    message: str,
    replaces: Sequence[str] = (),
) -> str:
    """Upload every file of `folder` to a model repository, which is created when it does not exist.

    Files that the repository holds already and the folder does not are left as they are, but for those that `replaces` names.

    Args:
        folder: what to upload, with its subfolders.
        repo: `org/name`, or `name` for the user's own.
        private: make the repository private. One that exists and is public is refused: uploading would publish.
        revision: the branch to write to, created from the default branch when missing; None is the default branch.
        create_pr: open a pull request instead of writing to the default branch.
        message: the title of the commit or pull request.
        replaces: shell patterns of files that the same commit removes from the repository where it does not write them.

    Returns:
        The web address of the repository, of the branch in it, or of the pull request. The Hub opens no pull request
        when the default branch holds the same files already; the address is then the repository's.

    Raises:
        OutputError: the folder cannot be uploaded there. Refusals come before anything is written, except those that
            only the Hub can give.
    """
    from huggingface_hub import HfApi

    if not folder.is_dir() or not any(path.is_file() for path in folder.rglob("*")):
        raise OutputError(f"cannot push {str(folder)!r}: it is not a folder with files in it.")
    if create_pr and revision is not None:
        raise OutputError(
            f"cannot push to {repo!r}: a pull request goes to the default branch. Leave out the revision {revision!r}, "
            "or the pull request."
        )
    full = check_push(repo)
    api = HfApi()
    try:
        # None leaves the choice to the organization, some of which make every new repository private.
        url = api.create_repo(full, private=private or None, exist_ok=True)
        if private and not api.model_info(full).private:
            raise OutputError(
                f"cannot push to {full!r} as private: it exists and is public. Make it private at {url}/settings, "
                "or push without asking for privacy."
            )
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(full, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=full,
            folder_path=folder,
            revision=revision,
            create_pr=create_pr,
            commit_message=message,
            delete_patterns=list(replaces) or None,
        )
    except OutputError:
        raise
    except Exception as error:  # which classes can come depends on the transport library below huggingface_hub
        raise OutputError(f"pushing {str(folder)!r} to {full!r} failed: {_refusal(error, full)}") from error
    if commit.pr_url is not None:
        return commit.pr_url
    return f"{url}/tree/{revision}" if revision is not None else str(url)


def _refusal(error: Exception, repo: str) -> str:
    status = status_of(error)
    if status == 401:
        source = "HF_TOKEN" if os.environ.get("HF_TOKEN") else "the stored token"
        return f"the Hub does not accept {source}. Log in with `hf auth login --force`, or set a valid HF_TOKEN."
    return explain_failure(error, repo, None)
