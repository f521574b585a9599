"""The process that renders templates: whatever they do, it happens here, and ends here.

It is run as a script and imports nothing of plait. A request is a frame (length, pickle) on stdin; answers are frames (kind,
length, bytes) on stdout, one per row:

    c  JSON: columns that the template may read       t  text in UTF-8
    e  error, as a sentence without its full stop     u  a column that is not there
    .  end of the request: processor seconds used
"""

from __future__ import annotations

import json
import math
import pickle
import signal
import struct
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any, BinaryIO

MEMORY = 1 << 30
LONGEST_TEXT = 16 << 20  # characters of one text
_COMPILED = 64  # templates that are kept
_MESSAGE = 400  # characters of a message

_compiled: dict[tuple[str, str], tuple[Any, list[str]]] = {}


def main() -> None:
    """Serve requests until stdin ends."""
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks; its end ends this one
    sys.path[:] = pickle.loads(frame(source) or b"")  # the parent's own bytes
    _columns()  # imports Jinja, before memory is limited
    limit_memory(MEMORY)
    while (request := frame(source)) is not None:
        kind, text, seconds, rows = pickle.loads(request)
        before = time.process_time()
        with _clock(seconds):
            _serve(sink, kind, text, rows)
        answer(sink, b".", repr(time.process_time() - before).encode())
        sink.flush()


def _serve(sink: BinaryIO, kind: str, source: str, rows: list[bytes]) -> None:
    try:
        template, names = _compile(kind, source)
    except Exception as error:  # whatever a template makes Jinja raise
        answer(sink, b"e", _message(error).encode("utf-8", "replace"))
        return
    answer(sink, b"c", json.dumps(names).encode())
    for row in rows:
        answer(sink, *_rendered(template, names, row, kind))


def _rendered(template: Any, names: Sequence[str], row: bytes, kind: str) -> tuple[bytes, bytes]:
    import jinja2

    try:
        columns = pickle.loads(row)
        if kind != "chat":  # of a task: NaN counts as true, so that `or` would not replace it
            columns = {name: None if _is_null(value) else value for name, value in columns.items()}
        text = str(template.render(columns))
        if len(text) > LONGEST_TEXT:
            return b"e", f"the text has {len(text):,} characters; at most {LONGEST_TEXT:,} are allowed".encode()
        return b"t", text.encode()
    except UnicodeEncodeError as error:
        return (
            b"e",
            f"the text holds half a surrogate pair (U+{ord(error.object[error.start]):04X}), which is not valid text".encode(),
        )
    except jinja2.UndefinedError as error:
        return b"u", _message(error).encode("utf-8", "replace")
    except _NullError:
        null = [name for name in names if name in columns and columns[name] is None]
        what = f"{' and '.join(map(repr, null)) or 'a value'} {'are' if len(null) > 1 else 'is'} null"
        advice = f"leave the row out, or write {{{{ {null[0] if null else 'NAME'} or '' }}}} where an empty text is meant"
        return b"e", f"{what}; {advice}".encode("utf-8", "replace")
    except Exception as error:
        return b"e", _message(error).encode("utf-8", "replace")


def _message(error: Exception) -> str:
    import jinja2

    if isinstance(error, RecursionError):
        return "it is nested too deeply, or calls itself without end"
    if isinstance(error, MemoryError):
        return f"it needs more than the {MEMORY >> 20} MiB of memory that are allowed"
    text = " ".join(str(getattr(error, "message", None) or error).split())[:_MESSAGE].rstrip(".")
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"line {error.lineno} is not Jinja2: {text}"
    return text if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {text}"


def _compile(kind: str, source: str) -> tuple[Any, list[str]]:
    import jinja2.meta

    if (kind, source) not in _compiled:
        environment = _chat() if kind == "chat" else _columns()
        made = environment.from_string(source), sorted(jinja2.meta.find_undeclared_variables(environment.parse(source)))
        if len(_compiled) >= _COMPILED:
            _compiled.clear()
        _compiled[kind, source] = made
    return _compiled[kind, source]


def _columns() -> Any:
    """Return the environment of a task's own templates."""
    import jinja2.sandbox

    return jinja2.sandbox.ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, finalize=_not_null, keep_trailing_newline=True
    )


class _NullError(Exception):
    """A template writes a value that is not there: its text would be `None` or `nan`."""


def _not_null(value: Any) -> Any:
    if _is_null(value):
        raise _NullError
    return value


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _chat() -> Any:
    """Return the environment of chat templates, as transformers has it."""
    import jinja2.ext
    import jinja2.sandbox

    class GenerationTag(jinja2.ext.Extension):
        """`{% generation %}`: marks the model's turns, which does not change the text."""

        tags = {"generation"}  # noqa: RUF012 (Jinja's own form)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_error_text"), [], [], body).set_lineno(line)

        def _error_text(self, caller: Any) -> Any:
            return caller()

    found = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
    )
    found.filters["tojson"] = _to_json
    found.globals |= {"raise_exception": _refuse, "strftime_now": _now}
    return found


def _to_json(
    x: Any,
    ensure_ascii: bool = False,  # noqa: FBT001, FBT002 (as templates call it)
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,  # noqa: FBT001, FBT002
) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(f"it refuses this chat: {message}")


def _now(format: str) -> str:  # the name that templates may use
    return datetime.now().strftime(format)  # as transformers


@contextmanager
def _clock(seconds: float) -> Iterator[None]:
    """End this process after so many seconds: of its processor where the system counts them, else of the wall's clock.

    The signal's default action is taken by the system itself, in the middle of a multiplication too.
    """
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        yield
        signal.setitimer(signal.ITIMER_PROF, 0)
        return
    import faulthandler

    faulthandler.dump_traceback_later(seconds, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def limit_memory(most: int) -> None:
    """Have the system refuse this process more than so many bytes of address space."""
    try:
        import resource

        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        limit = most if hard == resource.RLIM_INFINITY else min(hard, most)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    except (ImportError, OSError, ValueError):
        pass  # a system that counts no memory; time and the length of a text are limited all the same


def frame(source: BinaryIO) -> bytes | None:
    """Return the next request; None where there is none."""
    head = source.read(8)
    return source.read(struct.unpack("<Q", head)[0]) if len(head) == 8 else None


def answer(sink: BinaryIO, kind: bytes, body: bytes) -> None:
    """Write a frame of an answer."""
    sink.write(kind + struct.pack("<Q", len(body)) + body)


if __name__ == "__main__":
    main()
