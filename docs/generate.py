"""Write the generated parts of docs/ and src/plait/cli again; `--check` says whether they are current.

python docs/generate.py [--check]

A page of docs/methods/ names its methods in a comment, `<!-- methods: ties della -->`, and gets their descriptions from the
registry between that and `<!-- /methods -->`. A method that no page names is added to the page of its kind.
docs/methods/README.md gets one table of all of them, in the order of the pages; docs/installing.md one of the versions in
constraints.txt and pyproject.toml. The README's pictures are drawn from the table of docs/results.md. The command line's
table of a recipe's keys is written from the schema.
"""

from __future__ import annotations

import json
import keyword
import re
import sys
import textwrap
import tomllib
from collections.abc import Sequence
from itertools import chain, product
from pathlib import Path
from typing import Any

from plait.cli.methods import describe
from plait.cli.options import TABLE
from plait.methods import METHODS
from plait.recipes.importers.other_tools import page as words
from plait.recipes.keys import recipe_keys
from plait.recipes.problems import spell_value
from plait.recipes.schema import Recipe
from plait.results.older_keys import page as older_keys

ROOT = Path(__file__).parents[1]
METHODS_PAGE = ROOT / "docs" / "methods" / "README.md"
VERSIONS_PAGE = ROOT / "docs" / "installing.md"
RESULTS = ROOT / "docs" / "results.md"
#: Text, faint text, lines, bars and the bars of others, on a light and on a dark page.
COLORS = {
    "light": ("#1b1f24", "#59626c", "#d9dee3", "#1f5fa7", "#9aa4ae"),
    "dark": ("#e6e9ec", "#9aa4ae", "#343a40", "#6aa5e8", "#6b747d"),
}
PICTURES = {ROOT / "docs" / "pictures" / f"recovery-{name}.svg": colors for name, colors in COLORS.items()}
OTHER_TOOLS = ROOT / "docs" / "coming-from.md"
PAGES = ("linear", "elementwise", "spectral", "geometric", "solved", "compatibility")
KEYS = ROOT / "src" / "plait" / "cli" / TABLE.name
SETTINGS = ROOT / "src" / "plait" / "api" / "settings.py"
_BLOCK = re.compile(r"(?<=<!-- methods: )([\w\s]+?)( -->\n).*?(?=<!-- /methods -->)", re.DOTALL)
_WORDS = re.compile(r"(?<=<!-- words -->\n).*?(?=<!-- /words -->)", re.DOTALL)
_OLDER_KEYS = re.compile(r"(?<=<!-- older keys -->\n).*?(?=<!-- /older keys -->)", re.DOTALL)
_TABLE = re.compile(r"(?<=<!-- methods -->\n).*?(?=<!-- /methods -->)", re.DOTALL)
_VERSIONS = re.compile(r"(?<=<!-- versions -->\n).*?(?=<!-- /versions -->)", re.DOTALL)
_PAGE = {"linear": "linear", "entries": "elementwise", "deltas": "spectral"}  # of a method that no page names yet
_RESULT = {"linear": "exact", "deltas": "exact", "entries": "exact in `core`, `knots`; dense in `delta`"}


def page(name: str) -> Path:
    """Return the file of a page."""
    return ROOT / "docs" / "methods" / f"{name}.md"


FILES = (*map(page, PAGES), METHODS_PAGE, VERSIONS_PAGE, OTHER_TOOLS, KEYS, SETTINGS, *PICTURES)


def methods_of(text: str) -> list[str]:
    """Return the methods that a page describes, in its order."""
    return [name for names, _ in _BLOCK.findall(text) for name in names.split()]


def complete(path: Path) -> str:
    """Return a page with the names of methods of its kind that no page names, after those of its last block."""
    text = path.read_text(encoding="utf-8")
    named = {name for other in PAGES for name in methods_of(page(other).read_text(encoding="utf-8"))}
    new = [name for name, method in METHODS.items() if name not in named and _PAGE[method.kind] == path.stem]
    if not new:
        return text
    end = [match.end(1) for match in _BLOCK.finditer(text)][-1]
    return " ".join([text[:end], *new]) + text[end:]


