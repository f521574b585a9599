"""Rows of a benchmark as tables: for a terminal, for a README, for a program."""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass
class Row:
    """One line: what was done, what came out, and what it must reach.

    Attributes:
        work: what was measured.
        cells: the columns between `work` and `target`, as text.
        target: what it must reach; empty for information.
        reached: whether it does; None without a target.
    """

    work: str
    cells: tuple[str, ...]
    target: str = ""
    reached: bool | None = None

    @property
    def mark(self) -> str:
        """✓, ✗ or nothing."""
        return "" if self.reached is None else "✓" if self.reached else "✗"


@dataclass
class Section:
    """One table.

    Attributes:
        title: of the table.
        columns: heads of the rows' cells.
        rows: the lines.
        notes: what the numbers mean.
    """

    title: str
    columns: tuple[str, ...]
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def arguments(doc: str | None, quick: str, *, cache: bool = True, **numbers: tuple[int, str]) -> argparse.Namespace:
    """Parse a benchmark's command line.

    Args:
        doc: what it measures.
        quick: what `--quick` does.
        cache: whether files are kept.
        numbers: name of a flag → its default, and what it counts.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (default, what) in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} ({default})")
    parser.add_argument("--quick", action="store_true", help=f"{quick}: a smoke test")
    if cache:
        place = Path(tempfile.gettempdir(), "plait-bench")
        parser.add_argument("--cache", type=Path, default=place, help="where files are kept")
    parser.add_argument("--markdown", action="store_true", help="print Markdown instead of tables")
    return parser.parse_args()


def conclude(
    path: Path, machine: dict[str, Any], sections: Sequence[Section], raw: dict[str, Any], *, quick: bool, as_markdown: bool
) -> None:
    """Keep the results of a run and print them. A quick one is a smoke test: it has no verdicts and replaces no results.

    Args:
        path: of the JSON that is kept.
        machine: from `machine()`.
        sections: what was measured.
        raw: the single figures behind it.
        quick: whether the run was cut short.
        as_markdown: print Markdown instead of tables.
    """
    if quick:
        _unjudged(sections)
    else:
        write(path, machine, sections, raw)
    if as_markdown:
        print(markdown(machine, sections))
    else:
        print(describe(machine))
        show(sections)


def take_turns(
    doc: str | None, run: Callable[[Path, int, dict[str, Any]], list[Section]], path: Path, *, rounds: int = 6
) -> None:
    """Parse arguments, measure in turns, report.

    Args:
        doc: what is measured.
        run: folder of files, number of turns and a place for single figures → what was measured.
        path: of the JSON that is kept.
        rounds: turns that every variant takes by default.
    """
    options = arguments(doc, "one turn, no verdicts", rounds=(rounds, "turns that every variant takes"))
    about, raw = machine(), {}
    sections = run(options.cache.resolve(), 1 if options.quick else options.rounds, raw)
    conclude(path, about, sections, raw, quick=options.quick, as_markdown=options.markdown)


def _unjudged(sections: Sequence[Section]) -> None:
    """Take the verdicts away."""
    for section in sections:
        for row in section.rows:
            row.reached = None


def show(sections: Sequence[Section]) -> None:
    """Print the tables for people."""
    console = Console(width=None if Console().is_terminal else 140)
    for section in sections:
        table = Table(title=section.title, title_justify="left", title_style="bold")
        table.add_column("work")
        for column in section.columns:
            table.add_column(column, justify="right")
        table.add_column("target", justify="right")
        table.add_column("")
        for row in section.rows:
            color = {None: "", True: "green", False: "red"}[row.reached]
            table.add_row(row.work, *row.cells, row.target, f"[{color}]{row.mark}[/]" if color else "")
        console.print(table)
        for note in section.notes:
            console.print(f"  {note}", style="dim", highlight=False, markup=False)
        console.print()


def markdown(machine: dict[str, Any], sections: Sequence[Section]) -> str:
    """Return the tables for a README."""
    lines = [describe(machine), ""]
    for section in sections:
        heads = ["work", *section.columns, "target", ""]
        lines += [f"**{section.title}**", "", _line(heads), _line(["---"] + ["---:"] * (len(heads) - 2) + [":---:"])]
        lines += [_line([row.work, *row.cells, row.target, row.mark]) for row in section.rows]
        lines += ["", *section.notes, ""]
    return "\n".join(lines)


def write(path: Path, machine: dict[str, Any], sections: Sequence[Section], raw: dict[str, Any]) -> None:
    """Write everything as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {"machine": machine, "sections": [asdict(s) for s in sections], "raw": raw}
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def machine() -> dict[str, Any]:
    """Return what the numbers were measured on."""
    import torch

    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "load": round(os.getloadavg()[0], 2),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "peft", "safetensors")},
    }


def describe(machine: dict[str, Any]) -> str:
    """Return one line about the machine."""
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gb']} GB; load at the start {machine['load']}; "
        f"Python {machine['python']}, torch {machine['torch']} ({machine['torch_threads']} threads), "
        f"transformers {machine['transformers']}, PEFT {machine['peft']}."
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8").splitlines()
        names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        return next(names, platform.machine())
    return platform.processor() or platform.machine()


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
