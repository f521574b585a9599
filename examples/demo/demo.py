"""Merge three real adapters of a real 135M model with plait, and see what the result keeps of each.

`make demo` runs this. It shows the commands that a user would type, loads what they write in PEFT, compares several ways
to merge on held-out texts, with the base model in memory once, and writes a report.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from shutil import which
from typing import TYPE_CHECKING, Any

from base_model import BaseModelMissingError, base_model, cached, gguf_file
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from plait.errors import PlaitError

if TYPE_CHECKING:
    from speaking import Speaker

    from plait.evaluation.comparison import ComparedMerges, Leaderboard
    from plait.evaluation.record import Bounds, Evaluation
    from plait.tasks.inputs import Example

HERE = Path(__file__).resolve().parent
NAMES = ("sentiment", "supersense", "langid")
# With the scales that leaderboard.py chose on the validation split; the first is the best there of those that need no data.
MERGE = ("--method dc_merge",)
MERGES: Mapping[str, Mapping[str, Any]] = {
    "dc_merge": {"method": "dc_merge"},
    "ties, core": {"method": "ties", "space": "core", "density": 0.2, "flavor": "core_space", "scale": 0.71},
    "linear": {"method": "linear", "scale": 0.17},
}
CHOSEN = next(iter(MERGES))
BATCH = 32  # prompts at a time
SAMPLES = 40  # test texts per task
PROMPTS = 3  # per task, whose answers are shown
WIDEST = 100  # columns; tables do not read better when they are wider


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; return 0, or 2 when something that it needs is missing."""
    options = _options(arguments)
    console = Console(highlight=False)
    console.width = min(console.width, WIDEST)
    try:
        _demo(console, options.out, options.samples)
    except (BaseModelMissingError, PlaitError) as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print("[bold red]error:[/]", escape(str(error)))
        return 2
    except subprocess.CalledProcessError as error:
        return error.returncode  # it has printed why
    except KeyboardInterrupt:
        return 130
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Merge three adapters of SmolLM2-135M and see what the result keeps of each.")
    parser.add_argument("--samples", type=_positive, default=SAMPLES, metavar="N", help="test texts per task [%(default)s]")
    parser.add_argument("--out", type=Path, default=Path("out/demo-merge"), metavar="DIR", help="merged adapter [%(default)s]")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a number of texts; give 1 or more")
    return number


def _demo(console: Console, out: Path, samples: int) -> None:
    started = time.perf_counter()
    gguf = gguf_file()
    _require("peft", "transformers", "accelerate", "gguf", "jinja2")
    # Threads that wait asleep: on a machine with other work, spinning ones make this ten times slower. Read by torch when
    # it is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars of other libraries would cut through the text; read by tqdm as torch does
    console.print(
        f"Three LoRA adapters of SmolLM2-135M-Instruct ({', '.join(NAMES)}) become [bold]one[/bold], and one "
        "model then does all three jobs."
    )

    with ThreadPoolExecutor(1) as aside:
        unpacked = None if cached(gguf).is_dir() else aside.submit(base_model)

        _heading(console, "1 · What is in the adapters")
        _plait(console, "inspect", _adapters())

        _heading(console, "2 · Merge them, without the base model")
        _plait(console, "merge", _adapters(), *MERGE, f"-o {shlex.quote(str(out))}", "--force")

        _heading(console, "3 · What they answer, loaded by PEFT")
        if unpacked is not None:
            with _working(console, "waiting for the base model: it is unpacked from its 4-bit file, this first time only"):
                unpacked.result()
    dtype = _dtype(console)
    console.print(_answers(console, _load(console, out, dtype)))

    _heading(console, "4 · What the merge keeps, on texts that no training saw")
    compared = _compare(console, out, samples, dtype)
    console.print(*_kept(next(e for e in compared.evaluations if e.name == CHOSEN)), sep="\n")

    _heading(console, "5 · Beside other ways to merge the same adapters")
    console.print(*_leaderboard(compared.board), sep="\n")
    _report(console, compared, out)

    _heading(console, "6 · Merged once more, with 12 generic lines per task to look at, and no label")
    _tuned(console, out, samples, dtype)

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


def _tasks() -> list[Path]:
    return [HERE / "tasks" / f"{name}.yaml" for name in NAMES]


def _workspace(out: Path) -> Path:
    return out.with_name(f"{out.name}-eval")


def _tuning(out: Path) -> Path:
    return out.with_name(f"{out.name}-tuned")


def _page(out: Path) -> Path:
    return out.with_name(f"{out.name}-report.html")


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


@contextmanager
def _working(console: Console, what: str) -> Iterator[None]:
    """Say what is being done while it is, and afterward how long it took."""
    started = time.perf_counter()
    with console.status(f"{what} …"):
        yield
    console.print(f"[green]✓[/] {what} [dim]({time.perf_counter() - started:.1f} s)[/]")


