"""Text → plain data, with the line of every part.

Reads YAML by the rules of YAML 1.2: `no` and `on` are words, `1e-3` is a number, a date is text. Independent of what
a recipe may hold.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from plait.errors import PlaitError, RecipeError, did_you_mean, join_words
from plait.folders import open_in
from plait.notices import announce
from plait.parsing import DOCUMENT_SUFFIXES, MOST_BITS, MOST_LEVELS, parse_json, read_text, text_problem
from plait.recipes.paths import KeyPath, Plain
from plait.recipes.problems import Problem

_MOST_NODES = 200_000
_MOST_CHARACTERS = 4 << 20  # of YAML, which is read character by character
_LONGEST_CARD = 1 << 20  # bytes in which its front matter is looked for
_SURROGATES = re.compile(r"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")
_FRONT_MATTER = re.compile(r"^---\r?\n(.*?)\r?\n---", re.DOTALL)
FLOAT = re.compile(
    r"^(?:[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """A safe loader that guesses types as YAML 1.2 does."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  (declared so by the base class)


for _kind, _pattern, _first in (
    ("null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("int", re.compile(r"^(?:[-+]?(?:0|[1-9][0-9]*)|0x[0-9a-fA-F]+)$"), list("-+0123456789")),
    ("float", FLOAT, list("-+.0123456789")),
    ("merge", re.compile(r"^<<$"), ["<"]),
):
    _Loader.add_implicit_resolver(f"{_TAG}{_kind}", _pattern, _first)


@dataclass(frozen=True)
class YamlDocument:
    """What a text holds.

    Attributes:
        data: mappings with keys as text, lists and scalars; None when there is nothing.
        lines: path → line, counted from 1.
        problems: keys that are given twice, and what else the reader could not take.
    """

    data: Plain
    lines: dict[KeyPath, int]
    problems: tuple[Problem, ...] = ()


def open_document(file: Path, *, source: str | None = None, error: type[PlaitError] = RecipeError) -> YamlDocument:
    """Read a file that holds one YAML document, or JSON where its name ends so.

    Args:
        file: a recipe, a task, phases.
        source: what messages call it; its path when None.
        error: what a refusal raises.

    Raises:
        PlaitError: (`error`) there is no such file, it cannot be read, or it is not YAML.
    """
    try:
        file.stat()
    except FileNotFoundError:
        raise error(f"{file}: there is no such file.{_near(file)}") from None
    except (OSError, ValueError):
        pass  # raised when it is read
    else:
        if file.is_dir():
            raise error(f"{file} is a folder; give the file.{_near(file / 'recipe.yaml')}")
    read = read_json_document if file.suffix.lower() == ".json" else read_document
    text = read_text(file, error)
    try:
        return read(text, source or str(file))
    except RecipeError as found:
        raise error(str(found)) from None


def _near(file: Path) -> str:
    try:
        files = sorted(p.name for p in file.parent.iterdir() if p.suffix in DOCUMENT_SUFFIXES)
    except OSError:
        return ""
    return did_you_mean(file.name, files)


def read_document(text: str, source: str, *, loader: type[yaml.SafeLoader] = _Loader) -> YamlDocument:
    """Read one YAML document.

    Args:
        text: of the document.
        source: the file that a refusal names.
        loader: by whose rules types are guessed; those of YAML 1.2, unless given.

    Raises:
        RecipeError: the text is not YAML; the message says in which line.
    """
    if len(text) > _MOST_CHARACTERS:
        raise RecipeError(f"{source}: larger than {_MOST_CHARACTERS >> 20} MB, the limit for YAML.")
    try:
        return _compose(text, loader)
    except yaml.MarkedYAMLError as error:
        raise RecipeError(_syntax_error(error, source)) from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{source}: this is not YAML: {' '.join(str(error).split())}.") from None
    except RecursionError:
        raise RecipeError(f"{source}: this is nested too deeply to be a recipe.") from None
    except (ValueError, OverflowError):  # of chr(): "\\U00110000"
        raise RecipeError(f"{source}: this is not YAML: it holds a number (\\U…) that is not a character's.") from None


def read_front_matter(card: Path) -> Mapping[str, Plain]:
    """Return the front matter of a model card; empty where there is none, and, announced, where it cannot be read."""
    try:
        with open_in(card.parent, card.name) as file:
            found = _FRONT_MATTER.match(file.read(_LONGEST_CARD).decode("utf-8", "replace"))
        data = read_document(found[1], str(card)).data if found else {}
        problem = None if isinstance(data, Mapping | None) else f"{card}: its front matter is not a mapping"
    except FileNotFoundError:
        return {}
    except (OSError, RecipeError) as error:
        problem = str(error) if isinstance(error, RecipeError) else f"{card}: {error.strerror or error}"
    if problem is not None:
        announce(f"{problem.rstrip('.')}; what this card states (license, base model) is not known.")
        return {}
    return data or {}


def _compose(text: str, kind: type[yaml.SafeLoader]) -> YamlDocument:
    loader = kind(text)
    try:
        return _Builder(loader).document(loader.get_single_node())
    finally:
        loader.dispose()


def read_json_document(text: str, source: str) -> YamlDocument:
    """Read a JSON document, with lines where its text is YAML too, as nearly all JSON is.

    Raises:
        RecipeError: the text is not JSON; the message says in which line.
    """
    if not text.strip():
        return YamlDocument(None, {})
    data = parse_json(text, source, RecipeError, constants=True)
    if len(text) > _MOST_CHARACTERS:
        return YamlDocument(data, {})
    try:
        # JSON may be indented with tabs, YAML may not; inside of JSON's strings there are none. Its pairs of surrogates are not
        # characters in YAML; only lines are taken from there.
        marked = read_document(_SURROGATES.sub(r"\\ufffd", text.replace("\t", " ")), source)
    except RecipeError:
        return YamlDocument(data, {})
    return YamlDocument(data, marked.lines, marked.problems)


class _Builder:
    """Turns the nodes of one document into data and remembers lines."""

    def __init__(self, loader: yaml.SafeLoader) -> None:
        self._loader = loader
        self._lines: dict[KeyPath, int] = {}
        self._problems: list[Problem] = []
        self._open: list[yaml.Node] = []
        self._nodes = 0
        self._sizes: dict[int, int] = {}

    def document(self, node: yaml.Node | None) -> YamlDocument:
        data = None if node is None else self._build(node, ())
        return YamlDocument(data, self._lines, tuple(self._problems))

    def _build(self, node: yaml.Node, path: KeyPath) -> Plain:
        self._nodes += 1
        self._lines.setdefault(path, _line(node))
        large = isinstance(node, yaml.MappingNode) and self._size(node) > _MOST_NODES
        if large or self._nodes > _MOST_NODES or any(node is parent for parent in self._open):
            raise yaml.composer.ComposerError(None, None, "aliases (*name) make it endless or huge", node.start_mark)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        if len(self._open) >= MOST_LEVELS:
            raise RecursionError
        if node.tag not in (f"{_TAG}map", f"{_TAG}seq"):
            raise yaml.constructor.ConstructorError(None, None, f"the tag {node.tag!r} is not allowed", node.start_mark)
        self._open.append(node)
        try:
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node, path)
            return [self._build(item, (*path, i)) for i, item in enumerate(node.value)]
        finally:
            self._open.pop()

    def _size(self, node: yaml.MappingNode) -> int:
        """Return how many entries a mapping has with all that is merged into it (`<<`), before that is done."""
        if id(node) not in self._sizes:
            self._sizes[id(node)] = _MOST_NODES + 1  # while it is counted: one that is merged into itself
            total = 0
            for key, value in node.value:
                merged = value.value if isinstance(value, yaml.SequenceNode) else [value]
                sizes = (self._size(v) for v in merged if isinstance(v, yaml.MappingNode))
                total += sum(sizes) if key.tag == f"{_TAG}merge" else 1
            self._sizes[id(node)] = total
        return self._sizes[id(node)]

    def _scalar(self, node: yaml.ScalarNode) -> Plain:
        try:
            value = self._loader.construct_object(node)
        except (ValueError, LookupError, AttributeError, TypeError, OverflowError):  # `!!int x`, `!!timestamp x`, 5,000 digits
            value = node
        words = text_problem(value) if isinstance(value, str) else None
        if value is node or (type(value) is int and value.bit_length() > MOST_BITS):
            words = f"{node.value[:40]!r} cannot be read as {node.tag.rpartition(':')[2]}"
        if words:
            raise yaml.constructor.ConstructorError(None, None, words, node.start_mark)
        return value

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Plain]:
        self._find_doubles(node, path)
        self._loader.flatten_mapping(node)
        data: dict[str, Plain] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self._problems.append(Problem(path, f"line {_line(key)} has a key that is not text."))
                continue
            if words := text_problem(key.value):
                raise yaml.constructor.ConstructorError(None, None, words, key.start_mark)
            self._lines[(*path, key.value)] = _line(key)
            data[key.value] = self._build(value, (*path, key.value))
        return data

    def _find_doubles(self, node: yaml.MappingNode, path: KeyPath) -> None:
        first: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in first:
                lines = list(dict.fromkeys((first[key.value], _line(key))))
                where = f"line{'s' if len(lines) > 1 else ''} {join_words([str(n) for n in lines])}"
                self._problems.append(Problem((*path, key.value), f"{key.value!r} is given twice, in {where}; keep one."))
            first.setdefault(key.value, _line(key))


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _syntax_error(error: yaml.MarkedYAMLError, source: str) -> str:
    mark = error.problem_mark or error.context_mark
    place = source if mark is None else f"{source}:{mark.line + 1}"
    words = " ".join(part for part in (error.context, error.problem) if part)
    if "'\\t'" in words:
        return f"{place}: a tab cannot indent YAML; use spaces."
    return f"{place}: this is not YAML: {words}."
