"""Write the generated parts of README.md again; `--check` only says whether they are current.

python docs/generate.py [--check]
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from plait.cli.methods import exactness
from plait.methods import METHODS
from plait.methods.base import Method

README = Path(__file__).parents[1] / "README.md"


def method_row(method: Method) -> str:
    """Return one row of the table of methods."""
    source = f"[{method.source.title}]({method.source.url})" if method.source.url else method.source.title
    spaces = ", ".join(f"`{space}`" for space in method.spaces)
    exact = exactness(method)
    result = "exact" if exact[method.spaces[0]].startswith("exact") else exact[method.spaces[0]].partition(";")[0]
    notes = ", ".join([f"{result} in `{method.spaces[0]}`", *(["random (keyed)"] if method.randomised else [])])
    return f"| `{method.name}` | {method.summary} | {spaces} | {notes} | {source} |"


def methods_table() -> str:
    """Return the table of methods, from the registry."""
    head = "| method | what it does | spaces | result | source |\n|---|---|---|---|---|\n"
    return head + "\n".join(method_row(method) for method in METHODS.values()) + "\n"


def generated(text: str) -> str:
    """Return the README with its generated parts made again."""
    return re.sub(r"(?<=<!-- methods -->\n).*?(?=<!-- /methods -->)", lambda _: f"\n{methods_table()}\n", text, flags=re.DOTALL)


def main() -> int:
    """Write, or check."""
    before = README.read_text(encoding="utf-8")
    after = generated(before)
    if "--check" in sys.argv[1:]:
        return int(before != after)
    README.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
