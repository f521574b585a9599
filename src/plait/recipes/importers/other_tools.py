"""What other tools call what, and what means the same to plait: the one table behind hints and docs/coming-from.md.

Independent of what the words mean: who reads a command line or a call asks here about a word that plait does not know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

WordKind = Literal["command", "flag", "keyword", "code"]
PEFT = "PEFT"
MERGEKIT = "mergekit"
TRL = "TRL"
HELPER = "A script around add_weighted_adapter"
FRAMEWORK = "The earlier merging framework"
_MERGES = ("merge", "bake", "eval")
_WRITES = ("merge", "bake")
_SEARCHES = (*_MERGES, "sweep")


@dataclass(frozen=True)
class Word:
    """One word of another tool.

    Attributes:
        tool: whose.
        kind: a command, a flag of the command line, a keyword of a Python call, or code that is only in the page.
        old: the word there.
        new: what means the same to plait, as code; empty where nothing is needed.
        more: what to know of it, as a sentence.
        commands: of plait, that a flag may be given to.
        read: whether plait takes the flag as it is.
    """

    tool: str
    kind: WordKind
    old: str
    new: str = ""
    more: str = ""
    commands: tuple[str, ...] = _MERGES
    read: bool = False

    @property
    def hint(self) -> str:
        """What to write, for a message."""
        start = f"write `{self.new}`." if self.new else "leave it out."
        more = f" {self.more}" if self.more else ""
        tool = self.tool[:1].lower() + self.tool[1:] if self.tool.startswith(("A ", "The ")) else self.tool
        return f"{self.old} is a word of {tool}; {start}{more}"


TABLE: tuple[Word, ...] = (
    Word(PEFT, "code", 'model.add_weighted_adapter(["a", "b"], [0.7, 0.3], "ab", combination_type="cat")',
        'plait.merge({"a": "./a", "b": "./b"}, weights=[0.7, 0.3], out="ab")', "No base model is loaded."),
    Word(PEFT, "keyword", "combination_type", "method", "The names are PEFT's; add space='factors' for PEFT's own numbers."),
    Word(PEFT, "keyword", "majority_sign_method", "sign"),
    Word(PEFT, "keyword", "svd_rank", "rank"),
    Word(PEFT, "keyword", "adapter_name", "out", "The merge is a folder."),
    Word(PEFT, "flag", "--combination-type", "--method", "The names are PEFT's; add --space factors for PEFT's own numbers."),
    Word(PEFT, "flag", "--majority-sign-method", "--sign", commands=("merge",)),
    Word(PEFT, "flag", "--svd-rank", "--rank", commands=("merge",)),
    Word(PEFT, "code", "model.merge_and_unload()", "plait bake ADAPTER --base-id BASE -o OUT", "Streamed, in bounded memory."),
    Word(MERGEKIT, "command", "mergekit-yaml", "plait merge CONFIG.yaml -o OUT",
        "Its YAML is read where models are adapters of one base; `plait recipe migrate` rewrites it."),
    Word(MERGEKIT, "command", "mergekit-extract-lora", "plait extract BASE FINETUNED --rank N -o OUT"),
    Word(MERGEKIT, "flag", "--out-shard-size", "plait bake --shard-size", commands=_WRITES),
    Word(MERGEKIT, "flag", "--cuda", "plait bake --device cuda", commands=_WRITES),
    Word(MERGEKIT, "flag", "--copy-tokenizer", "", "Other files of the base model are copied.", _WRITES),
    Word(MERGEKIT, "flag", "--lazy-unpickle", "", "Tensors are always read one at a time, and no pickle is run."),
    Word(MERGEKIT, "flag", "--low-cpu-memory", "", "Memory is bounded anyway."),
    Word(MERGEKIT, "flag", "--allow-crimes", "", "What cannot be merged is refused."),
    Word(MERGEKIT, "flag", "--lora-merge-cache", "", "Downloads are kept where HF_HOME says."),
    Word(MERGEKIT, "keyword", "merge_method", "method"),
    Word(TRL, "code", "trl sft --model_name_or_path … --use_peft", "plait sft …", "The flags are the same."),
    Word(TRL, "code", "merge_peft_adapters.py --adapter_model_name A --base_model_name B",
        "plait bake A --base-id B -o OUT", "Or at the end of training: plait sft --merge_adapter_with_base."),
    Word(TRL, "flag", "--model-name-or-path", "--base-id"),
    Word(TRL, "flag", "--base-model", "--base-id"),
    Word(TRL, "flag", "--output-dir", "-o", commands=_WRITES),
    Word(TRL, "keyword", "output_dir", "out"),
    Word(HELPER, "flag", "--a1-repo", "[name=]org/repo[@revision][/subfolder]", "One argument per adapter.", read=True),
    Word(HELPER, "flag", "--a1-sub", "org/repo/checkpoint-100", "The end of that argument.", read=True),
    Word(HELPER, "flag", "--a1-name", "name=org/repo", "The beginning of that argument.", read=True),
    Word(FRAMEWORK, "code", "python main.py merge --config C.yaml", "plait merge C.yaml -o OUT", "Always saved, if it can be."),
    Word(FRAMEWORK, "code", "python main.py merge --config C.yaml --evaluate", "plait eval C.yaml -o OUT",
        "On `eval_tasks` and `split` of C.yaml (with a search: the split of `post_sweep_eval`); or --tasks, --split."),
    Word(FRAMEWORK, "code", "python main.py evaluate-merged --config C.yaml", "plait eval C.yaml", "In memory."),
    Word(FRAMEWORK, "code", "python main.py merge-sweep --config C.yaml", "plait sweep C.yaml -o STUDY",
        "STUDY is `output_dir` of C.yaml."),
    Word(FRAMEWORK, "command", "merge-sweep", "plait sweep RECIPE --tasks TASK... -o STUDY",
        "Or a leaderboard of methods and spaces: plait eval --methods linear,ties --spaces delta,core."),
    Word(FRAMEWORK, "command", "evaluate-merged", "plait eval RECIPE --tasks TASK...",
        "Of a merge in memory; plait eval FOLDER for one that is written."),
    Word(FRAMEWORK, "command", "evaluate", "plait eval ADAPTER --tasks TASK..."),
    Word(FRAMEWORK, "command", "materialize-merged-artifact", "plait merge RECIPE --rank energy:0.99 -o OUT"),
    Word(FRAMEWORK, "command", "continual-merge", "plait merge MERGED --add NEW -o OUT"),
    Word(FRAMEWORK, "command", "evaluate-continual", "plait eval MERGED --tasks TASK..."),
    Word(FRAMEWORK, "command", "mtl", "plait train PHASES.yaml -o OUT", "One adapter per task, then their merge."),
    Word(FRAMEWORK, "flag", "--config", "plait merge RECIPE.yaml", commands=_SEARCHES, read=True),
    Word(FRAMEWORK, "flag", "--adapters", "plait merge ADAPTER...", commands=_SEARCHES, read=True),
    Word(FRAMEWORK, "code", "adapters: [asr, intent]", "adapters: [asr, intent]", "Folders, or tasks: see below.", read=True),
    Word(FRAMEWORK, "flag", "--output", "-o", commands=(*_WRITES, "sweep"), read=True),
    Word(FRAMEWORK, "flag", "--output-dir", "-o STUDY", "Of a sweep.", ("sweep",)),
    Word(FRAMEWORK, "code", "--lambda", "--lambda 0.5",
        "Of weighted, weighted_delta and dare; with other methods the factor on the merge is --scale."),
    Word(FRAMEWORK, "flag", "--k", "--density 0.2", "Density is k / 100.", _SEARCHES),
    Word(FRAMEWORK, "code", "--drop-rate", "--density 0.1", "Density is 1 − the drop rate; dare has --drop-rate too."),
    Word(FRAMEWORK, "flag", "--evaluate", "plait eval RECIPE --tasks TASK...", "With -o it writes the merge too.", _WRITES),
    Word(FRAMEWORK, "flag", "--eval-tasks", "plait eval --tasks TASK..."),
    Word(FRAMEWORK, "flag", "--eval-tasks", "--tasks TASK...", "Of a sweep.", ("sweep",)),
    Word(FRAMEWORK, "flag", "--eval-split", "plait eval --split validation"),
    Word(FRAMEWORK, "flag", "--adapter-path", "plait eval FOLDER --tasks TASK..."),
    Word(FRAMEWORK, "flag", "--run-id", "plait eval FOLDER --tasks TASK...", "The run's own folder.", ("eval",)),
    Word(FRAMEWORK, "flag", "--checkpoint", "plait tune RECIPE --tasks TASK... -o OUT",
        "A tuning that was stopped continues by the same command; its folder is evaluated as it is.", ("eval",)),
    Word(FRAMEWORK, "flag", "--optimizer-steps", "plait tune --steps N", commands=("eval",)),
    Word(FRAMEWORK, "flag", "--confusion-matrix", "",
        "Results of tasks with labels have it, and the page of plait report draws it.", ("eval",)),
    Word(FRAMEWORK, "flag", "--no-confusion-matrix", "", "It costs nothing.", ("eval",)),
    Word(FRAMEWORK, "flag", "--save-merged", "-o", "plait merge always writes the merge; plait sweep has the flag itself."),
    Word(FRAMEWORK, "flag", "--allow-negative", "--constraint-nonnegative false", "Of a sweep.", ("sweep",)),
    Word(FRAMEWORK, "flag", "--save", "-o", "plait merge always writes the merge."),
    Word(FRAMEWORK, "flag", "--no-save-results", "plait.evaluate(..., workspace=None)", commands=("eval",)),
    Word(FRAMEWORK, "flag", "--compute-missing-interference-baselines", "", "Base and single adapters are always scored."),
    Word(FRAMEWORK, "flag", "--no-compute-interference-baselines", "", "What was scored once is kept.", ("eval",)),
    Word(FRAMEWORK, "flag", "--grid", "plait sweep --grid scale=0.5,1,1.5"),
    Word(FRAMEWORK, "flag", "--search-type", "plait sweep --type bayes", commands=_SEARCHES),
    Word(FRAMEWORK, "keyword", "eval_tasks", "plait.evaluate(..., tasks=[...])"),
    Word(FRAMEWORK, "keyword", "eval_subset", "plait.evaluate(..., subset=100)"),
    Word(FRAMEWORK, "keyword", "save_merged", "out"),
    Word(FRAMEWORK, "code", "interference_delta", "recovery",
        "(merged − base) / (single − base); files have both names."),
    Word(FRAMEWORK, "code", "recipes with method_params, lambda_policy, …", "plait recipe migrate OLD.yaml -o NEW.yaml",
        "Every command reads them as they are, too, with a note."),
)  # fmt: skip


def command_hint(word: str) -> str | None:
    """Report what a command of another tool is here; None for a word that no tool has."""
    row = next((r for r in TABLE if r.kind == "command" and r.old == word), None)
    return None if row is None else row.hint


def flag_row(flag: str, command: str) -> Word | None:
    """Return the row of a flag given to a command of plait; `_` and `-` are one, and so are the numbers of adapters."""
    word = flag.partition("=")[0].replace("_", "-")
    if word[:3] == "--a" and word[3:].partition("-")[0].isdecimal():
        word = f"--a1-{word[3:].partition('-')[2]}"
    return next((r for r in TABLE if r.kind == "flag" and r.old == word and command in r.commands), None)


def keyword_hints(words: Sequence[str]) -> list[str]:
    """Report what keywords of other tools are here, for those that some tool has."""
    return [r.hint for word in words for r in TABLE if r.kind == "keyword" and r.old == word]


def page() -> str:
    """Return the table as Markdown, one for every tool."""
    parts = []
    for tool in dict.fromkeys(row.tool for row in TABLE):
        parts += [f"## {tool}", "", "| there | here | |", "|---|---|---|"]
        for row in (r for r in TABLE if r.tool == tool):
            new = f"`{row.new}`" if row.new else "not needed"
            parts.append(f"| `{row.old}` | {new}{'; read as it is' * row.read} | {row.more} |")
        parts.append("")
    return "\n".join(parts)
