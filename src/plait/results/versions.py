"""The versions of the libraries that a result depends on."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def library_versions(*more: str) -> dict[str, str]:
    """Return the versions of the libraries that compute, and of those in `more` that are installed."""
    found = {}
    for name in ("torch", "safetensors", "numpy", *more):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            if name not in more:
                found[name] = "unknown"
    return found