def section(name: str) -> str:
    """Return the description of one method."""
    about: dict[str, Any] = describe(METHODS[name])
    source = f"[{about['source']}]({about['url']})" if about["url"] else about["source"]
    lines = [f"#### `{name}`", "", about["summary"], "", "```", about["equation"], "```", ""]
    pipeline = f"`{about['pipeline']}`" if about["pipeline"] else "set by the parameters"
    lines.append(f"Pipeline: {pipeline} · spaces: {', '.join(f'`{s}`' for s in about['spaces'])} · source: {source}")
    if about["deviation"]:
        lines += ["", f"Differs from the source: {about['deviation']}"]
    if about["parameters"]:
        lines += ["", "| parameter | default | allowed | meaning |", "|---|---|---|---|"]
        lines += [_parameter(p) for p in about["parameters"]]
    return "\n".join(lines) + "\n"


def _parameter(about: dict[str, Any]) -> str:
    default = "required" if about["required"] else "–" if about["default"] is None else f"`{spell_value(about['default'])}`"
    cells = (f"`{about['name']}`", default, about["allowed"], about["description"])
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def row(name: str, on: str) -> str:
    """Return one row of the table of all methods."""
    method = METHODS[name]
    result = "truncated to the largest rank" if method.auto_rank == "largest" else _RESULT[method.kind]
    if method.kind == "entries" and "delta" not in method.spaces:
        result = "exact"
    if method.kind == "entries" and method.spaces == ("delta",):
        result = "dense; truncated to the largest rank"
    notes = ", ".join(w for w, holds in (("random (keyed)", method.randomised), ("needs data", _needs_data(name))) if holds)
    source = f"[{method.source.title}]({method.source.url})" if method.source.url else method.source.title
    return f"| [`{name}`]({on}.md#{name}) | {method.summary} | {result} | {notes} | {source} |"


def _needs_data(name: str) -> bool:
    return bool(describe(METHODS[name])["needs_moments"])


def table() -> str:
    """Return the table of all methods."""
    head = "| method | what it does | result | | source |\n|---|---|---|---|---|\n"
    rows = [row(name, p) for p in PAGES for name in methods_of(complete(page(p)))]
    return head + "\n".join(rows) + "\n"


def versions() -> str:
    """Return which versions of what plait runs with are tested, and which it allows."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {
        name: needs for name, needs in project["optional-dependencies"].items() if name not in ("demo", "dev", "site", "test")
    }
    needed = {"": project["dependencies"], **extras}
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE))
    rows = []
    for name in sorted({need.split(">=")[0] for needs in needed.values() for need in needs}, key=str.lower):
        pairs = ((extra, *need.split(">=")) for extra, needs in needed.items() for need in needs)
        bounds = {extra: bound for extra, package, bound in pairs if package == name}
        brought = "plait" if "" in bounds else ", ".join(f"`{extra}`" for extra in bounds)
        least = next(iter(bounds.values()))
        more = "".join(f"; {bound} for `{extra}`" for extra, bound in bounds.items() if bound != least)
        rows.append(f"| {name} | {pins[name]} | {least}{more} | {brought} |")
    return "\n".join(["", "| package | tested | oldest allowed | comes with |", "|---|---|---|---|", *rows, ""])


#: The keywords of a group of functions: the beginning of their paths in a recipe → without it.
_KEYWORDS = {
    "MergeSettings": (
        "Keywords of what merges: keys of a recipe, of its output, and parameters of methods.",
        ("", "output.", "method."),
    ),
    "BakeSettings": ("The same, but for what shapes an adapter.", ("", "method.")),
    "CalibrationSettings": ("Keywords of `plait.calibrate`: keys of a recipe's `calibration`.", ("calibration.",)),
    "CompressSettings": ("Keywords of `plait.compress`.", ("output.", "")),
}
_LEFT_OUT = {
    **{key: {"version", "adapters", "tasks", "name", "weights"} for key in ("MergeSettings", "BakeSettings")},
    "CompressSettings": {"kind", "rank", "format", *(key for key in Recipe.model_fields if key != "base_model")},
}
_OF_RECIPES = {
    "method": "MethodName | str | Mapping[str, Any]",
    "weights": "Sequence[float] | Mapping[str, Any]",
    **dict.fromkeys(("heads", "eval", "calibration", "tune", "search"), "Mapping[str, Any]"),
}
_BY_HAND = {"MergeSettings": _OF_RECIPES, "BakeSettings": _OF_RECIPES}
_SETTINGS_HEAD = '''"""Types of the keywords that recipes take, for editors and type checkers; written by `make docs`.

