"""What failures of `huggingface_hub` mean to a user.

Independent of adapters; whether a failure is an `AddressError` or an `OutputError` is the caller's decision.
`huggingface_hub` is imported inside functions, because it costs more than the rest of this package together.
"""

from __future__ import annotations

import os

from plait.libraries.huggingface_hub import cause_of, is_of_transport, status_of, words_of


def login_hint() -> str:
    """Return what to do about a token, as a sentence."""
    from huggingface_hub import get_token

    try:
        token = get_token()
    except Exception:  # a broken login of any kind (a CI exchange, a keyring) is for the user the same as none
        token = None
    if token is None:
        return "No token is set: log in with `hf auth login`, or set HF_TOKEN."
    source = "HF_TOKEN, which goes before a login" if os.environ.get("HF_TOKEN") else "the one of `hf auth login`"
    return f"A token is set ({source}): check with `hf auth whoami` whose it is and what it may do."


def explain_failure(error: Exception, repo: str, revision: str | None, *, cached: bool = False) -> str:
    """Turn a failure of `huggingface_hub` into what happened and what to do, without the address it happened to.

    Args:
        error: what was raised; the transport library's own errors are understood by shape, as that library changes
            from one `huggingface_hub` to the next.
        repo: the repository that was asked for.
        revision: the revision that was asked for.
        cached: whether it was found in the cache all the same.
    """
    from huggingface_hub import constants, errors

    if constants.HF_HUB_OFFLINE:
        return (
            f"offline mode is on (HF_HUB_OFFLINE), and {revision or 'the default branch'} of this repository is not "
            f"complete in the cache {constants.HF_HUB_CACHE}. Unset HF_HUB_OFFLINE, or fetch it once where there is a "
            f"network: `hf download {repo}`."
        )
    cause = cause_of(error)
    if isinstance(cause, errors.GatedRepoError):
        return f"the repository is gated. Ask for access at {constants.ENDPOINT}/{repo}. {login_hint()}"
    if isinstance(cause, errors.RevisionNotFoundError):
        return f"the repository has no revision {revision!r}."
    if isinstance(cause, errors.RepositoryNotFoundError):
        return f"{constants.ENDPOINT} has no such repository, or it is private. {login_hint()}"
    return _by_status(cause) or _by_shape(cause, cached=cached)


def _by_status(cause: BaseException) -> str:
    from huggingface_hub import constants

    status = status_of(cause)
    if status is None:
        return ""
    if status == 401:
        return f"{constants.ENDPOINT} refuses the token. {login_hint()}"
    if status == 403:
        return f"{constants.ENDPOINT} does not allow this ({_words(cause)}). {login_hint()}"
    if status == 429 or status >= 500:
        return f"{constants.ENDPOINT} answers {status}: try again later."
    return f"{constants.ENDPOINT} answers {status} ({_words(cause)})."


def _by_shape(cause: BaseException, *, cached: bool) -> str:
    from huggingface_hub import constants

    if isinstance(cause, OSError) and cause.errno is not None and cause.filename is not None:
        return f"{cause.filename}: {cause.strerror}."
    if is_of_transport(cause):
        missing = "" if cached else f", and the cache {constants.HF_HUB_CACHE} does not hold it"
        return (
            f"{constants.ENDPOINT} cannot be reached, or does not answer as a Hub does ({_words(cause)}){missing}. "
            "Check the network, its proxy and HF_ENDPOINT."
        )
    return _words(cause)


def _words(error: BaseException) -> str:
    words = words_of(error)
    text = " ".join(str(words or error).split())[:300]
    return text if words else f"{type(error).__name__}: {text}".removesuffix(": ")
