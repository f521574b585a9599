"""The model card of a baked model: what it is, how it was made, how to load it. The license is the base's own word."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from plait.baking.plan import Bake
from plait.baking.record import BakeRecord
from plait.merging.card import (
    PIPELINES,
    base_name,
    hub_id,
    license_of,
    loader_of_model,
    public_recipe,
    source_row,
    task_type_of,
)
from plait.methods import METHODS
from plait.recipes.writing import recipe_json
from plait.results.quoting import as_yaml, block, code, prose


def model_card(bake: Bake, record: BakeRecord) -> str:
    """Return README.md: front matter for the Hub, then the page."""
    front = as_yaml(_front_matter(bake))
    recipe = as_yaml(public_recipe(recipe_json(bake.recipe)))
    base = base_name(bake.recipe.base_model)
    rows = "\n".join(source_row(s) for s in record.sources)
    names = "+".join(bake.merge.adapters)
    count = f"{len(bake.merge.adapters)} LoRA adapter{'s' * (len(bake.merge.adapters) != 1)}"
    return f"""---
{front}---

# {prose(base)} with {names}

A full model: the weights of {code(base)} with {count} merged into them by plait {record.plait}.

| adapter | from | weight | rank | sha256 |
|---|---|---|---|---|
{rows}

- **Method**: `{bake.merge.method}` in `{bake.merge.space}` space: {bake.merge.equation}
{"".join(f"- {line}" + chr(10) for line in _facts(bake))}
## Load it

{_loading(bake)}
## Make it again

`plait.lock` holds the recipe and the sha256 of every input and output file.

{block(recipe, "yaml")}"""


def _facts(bake: Bake) -> Iterator[str]:
    deviation = METHODS[bake.merge.method].deviation
    if deviation:
        yield f"**Differs from its source**: {deviation}"
    yield "**Loss**: none but rounding: base and deltas are added in float32 and rounded once."
    if bake.options.dtype:
        yield f"**Stored as** {bake.options.dtype}; the base is not necessarily."
    yield from map(prose, bake.plan.notes)


def _loading(bake: Bake) -> str:
    form = bake.checkpoint.form
    if form.loading is not None:
        return f"With diffusers:\n\n```python\n{form.loading}\n```\n"
    if not form.has_code:
        return (
            f"{code(bake.shards[0].name)} has the names and the layout of the base's own file: ComfyUI, Forge and diffusers' "
            "`from_single_file` load it in its place.\n"
        )
    auto = loader_of_model(bake.checkpoint.config, task_type_of(bake.inventory.adapters), bake.placement.head_class)
    text = f"""With transformers:

```python
from transformers import {auto}

model = {auto}.from_pretrained("PATH_OR_REPO")
```
"""
    if auto == "AutoModelForCausalLM":
        text += """
With vLLM:

```bash
vllm serve PATH_OR_REPO
```

With Unsloth: `FastLanguageModel.from_pretrained("PATH_OR_REPO")`.
"""
    return text


def _front_matter(bake: Bake) -> dict[str, Any]:
    base = hub_id(bake.recipe.base_model)
    front: dict[str, Any] = {"library_name": bake.checkpoint.form.library}
    if base:
        front |= {"base_model": base.partition("@")[0], "base_model_relation": "merge"}
    front["tags"] = ["merge", "lora", "plait"]
    if (task := task_type_of(bake.inventory.adapters)) in PIPELINES:
        front["pipeline_tag"] = PIPELINES[task]
    front |= dict(license_of(bake.checkpoint.folder) or ())
    repos = [p.repo for p in bake.inventory.located if p.repo]
    if repos:
        front["merged_adapters"] = repos
    return front
