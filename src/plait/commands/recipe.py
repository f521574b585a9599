"""`plait recipe check` and `migrate`, `plait.load_recipe` and `plait.migrate_recipe`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from plait.errors import OutputError
from plait.recipes.loading import migrate_file
from plait.results.writing import write_text_atomic


@dataclass(frozen=True)
class MigrateOrder:
    """A recipe in today's form that is asked for; see `plait.migrate_recipe`."""

    file: Path
    out: Path | None = None
    force: bool = False

    @cached_property
    def migrated(self) -> tuple[str, list[str]]:
        """The recipe's text, and notes on what changed.

        Raises:
            RecipeError: it cannot be read, a part of it has no counterpart, or it is not valid.
        """
        return migrate_file(self.file)

    def check(self) -> None:
        """Refuse an output that may not be written.

        Raises:
            PlaitError: it may not, or the recipe cannot be migrated.
        """
        out = self.out
        if out is not None and (out.is_symlink() or (out.exists() and not out.is_file())):
            raise OutputError(f"{out} exists already, and is not a file. Choose another output.")
        if out is not None and out.exists() and not self.force:
            raise OutputError(f"{out} exists already. Choose another output, or replace it with --force (force=True).")
        _ = self.migrated

    def run(self) -> tuple[str, list[str]]:
        """Return text and notes, and write the text where an output is given.

        Raises:
            PlaitError: as `check`.
        """
        self.check()
        if self.out is not None:
            write_text_atomic(self.out, self.migrated[0], replace=self.force)
        return self.migrated
