"""The model card of a merged adapter: what it is, how it was made, how to load it. Licenses are read, never guessed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from plait.adapters.adapter import Adapter
from plait.checkpoints.files import architectures
from plait.inspection.compatibility import serving
from plait.libraries.transformers.kinds import auto_class, task_of
from plait.merging.inventory import Inventory
from plait.merging.output_format import output_format, writes_peft
from plait.merging.plan import MergePlan
from plait.merging.record import RunRecord
from plait.methods import METHODS
from plait.recipes.documents import read_front_matter
from plait.recipes.writing import recipe_json
from plait.results.lock import CARD
from plait.results.public import place_name, public_values
from plait.results.quoting import UNKNOWN_BASE, as_yaml, block, code, is_plain_name, prose, python, shell

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9_.-]+")
#: License keys of a card's front matter → their type; other types are ignored.
_LICENSE = {
    "license": re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,60}"),
    "license_name": re.compile(r"[\w][\w .+()-]{0,100}"),
    "license_link": re.compile(r"https://[\w./?=&%#~:+-]{1,300}|[\w.-]{1,100}"),
}
PIPELINES = {"CAUSAL_LM": "text-generation", "SEQ_2_SEQ_LM": "text2text-generation", "SEQ_CLS": "text-classification"}


def card(inventory: Inventory, plan: MergePlan, record: RunRecord, folder: Path) -> str:
    """Return README.md: front matter for the Hub, then the page.

    Args:
        inventory: the sources.
        plan: what was to happen.
        record: what happened.
        folder: with the written files, whose adapter is looked at for what can serve it.
    """
    front = as_yaml(front_matter(inventory))
    recipe = as_yaml(public_recipe(recipe_json(inventory.recipe)))
    what = "The dense deltas" if record.result == "dense" else "One LoRA adapter"
    rows = "\n".join(source_row(s) for s in record.sources)
    return f"""---
{front}---

# {"+".join(plan.adapters)}, merged with {plan.method}

{what} of {code(base_name(inventory.base_model))}, made from {len(plan.adapters)} adapters by plait {record.plait}.

| adapter | from | weight | rank | sha256 |
|---|---|---|---|---|
{rows}

- **Method**: `{plan.method}` in `{plan.space}` space: {plan.equation}
{"".join(f"- {line}" + chr(10) for line in _facts(inventory, plan, record))}
## Load it

{_loading(inventory, record, folder)}
## Make it again

`plait.lock` holds the recipe and the sha256 of every input and output file; `plait verify` makes it again and compares.

{block(recipe, "yaml")}"""


def _facts(inventory: Inventory, plan: MergePlan, record: RunRecord) -> Iterator[str]:
    deviation = METHODS[plan.method].deviation
    if deviation:
        yield f"**Differs from its source**: {deviation}"
    if record.rank is not None and not writes_peft(inventory):
        yield f"**Rank**: up to {record.rank}, scaling baked in."
    elif record.rank is not None:
        yield f"**Rank**: {record.rank}, scaling baked in (`lora_alpha` = `r`)."
    losses = {"exact": "none; the factors hold the merge exactly.", "dense": "none; the dense deltas are stored."}
    truncated = f"truncated: {record.kept:.2%} of ‖ΔW‖² kept overall, {record.lowest_kept:.2%} in the worst module."
    yield f"**Loss**: {losses.get(record.result, truncated)}"
    heads = [a.name for a in inventory.adapters if a.full_tensors]
    if heads and inventory.recipe.heads.policy == "separate":
        yield f"**Heads** of {', '.join(heads)} are kept under `heads/`, one folder per adapter; they are not merged."


def _loading(inventory: Inventory, record: RunRecord, folder: Path) -> str:
    if record.result == "dense":
        return (
            "`delta.safetensors` holds one tensor per adapted weight, under the name of that weight in the base model, "
            "to be added to it.\n"
        )
    return loading(inventory, folder)


def loading(inventory: Inventory, folder: Path) -> str:
    """Return how a merged adapter is loaded.

    Args:
        inventory: the sources.
        folder: of its files, which decide what can serve it.
    """
    if not writes_peft(inventory):
        chosen = output_format(inventory)
        return f"`{chosen.file_name}` is in the format of {chosen.program}; `plait convert` writes others.\n"
    return load_adapter(base_name(inventory.base_model), loader_of(inventory.adapters), folder)


def load_adapter(base: str, loader: str, folder: Path) -> str:
    """Return how a written adapter is loaded, by the programs that are known to load such.

    Args:
        base: what the base model is called.
        loader: the class of transformers that loads it.
        folder: of the adapter's files.
    """
    with_peft = load_with_peft(base, loader)
    (served,) = serving([Adapter.open(folder, "merged")]).adapters
    if served.other_kind:
        return with_peft
    if served.refused:
        return f"{with_peft}\nvLLM does not serve it: {prose('; '.join(served.refused))}.\n"
    return f"{with_peft}\n{serve_with_vllm(base, served.max_lora_rank)}"


def load_with_peft(base: str, loader: str, labels: int | None = None) -> str:
    """Return how an adapter is loaded for inference.

    Args:
        base: what the base model is called.
        loader: the class of transformers that loads it.
        labels: of a head that the adapter brings.
    """
    head = "" if labels is None else f", num_labels={labels}"
    lines = f"""from peft import PeftModel