def _dtype(console: Console) -> str:
    """Return the dtype in which this processor is the faster, and say which."""
    from torch import bfloat16

    from plait.linalg.speed import fast_dtype, slowness

    ratio, chosen = slowness(bfloat16), str(fast_dtype()).removeprefix("torch.")
    speed = f"{1 / ratio:.1f} times faster" if ratio < 1 else f"{ratio:.1f} times slower"
    console.print(f"[green]✓[/] computing in {chosen}: this processor multiplies bfloat16 {speed} than float32")
    return chosen


def _load(console: Console, merged: Path, dtype: str) -> Speaker:
    with _working(console, "base model and four adapters: no tensor missing, none left over"):
        from speaking import Speaker

        return Speaker(base_model(), {"merged": merged} | {name: HERE / "adapters" / name for name in NAMES}, dtype)


def _answers(console: Console, speaker: Speaker) -> Table:
    """Ask base, own adapter and merged adapter a few test prompts of every task."""
    asked = _questions()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), caption_justify="left", expand=True)
    table.caption = "Greedy answers, cut to a line; ✓ when the answer is exactly the right one."
    widest = max(len(e.target) for examples in asked.values() for e in examples)
    table.add_column("text", no_wrap=True, overflow="ellipsis", ratio=4)
    table.add_column("right", no_wrap=True, width=widest)
    table.add_column("base model", no_wrap=True, overflow="ellipsis", ratio=3)
    for name in ("own adapter", "merged"):
        table.add_column(name, no_wrap=True, overflow="ellipsis", width=max(widest + 2, len(name)))
    prompts = {task: [str(example.prompt) for example in examples] for task, examples in asked.items()}
    with console.status("asking …"):
        everything = [prompt for own in prompts.values() for prompt in own]
        base, merged = iter(speaker.say(None, everything)), iter(speaker.say("merged", everything))
        own = {task: speaker.say(task, texts) for task, texts in prompts.items()}
    for task, examples in asked.items():
        table.add_row(f"[bold]{task}[/]")
        for example, *message in zip(examples, islice(base, PROMPTS), own[task], islice(merged, PROMPTS), strict=True):
            marked = (f"[green]{a} ✓[/]" if a == example.target else escape(a) for a in message)
            table.add_row(escape(_text(str(example.prompt))), example.target, *marked)
        table.add_section()
    return table


def _questions() -> dict[str, tuple[Example, ...]]:
    """Return the first test examples of every task; their labels take turns."""
    from plait.tasks.examples import read_examples
    from plait.tasks.loading import load_tasks

    return {task.name: read_examples(task, "test").items[:PROMPTS] for task in load_tasks(_tasks())}


def _text(prompt: str) -> str:
    """Return the text that a prompt asks about: its templates say `Text: …` and the end of the turn."""
    return prompt.partition("Text: ")[2].partition("<|im_end|>")[0]


def _compare(console: Console, out: Path, samples: int, dtype: str) -> ComparedMerges:
    """Evaluate all merges; the base model is loaded once, and every answer is asked for once."""
    from plait.cli.console import ProgressBars
    from plait.evaluation.comparison import compare_merges
    from plait.evaluation.pipeline import EvaluateOptions
    from plait.evaluation.request import evaluated_recipe
    from plait.hub.pretrained import LoadOptions
    from plait.recipes.request import read_request

    adapters = {name: HERE / "adapters" / name for name in NAMES}
    recipes = {
        label: evaluated_recipe(read_request(None, adapters, settings)[0], _tasks(), {"subset": samples, "batch_size": BATCH})
        for label, settings in MERGES.items()
    }
    options = EvaluateOptions(_workspace(out), LoadOptions(dtype, "cpu", base=str(base_model())))
    progress = ProgressBars() if console.is_terminal else None
    with _timed(console, f"{samples} texts per task, asked of the base, {len(NAMES)} adapters and {len(MERGES)} merges"):
        return compare_merges(recipes, None, options, progress)


@contextmanager
def _timed(console: Console, what: str) -> Iterator[None]:
    """As `_working`, for what shows its own progress."""
    started = time.perf_counter()
    yield
    console.print(f"[green]✓[/] {what} [dim]({time.perf_counter() - started:.1f} s)[/]")


