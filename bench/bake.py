"""plait's bake compared with `cp -r` and PEFT, in one run: `python bench/bake.py [--quick] [--markdown]`.

A random model with the shapes of Qwen3-1.7B (bfloat16, several files) and two random adapters (all linear layers, r 64,
float32). Every measurement is a fresh process; files are in the page cache for all. Two sizes of model show that memory does
not grow. The base is laid out as in the Hub's cache, and in a plain folder, where its sha256 has to be computed. Results go to
`bench/results/bake.json` too.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import report
import synthetic
from processes import run_job
from report import Row, Section

RESULTS = Path(__file__).parent / "results" / "bake.json"
MB = 1e6
MEMORY_TARGET = 300 * MB
SHARD = "1GB"


class Bench:
    """One run.

    Args:
        cache: where files are kept.
        sizes: numbers of layers, the last one is compared with the others' tools.
        repeats: how often times are taken; the fastest counts.
    """

    def __init__(self, cache: Path, sizes: tuple[int, ...], repeats: int) -> None:
        self.cache, self.sizes, self.repeats = cache, sizes, repeats
        self.out = cache / "bake-out"
        self.raw: dict[str, Any] = {}

    def job(self, label: str, job: str, **arguments: Any) -> dict[str, Any]:
        """Run a job and keep its result."""
        self.raw[label] = run_job(job, **arguments)
        return self.raw[label]

    def fastest(self, label: str, key: str, job: str, *, out: Path | None = None, **arguments: Any) -> dict[str, Any]:
        """Run a job several times, its output removed before each, and return the fastest by a key."""
        runs = []
        for _ in range(self.repeats):
            if out is not None:
                shutil.rmtree(out, ignore_errors=True)
                arguments["out"] = str(out)
            runs.append(run_job(job, **arguments))
        self.raw[label] = runs
        best: dict[str, Any] = min(runs, key=lambda r: r["work"]["seconds"] if key == "work" else r[key])
        return best


def run(bench: Bench) -> list[Section]:
    """Measure everything."""
    shutil.rmtree(bench.out, ignore_errors=True)
    bench.out.mkdir(parents=True)
    made = {n: bench.job(f"make {n}", "make_sharded", layers=n, cache=str(bench.cache)) for n in bench.sizes}
    workers = min(4, report.machine()["cores"])
    bakes = {n: bake(bench, n, made[n]["base"], workers) for n in bench.sizes}
    layers = bench.sizes[-1]
    fetched = bench.job("fetched", "lay_out_as_fetched", base=made[layers]["base"])["base"]
    known = bake(bench, layers, fetched, workers)
    unhashed = bake(bench, layers, made[layers]["base"], workers, hash_base=False)
    sections = [
        compared(bench, layers, made[layers], bakes[layers], {"fetched": known, "not hashed": unhashed}, workers),
        beside_floor(bench, layers, made[layers]["base"], bakes[layers]),
        memory(bakes, made),
    ]
    shutil.rmtree(bench.out, ignore_errors=True)
    return sections


def bake(bench: Bench, layers: int, base: str, workers: int, **settings: Any) -> dict[str, Any]:
    """Bake one size."""
    out = bench.out / f"plait-{layers}"
    label = " ".join(["plait", str(layers), Path(base).name, *settings])
    return bench.fastest(
        label, "work", "plait_bake", out=out, base=base, adapters=_adapters(bench, layers),
        settings={"workers": workers, **settings},
    )  # fmt: skip


def compared(
    bench: Bench,
    layers: int,
    made: dict[str, Any],
    ours: dict[str, Any],
    others: dict[str, dict[str, Any]],
    workers: int,
) -> Section:
    """Compare with a copy and with PEFT; `others` are bakes of a base whose sha256 is known (fetched), or not wanted."""
    adapters = _adapters(bench, layers)
    copied = bench.fastest("cp", "seconds", "copy", out=bench.out / "cp", base=made["base"])
    shutil.rmtree(bench.out / "cp")
    peft = bench.fastest(
        "PEFT", "work", "peft_bake", out=bench.out / "peft", base=made["base"], adapters=adapters, max_shard_size=SHARD
    )
    arithmetic = bench.fastest("arithmetic", "seconds", "bake_arithmetic", adapters=adapters, layers=layers, workers=workers)
    hashes = bench.fastest(
        "sha256", "seconds", "bake_hashes", folders=[made["base"], str(bench.out / f"plait-{layers}")], workers=workers
    )
    same = bench.job("difference", "compare_models", left=str(bench.out / f"plait-{layers}"), right=str(bench.out / "peft"))
    seconds, theirs = ours["work"]["seconds"], peft["work"]["seconds"]
    times = {**{word: run["work"]["seconds"] for word, run in others.items()}, "hashed": seconds}
    section = Section(f"A bake of {made['bytes'] / 1e9:.2f} GB, cp -r and PEFT", ("time", "against plait", "peak memory"))
    section.rows = [
        Row("cp -r of the base", (_s(copied["seconds"]), f"{copied['seconds'] / seconds:.2f}×", "")),
        Row("cp -r of the base, flushed to disk", (_s(copied["flushed"]), f"{copied['flushed'] / seconds:.2f}×", "")),
        *(
            Row(
                f"plait: bake of a base that is {word}",
                (_s(times[word]), f"{times[word] / seconds:.2f}×", _mb(run["all"]["peak_rss"])),
            )
            for word, run in others.items()
        ),
        Row("plait: bake of a base that is hashed", (_s(seconds), "1×", _mb(ours["all"]["peak_rss"]))),
        Row("  of which arithmetic alone", (_s(arithmetic["seconds"]), "", "")),
        Row("  of which sha256 of base and result", (_s(hashes["seconds"]), "", "")),
        *(
            Row(
                f"plait without arithmetic, base {word}",
                (_s(rest := times[word] - arithmetic["seconds"]), f"{rest / against:.2f}× cp{how}", ""),
                f"≤ 1.5× cp{how}", rest <= 1.5 * against,
            )
            for word, how, against in (
                ("fetched", "", copied["seconds"]),
                ("hashed", "", copied["seconds"]),
                ("not hashed", ", flushed", copied["flushed"]),
            )
        ),
        Row(
            "PEFT: load, merge_and_unload, save", (_s(theirs), f"{theirs / seconds:.1f}×", _mb(peft["all"]["peak_rss"])),
            "≥ 2×", theirs >= 2 * seconds,
        ),
        Row("‖plait − PEFT‖ / ‖PEFT‖", (f"{same['difference']:.1e}", f"{same['equal']:.1%} equal", "")),
    ]  # fmt: skip
    section.notes = [
        f"{layers} layers, {made['bytes'] / 1e9:.2f} GB in bfloat16, two adapters of r {synthetic.RANK} on all linear layers: "
        f"{ours['changed'] / ours['total']:.0%} of the bytes change. {workers} threads; fastest of {bench.repeats}.",
        "Times without interpreter and imports, for plait and PEFT alike. plait flushes every file, hashes the result, and a "
        "base whose sha256 is not noted (plait.lock), and can be killed and resumed; cp and PEFT do none of this. PEFT "
        "rounds to bfloat16 after each adapter, plait once.",
    ]
    return section


def beside_floor(bench: Bench, layers: int, base: str, ours: dict[str, Any]) -> Section:
    """Compare processor time with a script that does the same arithmetic with the same hashes, and nothing else."""
    floor = bench.fastest(
        "floor", "cpu_seconds", "bake_floor", out=bench.out / "floor", base=base, adapters=_adapters(bench, layers)
    )
    same = bench.job("equal", "compare_models", left=str(bench.out / f"plait-{layers}"), right=str(bench.out / "floor"))
    shutil.rmtree(bench.out / "floor")
    cpu, least = ours["work"]["cpu_seconds"], floor["cpu_seconds"]
    section = Section("Processor time: the same arithmetic with the same hashes", ("CPU", "against it"))
    section.rows = [
        Row("a script with three buffers", (_s(least), "1×")),
        Row("plait: bake of a base that is hashed", (_s(cpu), f"{cpu / least:.2f}×"), "≤ 1.1×", cpu <= 1.1 * least),
        Row("equal values", (f"{same['equal']:.1%}", "")),
    ]
    section.notes = [
        "Of all threads, without imports. The script makes one file after another on one thread and checks nothing."
    ]
    return section


def memory(bakes: dict[int, dict[str, Any]], made: dict[int, dict[str, Any]]) -> Section:
    """Show that memory does not depend on the size of the model."""
    section = Section("Memory above Python with torch imported", ("model", "peak memory", "anonymous"))
    for layers, run in bakes.items():
        peak = run["all"]["peak_rss"]
        cells = (f"{made[layers]['bytes'] / 1e9:.2f} GB", _mb(peak), _mb(run["all"]["peak_anonymous"]))
        section.rows.append(Row(f"plait, {layers} layers", cells, f"≤ {_mb(MEMORY_TARGET)}", peak <= MEMORY_TARGET))
    return section


def main() -> None:
    """Parse arguments, measure, report."""
    options = report.arguments(__doc__, "two small models, once")
    machine = report.machine()
    sizes, repeats = ((1, 2), 1) if options.quick else ((10, 28), 2)
    bench = Bench(options.cache.resolve(), sizes, repeats)
    sections = run(bench)
    report.conclude(RESULTS, machine, sections, bench.raw, quick=options.quick, as_markdown=options.markdown)


def _adapters(bench: Bench, layers: int) -> list[str]:
    return [str(path) for path in synthetic.locate(bench.cache, layers).adapters]


def _s(seconds: float) -> str:
    return f"{seconds:.2f} s"


def _mb(size: float) -> str:
    return f"{size / MB:.0f} MB"


if __name__ == "__main__":
    main()
