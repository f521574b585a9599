"""The packages of the core, and a process in which no other can be imported: as after `pip install plait`, without extras."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]

#: Runs commands and Python expressions without the packages in `blocked`, and writes what became of them.
_PROCESS = """
import contextlib, io, json, os, sys, traceback
from pathlib import Path

asked = json.loads(Path(sys.argv[1]).read_text())
blocked = set(asked["blocked"])

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
import plait
from plait.cli.main import main

def files():
    return sorted(str(p) for p in Path().rglob("*") if p.is_file())

found = []
for words in asked["runs"]:
    out, err, before = io.StringIO(), io.StringIO(), files()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            if isinstance(words, str):
                code, error = 0, repr(eval(words))
            else:
                main(words)
                code, error = 0, ""
        except SystemExit as left:
            code, error = left.code or 0, ""
        except BaseException as failed:
            code, error = type(failed).__name__, str(failed)
    found.append({"code": code, "out": out.getvalue(), "err": err.getvalue() + error, "new": sorted({*files()} - {*before})})
Path(sys.argv[2]).write_text(json.dumps(found))
"""


def project() -> dict[str, Any]:
    """Return the table `project` of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def closure(requirements: Iterable[str]) -> set[str]:
    """Return the distributions, of those installed, that requirements bring, and those that these need."""
    found: set[str] = set()
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        one = waiting.pop()
        name = canonicalize_name(one.name)
        if name in found:
            continue
        try:
            needs = [Requirement(text) for text in requires(name) or ()]
        except PackageNotFoundError:  # of another platform, or not installed
            continue
        found.add(name)
        extras = ["", *one.extras]
        waiting += [r for r in needs if r.marker is None or any(r.marker.evaluate({"extra": extra}) for extra in extras)]
    return found


@cache
def modules() -> dict[str, frozenset[str]]:
    """Return top-level module → the installed distributions that have it."""
    return {
        name: frozenset(map(canonicalize_name, distributions))
        for name, distributions in packages_distributions().items()
        if re.fullmatch(r"\w+", name)
    }


def beyond_the_core() -> list[str]:
    """Return every installed module that no core dependency brings."""
    core = {*closure(project()["dependencies"]), "plait"}
    return sorted(name for name, distributions in modules().items() if not distributions & core)


def run_with_core_alone(folder: Path, runs: list[list[str] | str]) -> list[dict[str, Any]]:
    """Run commands (lists of words) and Python expressions in one process of that kind.

    Args:
        folder: to work in.
        runs: one after another.

    Returns:
        Of each: exit code (or the exception's class), stdout, stderr (with the exception's text, or the value's) and new files.
    """
    asked, answer = folder.parent / "asked.json", folder.parent / "answered.json"
    asked.write_text(json.dumps({"blocked": beyond_the_core(), "runs": runs}))
    done = subprocess.run(
        [sys.executable, "-c", _PROCESS, str(asked), str(answer)], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(answer.read_text())
    return found
