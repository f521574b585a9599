"""Every merge method on the three real adapters: settings chosen on validation texts, judged once on the test texts.

`python examples/demo/leaderboard.py` writes the table of docs/results.md again. About two hours of processor time the first
time; scores are kept by content (merged tensors, texts, model, scoring code), so that a run that was stopped goes on where it
was, and a later run measures only what has changed. `--quick` tries a few methods on a few texts and writes nothing.

The rule is fixed before looking: of a method's settings, the largest sum of mean and worst recovery on validation.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from base_model import base_model
from contestants import CONTESTANTS, QUICK, Contestant
from moments import TEXTS, collect, unlabelled
from rich.console import Console
from scoring import HERE, Outcome, Split, Task, hits, intervals, load_tasks, mean_and_worst

import plait
from plait.methods import METHODS

if TYPE_CHECKING:
    from live import Live
    from numpy.typing import NDArray

RESULTS = HERE.parents[1] / "docs" / "results.md"
CANDIDATE = "candidate"
IN_LABEL = ("method", "space", "combination_type")  # what the name of a contestant says
PLAIN = "linear"  # what the others are compared with
console = Console(highlight=False, width=120)
Measure = Callable[[float], dict[str, Outcome]]  # scale → outcome per task
CLEARLY = 0.1  # of the sum of mean and worst recovery
STEP, MORE = 1.4, 3  # how far, and how often, the grid of scales is extended


@dataclass(frozen=True, eq=False)
class Setting:
    """One way to run a contestant: settings of `plait.merge` (or of PEFT's merge), and a scale."""

    settings: Mapping[str, Any]
    scale: float

    def __str__(self) -> str:
        said = [f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in self.settings.items() if k not in IN_LABEL]
        return ", ".join([*said, f"scale {self.scale:g}"])


@dataclass(frozen=True, eq=False)
class Placed:
    """A contestant with the setting chosen for it, and what it scores."""

    contestant: Contestant
    setting: Setting
    tried: int
    validation: Mapping[str, Outcome]
    test: Mapping[str, Outcome] = field(default_factory=dict)


class Scores:
    """Right and wrong answers on disk, by a hash of everything that decides them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, *parts: object) -> NDArray[np.bool_] | None:
        """Return what is known, (n,)."""
        path = self._path(parts)
        return np.array([c == "1" for c in path.read_text(encoding="ascii")]) if path.is_file() else None

    def put(self, right: NDArray[np.bool_], *parts: object) -> None:
        """Keep it; a stopped run leaves no half of it."""
        path = self._path(parts)
        fresh = path.with_suffix(f".{os.getpid()}")
        fresh.write_text("".join("01"[int(x)] for x in right), encoding="ascii")
        fresh.replace(path)

    def _path(self, parts: Sequence[object]) -> Path:
        return self._folder / hashlib.sha256(json.dumps([str(p) for p in parts]).encode()).hexdigest()[:32]


class Bench:
    """The live model, the tasks, and every score that was ever measured on them."""

    def __init__(self, cache: Path, texts: Mapping[Split, int | None]) -> None:
        # Threads that wait asleep: on a machine with other work, spinning ones make this ten times slower. Read by torch
        # when it is first imported, hence the late import.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        from live import Live

        self.tasks = load_tasks()
        self.texts = texts
        self._cache = cache
        self._scores = Scores(cache / "scores")
        base = base_model()
        self.live: Live = Live(base, {task.name: task.adapter for task in self.tasks})
        self.live.model.bfloat16()  # the adapters too, as servers run them; PEFT would compute them in float32
        self._of_model = (base.name, *(_digest(HERE / name) for name in ("live.py", "scoring.py")))
        self.moments: Path | None = None

    def reference(self, split: Split) -> dict[str, tuple[Any, Any]]:
        """Return what the base model and the task's own adapter get right, per task."""
        return {
            task.name: (
                self._right("base", "", task, split),
                self._right(task.name, _digest(task.adapter / "adapter_model.safetensors"), task, split),
            )
            for task in self.tasks
        }

    @contextmanager
    def merged(self, contestant: Contestant, settings: Mapping[str, Any], split: Split) -> Iterator[Measure]:
        """Make a merge, and offer a function that compares it, at any scale, with the references on a split."""
        reference = self.reference(split)
        with tempfile.TemporaryDirectory() as scratch:
            content = self._make(contestant, settings, Path(scratch))

            def measure(scale: float) -> dict[str, Outcome]:
                right = {t.name: self._right(CANDIDATE, f"{content} × {scale:g}", t, split, scale) for t in self.tasks}
                return {name: Outcome(*reference[name], right[name]) for name in right}

            yield measure
        if CANDIDATE in self.live.model.peft_config:
            self.live.remove(CANDIDATE)

    def _make(self, contestant: Contestant, settings: Mapping[str, Any], scratch: Path) -> str:
        """Merge; return what names the content. The model gets it when it is first asked something."""
        if contestant.by_peft:
            names = [task.name for task in self.tasks]
            self._pending = lambda: self.live.model.add_weighted_adapter(names, adapter_name=CANDIDATE, **settings)
            return f"PEFT {sorted(settings.items())}"
        more = {"moments": self.moments_of(contestant)} if contestant.moments else {}
        folder = plait.merge({t.name: t.adapter for t in self.tasks}, out=scratch / "merged", **settings, **more).folder
        kept = scratch / "merged"
        self._pending = lambda: self.live.add(CANDIDATE, kept)
        return _digest(folder / "adapter_model.safetensors")

    def _right(self, name: str, content: str, task: Task, split: Split, scale: float = 1.0) -> NDArray[np.bool_]:
        examples = task.examples(split, self.texts[split])
        key = (*self._of_model, name, content, task.prompt, *((e.text, e.label) for e in examples))
        known = self._scores.get(*key)
        if known is None:
            if name == CANDIDATE:
                self._ready(scale)
            known = hits(examples, self.live.classify(name, task, examples))
            self._scores.put(known, *key)
        return known

    def _ready(self, scale: float) -> None:
        if CANDIDATE not in self.live.model.peft_config:
            self._pending()
            self.live.model.bfloat16()
        for module in self.live.model.modules():
            if hasattr(module, "set_scale") and CANDIDATE in module.scaling:
                module.set_scale(CANDIDATE, scale)

    def moments_of(self, contestant: Contestant) -> Path:
        """Return the folder of the moments, collected now where they are not there yet."""
        if self.moments is None:
            name = hashlib.sha256(json.dumps([*self._of_model, _digest(HERE / "moments.py"), TEXTS]).encode()).hexdigest()
            self.moments = self._cache / f"moments-{name[:12]}"
            self.moments.mkdir(exist_ok=True)
        for task in self.tasks:
            target = self.moments / f"{task.name}.safetensors"
            if not target.is_file():
                console.print(f"[dim]moments of {task.name}, {TEXTS} texts[/]")
                plait.save_moments(target, collect(self.live, task.name, task, unlabelled(task)))
        return self.moments


def scan(score: Callable[[float], float], scales: Sequence[float]) -> None:
    """Try scales upwards until the score falls clearly; go on beyond either end while the best one is there.

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
    tried: list[tuple[Setting, dict[str, Outcome]]] = []
    for settings in contestant.variants:
        with bench.merged(contestant, settings, "validation") as measure:

            def score(scale: float, settings: Mapping[str, Any] = settings, measure: Measure = measure) -> float:
                outcomes = measure(scale)
                tried.append((Setting(settings, scale), outcomes))
                console.print(f"{contestant.name:22s} {tried[-1][0]!s:50s} {_summary(outcomes)}")
                return sum(mean_and_worst(outcomes))

            scan(score, contestant.scales)
    setting, outcomes = max(tried, key=lambda pair: sum(mean_and_worst(pair[1])))
    return Placed(contestant, setting, len(tried), outcomes)


def judge(bench: Bench, placed: Placed) -> Placed:
    """Read the test texts, once, with the chosen setting."""
    with bench.merged(placed.contestant, placed.setting.settings, "test") as measure:
        outcomes = measure(placed.setting.scale)
    console.print(f"test  {placed.contestant.name:22s} {placed.setting!s:44s} {_summary(outcomes)}")
    return replace(placed, test=outcomes)


def _summary(outcomes: Mapping[str, Outcome]) -> str:
    mean, worst = mean_and_worst(outcomes)
    shares = " ".join(f"{outcome.merged.mean():.3f}" for outcome in outcomes.values())
    return f"{shares}  {mean:+6.2f} {worst:+6.2f}"


def table(rows: Sequence[Placed]) -> str:
    """Return the results as a Markdown table, the largest mean recovery first."""
    lines = [
        "| method | needs | chosen (of) | validation | sentiment | supersense | langid | mean | worst | mean − `linear` |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    plain = next((row.test for row in rows if row.contestant.name == PLAIN), None)
    for row in sorted(rows, key=lambda r: -mean_and_worst(r.test)[0]):
        bounds = intervals(row.test)
        cells = [
            row.contestant.label,
            "texts" if row.contestant.moments else "–",
            f"{row.setting} ({row.tried})",
            "{:.2f} / {:.2f}".format(*mean_and_worst(row.validation)),
            *(f"{o.merged.mean():.3f}".lstrip("0") for o in row.test.values()),
            *(_interval(v, bounds[w]) for w, v in zip(("mean", "worst"), mean_and_worst(row.test), strict=True)),
            "–" if plain is None or plain is row.test else _interval(*advantage(row.test, plain), sign="+"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def advantage(
    outcomes: Mapping[str, Outcome], others: Mapping[str, Outcome], draws: int = 2000, seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """Return by how much the mean recovery is larger than another merge's, with a 95 % interval from paired resampling."""
    rng = np.random.default_rng(seed)

    def difference(picked: Mapping[str, NDArray[np.int64]]) -> float:
        one, other = (
            mean_and_worst({n: Outcome(o.base[picked[n]], o.single[picked[n]], o.merged[picked[n]]) for n, o in side.items()})[
                0
            ]
            for side in (outcomes, others)
        )
        return one - other

    sizes = {name: len(o.base) for name, o in outcomes.items()}
    drawn = [difference({name: rng.integers(0, n, n) for name, n in sizes.items()}) for _ in range(draws)]
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return difference({name: np.arange(n) for name, n in sizes.items()}), (float(low), float(high))


def _interval(value: float, bounds: tuple[float, float], sign: str = "") -> str:
    return f"{value:{sign}.2f} ({bounds[0]:{sign}.2f} – {bounds[1]:{sign}.2f})"


def references(bench: Bench) -> str:
    """Return accuracies of the base model and of the tasks' own adapters as a Markdown table."""
    found = {split: bench.reference(split) for split in ("validation", "test")}  # type: ignore[arg-type]
    lines = ["| split | model | sentiment | supersense | langid |", "|---|---|---|---|---|"]
    for split, reference in found.items():
        for side, words in enumerate(("base model", "its own adapter")):
            shares = [f"{pair[side].mean():.3f}".lstrip("0") for pair in reference.values()]
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


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _cache() -> Path:
    wanted = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (wanted if wanted.is_absolute() else Path.home() / ".cache") / "plait" / "leaderboard"


def main() -> None:
    """Place every contestant on validation, judge all of them on the test texts, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", help="only these contestants; writes nothing")
    parser.add_argument("--cache", type=Path, default=_cache(), help="where scores and moments are kept [%(default)s]")
    parser.add_argument("--validation", type=int, default=100, metavar="N", help="validation texts per task [%(default)s]")
    parser.add_argument("--quick", action="store_true", help="a few methods, 20 texts per task; writes nothing")
    parser.add_argument("--no-test", action="store_true", help="stop after validation")
    options = parser.parse_args()
    texts: dict[Split, int | None] = (
        {"validation": 20, "test": 20} if options.quick else {"validation": options.validation, "test": None}
    )
    bench = Bench(options.cache, texts)
    console.print("accuracy on sentiment, supersense, langid; mean and worst recovery")
    started = time.perf_counter()
    chosen = [place(bench, c) for c in taking_part(QUICK if options.quick else options.methods)]
    if options.no_test:
        return
    judged = [judge(bench, placed) for placed in chosen]
    parts = {"references": references(bench), "leaderboard": table(judged)}
    console.print(*parts.values(), sep="\n")
    if not options.quick and not options.methods:
        RESULTS.write_text(written(RESULTS.read_text(encoding="utf-8"), parts), encoding="utf-8")
        console.print(f"{RESULTS} is written again, after {(time.perf_counter() - started) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
