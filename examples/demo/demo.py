"""Merge three real adapters of a real 135M model with plait, and ask the result the questions of all three.

`make demo` runs this. It shows the commands that a user would type, loads what they write in PEFT, and compares the
base model, each task's own adapter and the merged adapter on held-out texts.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from base_model import BaseModelMissingError, base_model, cached, gguf_file
from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from scoring import HERE, NAMES, Outcome, Task, hits, intervals, load_tasks, margin, mean_and_worst

if TYPE_CHECKING:
    from live import Live

ADAPTERS = HERE / "adapters"
MERGE = ("--method", "ties", "--space", "core", "--density", "0.5", "--flavor", "core_space", "--scale", "1.5")
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
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]error:[/] {error}")
        return 2
    except subprocess.CalledProcessError as error:
        return error.returncode
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
    folders = [str(_short(ADAPTERS / name)) for name in sorted(NAMES)]
    _plait(console, "inspect", *folders)

    _heading(console, "2 · Merge them, without the base model")
    _plait(console, "merge", *folders, *MERGE, "-o", str(out), "--force")

    _heading(console, "3 · Load the base model and all four adapters with PEFT")
    tasks = load_tasks()
    live = _load(console, tasks, out, first_time=not cached(gguf).is_dir())

    _heading(console, "4 · What they answer")
    console.print(_answers(console, live, tasks))

    _heading(console, f"5 · How often they are right, on {samples} held-out texts per task")
    console.print(*_accuracies(_measure(console, live, tasks, samples)), sep="\n")

    _heading(console, f"Done in {time.perf_counter() - started:.0f} s")
    _what_next(console, out, cached(gguf))


def _require(*packages: str) -> None:
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise BaseModelMissingError(f"The demo needs {', '.join(missing)}: python -m pip install 'plait\\[demo]'")


def _heading(console: Console, text: str) -> None:
    console.print()
    console.rule(f"[bold]{text}[/bold]", align="left", style="dim")
    console.file.flush()  # sub-processes write to the same place


def _short(path: Path) -> Path:
    """Return a path as a user in the current folder would type it."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _plait(console: Console, command: str, *arguments: str) -> None:
    """Show a plait command as it is typed, and run it."""
    console.print(f"[bold green]$[/] [bold]{_typed('plait', command, *arguments)}[/]\n", soft_wrap=True)
    console.file.flush()
    subprocess.run([sys.executable, "-m", "plait", command, *arguments], check=True)


def _typed(*words: str) -> str:
    """Return a command as typed: a folder of adapters as a pattern, lines of readable length."""
    folders = [w for w in words if Path(w).parent == _short(ADAPTERS)]
    typed = [shlex.quote(w) for w in words if w not in folders]
    typed.insert(2, f"{shlex.quote(str(_short(ADAPTERS)))}/*")
    lines = [""]
    for word in typed:
        if lines[-1] and len(lines[-1]) + len(word) > 74:
            lines.append("   ")
        lines[-1] += f" {word}" if lines[-1] else word
    return " \\\n".join(lines)


def _load(console: Console, tasks: Sequence[Task], merged: Path, *, first_time: bool) -> Live:
    # Threads that wait asleep: on a machine with other work, spinning ones make this ten times slower. Read by torch when
    # it is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with _working(console, "starting transformers and PEFT"):
        from live import Live, quiet

        quiet()
    if first_time:
        with _working(console, "unpacking the base model from its 4-bit file; this happens once"):
            base_model()
    with _working(console, "loading the base model and the adapters; no tensor missing, none left over"):
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
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption_justify="left", expand=True)
    table.caption = "Greedy answers, cut to a line; ✓ when the answer is exactly the gold label."
    for name, ratio in (("text", 9), ("gold", 3), ("base model", 6), ("own adapter", 4), ("merged", 4)):
        table.add_column(name, no_wrap=True, overflow="ellipsis", ratio=ratio)
    for task in tasks:
        examples = task.examples("test", PROMPTS)
        prompts = [task.ask(example) for example in examples]
        with console.status(f"asking about {task.name} …"):
            columns = [live.answer(name, prompts) for name in ("base", task.name, MERGED)]
        table.add_row(f"[bold]{task.name}[/]")
        for example, *said in zip(examples, *columns, strict=True):
            table.add_row(_plain(example.text), example.label, *(_marked(answer, example.label) for answer in said))
        table.add_section()
    return table


def _plain(text: str) -> str:
    return text.replace("[", "\\[")


def _marked(answer: str, gold: str) -> str:
    return f"[green]{gold} ✓[/]" if answer == gold else _plain(answer)


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


def _accuracies(outcomes: Mapping[str, Outcome]) -> tuple[Table, Padding]:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("task", "n", "base model", "own adapter", "merged", "recovery"):
        table.add_column(name, justify="left" if name == "task" else "right")
    for name, o in outcomes.items():
        cells = (f"{right.mean():.2f} [dim]± {margin(right):.2f}[/]" for right in (o.base, o.single, o.merged))
        table.add_row(name, str(len(o.base)), *cells, f"[bold]{o.recovery:.0%}[/]")
    table.add_section()
    sides = [[right.mean() for right in (o.base, o.single, o.merged)] for o in outcomes.values()]
    means = (f"{sum(side) / len(sides):.2f}" for side in zip(*sides, strict=True))
    mean, worst = mean_and_worst(outcomes)
    table.add_row("mean", "", *means, f"[bold]{mean:.0%}[/]")
    low, high = intervals(outcomes)["mean"]
    note = (
        "Accuracy by the likelihood of the labels, ± half of its 95 % interval. "
        f"Recovery = (merged − base) / (own − base): mean {mean:.0%} (95 % interval {low:.0%} to {high:.0%}), "
        f"worst task {worst:.0%}. The texts are a fixed sample of the test split, as many of every label; "
        "--samples takes more."
    )
    return table, Padding(f"[dim]{note}[/]", (0, 0))


def _what_next(console: Console, out: Path, base: Path) -> None:
    folders = f"{_short(ADAPTERS)}/*"
    lines = (
        ("the merged adapter", str(out)),
        ("its base model", str(base)),
        ("", ""),
        ("look before merging", f"plait merge {folders} --dry-run"),
        ("another method", f"plait merge {folders} --scale 0.6 -o out/linear"),
        ("a smaller adapter", f"plait compress {out} --rank 8 -o out/rank8"),
        ("all methods", "plait methods"),
        ("as a recipe file", "plait recipe --help"),
        ("in PEFT", f'PeftModel.from_pretrained(model, "{out}")'),
    )
    table = Table.grid(padding=(0, 2))
    for what, how in lines:
        table.add_row(f"[dim]{what}[/]", _plain(how))
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
