"""plait's merges compared with the papers' dense algorithms, and with PEFT: `python bench/methods.py [--limit S] [--markdown]`.

Eight random adapters of rank 16 for one module, float64 on both sides so that results can be compared, one thread, CPU seconds.
The dense algorithm starts from dense deltas, plait from factors. A dense run that would take longer than the limit, judged by
the cube of the dimensions, is left out, with a note. Then TIES on the dense deltas of two float32 adapters with a truncation:
plait's merge of files against PEFT's `ties_svd` (`--dense` does only this). Results go to `bench/results/methods.json` too.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import report
from processes import run_job
from report import Row, Section

RESULTS = Path(__file__).parent / "results" / "methods.json"
METHODS = {"tsv": "TSV-M", "iso_c": "Iso-C", "core": "Core (TIES)", "knots": "KnOTS (TIES)"}
SIZES = (1024, 4096)
SHAPE = {"adapters": 8, "rank": 16}
GROWTH = {"m": 2048, "n": 2048, "adapters": 4, "rank": 16}
QUICKER, ERROR = 100, 1e-6
DENSE = ((4096, 4096), (11008, 4096))
DENSE_RANK, DENSE_QUICKER = 64, 50
MB = 1e6


class Bench:
    """One run.

    Args:
        folder: for merged deltas.
        limit: most CPU seconds that a dense run may be expected to take.
    """

    def __init__(self, folder: Path, limit: float) -> None:
        self.folder = folder
        self.limit = limit
        self.raw: dict[str, Any] = {}
        self._started = time.perf_counter()

    def run(self, side: str, method: str, shape: Mapping[str, int], repeat: int, out: Path) -> dict[str, Any]:
        """Merge in a fresh process."""
        found = run_job("merge_once", side=side, method=method, **shape, dtype="float64", out=str(out), repeat=repeat)
        label = f"{side} {method} " + " ".join(f"{k}={v}" for k, v in shape.items())
        self.raw[label] = found
        print(
            f"[{time.perf_counter() - self._started:4.0f} s] {label}: {found['cpu_seconds']:.3f} s", file=sys.stderr, flush=True
        )
        return found

    def beside_dense(self) -> Section:
        """Compare both sides at every size."""
        section = Section(
            "Eight adapters of rank 16, float64, one module",
            ("plait", "dense", "times quicker", "plait memory", "dense memory", "difference"),
        )
        before: dict[str, float] = {}
        for size in SIZES:
            for method, name in METHODS.items():
                section.rows.append(self._compared(method, f"{name}, {size} × {size}", size, before))
        section.notes += [
            "CPU time of one thread; memory above the inputs; difference: largest entry over largest value.",
            f"Dense runs expected to take more than {self.limit:g} s are left out (~: expected by the cube of the dimensions).",
        ]
        return section

    def _compared(self, method: str, work: str, size: int, before: dict[str, float]) -> Row:
        shape = {"m": size, "n": size, **SHAPE}
        ours = self.run("plait", method, shape, 5, self.folder / "plait.pt")
        expected = before.get(method, 0.0) * (size / SIZES[0]) ** 3
        target = f"≥ {QUICKER} ×, ≤ {ERROR:g}"
        own = (_time(ours["cpu_seconds"]), _memory(ours["peak_rss"]))
        if expected > self.limit:
            ratio = f"~{expected / ours['cpu_seconds']:.0f} ×"
            return Row(work, (own[0], f"~{_time(expected)}", ratio, own[1], "not run", "not compared"))
        dense = self.run("dense", method, shape, 1, self.folder / "dense.pt")
        before.setdefault(method, dense["cpu_seconds"])
        ratio = dense["cpu_seconds"] / ours["cpu_seconds"]
        error = self._difference()
        cells = (own[0], _time(dense["cpu_seconds"]), f"{ratio:.0f} ×", own[1], _memory(dense["peak_rss"]), f"{error:.1e}")
        return Row(work, cells, target, ratio >= QUICKER and error <= ERROR)

    def _difference(self) -> float:
        import torch

        ours, dense = (torch.load(self.folder / f"{side}.pt") for side in ("plait", "dense"))
        return float((ours - dense).abs().max() / dense.abs().max())

    def beside_peft(self) -> Section:
        """Compare TIES on dense deltas, truncated to a rank."""
        section = Section(
            f"TIES on dense deltas, two adapters of rank {DENSE_RANK}, truncated to {DENSE_RANK}, one module",
            ("plait", "PEFT `ties_svd`", "times quicker", "plait's energy over PEFT's"),
        )
        module, first = "mlp.up_proj", 0.0
        for m, n in DENSE:
            adapters = run_job("make_module", folder=str(self.folder / f"{m}-{n}"), module=module, shape=[m, n])["adapters"]
            ours, theirs = str(self.folder / f"plait-{m}-{n}"), str(self.folder / f"peft-{m}-{n}")
            settings = {"method": "ties_svd", "density": 0.2, "rank": DENSE_RANK, "workers": 1}
            merged = run_job("plait_merge", adapters=adapters, out=ours, settings=settings, repeat=4)
            self.raw[f"ties_svd {m} {n} plait"], seconds = merged, merged["busy"]
            print(f"[{time.perf_counter() - self._started:4.0f} s] plait ties_svd {m} {n}: {seconds:.3f} s", file=sys.stderr)
            expected = first * max(m, n) ** 3 / DENSE[0][0] ** 3
            if expected > self.limit:
                cells = (_time(seconds), f"~{_time(expected)}", f"~{expected / seconds:.0f} ×", "not compared")
                section.rows.append(Row(f"{m} × {n}", cells))
                continue
            found = run_job(
                "peft_modules",
                adapters=adapters,
                out=theirs,
                modules=[module],
                combination_type="ties_svd",
                rank=DENSE_RANK,
                density=0.2,
            )
            self.raw[f"ties_svd {m} {n} peft"] = found
            dense = found["cpu_seconds"][module]
            first = first or dense
            kept = run_job("energies", folders=[ours, theirs], module=module)["energies"]
            ratio, share = dense / seconds, kept[0] / kept[1]
            cells = (_time(seconds), _time(dense), f"{ratio:.0f} ×", f"{share:.4f}")
            section.rows.append(Row(f"{m} × {n}", cells, f"≥ {DENSE_QUICKER} ×", ratio >= DENSE_QUICKER))
        section.notes.append(
            "CPU time of a merge from file to file, the quickest of 4, and of PEFT's `add_weighted_adapter` alone."
        )
        return section

    def growth(self) -> Section:
        """Time plait while one of m, n, T and r doubles."""
        start = " × ".join(str(GROWTH[k]) for k in ("m", "n"))
        shapes = [GROWTH, *({**GROWTH, key: 2 * GROWTH[key]} for key in GROWTH)]
        found = run_job(
            "merge_growing", methods=list(METHODS), shapes=[list(s.values()) for s in shapes], dtype="float32", repeat=5
        )
        self.raw["growth"] = found
        section = Section(
            f"plait's time, float32, as one number doubles: from {start}, T = {GROWTH['adapters']}, r = {GROWTH['rank']}",
            ("start", "2 m", "2 n", "2 T", "2 r"),
        )
        for method, name in METHODS.items():
            first, *more = found[method]
            section.rows.append(Row(name, (_time(first), *(f"{x / first:.1f} ×" for x in more))))
        section.notes.append("Work is (m + n) R² + R³ with R = T r (KnOTS: and T R n for its coordinates).")
        return section


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def _memory(peak: int) -> str:
    return f"{peak / MB:.0f} MB"


def main() -> None:
    """Run everything and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=float, default=60, help="leave out dense runs expected to take longer (seconds)")
    parser.add_argument("--markdown", action="store_true", help="print the tables for a README")
    parser.add_argument("--dense", action="store_true", help="only TIES on dense deltas, against PEFT")
    arguments = parser.parse_args()
    machine = report.machine()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), arguments.limit)
        sections = [] if arguments.dense else [bench.beside_dense(), bench.growth()]
        sections.append(bench.beside_peft())
    report.conclude(RESULTS, machine, sections, bench.raw, quick=False, as_markdown=arguments.markdown)


if __name__ == "__main__":
    main()
