"""The model card of a merged adapter: what it is, how it was made, how to load it. Licences are read, never guessed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from plait.merging.inventory import Inventory
from plait.merging.plan import MergePlan
from plait.merging.record import RunRecord, recipe_json
from plait.methods import METHODS

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
_PIPELINES = {"CAUSAL_LM": "text-generation", "SEQ_2_SEQ_LM": "text2text-generation", "SEQ_CLS": "text-classification"}


def card(inventory: Inventory, plan: MergePlan, record: RunRecord) -> str:
    """Return README.md: front matter for the Hub, then the page for people."""
    front = yaml.safe_dump(_front_matter(inventory), sort_keys=False, allow_unicode=True)
    recipe = yaml.safe_dump(recipe_json(inventory.recipe), sort_keys=False, allow_unicode=True)
    base = inventory.base_model or "BASE_MODEL"
    name = "+".join(plan.adapters)
    rows = "\n".join(_source_row(s) for s in record.sources)
    heads = [a.name for a in inventory.adapters if a.full_tensors]
    return f"""---
{front}---

# {name}, merged with {plan.method}

One LoRA adapter of `{base}`, made from {len(plan.adapters)} by [plait](https://pypi.org/project/plait/) {record.plait}.

| adapter | from | weight | rank | sha256 |
|---|---|---|---|---|
{rows}

- **Method**: `{plan.method}` in `{plan.space}` space: {plan.equation}
{_deviation_line(plan)}- **Rank**: {plan.rank or record.rank}, scaling baked in (`lora_alpha` = `r`).
- **Loss**: {_loss(record)}
{_heads_line(heads, inventory)}
## Load it

With PEFT:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(model, "PATH_OR_REPO")
```

With vLLM (needs `--max-lora-rank {plan.max_lora_rank or "larger than any it offers"}`):

```bash
vllm serve {base} --enable-lora --max-lora-rank {plan.max_lora_rank or plan.rank} --lora-modules merged=PATH_OR_REPO
```

With Unsloth: `FastLanguageModel.from_pretrained("PATH_OR_REPO")`.

## Make it again

`plait.lock` holds the recipe and the sha256 of every input and output file.

```yaml
{recipe}```
"""


def _front_matter(inventory: Inventory) -> dict[str, Any]:
    base = inventory.base_model
    on_hub = base is not None and bool(_HUB_ID.match(base))
    task = next((a.config.raw.get("task_type") for a in inventory.adapters if a.config.raw.get("task_type")), None)
    front: dict[str, Any] = {"library_name": "peft"}
    if on_hub:
        front |= {"base_model": base, "base_model_relation": "adapter"}
    front["tags"] = ["lora", "peft", "merge", "plait", *([f"base_model:adapter:{base}"] if on_hub else [])]
    if task in _PIPELINES:
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


def _deviation_line(plan: MergePlan) -> str:
    deviation = METHODS[plan.method].deviation
    return f"- **Differs from its source**: {deviation}\n" if deviation else ""


def _loss(record: RunRecord) -> str:
    if record.result == "exact":
        return "none; the factors hold the merge exactly."
    if record.result == "dense":
        return "none; the dense deltas are stored."
    return f"truncated: {record.kept:.2%} of ‖ΔW‖² kept overall, {record.lowest_kept:.2%} in the worst module."


def _heads_line(heads: list[str], inventory: Inventory) -> str:
    if not heads or inventory.recipe.heads.policy != "separate":
        return ""
    return f"- **Heads** of {', '.join(heads)} are kept under `heads/`, one folder per adapter; they are not merged.\n"
