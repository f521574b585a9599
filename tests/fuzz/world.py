"""Tiny models, adapters and results, and every command that reads them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pyarrow
import pyarrow.csv
import pyarrow.parquet
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import plait
from plait.baking import journal
from plait.cli.main import main
from plait.tuning.working import WorkingState
from tests.adapters_on_disk import Linear, write_adapter
from tests.fuzz.formats import build_formats
from tests.fuzz.media import build_media
from tests.language_models import LABELS, WORDS, label, save_model, train_adapter, write_task

SHAPES = {
    f"model.layers.{i}.{name}": shape
    for i in range(2)
    for name, shape in (("self_attn.q_proj", (32, 32)), ("self_attn.v_proj", (32, 32)), ("mlp.up_proj", (48, 32)))
}


@dataclass(frozen=True)
class Command:
    """A command, and the files that it reads.

    Attributes:
        words: of the command line, in the folder of the world.
        files: patterns of the files that are damaged, one at a time.
        needs: what of the world it needs.
        share: how often it is drawn.
        exact: the result is compared with an independent reading.
    """

    words: tuple[str, ...]
    files: tuple[str, ...]
    needs: tuple[str, ...]
    share: int = 2
    exact: bool = False


ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
OUT = ("-o", "out")
BASE = ("config.json", "model.safetensors", "generation_config.json")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


TUNE = (
    *("tune", "sort=first", "rate=second", "--tasks", "tasks/sort.yaml", "tasks/rate.yaml", "--base-id", "base"),
    *("--steps", "2", "--count", "4", "--split", "train", *OUT),
)


SWEEP = (
    *("sweep", "sort", "rate", "--tasks", "tasks/sort.yaml", "tasks/rate.yaml", "--base-id", "base", "--method", "linear"),
    *("--space", "scale=0.2..2", "--type", "random", "--budget", "2", "--split", "train", "--workspace", "sws"),
)
SEARCHED = ("sort", "rate", "base", "tasks", "study", "sws")


def _in(folder: str, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{folder}/{name}" for name in names)


SD = "sd/pytorch_lora_weights.safetensors"
MLX = _in("mlx", ("adapter_config.json", "adapters.safetensors"))
GGUF = ("gguf/adapter.gguf",)
LYCORIS = ("lycoris.safetensors",)
NUMBERED = _in("numbered", ("adapter_config.json", "adapter_model-0000?-of-00002.safetensors"))
#: Of adapters that other programs than PEFT wrote.
FORMAT_COMMANDS = (
    Command(("merge", "mlx", "second", "--weights", "0.7", "-0.3", *OUT), MLX, ("mlx", "second"), 4, exact=True),
    Command(("merge", "sd", "sd2", "--weights", "0.7", "-0.3", *OUT), (SD,), ("sd", "sd2"), 4, exact=True),
    Command(("merge", "kohya.safetensors", "sd2", *OUT), ("kohya.safetensors",), ("kohya.safetensors", "sd2"), 5, exact=True),
    Command(("merge", "numbered", "second", *OUT), NUMBERED, ("numbered", "second"), 2, exact=True),
    Command(("merge", "lycoris.safetensors", "sd2", *OUT), LYCORIS, (*LYCORIS, "sd2"), 4),
    Command(("merge", "gguf", "second", *OUT), (*GGUF, "gguf/config.json"), ("gguf", "second"), 4),
    Command(("inspect", "mlx", "gguf"), (*MLX, *GGUF), ("mlx", "gguf"), 2),
    Command(("inspect", "sd", "kohya.safetensors"), (SD, "kohya.safetensors"), ("sd", "kohya.safetensors"), 2),
    Command(("convert", "mlx", "--to", "peft", *OUT), MLX, ("mlx",), 3, exact=True),
    Command(("convert", "sd", "--to", "kohya", *OUT), (SD,), ("sd",), 3, exact=True),
    Command(
        ("convert", "kohya.safetensors", "--to", "diffusers", *OUT),
        ("kohya.safetensors",),
        ("kohya.safetensors",),
        3,
        exact=True,
    ),
    Command(("convert", "lycoris.safetensors", "--to", "diffusers", *OUT), LYCORIS, LYCORIS, 3),
    Command(("convert", "gguf", "--to", "peft", *OUT), (*GGUF, "gguf/config.json"), ("gguf",), 3),
    Command(("convert", "mlx", "--to", "gguf", "--base-id", "base", *OUT), (*MLX, "base/config.json"), ("mlx", "base"), 3),
    Command(("bake", "mlx", "gguf", "--base-id", "base", *OUT), (*MLX, *GGUF), ("mlx", "gguf", "base"), 3),
)

COMMANDS = (
    *FORMAT_COMMANDS,
    Command(
        ("merge", "first", "second", "--weights", "0.7", "-0.3", *OUT),
        _in("first", ADAPTER),
        ("first", "second"),
        14,
        exact=True,
    ),
    Command(("merge", "pickled", "second", *OUT), ("pickled/adapter_model.bin",), ("pickled", "second"), 8, exact=True),
    Command(("merge", "first", "second", "--method", "ties", *OUT), _in("first", ADAPTER), ("first", "second"), 3),
    Command(("merge", "first", "second", "--method", "tsv", *OUT), _in("first", ADAPTER), ("first", "second"), 2),
    Command(("merge", "first", "second", *OUT), ("first/README.md",), ("first", "second"), 3, exact=True),
    Command(("merge", "recipe.yaml", *OUT), ("recipe.yaml",), ("first", "second", "recipe.yaml"), 6),
    Command(("merge", "recipe.json", *OUT), ("recipe.json",), ("first", "second", "recipe.json"), 4),
    Command(("merge", "mergekit.yaml", *OUT), ("mergekit.yaml",), ("first", "second", "mergekit.yaml"), 3),
    Command(
        ("merge", "first", "second", "--method", "regmean", "--moments", "moments", *OUT),
        ("moments/first.safetensors",),
        ("first", "second", "moments"),
        5,
    ),
    Command(
        ("merge", "dora", "second", "--base-id", "base", *OUT),
        _in("base", BASE[:2]) + _in("dora", ADAPTER),
        ("dora", "second", "base"),
        5,
    ),
    Command(
        ("merge", "merged", "--add", "third=second", *OUT),
        _in("merged", ("plait.lock", "merge_metadata.json")),
        ("first", "second", "merged"),
        2,
    ),
    Command(("inspect", "first", "second"), _in("first", ADAPTER), ("first", "second"), 4),
    Command(("compress", "first", "--rank", "1", *OUT), _in("first", ADAPTER), ("first",), 3),
    Command(
        ("bake", "first", "second", "--base-id", "base", *OUT), _in("base", BASE + TOKENIZER), ("first", "second", "base"), 8
    ),
    Command(
        ("bake", "first", "second", "--base-id", "sharded", *OUT),
        ("sharded/model.safetensors.index.json", "sharded/model-00001-of-*.safetensors"),
        ("first", "second", "sharded"),
        6,
    ),
    Command(  # what a killed bake has left
        ("bake", "first", "second", "--base-id", "sharded", *OUT),
        (".out.baking/journal.jsonl", ".out.baking/model/model-00001-of-*.safetensors", ".out.baking/model/config.json"),
        ("first", "second", "sharded", ".out.baking"),
        5,
    ),
    Command(("un-bake", "baked", "first", *OUT), _in("baked", ("plait.lock", *BASE)), ("baked", "first"), 4),
    Command(("extract", "base", "tuned", "--rank", "2", *OUT), _in("base", BASE) + _in("tuned", BASE), ("base", "tuned"), 5),
    Command(
        ("verify", "merged"),
        _in("merged", ("plait.lock", "merge_metadata.json", "README.md", "adapter_config.json")),
        ("merged", "first", "second"),
        5,
    ),
    Command(("verify", "merged", "--rebuild"), ("merged/plait.lock", *_in("first", ADAPTER)), ("merged", "first", "second"), 3),
    Command(("push", "merged", "org/name"), _in("merged", ("plait.lock", "merge_metadata.json", "README.md")), ("merged",), 3),
    Command(("recipe", "check", "recipe.yaml"), ("recipe.yaml",), ("recipe.yaml", "first", "second"), 5),
    Command(("recipe", "migrate", "mergekit.yaml"), ("mergekit.yaml",), ("mergekit.yaml", "first", "second"), 4),
    Command(("tasks", "check", "tasks/sort.yaml"), ("tasks/sort.yaml", "tasks/sort/test.jsonl"), ("tasks",), 8),
    Command(("tasks", "check", "tasks/sort.yaml", "--model", "base"), _in("base", TOKENIZER), ("tasks", "base"), 3),
    Command(
        ("eval", "sort=first", "--base-id", "base", "--tasks", "tasks/sort.yaml", "--workspace", "ws"),
        ("tasks/sort.yaml", "tasks/sort/test.jsonl", *_in("base", BASE + TOKENIZER), *_in("first", ADAPTER)),
        ("first", "base", "tasks"),
        4,
    ),
    Command(
        ("eval", "sort=first", "--base-id", "base", "--tasks", "tasks/sort.yaml", "--workspace", "ws"),
        ("ws/.scores/*.json", "ws/merged/*/*/eval/index.json"),
        ("first", "base", "tasks", "ws"),
        3,
    ),
    Command(
        ("ask", "asked.jsonl", "first", "second", "--base-id", "base", "--max-new-tokens", "1", "--json"),
        ("asked.jsonl", *_in("base", BASE + TOKENIZER), *_in("first", ADAPTER)),
        ("asked.jsonl", "first", "second", "base"),
        3,
    ),
    Command(
        ("report", "ws/run", "-o", "page.html"),
        ("ws/run/eval_results_test.json", "merged/merge_metadata.json"),
        ("ws", "merged", "first"),
        5,
    ),
    Command(
        ("report", "merged", "-o", "page.html"), _in("merged", ("plait.lock", "merge_metadata.json")), ("merged", "first"), 3
    ),
    Command(
        ("train", "phases.yaml", "-o", "runs", "--dry-run"),
        ("phases.yaml", "tasks/sort/test.jsonl", *_in("base", BASE[:2])),
        ("phases.yaml", "tasks", "base"),
        3,
    ),
    Command(
        ("train", "phases.yaml", "-o", "runs", "--dry-run"),
        ("runs/train.json", "runs/phases/sort/training.json"),
        ("phases.yaml", "tasks", "base", "runs"),
        2,
    ),
    Command(
        ("train", "phases.yaml", "-o", "runs", "--dry-run"),
        ("runs/phases/sort/adapter/*", "runs/phases/sort/*.json", "runs/*.json"),
        ("phases.yaml", "tasks", "base", "runs"),
        3,
    ),
    Command(("sft", "--config", "sft.yaml", "--dry_run"), ("sft.yaml", "rows.jsonl"), ("sft.yaml", "rows.jsonl", "base"), 3),
    *(
        Command(
            ("sft", "--config", "sft.yaml", "--dataset_name_or_path", f"./rows.{kind}", "--dry_run"),
            (f"rows.{kind}",),
            ("sft.yaml", f"rows.{kind}", "base"),
            2,
        )
        for kind in ("csv", "parquet")
    ),
    Command(  # what a killed training has left
        ("sft", "--config", "sft.yaml"), ("left/checkpoint-2/*", "left/job.json"), ("sft.yaml", "rows.jsonl", "base", "left"), 2
    ),
    Command(
        ("tasks", "check", "seen/seen.yaml"),
        _in("seen", ("[0-3].png", "[0-3].png", "seen.yaml", "rows.jsonl")),
        ("seen",),
        3,
    ),
    Command(
        ("tasks", "check", "heard/heard.yaml"),
        _in("heard", ("[0-3].wav", "[0-3].wav", "heard.yaml", "rows.jsonl")),
        ("heard",),
        3,
    ),
    Command(("tasks", "check", "tables/sort.yaml"), ("tables/sort/test.csv", "tables/sort/train.parquet"), ("tables",), 6),
    Command(
        TUNE,
        ("tasks/sort.yaml", "tasks/sort/test.jsonl", *_in("base", BASE + TOKENIZER), *_in("first", ADAPTER)),
        ("first", "second", "base", "tasks"),
        3,
    ),
    Command((*SWEEP, "-o", "study"), ("study/study.db",), SEARCHED, 4),
    Command((*SWEEP, "--warm-start", "study", *OUT), ("study/study.json",), SEARCHED, 3),
    Command(("sweep", "--status", "study"), ("study/study.db", "study/study.json", "study/.lock"), ("study",), 4),
    Command(("report", "study", "-o", "page.html"), ("study/study.json",), ("study",), 5),
    Command(("merge", "study/recipe.yaml", *OUT), ("study/recipe.yaml",), ("study", "sort", "rate"), 2),
    # what a killed tuning has left
    Command(TUNE, (".out.tuning/*",), ("first", "second", "base", "tasks", ".out.tuning"), 3),
)


def build(folder: Path) -> None:
    """Make the world; needs some seconds, and transformers and TRL."""
    base = save_model(folder / "base")
    _adapter(folder / "first", 1)
    _adapter(folder / "second", 2)
    _adapter(folder / "dora", 3, magnitude=True)
    for task in LABELS:
        train_adapter(folder / task, task, steps=30)
    (folder / "first" / "README.md").write_text("---\nlicense: mit\n---\n# card\n")
    shutil.copytree(folder / "first", folder / "pickled")
    torch.save(load_file(folder / "pickled" / ADAPTER[1]), folder / "pickled" / "adapter_model.bin")
    (folder / "pickled" / ADAPTER[1]).unlink()
    model = AutoModelForCausalLM.from_pretrained(base)
    model.save_pretrained(folder / "sharded", max_shard_size="12KB")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.ones_like(parameter))
    model.save_pretrained(folder / "tuned")
    _moments(folder / "moments")
    for task in LABELS:
        write_task(
            folder / "tasks",
            task,
            splits={"train": {"rows": [0, 12]}, "test": {"rows": [12, 24]}},
            data={"path": f"{task}/test.jsonl"},
        )
    build_formats(folder)
    build_media(folder)
    _documents(folder)
    _results(folder)


def _adapter(folder: Path, seed: int, *, magnitude: bool = False) -> None:
    modules = {}
    for path, shape in SHAPES.items():
        modules[path] = Linear(*shape, magnitude=torch.rand(shape[0]).add(0.5).numpy() if magnitude else None)
    write_adapter(folder, modules, seed=seed, base="./base", alpha_pattern={"mlp.up_proj": 3.0}, task_type="CAUSAL_LM")


def _moments(folder: Path) -> None:
    for name in ("first", "second"):
        inputs = {path: torch.randn(50, d_in) for path, (_, d_in) in SHAPES.items()}
        plait.save_moments(folder / f"{name}.safetensors", {path: x.T @ x / len(x) for path, x in inputs.items()})


def _documents(folder: Path) -> None:
    (folder / "recipe.yaml").write_text(
        "version: 1\nadapters:\n  - {name: first, path: ./first, weight: 0.7}\n  - {name: second, path: ./second}\n"
        "method: {name: ties, space: core, density: 0.5}\nmerge_mode: union\n"
        "transforms: [{name: layer_l2_normalize, target_norm: 1.0}]\n"
        "weights: {policy: per_layer, default: 1.0, layers: {1: {second: 0.5}}}\n"
        "scale: 1.5\noutput: {rank: auto, dtype: float32}\nseed: 0\n"
    )
    adapters = [{"name": "first", "path": "./first"}, {"name": "second", "path": "./second"}]
    (folder / "recipe.json").write_text(
        json.dumps({"version": 1, "adapters": adapters, "method": {"name": "linear"}}, indent=1)
    )
    (folder / "mergekit.yaml").write_text(
        "merge_method: dare_ties\nbase_model: ./base\nmodels:\n"
        "  - model: ./base+./first\n    parameters: {weight: 0.5, density: 0.5}\n"
        "  - model: ./base+./second\n    parameters: {weight: 0.3, density: 0.5}\n"
        "parameters: {normalize: false}\ndtype: float32\n"
    )
    (folder / "phases.yaml").write_text(
        "base_model: ./base\nlora: {r: 4, alpha: 8, targets: [q_proj, v_proj]}\n"
        "arguments: {learning_rate: 1e-3, max_steps: 2, per_device_train_batch_size: 2, use_cpu: true}\n"
        "phases: [tasks/sort.yaml, tasks/rate.yaml]\nmerge: {method: linear}\n"
    )
    (folder / "sft.yaml").write_text(
        "model_name_or_path: ./base\ndataset_name_or_path: ./rows.jsonl\noutput_dir: ./left\nuse_peft: true\n"
        "lora_r: 4\nlearning_rate: 1e-3\nmax_steps: 2\nuse_cpu: true\n"
    )
    rows = [{"prompt": f"sort w{i} :", "completion": " red"} for i in range(8)]
    (folder / "asked.jsonl").write_text("".join(json.dumps({"prompt": f"{task} w1 :"}) + "\n" for task in LABELS))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _table(folder / "rows.csv", rows)
    _table(folder / "rows.parquet", rows)
    labeled = [{"word": word, "label": label("sort", word)} for word in WORDS]
    file = write_task(folder / "tables", "sort", splits={"train": "train.parquet", "test": "test.csv"})
    for name in ("train.parquet", "test.csv"):
        _table(file.with_suffix("") / name, labeled)


def _table(file: Path, rows: list[dict[str, str]]) -> None:
    table = pyarrow.Table.from_pylist(rows)
    (pyarrow.csv.write_csv if file.suffix == ".csv" else pyarrow.parquet.write_table)(table, file)


def _results(folder: Path) -> None:
    for words in (
        ("merge", "first", "second", "-o", "merged"),
        ("bake", "first", "--base-id", "base", "-o", "baked"),
        ("eval", "sort=first", "--base-id", "base", "--tasks", "tasks/sort.yaml", "--workspace", "ws"),
        (*SWEEP, "-o", "study"),
    ):
        with suppress(SystemExit):
            main(words)
    runs = next((folder / "ws").glob("*/*/*/runs/run_*"))
    shutil.copytree(runs, folder / "ws" / "run")
    _left_behind(folder)


def _left_behind(folder: Path) -> None:
    """What a bake, a tuning and trainings leave that are stopped near their end."""
    with mock.patch.object(journal, "publish", side_effect=KeyboardInterrupt), suppress(SystemExit):
        main(("bake", "first", "second", "--base-id", "sharded", *OUT))
    with mock.patch.object(WorkingState, "remove"), suppress(SystemExit):
        main(TUNE)
    shutil.rmtree(folder / "out")
    for words in (("train", "phases.yaml", "-o", "runs"), ("sft", "--config", "sft.yaml")):
        with suppress(SystemExit):
            main(words)
    for name in ("adapter", "final_model"):
        shutil.rmtree(folder / "left" / name)
    (folder / "left" / "training.json").unlink()
    for name in ("study/study.json", ".out.baking/journal.jsonl", ".out.tuning/tuning", "runs/train.json", "left/checkpoint-2"):
        assert (folder / name).exists(), name
