"""Print constraints that install the oldest versions that pyproject.toml allows; torch stays at its tested version.

python tests/lower_bounds.py EXTRA... > constraints.txt
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
_BOUND = re.compile(r"(?P<name>[\w.-]+)>=(?P<version>[\w.]+)")
_EXTRAS = re.compile(r"plait\[(?P<extras>[\w,-]+)\]")


def pins() -> dict[str, str]:
    """Return the pins of constraints.txt: name, in lower case and with dashes → version."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if line.strip() and not line.startswith("#"))
    return {canonical(name): version.strip() for name, version in pairs}


def extras() -> list[str]:
    """Return the names of all extras."""
    return list(_project()["optional-dependencies"])


def bounds(wanted: Iterable[str]) -> dict[str, str]:
    """Return the core's direct dependencies and those of some extras → the highest lower bound that is declared for it."""
    found: dict[str, str] = {}
    for requirement in _requirements(wanted):
        matched = _BOUND.fullmatch(requirement)
        if matched is None:
            raise ValueError(f"pyproject.toml: {requirement!r} must be a name with a lower bound, NAME>=VERSION")
        name = canonical(matched["name"])
        found[name] = max(found.get(name, "0"), matched["version"], key=_numbers)
    return found


def canonical(name: str) -> str:
    """Return a distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


def _project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def _requirements(wanted: Iterable[str]) -> Iterator[str]:
    yield from _project()["dependencies"]
    for extra in wanted:
        for requirement in _project()["optional-dependencies"][extra]:
            others = _EXTRAS.fullmatch(requirement)
            if others is None:
                yield requirement
            else:
                yield from _requirements(others["extras"].split(","))


def main() -> None:
    """Print them."""
    for name, version in sorted(bounds(sys.argv[1:]).items()):
        sys.stdout.write(f"{name}=={pins()['torch'] if name == 'torch' else version}\n")


if __name__ == "__main__":
    main()
