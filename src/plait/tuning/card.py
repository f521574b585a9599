"""The model card of a tuned merge."""

from __future__ import annotations

from pathlib import Path

from plait.merging.card import front_matter, loading, public_recipe, source_row
from plait.merging.inventory import Inventory
from plait.recipes.writing import recipe_json
from plait.results.quoting import as_yaml
from plait.tuning.objectives import OBJECTIVES
from plait.tuning.record import TuneRecord


def tune_card(inventory: Inventory, record: TuneRecord, folder: Path) -> str:
    """Return README.md: front matter for the Hub, then the page for people.

    Args:
        inventory: the sources.
        record: what was done.
        folder: with the written files, whose adapter is looked at for what can serve it.
    """
    front = as_yaml(front_matter(inventory))
    recipe = as_yaml(public_recipe(recipe_json(inventory.recipe)))
    names = [a.name for a in inventory.adapters]
    rows = "\n".join(source_row(s) for s in record.sources)
    kept = "\n".join(
        f"| {t.task} | {t.count}, {t.source} | {record.base[t.task]:.3g} | {record.start.divergence[t.task]:.3g} "
        f"| {record.kept.divergence[t.task]:.3g} |"
        for t in record.texts
    )
    return f"""---
{front}---

# {"+".join(names)}, merged with {inventory.recipe.method_name} and tuned

One LoRA adapter of rank {record.rank}, made from {len(names)} adapters by plait {record.plait}. It starts at the closed form of
`{inventory.recipe.method_name}` × {record.scale:.3g}, and {_learned(record)}.

| adapter | from | weight | rank | sha256 |
|---|---|---|---|---|
{rows}

| task | texts | KL of the base | KL of the start | KL of this adapter |
|---|---|---|---|---|
{kept}

KL is the mean divergence from the task's own adapter, in nats, on texts that were held out.

- **Steps**: {len(record.losses)}; what step {record.kept_step} had learned was kept.
- **Distance from the start**: {_distance(record)}; {record.outside:.2%} of the energy is outside of what the
  sources span.

{_how(record)}## Load it

{loading(inventory, folder)}
## The start

`tuning.json` holds everything that was seen and done, `plait.lock` the sha256 of every input and output file.

```yaml
{recipe}```
"""


def _learned(record: TuneRecord) -> str:
    what = "its factors have" if record.coefficients is None else f"coefficients per {record.coefficients.granularity} have"
    if record.objective == "distill":
        return f"{what} learned to answer as each task's own adapter does on\nunlabeled texts of that task"
    return f"{what} been learned: {OBJECTIVES[record.objective].summary}\n(`{record.objective}`)"


def _distance(record: TuneRecord) -> str:
    return "the start is zero" if record.distance is None else f"{record.distance:.3g} of its norm"


def _how(record: TuneRecord) -> str:
    if record.coefficients is None or record.coefficients.granularity == "direction":
        return ""
    start = " `start/` holds the closed form that it names." if len(record.coefficients.columns) > len(record.sources) else ""
    return f"`plait merge recipe.yaml` makes the same adapter without any text.{start}\n\n"
