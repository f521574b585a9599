"""What makes saved weights a result of plait: its card, its lock, and files with the usual modes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from plait.adapters.config import ADAPTER_CONFIG
from plait.checkpoints.digests import weight_digests
from plait.merging.card import base_name, load_with_peft
from plait.results.lock import LOCK, locked_input, new_lock, output_digests
from plait.results.public import place_name
from plait.results.quoting import prose
from plait.results.records import write_json
from plait.training.fingerprints import taken_once
from plait.training.formats import PlainText
from plait.training.job import ResolvedJob, TrainingRecord
from plait.training.kinds import KINDS

_SETS = ("target_modules", "modules_to_save", "exclude_modules")


def write_provenance(folder: Path, opened: ResolvedJob, record: TrainingRecord, *, home: Path) -> None:
    """Write card and lock into a folder of saved weights, and give its files the modes of the umask.

    Args:
        folder: where the weights are.
        opened: the job.
        record: what training did.
        home: where the folder will be.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        # the base is named as the job does, and what PEFT writes in the order of a set, another one in every process, is sorted
        data = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        sets = {key: sorted(value) for key, value in data.items() if key in _SETS and isinstance(value, list)}
        name = opened.job.base_name
        write_json(folder / ADAPTER_CONFIG, data | sets | ({} if name is None else {"base_model_name_or_path": name}))
    card = folder / "README.md"
    card.unlink(missing_ok=True)
    card.write_text(_card(opened, record), encoding="utf-8")
    mode = card.stat().st_mode & 0o777
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)
    # a Hub model is known by its commit; a local one by its files
    files = {} if opened.base.repo else taken_once(weight_digests, opened.base.folder)
    lock = new_lock(
        "train",
        recipe=record.job.model_dump(mode="json"),
        inputs={},
        outputs=output_digests(folder),
        options={"digest": record.digest},
        base=locked_input(opened.base, files, home),
        versions=(record.plait, record.versions),
    )
    write_json(folder / LOCK, lock)


def _card(opened: ResolvedJob, record: TrainingRecord) -> str:
    job, lora = record.job, record.job.lora
    front: dict[str, Any] = {"tags": ["plait", "sft"] + (["lora"] if lora else [])}
    if (name := job.base_name or opened.base.repo) is not None and name == base_name(name):
        front = {"base_model": name, **front}
    front |= {"library_name": "peft" if lora else "transformers"}
    if (pipeline := KINDS[job.kind].PIPELINE) is not None:
        front |= {"pipeline_tag": pipeline}
    what = "Full fine-tune" if lora is None else f"LoRA (r {lora.r}, alpha {lora.alpha:g})"
    source = prose(place_name(str(job.data.task or job.data.place)))
    lines = [
        f"- **Data**: {source}, {record.examples} examples; loss on {_learned(opened)}.",
        f"- **Steps**: {record.steps},{f' {record.tokens} tokens,' if record.tokens else ''} {record.trainable} trained "
        f"parameters, seed {job.seed}.",
    ]
    lines += [f"- **Training loss**: {record.losses[0][1]:.4g} → {record.losses[-1][1]:.4g}."] if record.losses else []
    lines += [f"- **Loss on held-out data**: {record.eval_losses[-1][1]:.4g}."] if record.eval_losses else []
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    base = base_name(job.base_name or job.base)
    kind = KINDS[job.kind]
    alone = f'```python\nfrom transformers import {kind.LOADER}\n\nmodel = {kind.LOADER}.from_pretrained("PATH_OR_REPO")\n```\n'
    loading = load_with_peft(base, kind.LOADER, None if job.labels is None else len(job.labels)) if lora else alone
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {what} of {prose(base)}\n\n"
        f"Trained by plait {record.plait} ({versions}).\n\n{chr(10).join(lines)}\n\n## Load it\n\n{loading}\n"
        "`plait.lock` holds all settings and the sha256 of every file.\n"
    )


def _learned(opened: ResolvedJob) -> str:
    if opened.job.kind == "speech_to_text":
        return "the transcripts"
    if opened.job.labels is not None:
        return "the labels"
    arguments = opened.job.arguments
    all_tokens = arguments.get("completion_only_loss") is False and not arguments.get("assistant_only_loss")
    plain = any(isinstance(example, PlainText) for example in opened.data.examples)
    return "every token" if all_tokens or plain else "the answers only"
