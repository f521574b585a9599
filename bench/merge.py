"""plait compared with PEFT, in one run: `python bench/merge.py [--quick] [--markdown]`.

Two random adapters with the shapes of Qwen3-1.7B (all linear layers, r 64, float32) are merged by both. Every measurement is a
fresh process; files are in the page cache for both. PEFT's dense methods are timed on one module of every shape and the whole
model's time is added up from those. Results go to `bench/results/merge.json` too.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import report
import synthetic
from processes import peak_of, run_job, time_command
from report import Row, Section

RESULTS = Path(__file__).parent / "results" / "merge.json"
PROBES = ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj")  # one module of every shape
MB = 1e6
DENSITY = 0.2
TIES = {"method": "ties", "space": "delta", "density": DENSITY}
TIES_RANKS = (128, 64)
SVD_RANK = 64
LINEAR = {"method": "linear", "weights": [0.5, 0.5]}
COMMANDS = {  # the same as a user types them
    "linear": ("--method", "linear", "--weights", "0.5", "0.5"),
    "linear, bfloat16 written": ("--method", "linear", "--weights", "0.5", "0.5", "--dtype", "bfloat16"),
}
RUNS: dict[str, dict[str, Any]] = {  # what plait does to the whole model
    "linear": LINEAR,
    "linear, bfloat16 written": {**LINEAR, "dtype": "bfloat16"},  # as PEFT does, whose dtype follows the base model's
    "svd, rank 64": {"method": "svd", "rank": SVD_RANK},
    "ties, delta, rank 128": TIES,
    "ties, delta, rank 64": {**TIES, "rank": 64},
    "ties, core": {"method": "ties", "space": "core"},
    "ties, knots": {"method": "ties", "space": "knots"},
    "dare_linear, delta": {"method": "dare_linear", "space": "delta"},
    "dare_ties, delta": {"method": "dare_ties", "space": "delta"},
    "della, delta": {"method": "della", "space": "delta"},
    "breadcrumbs, delta": {"method": "breadcrumbs", "space": "delta"},
    "magnitude_prune, delta": {"method": "magnitude_prune", "space": "delta"},
}
REPEATED = {"linear": 3, "linear, bfloat16 written": 3, "svd, rank 64": 3}
QUICK = ("linear", "linear, bfloat16 written", "svd, rank 64", "ties, delta, rank 128", "ties, delta, rank 64", "ties, core")
MEMORY_TARGET = 600 * MB


class Bench:
    """One run: the materials, where outputs go, and what was measured so far.

    Args:
        cache: where adapters and base model are kept.
        layers: of the whole model.
        modules: the modules of a layer that PEFT's dense methods and the errors are measured on.
        runs: what plait does to the whole model.
        repeat: whether short work is repeated.
    """

    def __init__(self, cache: Path, layers: int, modules: Sequence[str], runs: Sequence[str], *, repeat: bool) -> None:
        self.materials = synthetic.locate(cache, layers)
        self.single = synthetic.locate(cache, 1)
        self.modules = list(modules)
        self.runs = runs
        self.repeat = repeat
        self.out = cache / "out"
        self.raw: dict[str, Any] = {}
        self._started = time.perf_counter()

    def prepare(self) -> None:
        """Make the files, and empty the output folder."""
        shutil.rmtree(self.out, ignore_errors=True)
        self.say("making adapters and base model (once), reading them into the page cache")
        run_job("make", layers=self.single.layers, cache=str(self.out.parent), base=False)
        run_job("make", layers=self.materials.layers, cache=str(self.out.parent), base=True)

    def say(self, text: str) -> None:
        """Print progress."""
        print(f"[{time.perf_counter() - self._started:4.0f} s] {text}", file=sys.stderr, flush=True)

    def job(self, name: str, job: str, times: int = 1, **arguments: Any) -> dict[str, Any]:
        """Run a job several times, remember every result, and return the one of median wall time."""
        results = []
        for _ in range(times if self.repeat else 1):
            shutil.rmtree(self.out / name, ignore_errors=True)
            results.append(run_job(job, **arguments))
            self.say(f"{name}: {results[-1]['wall']:.1f} s")
        self.raw[name] = results
        return sorted(results, key=lambda r: r["wall"])[(len(results) - 1) // 2]

    def plait(self, label: str) -> dict[str, Any]:
        """Merge the whole model with plait."""
        adapters = _paths(self.materials)
        name = f"plait {label}"
        return self.job(
            name, "plait_merge", REPEATED.get(label, 1), adapters=adapters, out=str(self.out / name), settings=RUNS[label]
        )

    def command(self, label: str) -> float:
        """Return the seconds that `plait merge` takes from its start to its end, the median of several."""
        name = f"plait merge, {label}"
        out = self.out / name
        seconds = []
        for _ in range(REPEATED.get(label, 1) if self.repeat else 1):
            shutil.rmtree(out, ignore_errors=True)
            os.sync()  # what earlier jobs wrote must not be waited for by this one
            seconds.append(time_command("-m", "plait", "merge", *_paths(self.materials), *COMMANDS[label], "-o", str(out)))
            self.say(f"{name}: {seconds[-1]:.1f} s")
        self.raw[name] = seconds
        return statistics.median(seconds)

    def floor(self, dtype: str) -> float:
        """Return the seconds of a numpy script that does no more for that sum than has to be done, the median of several."""
        out, seconds = self.out / "floor", []
        for _ in range(3 if self.repeat else 1):
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            script = str(Path(__file__).with_name("sum_floor.py"))
            seconds.append(time_command(script, str(out), dtype, "0.5", *_paths(self.materials)))
            self.say(f"numpy script, {dtype}: {seconds[-1]:.1f} s")
        self.raw[f"numpy script, {dtype}"] = seconds
        return statistics.median(seconds)

    def peak(self, label: str) -> int:
        """Return the bytes that the process of `plait merge` takes at most."""
        out = self.out / "peak"
        shutil.rmtree(out, ignore_errors=True)
        found = peak_of("plait", "merge", *_paths(self.materials), *COMMANDS[label], "-o", str(out))
        self.raw[f"peak, {label}"] = found
        return found

    def per_module(self, run: dict[str, Any]) -> float:
        """Return the seconds per module of a whole-model run, imports aside and files included."""
        return float(run["work"]["seconds"]) / self.materials.modules

    def peft_per_module(self, seconds: dict[str, float]) -> float:
        """Return PEFT's mean seconds per module of a layer, from one module of every shape."""
        by_shape = {synthetic.SHAPES[m]: s for m, s in seconds.items()}
        known = [by_shape[shape] for shape in synthetic.SHAPES.values() if shape in by_shape]
        return statistics.mean(known)