from transformers import {loader}

model = {loader}.from_pretrained({python(base)}{head})
model = PeftModel.from_pretrained(model, "PATH_OR_REPO")"""
    return f"With PEFT:\n\n{block(lines, 'python')}"


def serve_with_vllm(base: str, max_lora_rank: int | None) -> str:
    """Return how an adapter is served, by vLLM and by Unsloth."""
    if max_lora_rank is None:
        return "Its rank is larger than any `--max-lora-rank` of vLLM; `plait compress` makes it smaller.\n"
    line = f"vllm serve {shell(base)} --enable-lora --max-lora-rank {max_lora_rank} --lora-modules adapter=PATH_OR_REPO"
    return f"""With vLLM:

{block(line, "bash")}
With Unsloth: `FastLanguageModel.from_pretrained("PATH_OR_REPO")`.
"""


def public_recipe(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe without the folders of this machine: what is in them is named by its folder alone."""
    found: dict[str, Any] = public_values(recipe)
    return found


def base_name(name: str | None) -> str:
    """Return what a card calls a base model: its name, without the folders of this machine; a placeholder where it has none."""
    found = place_name(name or UNKNOWN_BASE)
    return found if is_plain_name(found) else UNKNOWN_BASE


def task_type_of(adapters: Sequence[Adapter]) -> str | None:
    """Return the task type of the first adapter that has one."""
    return next((t for a in adapters if isinstance(t := a.config.raw.get("task_type"), str) and t), None)


def loader_of(adapters: Sequence[Adapter]) -> str:
    """Return the class of transformers that loads the base of adapters; PEFT notes the class where it has no task type."""
    if (task := task_type_of(adapters)) is not None:
        return auto_class(task)
    return next((noted[1] for a in adapters if (noted := a.config.noted_class) is not None), "AutoModel")


def loader_of_model(config: Mapping[str, Any], task_type: str | None, named: str | None = None) -> str:
    """Return the class of transformers that loads a full model: the Auto class of its task, or its own where that has none.

    Args:
        config: its `config.json`.
        task_type: PEFT's, of adapters that are or were on it; None where the model's own class says it.
        named: the class that it is of, where `config` does not say so.
    """
    own = next(iter([named] if named else architectures(config)), "")
    writes = task_of({**config, "architectures": [own]}) == "CAUSAL_LM"
    task = task_type or ("CAUSAL_LM" if writes else None)
    is_known = own.isidentifier() and "auto_map" not in config
    if is_known and (own.endswith("ForConditionalGeneration") or (task is None and "For" in own)):
        return own
    return auto_class(task)


def front_matter(inventory: Inventory) -> dict[str, Any]:
    """Return what the Hub reads of a merged adapter's card."""
    base = hub_id(inventory.base_model)
    task = task_type_of(inventory.adapters)
    of_peft = writes_peft(inventory)
    front: dict[str, Any] = {"library_name": "peft"} if of_peft else {}
    if base:
        front |= {"base_model": base, "base_model_relation": "adapter"}
    front["tags"] = ["lora", *["peft"] * of_peft, "merge", "plait", *([f"base_model:adapter:{base}"] if base else [])]
    if task is not None and task in PIPELINES:
        front["pipeline_tag"] = PIPELINES[task]
    front |= dict(_license(inventory) or ())
    repos = [p.repo for p in inventory.located if p.repo]
    if repos:
        front["merged_adapters"] = repos
    return front


def _license(inventory: Inventory) -> tuple[tuple[str, str], ...] | None:
    """Return the license that every source states, the base model included where it is local; None when they differ."""
    cards = [None if a.is_one_file else a.folder for a in inventory.adapters]
    located = inventory.base_located
    base = Path(inventory.base_model or "") if located is None else located.folder
    is_here = located is not None or (base.is_absolute() and base.is_dir())
    stated = {None if folder is None else license_of(folder) for folder in cards}
    if is_here and (of_base := license_of(base)):
        # an adapter without a card of its own adds no stated condition
        stated = (stated - {None}) | {of_base}
    return stated.pop() if len(stated) == 1 else None


def hub_id(name: str | None) -> str | None:
    """Return a base model's name where it can be a repository on the Hub; a card links to nothing else."""
    return name if name is not None and _HUB_ID.fullmatch(name) else None


def license_of(folder: Path) -> tuple[tuple[str, str], ...] | None:
    """Return the license keys that the card in a folder states, or None."""
    data = read_front_matter(folder / CARD)
    stated = {key: value for key, form in _LICENSE.items() if isinstance(value := data.get(key), str) and form.fullmatch(value)}
    return tuple(stated.items()) if "license" in stated else None


def source_row(source: Mapping[str, Any]) -> str:
    """Return an adapter's row of the table of sources."""
    place = (
        f"[{source['repo']}](https://huggingface.co/{source['repo']}) @ `{source['commit']}`"
        if source["repo"]
        else "local files"
    )
    ranks = ", ".join(map(str, source["ranks"]))
    return f"| {prose(source['name'])} | {place} | {source['weight']:g} | {ranks} | `{source['sha256'][:16]}…` |"
