"""Merge three real adapters of a real 135M model with plait, and ask the result the questions of all three.

`make demo` runs this. It shows the commands that a user would type, loads what they write in PEFT, and compares the
base model, each task's own adapter and the merged adapter on held-out texts.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import TYPE_CHECKING

from base_model import BaseModelMissingError, base_model, cached, gguf_file
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from scoring import HERE, NAMES, Outcome, Task, hits, intervals, load_tasks, margin, mean_and_worst

if TYPE_CHECKING:
    from live import Live

# Chosen on the validation split by choose.py.
MERGE = ("--method ties", "--space core", "--density 0.2", "--flavor core_space", "--scale 2")
MERGED = "merged"
PROMPTS = 3  # per task, whose answers are shown
WIDEST = 100  # columns; tables do not read better when they are wider


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; return 0, or 2 when something that it needs is missing."""
    options = _options(arguments)
    console = Console(highlight=False)
    console.width = min(console.width, WIDEST)
    try:
        _demo(console, options.out, options.samples)
    except BaseModelMissingError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print("[bold red]error:[/]", escape(str(error)))
        return 2
    except subprocess.CalledProcessError as error:
        return error.returncode  # it has said why
    except KeyboardInterrupt:
        return 130
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Merge three adapters of SmolLM2-135M and ask the result all their questions.")
    parser.add_argument("--samples", type=_positive, default=100, metavar="N", help="test texts per task [%(default)s]")
    parser.add_argument("--out", type=Path, default=Path("out/demo-merge"), metavar="DIR", help="merged adapter [%(default)s]")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is no number of texts; give 1 or more")
    return number


def _demo(console: Console, out: Path, samples: int) -> None:
    started = time.perf_counter()
    gguf = gguf_file()
    _require("peft", "transformers", "accelerate", "gguf")
    console.print(
        f"Three LoRA adapters of SmolLM2-135M-Instruct ({', '.join(NAMES)}) become [bold]one[/bold], and one "
        "model then does all three jobs."
    )

    _heading(console, "1 · What is in the adapters")
    _plait(console, "inspect", _adapters())

    _heading(console, "2 · Merge them, without the base model")
    _plait(console, "merge", _adapters(), *MERGE, f"-o {shlex.quote(str(out))}", "--force")

    _heading(console, "3 · Load the base model and all four adapters with PEFT")
    tasks = load_tasks()
    live = _load(console, tasks, out, first_time=not cached(gguf).is_dir())

    _heading(console, "4 · What they answer")
    console.print(_answers(console, live, tasks))

    _heading(console, "5 · How often they are right on texts that no training saw")
    console.print(*_accuracies(_measure(console, live, tasks, samples)), sep="\n")

    _heading(console, f"Done in {time.perf_counter() - started:.0f} s")
    _what_next(console, out, cached(gguf))


def _require(*packages: str) -> None:
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise BaseModelMissingError(f"The demo needs {', '.join(missing)}: python -m pip install 'plait[demo]'")


def _heading(console: Console, text: str) -> None:
    console.print()
    console.rule(f"[bold]{text}[/bold]", align="left", style="dim")


def _short(path: Path) -> Path:
    """Return a path as a user in the current folder would type it."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _adapters() -> str:
    return f"{shlex.quote(str(_short(HERE / 'adapters')))}/*"


def _plait(console: Console, *pieces: str) -> None:
    """Show a plait command as it is typed, and run it as a shell would.

    Args:
        console: where to.
        pieces: of the command behind `plait`; each stays on one line.
    """
    console.print(f"[bold green]$[/] [bold]{_lines('plait', *pieces)}[/]\n", soft_wrap=True)
    console.file.flush()  # the command writes to the same place
    subprocess.run([sys.executable, "-m", "plait", *_words(pieces)], check=True)


def _lines(*pieces: str, width: int = 74) -> str:
    lines = [pieces[0]]
    for piece in pieces[1:]:
        if len(lines[-1]) + 1 + len(piece) > width:
            lines.append("   ")
        lines[-1] += f" {piece}"
    return " \\\n".join(lines)


def _words(pieces: Sequence[str]) -> list[str]:
    words = [word for piece in pieces for word in shlex.split(piece)]
    return [found for word in words for found in (_matching(Path(word)) if "*" in word else [word])]


def _matching(pattern: Path) -> list[str]:
    return [str(path) for path in sorted(pattern.parent.glob(pattern.name))]


def _load(console: Console, tasks: Sequence[Task], merged: Path, *, first_time: bool) -> Live:
    # Threads that wait asleep: on a machine with other work, spinning ones make this ten times slower. Read by torch when
    # it is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with _working(console, "starting transformers and PEFT"):
        from live import Live, quiet

        quiet()
    if first_time:
        with _working(console, "unpacking the base model from its 4-bit file, this first time only"):
            base_model()
    with _working(console, "loading base model and adapters: no tensor missing, none left over"):
        return Live(base_model(), {MERGED: merged} | {task.name: task.adapter for task in tasks})


@contextmanager
def _working(console: Console, what: str) -> Iterator[None]:
    """Say what is being done while it is, and afterwards how long it took."""
    started = time.perf_counter()
    with console.status(f"{what} …"):
        yield
    console.print(f"[green]✓[/] {what} [dim]({time.perf_counter() - started:.1f} s)[/]")


def _answers(console: Console, live: Live, tasks: Sequence[Task]) -> Table:
    """Ask base, own adapter and merged adapter the first test prompts of every task."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), caption_justify="left", expand=True)
    table.caption = "Greedy answers, cut to a line; ✓ when the answer is exactly the gold label."
    widest = max(len(e.label) for task in tasks for e in task.examples("test", PROMPTS))
    table.add_column("text", no_wrap=True, overflow="ellipsis", ratio=4)
    table.add_column("gold", no_wrap=True, width=widest)
    table.add_column("base model", no_wrap=True, overflow="ellipsis", ratio=3)
    for name in ("own adapter", "merged"):
        table.add_column(name, no_wrap=True, overflow="ellipsis", width=max(widest + 2, len(name)))
    for task in tasks:
        examples = task.examples("test", PROMPTS)
        prompts = [task.ask(example) for example in examples]
        with console.status(f"asking about {task.name} …"):
            columns = [live.answer(name, prompts) for name in ("base", task.name, MERGED)]
        table.add_row(f"[bold]{task.name}[/]")
        for example, *said in zip(examples, *columns, strict=True):
            table.add_row(escape(example.text), example.label, *(_marked(answer, example.label) for answer in said))
        table.add_section()
    return table