def linear(bench: Bench, runs: dict[str, dict[str, Any]]) -> list[Row]:
    """The exact weighted sum."""
    peft = bench.job(
        "PEFT cat", "peft_merge", 2,
        base=str(bench.materials.base), adapters=_paths(bench.materials), out=str(bench.out / "PEFT cat"),
    )  # fmt: skip
    same, default = runs["linear, bfloat16 written"], runs["linear"]
    mine = {label: bench.command(label) for label in COMMANDS}
    floors = {label: bench.floor("bfloat16" if "bfloat16" in label else "float32") for label in COMMANDS}
    theirs = str(bench.out / "PEFT cat" / "merged")
    difference = run_job(
        "compare", left=str(bench.out / "plait linear, bfloat16 written"), right=theirs, modules=bench.modules
    )["difference"]
    results = {"plait": str(bench.out / "plait linear"), "PEFT": theirs}
    errors = run_job("sum_errors", adapters=_paths(bench.materials), weight=0.5, results=results, modules=bench.modules)[
        "errors"
    ]
    bench.raw["linear difference"], bench.raw["linear errors"] = difference, errors
    return [
        _seconds("linear, whole process", mine["linear, bfloat16 written"], peft["wall"], 20),
        _seconds("linear, without imports", same["work"]["seconds"], peft["work"]["seconds"]),
        _seconds("linear, float32 written, whole process", mine["linear"], peft["wall"], 20),
        _seconds("linear, float32 written, without imports", default["work"]["seconds"], peft["work"]["seconds"]),
        *(_beside_floor(label, mine[label], floors[label], bench.peak(label)) for label in COMMANDS),
        _memory("linear, peak memory", same["all"]["peak_rss"], peft["all"]["peak_rss"], 20),
        _memory("linear, float32 written, peak memory", default["all"]["peak_rss"], peft["all"]["peak_rss"], 20),
        _memory("linear, peak anonymous memory", same["all"]["peak_anonymous"], peft["all"]["peak_anonymous"]),
        Row("linear, largest difference of deltas", (f"{difference:.1e}", "", ""), "≤ 1e-6", difference <= 1e-6),
        Row("linear, float32 written, distance to the exact sum", (*(f"{max(errors[x]):.1e}" for x in ("plait", "PEFT")), "")),
    ]


