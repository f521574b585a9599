"""The `plait` command: its sub-commands, and what becomes of errors."""

from __future__ import annotations

import atexit
import gc
import os
import re
import sys
import traceback
import warnings
from collections.abc import Collection, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperArgument, TyperGroup

from plait.cli.ask import ask
from plait.cli.bake import bake
from plait.cli.calibrate import calibrate
from plait.cli.compress import compress
from plait.cli.convert import convert
from plait.cli.evaluate import evaluate
from plait.cli.extract import extract
from plait.cli.inspect import inspect
from plait.cli.merge import merge
from plait.cli.methods import methods
from plait.cli.mix import mix
from plait.cli.options import switches_of
from plait.cli.push import push
from plait.cli.recipe import recipe_app
from plait.cli.report import report
from plait.cli.sft import sft
from plait.cli.stopping import Stopped, stoppable
from plait.cli.streams import StreamError, give_up_stdout, guarded
from plait.cli.sweep import sweep
from plait.cli.tasks import tasks_app
from plait.cli.train import train
from plait.cli.tune import tune
from plait.cli.unbake import unbake
from plait.cli.usage import explain_usage
from plait.cli.variables import is_asked, unknown_variables
from plait.cli.verify import verify
from plait.deferred import import_torch
from plait.errors import PlaitError, listed
from plait.folders import working_folder
from plait.notices import PlaitWarning, noting_completed
from plait.version import __version__

#: Options that take several values in a row, and what such a value looks like.
_LISTS = {
    "--weights": re.compile(r"[-+]?((\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|nan|inf)"),
    "--tasks": re.compile(r"[^-].*\.(ya?ml|json)"),
}

_HELP = ["-h", "--help"]

app = typer.Typer(
    name="plait",
    help="Merge LoRA adapters of one base model into one adapter, exactly, straight from their files.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": _HELP},
)
app.command("merge", rich_help_panel="Merge")(merge)
app.command("bake", rich_help_panel="Merge")(bake)
app.command("un-bake", rich_help_panel="Merge")(unbake)
app.command("inspect", rich_help_panel="Merge")(inspect)
app.command("compress", rich_help_panel="Merge")(compress)
app.command("convert", rich_help_panel="Merge")(convert)
app.command("extract", rich_help_panel="Merge")(extract)
app.command("verify", rich_help_panel="Results")(verify)
app.command("push", rich_help_panel="Results")(push)
app.command("eval", rich_help_panel="Judge and tune")(evaluate)
app.command("ask", rich_help_panel="Judge and tune")(ask)
app.command("mix", rich_help_panel="Judge and tune")(mix)
app.command("calibrate", rich_help_panel="Judge and tune")(calibrate)
app.command("tune", rich_help_panel="Judge and tune")(tune)
app.command("sweep", rich_help_panel="Judge and tune")(sweep)
app.command("report", rich_help_panel="Results")(report)
app.command("sft", rich_help_panel="Train", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(sft)
app.command("train", rich_help_panel="Train")(train)
app.command("methods", rich_help_panel="Look up")(methods)
app.add_typer(recipe_app, name="recipe", rich_help_panel="Look up")
app.add_typer(tasks_app, name="tasks", rich_help_panel="Look up")


def _version(value: bool) -> None:  # noqa: FBT001 (typer's callback)
    if value:
        typer.echo(f"plait {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error was raised.")] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print results and errors alone: no progress, no notes.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="As --traceback, and show what libraries warn of.")] = False,
) -> None:
    pass


@cache
def command_tree() -> TyperGroup:
    """Return all commands with their options, which takes longer than a small merge: made from the signatures once."""
    found = typer.main.get_command(app)
    assert isinstance(found, TyperGroup)
    _complete(found)
    return found


#: Where the help shows options that are not of the recipe's schema.
_PANELS = {
    "Input": "tasks base-id add from-merged input moments source sources warm-start set original weight",
    "The merge": "method methods weights scale rank space spaces energy",
    "What is written": "out to tower bake-dir push-adapter-repo push-baked-repo private card force dry-run json figures title",
    "This machine": "load-dtype device-map trust-remote-code workers device cluster workspace storage",
}
_PANEL_OF = {f"--{option}": panel for panel, options in _PANELS.items() for option in options.split()}