def _marked(answer: str, gold: str) -> str:
    return f"[green]{gold} ✓[/]" if answer == gold else escape(answer)


def _measure(console: Console, live: Live, tasks: Sequence[Task], samples: int) -> dict[str, Outcome]:
    """Classify the sample of every task with the base model, its own adapter and the merged adapter."""
    chosen = {task: task.examples("test", samples) for task in tasks}
    outcomes = {}
    with _progress(console, 3 * sum(map(len, chosen.values()))) as report:
        for task, examples in chosen.items():
            names = ("base", task.name, MERGED)
            right = [hits(examples, live.classify(name, task, examples, report(f"{task.name}, {name}"))) for name in names]
            outcomes[task.name] = Outcome(*right)
    return outcomes


@contextmanager
def _progress(console: Console, total: int) -> Iterator[Callable[[str], Callable[[int], object]]]:
    """Show progress: a bar on a terminal, a line per stage elsewhere."""
    if not console.is_terminal:

        def announce(stage: str) -> Callable[[int], object]:
            console.print(f"[dim]classifying: {stage}[/]")
            return lambda done: None

        yield announce
        return
    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=total)

        def advance(stage: str) -> Callable[[int], object]:
            progress.update(bar, description=stage)
            return lambda done: progress.advance(bar, done)

        yield advance


def _accuracies(outcomes: Mapping[str, Outcome]) -> tuple[Table, str]:
    """Return the accuracies and recoveries as a table, and how to read it."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("task", "n", "base model", "own adapter", "merged", "recovery"):
        table.add_column(name, justify="left" if name == "task" else "right")
    for name, o in outcomes.items():
        cells = (f"{right.mean():.2f} [dim]± {margin(right):.2f}[/]" for right in (o.base, o.single, o.merged))
        table.add_row(name, str(len(o.base)), *cells, f"[bold]{_percent(o.recovery)}[/]")
    table.add_section()
    sides = [[right.mean() for right in (o.base, o.single, o.merged)] for o in outcomes.values()]
    means = (f"{sum(side) / len(sides):.2f} [dim]{' ' * 6}[/]" for side in zip(*sides, strict=True))
    mean, worst = mean_and_worst(outcomes)
    low, high = intervals(outcomes)["mean"]
    table.add_row("mean", "", *means, f"[bold]{_percent(mean)}[/]")
    note = (
        f"Recovery = (merged − base) / (own − base): mean {_percent(mean)} (95 % interval {_percent(low)} to "
        f"{_percent(high)}), worst task {_percent(worst)}.\n[dim]A prediction is the likeliest label; ± is half of the "
        "accuracy's 95 % interval. The texts are a fixed sample of the test split, as many of every label; --samples N "
        "takes more.[/]"
    )
    return table, note


def _percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{100 * share:.0f} %"


def _what_next(console: Console, out: Path, base: Path) -> None:
    """Say what lies where, and what to try now."""
    recipe = shlex.quote(str(_short(HERE.parent / "recipes" / "ties_core.yaml")))
    console.print(f"[dim]merged adapter[/]  {out}\n[dim]base model[/]      {base}\n", soft_wrap=True)
    activate = Path(sys.executable).parent / "activate"
    if which("plait") is None and activate.is_file():
        console.print(f"[dim]# puts plait on the path[/]\nsource {shlex.quote(str(_short(activate)))}", soft_wrap=True)
    for why, command in (
        ("the plan, without merging", f"plait merge {_adapters()} --dry-run"),
        (
            "another method, or a plain weighted sum; `plait methods` lists all",
            f"plait merge {_adapters()} --scale 0.6 -o out/sum",
        ),
        ("a smaller adapter, and what that loses", f"plait compress {shlex.quote(str(out))} --rank 8 -o out/rank8"),
        ("a recipe file instead of options", f"plait merge {recipe} -o out/recipe"),
        ("in Python, with PEFT", f'model = PeftModel.from_pretrained(model, "{out}")'),
    ):
        console.print(f"[dim]# {why}[/]\n{escape(command)}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
