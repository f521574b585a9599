"""`plait compress`, `plait.compress`."""

from __future__ import annotations

from dataclasses import dataclass

from plait.commands.request import LowRankOrder, Request
from plait.errors import PlaitError, RecipeError
from plait.hub.references import parse_reference
from plait.merging.inventory import open_adapters
from plait.merging.pipeline import MergeResult, run_recipe
from plait.notices import announce
from plait.results.progress import Progress

_SETTINGS = {"base_model", "dtype", "layout"}
_SMALLER = 0.98  # of the bytes before: less than that is saved by headers alone


@dataclass(frozen=True, kw_only=True)
class CompressOrder(LowRankOrder):
    """A compression that is asked for; see `plait.compress`."""

    adapter: str

    def run(self, progress: Progress | None = None) -> MergeResult:
        """Merge one adapter alone, at the rank asked for.

        Raises:
            PlaitError: anything wrong with what was given.
        """
        if others := sorted({key for key, value in self.settings.items() if value is not None} - _SETTINGS):
            raise RecipeError(
                f"{', '.join(others)}: a compression takes {', '.join(sorted(_SETTINGS))} and a rank or an energy; for other "
                "keys of a recipe, merge this one adapter."
            )
        reference = parse_reference(self.adapter)
        name = reference.default_name()
        settings = {"rank": self.wanted_rank, "heads": {"policy": "from", "adapter": name}, **self.settings}
        recipe, folder = Request({name: reference.address}, settings).resolved
        result = run_recipe(recipe, folder=folder, out=self.out, force=self.force, workers=self.workers, progress=progress)
        _announce_if_not_smaller(result, reference.address)
        return result


def _announce_if_not_smaller(result: MergeResult, adapter: str) -> None:
    """Announce that a compressed adapter has hardly fewer bytes than it had, and what would have."""
    try:
        opened, written = open_adapters([(None, adapter), ("compressed", str(result.folder))])[1]
        before, after = opened.file.path.stat().st_size, written.file.path.stat().st_size
    except (PlaitError, OSError):  # gone since: the result is complete, and this note is all that is lost
        return
    if after < _SMALLER * before:
        return
    ranks = {m.target: m.rank or 0 for m in result.record.modules}
    largest = max(ranks.values(), default=0)
    size = {"float32": 4}.get(result.record.recipe["output"]["dtype"], 2)
    padding = sum((largest - ranks[m.target]) * sum(m.shape) * m.stack * size for m in result.plan.modules)
    text = f"the adapter is not smaller than it was: {after / 1e6:.1f} MB, before {before / 1e6:.1f} MB."
    if result.record.recipe["output"]["layout"] == "uniform" and after - padding < _SMALLER * before:
        text += (
            f" Every module is stored with the largest rank, {largest}: with --layout pattern (layout='pattern') it has "
            f"{(after - padding) / 1e6:.1f} MB."
        )
    else:
        text += " Choose a lower rank or energy, or --dtype bfloat16."
    announce(text)