def _complete(command: Any, words: tuple[str, ...] = ("plait",)) -> None:
    """Give every option a variable and a panel of the help, and leave the types of flags and arguments out of it.

    A flag takes nothing, and an argument's name says what it is.
    """
    for name, inner in getattr(command, "commands", {}).items():
        _complete(inner, (*words, name))
    explain_usage(command)
    context = command.context_class(command, help_option_names=_HELP)
    for parameter in [*command.params, command.get_help_option(context)]:
        if getattr(parameter, "is_flag", False):
            parameter.metavar = ""
        if isinstance(parameter, TyperArgument):
            parameter.display_type_rich = lambda ctx: None  # type: ignore[method-assign]
            continue
        parameter.show_envvar = False
        if len(words) > 1 and "--help" not in parameter.opts and parameter.envvar is None:
            option = next(name for name in parameter.opts if name.startswith("--"))
            parameter.rich_help_panel = parameter.rich_help_panel or _PANEL_OF.get(option)
            parameter.envvar = "_".join((*words, option.lstrip("-"))).replace("-", "_").upper()


def _known_variables(command: Any, name: str = "") -> tuple[set[str], set[str]]:
    """Return the variables that commands read, and the names of the commands."""
    variables = {p.envvar for p in command.params if isinstance(p.envvar, str)} | {*_VARIABLES.values()}
    commands = {name} if name else set[str]()
    for inner_name, inner in getattr(command, "commands", {}).items():
        more = _known_variables(inner, f"{name} {inner_name}".strip())
        variables, commands = variables | more[0], commands | more[1]
    return variables, commands


_LIBRARIES = ("accelerate", "datasets", "huggingface_hub", "peft", "torch", "transformers", "trl")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and leave the process: 0 done, 1 our fault, 2 the user's, 128 + n stopped by a signal."""
    atexit.register(gc.freeze)  # the last collections would look all of torch through, for nothing: the process ends

    arguments, asked = _without_anywhere(_join_lists(list(sys.argv[1:] if argv is None else argv)))
    with guarded():
        try:
            code = _run(arguments, asked)
            sys.stdout.flush()
        except StreamError as error:
            code = give_up_stdout(error)
    sys.exit(code)


#: Accepted anywhere on the command line, though they belong to `plait` itself.
_ANYWHERE = {"--traceback": "traceback", "--quiet": "quiet", "--verbose": "verbose"}
_VARIABLES = {name: f"PLAIT_{name.upper()}" for name in _ANYWHERE.values()}


def _without_anywhere(arguments: list[str]) -> tuple[list[str], set[str]]:
    """Return the command line without the options that are accepted anywhere, and those of them that it gives."""
    at = next((i for i, word in enumerate(arguments) if not word.startswith("-")), len(arguments))
    short = {"-q": "quiet", "-v": "verbose"}  # before the command alone: after it they may be another program's
    asked = {short[word] for word in arguments[:at] if word in short}
    asked |= {name for option, name in _ANYWHERE.items() if option in arguments}
    kept = [word for i, word in enumerate(arguments) if word not in _ANYWHERE and not (i < at and word in short)]
    return kept, asked


def _hide_deprecations() -> None:
    """Hide libraries' warnings about each other, which a user cannot act on."""
    if not sys.warnoptions:  # PYTHONWARNINGS, or -W: whoever asks for warnings gets them
        for library in _LIBRARIES:
            warnings.filterwarnings("ignore", category=FutureWarning, module=rf"{library}(\.|$)")


