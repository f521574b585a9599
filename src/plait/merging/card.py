"""The model card of a merged adapter: what it is, how it was made, how to load it. Licences are read, never guessed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from plait.adapters.adapter import Adapter
from plait.merging.compatibility import serving
from plait.merging.inventory import Inventory
from plait.merging.plan import MergePlan
from plait.merging.record import RunRecord, recipe_json
from plait.methods import METHODS

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
_AUTO_MODELS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
_PIPELINES = {"CAUSAL_LM": "text-generation", "SEQ_2_SEQ_LM": "text2text-generation", "SEQ_CLS": "text-classification"}


def card(inventory: Inventory, plan: MergePlan, record: RunRecord, folder: Path) -> str:
    """Return README.md: front matter for the Hub, then the page for people.

    Args:
        inventory: the sources.
        plan: what was to happen.
        record: what happened.
        folder: with the written files, whose adapter is looked at for what can serve it.
    """
    front = yaml.safe_dump(_front_matter(inventory), sort_keys=False, allow_unicode=True)
    recipe = yaml.safe_dump(_public(recipe_json(inventory.recipe)), sort_keys=False, allow_unicode=True)
    what = "The dense deltas" if record.result == "dense" else "One LoRA adapter"
    rows = "\n".join(_source_row(s) for s in record.sources)
    return f"""---
{front}---

# {"+".join(plan.adapters)}, merged with {plan.method}

{what} of `{_base(inventory)}`, made from {len(plan.adapters)} adapters by plait {record.plait}.

| adapter | from | weight | rank | sha256 |
|---|---|---|---|---|
{rows}

- **Method**: `{plan.method}` in `{plan.space}` space: {plan.equation}
{"".join(f"- {line}" + chr(10) for line in _facts(inventory, plan, record))}
## Load it

{_loading(inventory, record, folder)}
## Make it again

`plait.lock` holds the recipe and the sha256 of every input and output file.

```yaml
{recipe}```
"""


def _facts(inventory: Inventory, plan: MergePlan, record: RunRecord) -> Iterator[str]:
    deviation = METHODS[plan.method].deviation
    if deviation:
        yield f"**Differs from its source**: {deviation}"
    if record.rank is not None:
        yield f"**Rank**: {record.rank}, scaling baked in (`lora_alpha` = `r`)."
    yield f"**Loss**: {_loss(record)}"
    heads = [a.name for a in inventory.adapters if a.full_tensors]
    if heads and inventory.recipe.heads.policy == "separate":
        yield f"**Heads** of {', '.join(heads)} are kept under `heads/`, one folder per adapter; they are not merged."


def _loading(inventory: Inventory, record: RunRecord, folder: Path) -> str:
    base = _base(inventory)
    if record.result == "dense":
        return (
            "`delta.safetensors` holds one tensor per adapted weight, under the name of that weight in the base model, "
            "to be added to it.\n"
        )
    auto = _AUTO_MODELS.get(_task_type(inventory) or "", "AutoModel")
    with_peft = f"""With PEFT:

```python
from peft import PeftModel
from transformers import {auto}

model = {auto}.from_pretrained("{base}")
model = PeftModel.from_pretrained(model, "PATH_OR_REPO")
```
"""
    (served,) = serving([Adapter.open(folder, "merged")]).adapters
    if served.refused:
        return f"{with_peft}\nvLLM does not serve it: {'; '.join(served.refused)}.\n"
    if record.max_lora_rank is None:
        return f"{with_peft}\nIts rank is larger than any `--max-lora-rank` of vLLM; `plait compress` makes it smaller.\n"
    return f"""{with_peft}
With vLLM:

```bash
vllm serve {base} --enable-lora --max-lora-rank {record.max_lora_rank} --lora-modules merged=PATH_OR_REPO
```

With Unsloth: `FastLanguageModel.from_pretrained("PATH_OR_REPO")`.
"""


def _public(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe without the folders of this machine: what lies there is named by its folder alone."""
    adapters = [{**a, "path": _place(a["path"])} for a in recipe["adapters"]]
    base = recipe["base_model"]
    return {**recipe, "adapters": adapters, "base_model": None if base is None else _place(base)}


def _place(text: str) -> str:
    return Path(text).name if text.startswith((".", "/", "~")) else text


def _base(inventory: Inventory) -> str:
    return _place(inventory.base_model or "BASE_MODEL")


def _task_type(inventory: Inventory) -> str | None:
    return next((a.config.raw.get("task_type") for a in inventory.adapters if a.config.raw.get("task_type")), None)


def _front_matter(inventory: Inventory) -> dict[str, Any]:
    base = inventory.base_model
    on_hub = base is not None and bool(_HUB_ID.match(base))
    task = _task_type(inventory)
    front: dict[str, Any] = {"library_name": "peft"}
    if on_hub:
        front |= {"base_model": base, "base_model_relation": "adapter"}
    front["tags"] = ["lora", "peft", "merge", "plait", *([f"base_model:adapter:{base}"] if on_hub else [])]
    if task is not None and task in _PIPELINES:
        front["pipeline_tag"] = _PIPELINES[task]
    licences = {_licence(a.folder) for a in inventory.adapters}
    if len(licences) == 1 and (licence := licences.pop()):
        front |= dict(licence)
    repos = [p.repo for p in inventory.located if p.repo]
    if repos:
        front["merged_adapters"] = repos
    return front


def _licence(folder: Path) -> tuple[tuple[str, str], ...] | None:
    """Return the licence keys that an adapter's own card states, or None."""
    path = folder / "README.md"
    if not path.is_file():
        return None
    found = re.match(r"^---\n(.*?)\n---", path.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        data = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        return None
    if not isinstance(data, dict) or not isinstance(data.get("license"), str):
        return None
    return tuple((k, data[k]) for k in ("license", "license_name", "license_link") if isinstance(data.get(k), str))


def _source_row(source: Mapping[str, Any]) -> str:
    place = (
        f"[{source['repo']}](https://huggingface.co/{source['repo']}) @ `{source['commit']}`"
        if source["repo"]
        else "local files"
    )
    ranks = ", ".join(map(str, source["ranks"]))
    return f"| {source['name']} | {place} | {source['weight']:g} | {ranks} | `{source['sha256'][:16]}…` |"


def _loss(record: RunRecord) -> str:
    if record.result == "exact":
        return "none; the factors hold the merge exactly."
    if record.result == "dense":
        return "none; the dense deltas are stored."
    return f"truncated: {record.kept:.2%} of ‖ΔW‖² kept overall, {record.lowest_kept:.2%} in the worst module."