Parameters of methods that other packages register are taken too, and are in no type.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict
'''


def settings() -> str:
    """Return the module of keywords' types."""
    lines = [_SETTINGS_HEAD, "MethodName = Literal["]
    lines += [f'    "{name}",' for name in METHODS]
    lines.append("]")
    fields = {name: _fields(name, above) for name, (_, above) in _KEYWORDS.items()}
    first, second = (fields[name] for name in _ALIKE)
    shared = {key: text for key, text in first.items() if second.get(key) == text}
    lines += _class("RecipeSettings(TypedDict, total=False)", "Keywords of all that makes a merge.", shared)
    for name, (about, _) in _KEYWORDS.items():
        base = "RecipeSettings" if name in _ALIKE else "TypedDict"
        own = {key: text for key, text in fields[name].items() if base == "TypedDict" or key not in shared}
        lines += _class(f"{name}({base}, total=False)", about, own)
    return "\n".join(lines) + "\n"


_ALIKE = ("MergeSettings", "BakeSettings")


def _class(head: str, about: str, fields: dict[str, list[str]]) -> list[str]:
    return ["", "", f"class {head}:", f'    """{about}"""', "", *chain.from_iterable(fields.values())]


def _fields(name: str, above: Sequence[str]) -> dict[str, list[str]]:
    """Return keyword → its lines, of a class of keywords."""
    found = {}
    for key, kind in _BY_HAND.get(name, {}).items():
        text = Recipe.model_fields[key].description or f"Keys of a recipe's `{key}`."
        found[key] = [f"    {key}: {kind}", *_field_text(text)]
    taken = {*found, *_LEFT_OUT.get(name, ())}
    for head, about_key in product(above, recipe_keys()):
        key = about_key["path"].removeprefix(head)
        is_here = about_key["path"].startswith(head) and "." not in key
        if is_here and key not in taken and not keyword.iskeyword(key):
            taken.add(key)
            found[key] = [f"    {key}: {_type(about_key['allowed'])}", *_field_text(about_key["description"])]
    return found


def _field_text(text: str) -> list[str]:
    wrapped = textwrap.wrap(text.replace("\\", ""), 116, break_long_words=False, break_on_hyphens=False)
    return (
        [f'    """{wrapped[0]}"""']
        if len(wrapped) == 1
        else [f'    """{wrapped[0]}', *(f"    {x}" for x in wrapped[1:]), '    """']
    )


def _type(allowed: str) -> str:
    """Return the type of allowed values that are described in words."""
    kinds, words = dict[str, None](), []
    for part in allowed.split(" | "):
        if part.startswith(("number", "integer")):
            kinds["float" if part.startswith("number") else "int"] = None
        elif part in _PLAIN:
            kinds[_PLAIN[part]] = None
        elif part.startswith("list of"):
            inner = part.removeprefix("list of ").split()[0]
            kinds[
                f"Sequence[{ {'number': 'float', 'integer': 'int', 'string': 'str'}.get(inner, 'Any') }]".replace(" ", "")
            ] = None
        elif part.startswith("mapping"):
            kinds["Mapping[str, Any]"] = None
        elif re.fullmatch(r"\w+", part):
            words.append(f'"{part}"')
        else:
            kinds["Any"] = None
    literal = [f"Literal[{', '.join(words)}]"] if words and not any(kind.startswith("Sequence[Any") for kind in kinds) else []
    found = " | ".join([*literal, *(kind for kind in kinds if kind != "None"), *(["None"] if "None" in kinds else [])])
    return "Any" if "Any" in kinds or len(found) > 90 else found


_PLAIN = {"string": "str", "true": "bool", "false": "bool", "null": "None", "object": "Any", "1": "int"}


def means() -> list[tuple[str, float, float, float]]:
    """Return (merge, mean recovery, and its interval's ends) from the table of docs/results.md."""
    table = RESULTS.read_text(encoding="utf-8").partition("<!-- demo -->")[2].partition("<!-- /demo -->")[0]
    head, *rows = ([cell.strip(" *`") for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|")
    (mean,) = (row for row in rows if row[0] == "mean")
    numbers = [tuple(map(float, re.findall(r"\d*\.\d+", cell))) for cell in mean[3:]]
    names = [name.replace("`", "") for name in head[3:]]
    return [(name, *found) for name, found in zip(names, numbers, strict=True)]  # type: ignore[misc]


def picture(colors: tuple[str, ...]) -> str:
    """Return the means as bars, from the base model to the adapters themselves."""
    ink, dim, line, own, others = colors
    left, width, step = 250, 400, 44
    bars = []
    found = means()
    for place, (name, mean, low, high) in enumerate(found):
        y = 52 + step * place
        command, _, about = name.partition(": ")
        short, _, seen = command.partition(", ") if not about else (command, "", about)
        color = others if name.startswith("PEFT") else own
        at, a, b = (left + width * value for value in (mean, low, high))
        bars += [
            f'<text x="{left - 12}" y="{y + 8}" text-anchor="end" fill="{ink}">{short}</text>',
            f'<text x="{left - 12}" y="{y + 23}" text-anchor="end" fill="{dim}" font-size="11">{seen}</text>',
            f'<rect x="{left}" y="{y}" width="{at - left:.0f}" height="20" rx="2" fill="{color}"/>',
            f'<path d="M{a:.0f} {y + 10}H{b:.0f}M{a:.0f} {y + 5}v10M{b:.0f} {y + 5}v10" stroke="{ink}" stroke-width="1.5"/>',
            f'<text x="{left + width + 50}" y="{y + 15}" text-anchor="end" fill="{ink}" font-weight="600">{mean:.2f}</text>',
        ]
    bottom = 52 + step * len(found)
    marks = "".join(
        f'<path d="M{x} 44V{bottom}" stroke="{dim if x > left else line}" stroke-dasharray="3 3"/>'
        f'<text x="{x}" y="36" text-anchor="middle" fill="{dim}" font-size="11">{text}</text>'
        for x, text in ((left, "base model"), (left + width, "own adapters"))
    )
    title = "What one merge of three adapters keeps of them, mean of three tasks"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 {bottom + 8}" font-family="system-ui, sans-serif" '
            f'font-size="14" role="img" aria-label="{title}">',
            f'<text x="12" y="18" fill="{ink}" font-weight="600">{title}</text>',
            marks,
            *bars,
            "</svg>\n",
        ]
    )


def generated(path: Path) -> str:
    """Return a file with its generated parts made again."""
    if path == SETTINGS:
        return settings()
    if path in PICTURES:
        return picture(PICTURES[path])
    if path == KEYS:
        return json.dumps(recipe_keys(), indent=1, ensure_ascii=False) + "\n"
    text = path.read_text(encoding="utf-8")
    if path == VERSIONS_PAGE:
        return _VERSIONS.sub(lambda _: f"{versions()}\n", text)
    if path == METHODS_PAGE:
        return _TABLE.sub(lambda _: f"\n{table()}\n", text)
    if path == OTHER_TOOLS:
        text = _OLDER_KEYS.sub(lambda _: f"\n{older_keys()}\n", text)
        return _WORDS.sub(lambda _: f"\n{words()}\n", text)
    return _BLOCK.sub(lambda m: f"{m[1]}{m[2]}\n" + "\n".join(section(name) for name in m[1].split()) + "\n", complete(path))


def main() -> int:
    """Write, or check."""
    stale = []
    for path in FILES:
        after = generated(path)
        if not path.is_file() or after != path.read_text(encoding="utf-8"):
            stale.append(path)
            if "--check" not in sys.argv[1:]:
                path.write_text(after, encoding="utf-8")
    return int("--check" in sys.argv[1:] and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
