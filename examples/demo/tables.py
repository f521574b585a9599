"""What the scripts share that make a table of many runs of `plait`: which rows, with which seeds, kept where."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Found = Mapping[str, Mapping[int, Mapping[str, Any]]]  # name of a row → seed → what its run found


@dataclass(frozen=True)
class Table:
    """A table of runs.

    Attributes:
        about: what the script does.
        rows: their names.
        seeds: that are taken where none are given.
        cache: where runs are kept where no folder is given.
        commands: (row, seed, cache) → the words of its commands.
        run: (row, seed, cache) → what the run found, or had found before.
        lines: what was found → lines of a Markdown table.
        has_seed: whether a row depends on the seed; the others run once.
    """

    about: str
    rows: Sequence[str]
    seeds: str
    cache: str
    commands: Callable[[str, int, Path], Iterable[Sequence[str]]]
    run: Callable[[str, int, Path], Mapping[str, Any]]
    lines: Callable[[Found], Iterator[str]]
    has_seed: Callable[[str], bool] = lambda row: True

    def main(self) -> None:
        """Run rows, and print them."""
        parser = argparse.ArgumentParser(description=self.about, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--rows", default="", help="names, or how they begin, separated by semicolons; all without")
        parser.add_argument("--seeds", default=self.seeds, help="with commas between [%(default)s]")
        parser.add_argument("--cache", type=Path, default=Path(self.cache), help="where all is kept [%(default)s]")
        parser.add_argument("--commands", action="store_true", help="print the commands and run nothing")
        options = parser.parse_args()
        wanted, seeds = tuple(options.rows.split(";")), [int(seed) for seed in options.seeds.split(",")]
        chosen = {row: seeds if self.has_seed(row) else [0] for row in self.rows if row.startswith(wanted)}
        if options.commands:
            for row, some in chosen.items():
                for words in (words for seed in some for words in self.commands(row, seed, options.cache)):
                    print("plait", shlex.join(words))
            return
        os.environ.setdefault("TQDM_DISABLE", "1")
        options.cache.mkdir(parents=True, exist_ok=True)
        found: dict[str, dict[int, Mapping[str, Any]]] = {}
        for row, some in chosen.items():
            found[row] = {seed: self.run(row, seed, options.cache) for seed in some}
            print(f"{row}: {found[row]}", file=sys.stderr)
        print(*self.lines(found), sep="\n")


def folder(row: str, seed: int, cache: Path) -> Path:
    """Return where a run is kept."""
    return cache / f"{row.replace(', ', '-').replace(' ', '-')}-{seed}"


def plait(words: Sequence[str]) -> str:
    """Run a command, and return what it prints."""
    return subprocess.run([sys.executable, "-m", "plait", *words], check=True, stdout=subprocess.PIPE, text=True).stdout


def two_digits(share: float) -> str:
    """Write .98 for 0.98."""
    return f"{share:.2f}".replace("0.", ".", 1)