def svd(bench: Bench, run: dict[str, Any]) -> list[Row]:
    """The best rank-64 approximation of the weighted sum."""
    peft = _peft_dense(bench, "svd")
    errors = run_job(
        "sum_errors",
        adapters=_paths(bench.materials),
        weight=1.0,
        results={"plait": str(bench.out / "plait svd, rank 64"), "PEFT": str(bench.out / "PEFT svd")},
        modules=bench.modules,
    )["errors"]
    bench.raw["svd errors"] = errors
    ours, theirs = (statistics.mean(errors[name]) for name in ("plait", "PEFT"))
    apart = max(abs(a - b) for a, b in zip(errors["plait"], errors["PEFT"], strict=True))
    return [
        _seconds("svd rank 64, per module", bench.per_module(run), bench.peft_per_module(peft), 300),
        Row("svd rank 64, truncation error", (f"{ours:.6f}", f"{theirs:.6f}", f"± {apart:.0e}"), "± 1e-5", apart <= 1e-5),
    ]


def ties(bench: Bench, runs: dict[str, dict[str, Any]]) -> list[Row]:
    """TIES on the dense deltas, truncated."""
    peft = bench.peft_per_module(_peft_dense(bench, "ties_svd", DENSITY))
    ratios = bench.job(
        "TIES errors", "ties_errors",
        adapters=_paths(bench.single), out=str(bench.out / "TIES errors"), modules=bench.modules,
        settings=TIES, ranks=list(TIES_RANKS),
    )["ratios"]  # fmt: skip
    rows = []
    for rank in TIES_RANKS:
        worst = max(ratios[str(rank)])
        ours = bench.per_module(runs[f"ties, delta, rank {rank}"])
        rows.append(_seconds(f"ties on deltas, rank {rank}, per module", ours, peft, 50))
        rows.append(
            Row(f"ties on deltas, rank {rank}, error over a dense SVD's", (f"{worst:.4f}", "1", ""), "≤ 1.01", worst <= 1.01)
        )
    return rows


def methods(bench: Bench, runs: dict[str, dict[str, Any]]) -> Section:
    """Time and memory of every method on the whole model."""
    columns = ("time", "peak memory", "anonymous", "energy kept")
    section = Section(f"plait's methods on all {bench.materials.modules} modules", columns)
    for label, run in runs.items():
        memory = run["all"]["peak_rss"]
        cells = (f"{run['work']['seconds']:.1f} s", _mb(memory), _mb(run["all"]["peak_anonymous"]), f"{run['kept']:.1%}")
        section.rows.append(Row(label, cells, f"≤ {_mb(MEMORY_TARGET)}", memory <= MEMORY_TARGET))
    section.notes.append("Time without imports; memory above Python with torch imported, plait's own imports included.")
    return section


def startup(bench: Bench) -> Section:
    """Start-up times."""
    section = Section("Start-up, fresh processes, median of 5", ("time", "torch imported"))
    call = "import sys; sys.argv = ['plait', '--help']; from plait.cli.main import main; main()"
    cases = {
        "python -c pass": (("-c", "pass"), "pass"),
        "import plait": (("-c", "import plait"), "import plait"),
        "plait --help": (("-m", "plait", "--help"), call),
    }
    for label, (command, statement) in cases.items():
        seconds = statistics.median(time_command(*command) for _ in range(5))
        torch = run_job("startup", statement=statement)["torch"]
        bench.raw[f"start-up {label}"] = {"seconds": seconds, "torch": torch}
        target = ("≤ 0.3 s", seconds <= 0.3 and not torch) if "plait" in label else ("", None)
        section.rows.append(Row(label, (f"{seconds:.2f} s", "yes" if torch else "no"), *target))
    return section


