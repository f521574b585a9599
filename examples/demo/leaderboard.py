"""Every merge method on the three real adapters: settings chosen on validation texts, judged once on the test texts.

`python examples/demo/leaderboard.py` writes the tables of docs/results.md again. More than an hour on two cores the first
time; answers are kept by content, as `plait eval` keeps them, so that a run that was stopped continues where it was, and a
later run asks only what has changed. `--quick` tries a few methods on a few texts and writes nothing.

The rule is fixed before looking: of a method's settings, the largest sum of mean and worst recovery on validation.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from base_model import base_model
from contestants import CONTESTANTS, QUICK, Contestant
from rich.console import Console

import plait
from plait.adapters.adapter import Adapter
from plait.evaluation.candidates import Candidate
from plait.evaluation.pipeline import EvalSubject, EvaluateOptions, Evaluator
from plait.evaluation.record import Evaluation
from plait.evaluation.recovery import BootstrapDraws, central_interval
from plait.evaluation.request import eval_spec
from plait.evaluation.scores import adapter_digest, digest
from plait.hub.pretrained import LoadOptions
from plait.libraries.transformers.quiet import quiet_loading
from plait.merging.inventory import open_adapters, take_inventory
from plait.methods import METHODS
from plait.recipes.evaluation import EvalSpec
from plait.recipes.request import read_request
from plait.results.progress import SilentProgress

HERE = Path(__file__).resolve().parent
NAMES = ("sentiment", "supersense", "langid")
ADAPTERS = {name: str(HERE / "adapters" / name) for name in NAMES}
RESULTS = HERE.parents[1] / "docs" / "results.md"
IN_LABEL = ("method", "space", "combination_type")  # what the name of a contestant says
PLAIN = "linear"  # what the others are compared with
CLEARLY = 0.1  # of the sum of mean and worst recovery
STEP, MORE = 1.4, 3  # how far, and how often, the grid of scales is extended
BATCH = 32
TEXTS = 200  # per task, for second moments
Split = Literal["validation", "test"]
console = Console(highlight=False, width=120)


@dataclass(frozen=True, eq=False)
class Setting:
    """One way to run a contestant: settings of a recipe (or of PEFT's merge), and a scale."""

    settings: Mapping[str, Any]
    scale: float

    def __str__(self) -> str:
        message = [f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in self.settings.items() if k not in IN_LABEL]
        return ", ".join([*message, f"scale {self.scale:g}"])


@dataclass(frozen=True, eq=False)
class Placed:
    """A contestant with the setting chosen for it, and what it keeps.

    Attributes:
        contestant: the method.
        setting: the best on validation.
        tried: how many settings there were.
        validation: of that setting.
        test: of that setting.
        drawn: bootstrap of `test`, per task.
    """

    contestant: Contestant
    setting: Setting
    tried: int
    validation: Evaluation
    test: Evaluation | None = None
    drawn: Mapping[str, BootstrapDraws] | None = None


class Bench:
    """Two evaluators, of validation and of test; what one of them ever asked is kept in the cache folder."""

    def __init__(self, cache: Path, samples: Mapping[Split, int | None], contestants: Sequence[Contestant]) -> None:
        # Threads that wait asleep: on a machine with other work, spinning ones make this ten times slower. Read by torch
        # when it is first imported.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        self._cache = cache
        self._base = base_model()
        self._options = EvaluateOptions(cache / "evaluation", LoadOptions(device_map="cpu", base=str(self._base)))
        located, opened = open_adapters(list(ADAPTERS.items()))
        self._singles = list(zip(opened, located, ADAPTERS.values(), strict=True))
        self._by_peft = {c.name: self._merged_by_peft(c) for c in contestants if c.by_peft}
        self._evaluators = {split: self._evaluator(split, count) for split, count in samples.items()}

    def ask(self, contestant: Contestant, setting: Setting, split: Split) -> tuple[Evaluation, Mapping[str, BootstrapDraws]]:
        """Merge, and compare with the base and the tasks' own adapters; return that, and its bootstrap."""
        evaluator = self._evaluators[split]
        if contestant.by_peft:
            subject = EvalSubject(contestant.name, "adapter", _scaled(self._by_peft[contestant.name], setting.scale))
        else:
            more = {"moments": str(self._moments())} if contestant.moments else {}
            recipe, _ = read_request(None, ADAPTERS, {**setting.settings, **more, "scale": setting.scale})
            subject = evaluator.merge(take_inventory(recipe, None), contestant.name)
        return evaluator.evaluate(subject), evaluator.draws(subject)

    def _evaluator(self, split: Split, count: int | None) -> Evaluator:
        spec = eval_spec(EvalSpec(), {"split": split, "subset": count, "batch_size": BATCH})
        tasks = [HERE / "tasks" / f"{name}.yaml" for name in NAMES]
        others = tuple(self._by_peft.values())
        return Evaluator(str(self._base), None, self._singles, others, tasks, spec, self._options, SilentProgress())

    def _merged_by_peft(self, contestant: Contestant) -> Adapter:
        """Return a merge by PEFT, made now: it costs seconds, and so is never stale."""
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        first, *rest = ADAPTERS
        merged = re.sub(r"\W+", "-", contestant.name).lower()
        (settings,) = contestant.variants
        with quiet_loading():
            model = AutoModelForCausalLM.from_pretrained(self._base, dtype=torch.bfloat16)
            model = PeftModel.from_pretrained(model, ADAPTERS[first], adapter_name=first)
            for name in rest:
                model.load_adapter(ADAPTERS[name], adapter_name=name)
            model.add_weighted_adapter(list(ADAPTERS), [1.0] * len(ADAPTERS), merged, **settings)
            folder = self._cache / "peft"
            # save_embedding_layers: its default asks the Hub about the base model
            model.save_pretrained(str(folder), selected_adapters=[merged], save_embedding_layers=False)
        return Adapter.open(folder / merged, merged)

    def _moments(self) -> Path:
        """Return the folder of the moments, collected now where they are not there yet."""
        stamp = "-".join(adapter.sha256()[:4] for adapter, _, _ in self._singles)
        folder = self._cache / f"calibration-{TEXTS}-{stamp}"
        if not (folder / "plait.lock").is_file():
            console.print(f"[dim]moments of {TEXTS} texts per task[/]")
            files = texts_of_moments(_made(self._cache / "texts"))
            tasks = [HERE / "tasks" / f"{name}.yaml" for name in NAMES]
            plait.calibrate(
                ADAPTERS, tasks=tasks, base_model=self._base, out=folder, files=files, count=TEXTS, device_map="cpu"
            )
        return folder


def texts_of_moments(folder: Path) -> dict[str, str]:
    """Write the first training texts of every task, in the file's order: it is shuffled, and no label chooses them.

    Returns:
        Task → file.
    """
    files = {name: folder / f"{name}.jsonl" for name in NAMES}
    for name, file in files.items():
        rows = (HERE / "tasks" / name / "train.jsonl").read_text(encoding="utf-8").splitlines()[:TEXTS]
        file.write_text("".join(json.dumps({"text": json.loads(row)["text"]}) + "\n" for row in rows), encoding="utf-8")
    return {name: str(file) for name, file in files.items()}


def _scaled(adapter: Adapter, scale: float) -> Candidate:
    """Return an adapter with a weight. PEFT gives √w of a weight w to A and to B, so that equal weights scale its result."""
    key = digest("adapter", adapter_digest(adapter.folder), scale)
    return Candidate(adapter.name, key, lambda task: None, lambda live, _: live.mixture.active({adapter.name: scale}))


def scan(score: Callable[[float], float], scales: Sequence[float]) -> None:
    """Try scales upward until the score falls clearly; continue beyond either end while the best one is there.

    Args:
        score: of a scale; it keeps what it finds.
        scales: to begin with, ascending.
    """
    found: dict[float, float] = {}
    for scale in scales:
        found[scale] = score(scale)
        if found[scale] < max(found.values()) - CLEARLY:
            break
    for factor, end in ((STEP, max), (1 / STEP, min)):
        for _ in range(len(scales) > 1 and MORE):
            if max(found, key=lambda scale: found[scale]) != end(found):
                break
            scale = round(end(found) * factor, 2)
            found[scale] = score(scale)


def place(bench: Bench, contestant: Contestant) -> Placed:
    """Try the settings of a contestant on validation, and take the best."""
    tried: list[tuple[Setting, Evaluation]] = []
    for settings in contestant.variants:

        def score(scale: float, settings: Mapping[str, Any] = settings) -> float:
            setting = Setting(settings, scale)
            tried.append((setting, bench.ask(contestant, setting, "validation")[0]))
            console.print(f"{contestant.name:22s} {setting!s:50s} {_summary(tried[-1][1])}")
            return _score(tried[-1][1])

        scan(score, contestant.scales)
    setting, found = max(tried, key=lambda pair: _score(pair[1]))
    return Placed(contestant, setting, len(tried), found)


def judge(bench: Bench, placed: Placed) -> Placed:
    """Read the test texts, once, with the chosen setting."""
    found, drawn = bench.ask(placed.contestant, placed.setting, "test")
    console.print(f"test  {placed.contestant.name:22s} {placed.setting!s:44s} {_summary(found)}")
    return replace(placed, test=found, drawn=drawn)


def _score(found: Evaluation) -> float:
    return sum(_mean_and_worst(found))


def _mean_and_worst(found: Evaluation) -> tuple[float, float]:
    if found.mean_recovery is None or found.worst_recovery is None:
        raise ValueError(f"{found.name}: no task has a recovery")
    return found.mean_recovery, found.worst_recovery


def _summary(found: Evaluation) -> str:
    shares = " ".join(f"{task.merged:.3f}" for task in found.tasks)
    mean, worst = _mean_and_worst(found)
    return f"{shares}  {mean:+6.2f} {worst:+6.2f}"


def table(rows: Sequence[Placed]) -> str:
    """Return the results as a Markdown table, the largest mean recovery on the test first."""
    lines = [
        "| method | needs | chosen (of) | validation | sentiment | supersense | langid | mean | worst | mean − `linear` |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    judged = [(row, row.test) for row in rows if row.test is not None]
    plain = next((row for row in rows if row.contestant.name == PLAIN), None)
    for row, test in sorted(judged, key=lambda pair: -_mean_and_worst(pair[1])[0]):
        mean, worst = _mean_and_worst(test)
        cells = [
            row.contestant.label,
            "texts" if row.contestant.moments else "–",
            f"{row.setting} ({row.tried})",
            "{:.2f} / {:.2f}".format(*_mean_and_worst(row.validation)),
            *(_share(task.merged) for task in test.tasks),
            _bounded(mean, test.mean_interval),
            _bounded(worst, test.worst_interval),
            "–" if plain is None or plain is row else _advantage(row, plain),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _advantage(row: Placed, plain: Placed) -> str:
    """Say by how much the mean recovery is larger than another merge's, from paired resampling."""
    if row.test is None or plain.test is None or row.drawn is None or plain.drawn is None:
        raise ValueError("only what was judged can be compared")
    value = _mean_and_worst(row.test)[0] - _mean_and_worst(plain.test)[0]
    draws = np.mean([row.drawn[name].recovery - plain.drawn[name].recovery for name in NAMES], axis=0)
    return _bounded(value, central_interval(draws, value), sign="+")


def _bounded(value: float, bounds: tuple[float, float] | None, sign: str = "") -> str:
    if bounds is None:
        raise ValueError("no draw has a recovery")
    return f"{value:{sign}.2f} ({bounds[0]:{sign}.2f} – {bounds[1]:{sign}.2f})"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}".lstrip("0")


def references(rows: Sequence[Placed]) -> str:
    """Return accuracies of the base model and of the tasks' own adapters as a Markdown table."""
    found = {"validation": rows[0].validation, "test": rows[0].test}
    lines = ["| split | model | sentiment | supersense | langid |", "|---|---|---|---|---|"]
    for split, evaluation in found.items():
        if evaluation is not None:
            for side, words in (("base", "base model"), ("single", "its own adapter")):
                shares = [_share(getattr(task, side)) for task in evaluation.tasks]
                lines.append(f"| {split} | {words} | {' | '.join(shares)} |")
    return "\n".join(lines) + "\n"


def written(text: str, parts: Mapping[str, str]) -> str:
    """Return a page with its generated parts, between `<!-- name -->` and `<!-- /name -->`, made again."""
    for name, content in parts.items():
        text, count = re.subn(rf"(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)", lambda _, c=content: c, text, flags=re.DOTALL)  # type: ignore[misc]
        if count != 1:
            raise ValueError(f"{RESULTS} has {count} parts named {name!r}; one is needed")
    return text


def taking_part(names: Sequence[str]) -> Iterator[Contestant]:
    """Yield the contestants whose methods are registered, all or those named."""
    for contestant in CONTESTANTS:
        if names and contestant.name not in names:
            continue
        missing = {str(v["method"]) for v in contestant.variants if not contestant.by_peft} - set(METHODS)
        if missing:
            console.print(f"[yellow]{contestant.name} is left out: no method {', '.join(sorted(missing))}[/]")
        else:
            yield contestant


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _cache() -> Path:
    wanted = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (wanted if wanted.is_absolute() else Path.home() / ".cache") / "plait" / "leaderboard"


def main() -> None:
    """Place every contestant on validation, judge all of them on the test texts, write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", help="only these contestants; writes nothing")
    parser.add_argument("--cache", type=Path, default=_cache(), help="where answers and moments are kept [%(default)s]")
    parser.add_argument("--validation", type=int, default=100, metavar="N", help="validation texts per task [%(default)s]")
    parser.add_argument("--quick", action="store_true", help="a few methods, 20 texts per task; writes nothing")
    parser.add_argument("--no-test", action="store_true", help="stop after validation")
    options = parser.parse_args()
    samples: dict[Split, int | None] = (
        {"validation": 20, "test": 20} if options.quick else {"validation": options.validation, "test": None}
    )
    started = time.perf_counter()
    contestants = list(taking_part(QUICK if options.quick else options.methods))
    bench = Bench(options.cache, samples, contestants)
    console.print("accuracy on sentiment, supersense, langid; mean and worst recovery")
    chosen = [place(bench, c) for c in contestants]
    if options.no_test:
        return
    judged = [judge(bench, placed) for placed in chosen]
    parts = {"references": references(judged), "leaderboard": table(judged)}
    console.print(*parts.values(), sep="\n")
    if not options.quick and not options.methods:
        RESULTS.write_text(written(RESULTS.read_text(encoding="utf-8"), parts), encoding="utf-8")
        console.print(f"{RESULTS} is written again, after {(time.perf_counter() - started) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
