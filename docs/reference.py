"""The site's generated pages, from the code: every command, every public name, every key of a recipe; and its links.

mkdocs runs this as its hooks (mkdocs.yml). `pages()` needs no mkdocs, so that tests see the same pages.
"""

from __future__ import annotations

import inspect
import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import plait
from plait.cli.main import command_tree
from plait.recipes.keys import recipe_keys

ROOT = Path(__file__).parents[1]
#: Pages of the repository outside of docs/ → where they are on the site.
ELSEWHERE = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "examples/demo/README.md": "demo.md",
    "examples/notebooks/README.md": "notebooks.md",
}
_LINK = re.compile(r"(?P<text>!?\[[^\]]*\])\((?P<target>(?!https?:|#|mailto:)[^)\s]+)\)")
_SECTION = re.compile(r"^(Args|Returns|Raises|Attributes|Yields):$")
_ENTRY = re.compile(r"^(?P<name>[*\w. ]+?)(?: \([^)]*\))?: (?P<text>.*)$")
_PARTS = {
    "Errors": lambda thing: inspect.isclass(thing) and issubclass(thing, Exception),
    "Classes": inspect.isclass,
    "Functions": inspect.isroutine,
    "Values": lambda thing: True,
}  # fmt: skip


def pages() -> dict[str, str]:
    """Return the generated pages: their place on the site → Markdown."""
    made = {"reference/cli.md": commands_page(), "reference/api.md": api_page(), "reference/recipe.md": recipe_page()}
    return made | {place: (ROOT / source).read_text(encoding="utf-8") for source, place in ELSEWHERE.items()}


def commands_page() -> str:
    """Return all commands with their arguments and options."""
    lines = [
        "# Commands",
        "",
        "`plait COMMAND --help` shows the same. Every command takes `--quiet`, `--verbose` and `--traceback`. Exit codes, and "
        "variables in place of options: [variables, exit codes, offline use](../environment.md).",
    ]
    for words, command in _commands(command_tree(), ()):
        lines += ["", f"## plait {' '.join(words)}", "", *_paragraphs(command.help or "")]
        arguments = " ".join(p.metavar or p.name.upper() for p in command.params if p.param_type_name == "argument")
        lines += ["", "```", f"plait {' '.join(words)} {arguments} [OPTIONS]".replace("  ", " "), "```"]
        groups: dict[str, list[Any]] = {}
        for option in command.params:
            groups.setdefault(getattr(option, "rich_help_panel", None) or "", []).append(option)
        for name, options in groups.items():
            lines += ["", *([f"**{name}**", ""] if name else []), "| option | value | meaning |", "|---|---|---|"]
            lines += [_option(option) for option in options if not getattr(option, "hidden", False)]
    return "\n".join(lines) + "\n"


def _commands(group: Any, above: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, (*above, name))
        else:
            yield (*above, name), command


def _paragraphs(text: str) -> list[str]:
    return [line for part in inspect.cleandoc(text).split("\n\n") for line in (" ".join(part.split()), "")][:-1]


def _option(option: Any) -> str:
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    if option.param_type_name == "argument":
        names = f"`{option.name.upper()}`"
    value = "" if getattr(option, "is_flag", False) else option.metavar or option.name.rpartition("__")[2].upper()
    default = option.default if isinstance(option.default, (str, int, float)) and not isinstance(option.default, bool) else None
    text = (
        f"{option.help or ''}{f' Default: `{default}`.' if default not in (None, '') else ''}{' Required.' * option.required}"
    )
    return f"| {names} | {_cell(value)} | {_cell(text)} |"


def _cell(text: object) -> str:
    return " ".join(_prose(str(text).replace("\\[", "[")).replace("|", "\\|").split())


def api_page() -> str:
    """Return all public names with their signatures and docstrings."""
    lines = [
        "# Python",
        "",
        "Everything that `import plait` offers: the commands of the command line, to the same bytes. Errors are a "
        "[`PlaitError`](../errors.md). `plait.mixture` is a live model, `plait.testing` has contract tests for new methods.",
    ]
    left = [name for name in plait.__all__ if name != "__version__"]
    for title, holds in _PARTS.items():
        lines += ["", f"## {title}"]
        for name in [name for name in left if holds(getattr(plait, name))]:
            left.remove(name)
            lines += ["", *_described(name, getattr(plait, name))]
    return "\n".join(lines) + "\n"


def _described(name: str, thing: Any) -> Iterator[str]:
    yield f"### plait.{name}"
    yield ""
    if callable(thing) and not (inspect.isclass(thing) and (issubclass(thing, Exception) or hasattr(thing, "model_fields"))):
        yield from ("```python", _signature(f"plait.{name}", thing), "```", "")
    if inspect.isclass(thing) or inspect.isroutine(thing):
        yield from docstring(inspect.getdoc(thing) or "")
    else:
        yield f"{', '.join(f'`{key}`' for key in thing)}."
    if inspect.isclass(thing) and not issubclass(thing, Exception):
        for method, function in _methods(thing):
            yield from ("", f"#### plait.{name}.{method}", "", "```python", _signature(method, function), "```", "")
            yield from docstring(inspect.getdoc(function) or "")