def run(bench: Bench) -> list[Section]:
    """Measure everything."""
    m = bench.materials
    bench.prepare()
    start = startup(bench)
    runs = {label: bench.plait(label) for label in bench.runs}
    compared = Section("plait and PEFT", ("plait", "PEFT", "ratio"))
    compared.rows = [*linear(bench, runs), *svd(bench, runs["svd, rank 64"]), *ties(bench, runs)]
    compared.notes = [
        f"Two adapters of {m.adapter_parameters / 1e6:.0f} M float32 values for {m.modules} modules "
        f"({m.layers} layers; {m.delta_entries / 1e6:.0f} M entries of ΔW). The base model is bfloat16, and so PEFT writes "
        "bfloat16; `linear` writes the same where nothing else is given (plait's default is float32).",
        "Whole process: interpreter, imports, work, exit, of the command `plait merge` and of a script for PEFT. Memory: peak "
        "above Python with torch imported, plait's own imports included.",
        f"PEFT per module: measured on {', '.join(bench.modules)} of layer 0, averaged over a layer's seven modules. "
        "plait per module: the whole merge without imports, files and hashes included, over the number of modules.",
    ]
    shutil.rmtree(bench.out, ignore_errors=True)
    return [compared, methods(bench, runs), start]


def main() -> None:
    """Parse arguments, measure, report."""
    options = report.arguments(__doc__, "one layer, few methods", layers=(28, "layers of the model"))
    layers, modules, runs = (1, ("self_attn.k_proj",), QUICK) if options.quick else (options.layers, PROBES, tuple(RUNS))
    machine = report.machine()
    bench = Bench(options.cache.resolve(), layers, modules, runs, repeat=not options.quick)
    sections = run(bench)
    report.conclude(RESULTS, machine, sections, bench.raw, quick=options.quick, as_markdown=options.markdown)


def _peft_dense(bench: Bench, combination_type: str, density: float | None = None) -> dict[str, float]:
    name = f"PEFT {combination_type}"
    result = bench.job(
        name, "peft_modules",
        adapters=_paths(bench.materials), out=str(bench.out / name), modules=bench.modules,
        combination_type=combination_type, rank=SVD_RANK, density=density,
    )  # fmt: skip
    seconds: dict[str, float] = result["seconds"]
    return seconds


def _paths(materials: synthetic.Materials) -> list[str]:
    return [str(path) for path in materials.adapters]


def _seconds(work: str, ours: float, theirs: float, target: float | None = None) -> Row:
    return _compared(work, (_time(ours), _time(theirs)), theirs / ours, target)


def _beside_floor(label: str, ours: float, floor: float, peak: int) -> Row:
    """Compare the whole process with a script of numpy's, in the columns of plait and its ratio."""
    ratio = ours / floor
    cells = (f"{_time(ours)}, {_mb(peak)}", f"{_time(floor)}, a script of numpy's", f"{ratio:.2f}")
    return Row(f"{label}, whole process and its memory", cells, "≤ 1.5, ≤ 80 MB", ratio <= 1.5 and peak <= 80 * MB)


def _memory(work: str, ours: float, theirs: float, target: float | None = None) -> Row:
    return _compared(work, (_mb(ours), _mb(theirs)), theirs / max(1, ours), target)


def _compared(work: str, values: tuple[str, str], ratio: float, target: float | None) -> Row:
    cells = (*values, f"{ratio:.0f}×" if ratio >= 10 else f"{ratio:.1f}×")
    return Row(work, cells) if target is None else Row(work, cells, f"≥ {target:.0f}×", ratio >= target)


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds < 0.1 else f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"


def _mb(size: float) -> str:
    return f"{size / MB:.0f} MB"


if __name__ == "__main__":
    main()