def _run(arguments: list[str], asked: Collection[str]) -> int:
    """Run a command and return the exit code.

    Args:
        arguments: of the command.
        asked: names of the options that are accepted anywhere and given there.
    """
    from plait.cli.console import VERBOSITY, print_notes, warnings_as_notes

    try:
        asked = {*asked, *(name for name, variable in _VARIABLES.items() if is_asked(variable))}
    except PlaitError as error:
        _show(error, "error: ", wants_traceback=False)
        return 2
    VERBOSITY.quiet = "quiet" in asked
    wants_traceback = bool({"traceback", "verbose"} & {*asked})
    try:
        with warnings_as_notes(PlaitWarning), noting_completed() as completed, stoppable():
            if working_folder() == Path():  # whoever needs it next would import it here
                import_torch()
            if "verbose" not in asked:
                _hide_deprecations()
            if any(name.startswith("PLAIT_") for name in os.environ):
                print_notes(unknown_variables(*_known_variables(command_tree())))
            command_tree()(_translated(arguments))
    except SystemExit as leave:
        return leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    except Stopped as stop:
        _note_what_is_there(stop, completed)
        _show(stop, "", wants_traceback=False)
        return stop.code
    except PlaitError as error:
        _show(error, "error: ", wants_traceback=wants_traceback)
        return 2
    except StreamError:
        raise
    except Exception as error:
        if failure := _failure_of_a_file(error):
            _show(failure, "error: ", wants_traceback=wants_traceback)
            return 2
        traceback.print_exc()  # a bug in plait: print what a report needs
        typer.echo(f"\nThis is a bug in plait {__version__}: {type(error).__name__}. Please report the lines above.", err=True)
        return 1
    finally:
        VERBOSITY.quiet = False
    return 0


def _note_what_is_there(stop: Stopped, written: Sequence[Path]) -> None:
    """Say which results a command had written when it was stopped; where none, and nothing is kept, that it begins anew."""
    if written:
        stop.add_note(f"Written completely: {listed(map(str, written))}.")
    elif not any("the same command" in note for note in getattr(stop, "__notes__", ())):
        stop.add_note("The same command starts from the beginning.")


def _failure_of_a_file(error: Exception) -> PlaitError | None:
    """Return what the system says of a file that it cannot read or write any more; None of anything else.

    Files are looked at when a plan is made. A disk that fails later, or a file that is deleted, is met by whoever comes next.
    """
    if working_folder() == Path() and any(isinstance(e, FileNotFoundError) and e.filename is None for e in _led_to(error)):
        failure = PlaitError("the working directory does not exist any more, and is needed here. Change to one that does (cd).")
    elif isinstance(error, OSError) and error.errno is not None and isinstance(error.filename, (str, bytes, os.PathLike)):
        failure = PlaitError(f"{os.fsdecode(error.filename)}: {error.strerror or error}.")
    else:
        return None
    for note in getattr(error, "__notes__", ()):  # on what is kept
        failure.add_note(note)
    return failure


def _led_to(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, and those that led to it: libraries raise others for what they cannot import."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _translated(arguments: list[str]) -> list[str]:
    """Return the command line with the words of other tools in plait's.

    Raises:
        RecipeError: some of them mean something else here.
    """
    from plait.cli.console import print_notes
    from plait.cli.spellings import complete_switches, refuse_foreign_command, translate_flags

    at = next((i for i, word in enumerate(arguments) if not word.startswith("-")), None)
    if at is None:
        return arguments
    commands = {info.name: info for info in app.registered_commands}
    if arguments[at] not in commands:
        refuse_foreign_command(arguments[at])
        return arguments
    if not any(word.startswith("--") for word in arguments[at:]):
        return arguments
    command = command_tree().commands[arguments[at]]
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    words, notes = translate_flags(arguments[at:], known)
    print_notes(notes)
    return [*arguments[:at], *complete_switches(words, switches_of(arguments[at]))]


def _show(error: BaseException, head: str, *, wants_traceback: bool) -> None:
    if wants_traceback:
        traceback.print_exc()
        return
    from plait.cli.console import err

    console = err()
    console.print(head, style="bold red", end="")
    for line in (str(error), *getattr(error, "__notes__", [])):
        console.print(line, markup=False, soft_wrap=True)


def _join_lists(arguments: list[str]) -> list[str]:
    """Turn `--weights 0.7 0.3` into `--weights 0.7,0.3`, and `--tasks a.yaml b.yaml` into `--tasks a.yaml --tasks b.yaml`."""
    joined: list[str] = []
    option, items = "", list[str]()
    for argument in [*arguments, ""]:
        if option and _LISTS[option].fullmatch(argument):
            items.append(argument)
            continue
        if option:
            if option == "--weights" and items:
                joined += [option, ",".join(items)]
            else:  # the option before each of its values: a path may have a comma in it
                joined += [part for item in items for part in (option, item)] or [option]
        option, items = (argument, []) if argument in _LISTS else ("", [])
        joined += [] if option else [argument]
    return joined[:-1]
