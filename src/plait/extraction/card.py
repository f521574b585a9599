"""The model card of an extracted adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from plait.extraction.pairing import Pairing
from plait.hub.download import Located
from plait.merging.card import PIPELINES, base_name, hub_id, license_of, load_adapter, loader_of_model
from plait.results.public import public_values
from plait.results.quoting import as_yaml, block, code, prose

if TYPE_CHECKING:
    from plait.extraction.record import ExtractRecord


def extract_card(pairing: Pairing, record: ExtractRecord, folder: Path) -> str:
    """Return README.md: front matter for the Hub, then the page.

    Args:
        pairing: the models.
        record: what happened.
        folder: with the written files, whose adapter is looked at for what can serve it.
    """
    front = as_yaml(_front_matter(pairing, record))
    base = _base_on_hub(pairing, record) or base_name(record.base_model)
    kept = [x for x in record.leftovers if x.kept]
    lost = [x for x in record.leftovers if not x.kept]
    request = {**record.request, "base": _name(pairing.base.located), "finetuned": _name(pairing.tuned.located)}
    settings = as_yaml(public_values(request))
    facts = [
        f"**Rank**: {record.rank}, scaling baked in (`lora_alpha` = `r`); {len(record.modules)} target modules.",
        f"**Energy**: {record.kept:.2%} of ‖ΔW‖² of these modules is kept, {record.lowest_kept:.2%} in the worst.",
        f"**Loss**: {record.lost:.2%} of the difference ‖Δ‖² between the models is not in the adapter.",
        *([f"**Kept in full**: {len(kept)} tensors that cannot be a LoRA."] if kept else []),
        *([f"**Left out**: {len(lost)} changed tensors, such as {code(lost[0].tensor)}."] if lost else []),
    ]
    lines = "".join(f"- {fact}\n" for fact in facts)
    return f"""---
{front}---

# {prose(_name(pairing.tuned.located))}, as a LoRA of rank {record.rank}

The difference between the full fine-tune {_link(pairing.tuned.located)} and its base model {code(base)}, approximated by one
LoRA adapter with plait {record.plait}.

{lines}
## Load it

{load_adapter(base, loader_of_model(pairing.base.config, None), folder)}
## Make it again

`plait.lock` holds the request and the sha256 of every input and output file; `plait verify` makes it again and compares.

{block(settings, "yaml")}"""


def _front_matter(pairing: Pairing, record: ExtractRecord) -> dict[str, Any]:
    base = _base_on_hub(pairing, record)
    front: dict[str, Any] = {"library_name": "peft"}
    if base:
        front |= {"base_model": base, "base_model_relation": "adapter"}
    front["tags"] = ["lora", "peft", "plait", *([f"base_model:adapter:{base}"] if base else [])]
    if record.task_type in PIPELINES:
        front["pipeline_tag"] = PIPELINES[record.task_type]
    licenses = {license_of(side.located.folder) for side in (pairing.base, pairing.tuned)}
    if len(licenses) == 1 and (license := licenses.pop()):
        front |= dict(license)
    if pairing.tuned.located.repo:
        front["extracted_from"] = pairing.tuned.located.repo
    return front


def _base_on_hub(pairing: Pairing, record: ExtractRecord) -> str | None:
    """Return the base model's repository: the one it came from, or the one that the user gives."""
    return pairing.base.located.repo or hub_id(record.request["base_id"])


def _name(place: Located) -> str:
    return place.repo or base_name(str(place.folder))


def _link(place: Located) -> str:
    if place.repo is None:
        return f"{code(_name(place))} (local files)"
    return f"[{place.repo}](https://huggingface.co/{place.repo}) @ `{place.commit}`"