def _methods(thing: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    for name, function in vars(thing).items():
        function = getattr(function, "__func__", function)
        if not name.startswith("_") and inspect.isfunction(function):
            yield name, function


def _signature(name: str, function: Callable[..., Any]) -> str:
    text = re.sub(r"(?<=[:>] )'([^']*)'", r"\1", str(inspect.signature(function)))
    if len(name + text) <= 100:
        return name + text
    parameters, arrow, result = text[1:].rpartition(") -> ")
    depth, parts, current = 0, [], ""
    for letter in parameters if arrow else text[1:-1]:
        depth += {"[": 1, "(": 1, "{": 1, "]": -1, ")": -1, "}": -1}.get(letter, 0)
        if letter == "," and not depth:
            parts, current = [*parts, current.strip()], ""
        else:
            current += letter
    return f"{name}(\n" + "".join(f"    {part},\n" for part in [*parts, current.strip()] if part) + f"){arrow[1:]}{result}"


def docstring(text: str) -> Iterator[str]:
    """Yield a docstring of Google's style as Markdown: its sections as lists, its examples as blocks."""
    fenced = in_section = False
    for line in text.splitlines():
        is_example = line.startswith((">>> ", "... "))
        if is_example != fenced:
            fenced = is_example
            yield from ("", "```python") if fenced else ("```",)
        if is_example:
            yield line[4:]
        elif _SECTION.match(line):
            in_section = True
            yield from ("", f"**{line[:-1]}**", "")
        elif in_section and line.startswith("    ") and not line.startswith("     ") and (found := _ENTRY.match(line.strip())):
            yield f"- `{found['name']}`: {_prose(found['text'])}"
        elif in_section and line.startswith("    "):
            yield f"  {_prose(line.strip())}"
        else:
            in_section = in_section and not line
            yield _prose(line)
    if fenced:
        yield "```"


def _prose(text: str) -> str:
    """Return text in which nothing outside of code is a tag."""
    return "".join(part if i % 2 else re.sub(r"<(?=\w)", "&lt;", part) for i, part in enumerate(re.split(r"(`[^`]*`)", text)))


def recipe_page() -> str:
    """Return every key of a recipe."""
    lines = [
        "# A recipe's keys",
        "",
        "YAML, or keywords in Python; each is a flag of the commands that read it, and `--set PATH=VALUE` sets any. "
        "`plait recipe schema` prints a JSON Schema for editors, `plait recipe check FILE` names what is wrong by its line. "
        "A method's parameters are keys of `method`: [methods](../methods/README.md).",
    ]
    groups: dict[str, list[dict[str, str]]] = {}
    for key in recipe_keys():
        groups.setdefault(key["path"].partition(".")[0] if "." in key["path"] else "", []).append(key)
    for name, keys in sorted(groups.items(), key=lambda pair: pair[0] != ""):
        lines += ["", f"## {name or 'At the top'}", "", "| key | default | allowed | meaning |", "|---|---|---|---|"]
        for key in keys:
            default = f"`{_cell(key['default'])}`" if key["default"] else ""
            lines.append(f"| `{key['path']}` | {default} | {_cell(key['allowed'])} | {_cell(key['description'])} |")
    return "\n".join(lines) + "\n"


def place_of_link(target: str, source: str, page: str) -> str | None:
    """Return a link of a page of the repository as it is on the site; None where it leads to a file that is not on it.

    Args:
        target: as it is written, with its anchor.
        source: the page's file, from the repository's root.
        page: its place on the site.
    """
    path, hash_, anchor = target.partition("#")
    repository = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    if (ROOT / repository).is_dir():
        repository = posixpath.join(repository, "README.md")
    if repository.startswith("docs/"):
        place = repository.removeprefix("docs/")
        if not (ROOT / repository).is_file() and place not in pages_of_reference():
            return None
    elif repository in ELSEWHERE:
        place = ELSEWHERE[repository]
    else:
        return None
    return posixpath.relpath(place, posixpath.dirname(page) or ".") + hash_ + anchor


def pages_of_reference() -> tuple[str, ...]:
    """Return the places of pages that are in no folder."""
    return ("reference/cli.md", "reference/api.md", "reference/recipe.md")


def with_links(markdown: str, source: str, page: str) -> str:
    """Return a page with its links as they are on the site; those to files that are not on it become their text."""

    def replace(found: re.Match[str]) -> str:
        place = place_of_link(found["target"], source, page)
        return f"{found['text']}({place})" if place else found["text"][1:-1]

    return _LINK.sub(replace, markdown)


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages."""
    from mkdocs.structure.files import File

    for place, text in pages().items():
        files.append(File.generated(config, place, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Have links lead to pages of the site."""
    place = page.file.src_uri
    source = next((file for file, at in ELSEWHERE.items() if at == place), f"docs/{place}")
    return with_links(markdown, source, place)


def on_config(config: Any) -> Any:
    """Put the decisions into the navigation, in their order."""
    decisions = [f"decisions/{file.name}" for file in sorted((ROOT / "docs" / "decisions").glob("*.md"))]
    for part in config["nav"]:
        for pages_of in part.values():
            if isinstance(pages_of, list):
                pages_of[:] = [{"Decisions": decisions} if entry == "DECISIONS" else entry for entry in pages_of]
    return config