def _kept(found: Evaluation) -> tuple[Table, str]:
    """Return accuracies and recoveries of one merge as a table, and how to read it."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("task", "n", "base", "own adapter", "merged", "recovery", "95 %"):
        table.add_column(name, justify="left" if name == "task" else "right")
    for t in found.tasks:
        accuracies = (f"{value:.2f}" for value in (t.base, t.single or 0.0, t.merged))
        table.add_row(t.task, str(t.examples), *accuracies, f"[bold]{_percent(t.recovery)}[/]", _bounds(t.recovery_interval))
    table.add_section()
    table.add_row("mean", "", "", "", "", f"[bold]{_percent(found.mean_recovery)}[/]", _bounds(found.mean_interval))
    worst = f"[bold]{_percent(found.worst_recovery)}[/]"
    table.add_row(f"worst: {found.worst_task}", "", "", "", "", worst, _bounds(found.worst_interval))
    return table, (
        "[dim]Recovery = (merged − base) / (own − base): 0 % is the base model, 100 % the task's own adapter. The interval "
        "resamples the texts, a fixed sample of the test split; --samples N takes more and narrows it.[/]"
    )


def _leaderboard(board: Leaderboard) -> tuple[Table, str]:
    """Return all merges as a table, best first, and what it does not say."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("merge", "worst", "95 %", "mean", *board.base):
        table.add_column(name, justify="left" if name == "merge" else "right")
    for p in board.places:
        name = f"[bold]{p.name}[/]" if p.name == CHOSEN else p.name
        kept = (_percent(p.recovery[task]) for task in board.base)
        table.add_row(name, _percent(p.worst_recovery), _bounds(p.worst_interval), _percent(p.mean_recovery), *kept)
    return table, (
        "[dim]Recovery, the largest of the worst task first. Where intervals overlap, the order may be chance: --samples N "
        "takes more texts, and docs/results.md has all methods on all of them.[/]"
    )


def _report(console: Console, compared: ComparedMerges, out: Path) -> None:
    """Write the results where `plait eval` does, and the page that `plait report` makes of them."""
    from plait.evaluation.workspace import write_comparison, write_evaluation
    from plait.reports.pipeline import make_report

    workspace = _workspace(out)
    runs = {found.name: write_evaluation(workspace, found) for found in compared.evaluations}
    board = write_comparison(workspace, compared.board.adapters, compared.board.model_dump(mode="json"))
    console.print()
    with _working(console, "all of this as one page, with the merge's own record"):
        make_report([runs[CHOSEN], board, out], out=_page(out), title="Three adapters in one", force=True)


def _tuned(console: Console, out: Path, samples: int, dtype: str) -> None:
    """Let plait choose a closed form on texts that it ships, and judge it on the same test texts; the references are kept."""
    base = shlex.quote(str(base_model()))
    tasks = f"--tasks {shlex.quote(str(_short(HERE / 'tasks')))}/*.yaml"
    tuned = shlex.quote(str(_tuning(out)))
    where = (f"--base-id {base}", f"--load-dtype {dtype}", "--device-map cpu")
    _plait(console, "tune", _adapters(), tasks, "--texts lines --count 12 --steps 0", f"-o {tuned}", *where, "--force")
    console.print()
    sample = f"--subset {samples} --batch-size {BATCH}"
    _plait(console, "eval", tuned, tasks, sample, f"--workspace {shlex.quote(str(_workspace(out)))}", *where)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f} %"


def _bounds(interval: Bounds | None) -> str:
    return "–" if interval is None else f"{100 * interval[0]:.0f} – {100 * interval[1]:.0f}"


def _what_next(console: Console, out: Path, base: Path) -> None:
    """Print which results are where, and what to try now."""
    for what, place in (
        ("merged adapter", out),
        ("tuned adapter", _tuning(out)),
        ("report", f"{_page(out)}   (open it in a browser)"),
        ("results", _workspace(out)),
        ("base model", base),
    ):
        console.print(f"[dim]{what:<15}[/] {place}", soft_wrap=True)
    console.print()
    activate = Path(sys.executable).parent / "activate"
    if which("plait") is None and activate.is_file():
        console.print(f"[dim]# puts plait on the path[/]\nsource {shlex.quote(str(_short(activate)))}", soft_wrap=True)
    recipe = shlex.quote(str(_short(HERE.parent / "recipes" / "ties_core.yaml")))
    tasks = f"{shlex.quote(str(_short(HERE / 'tasks')))}/*.yaml"
    for why, command in (
        ("the plan, without merging", f"plait merge {_adapters()} --dry-run"),
        (
            "another method, or a plain weighted sum; `plait methods` lists all",
            f"plait merge {_adapters()} --scale 0.17 -o out/sum",
        ),
        ("a smaller adapter, and what that loses", f"plait compress {shlex.quote(str(out))} --rank 8 -o out/rank8"),
        (
            "what a merge keeps, from its files",
            f"plait eval {shlex.quote(str(out))} --tasks {tasks} --subset {SAMPLES} --base-id {shlex.quote(str(base))}",
        ),
        ("a recipe file instead of options", f"plait merge {recipe} -o out/recipe"),
        ("in Python, with PEFT", f'model = PeftModel.from_pretrained(model, "{out}")'),
    ):
        console.print(f"[dim]# {why}[/]\n{escape(command)}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
