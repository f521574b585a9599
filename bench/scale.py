"""How time, memory and bytes grow with adapters, rank, modules and width: `python bench/scale.py [--quick] [--markdown]`.

One layer (all seven projections, random values, float32 adapters) of models of several widths is merged, inspected and baked
with one thread, every time in a fresh process. CPU seconds are fitted by the terms that the algorithms have, without the two
largest layers, which the fit then predicts: its error there is shown. Complete models are a measured layer times their
layers. A bake of Llama 3.1 405B on nodes is arithmetic from the measured rates. Results go to `bench/results/scale.json` too.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np

import report
import synthetic
from processes import run_job
from report import Row, Section

RESULTS = Path(__file__).parent / "results" / "scale.json"
MB, GB = 1e6, 1e9
Usage = dict[str, float]  # as `measuring.Usage`, and the whole process's `wall`
WORKS = ("linear", "ties, core", "ties, delta", "inspect")


@dataclass(frozen=True)
class Model:
    """A decoder of Llama's form: d, width of keys and values, of the MLP, layers, rows of the two vocabularies."""

    name: str
    d: int
    kv: int
    mlp: int
    layers: int
    vocabulary: int

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """The modules of one layer, (d_out, d_in)."""
        d, kv, mlp = self.d, self.kv, self.mlp
        attention = {"q": (d, d), "k": (kv, d), "v": (kv, d), "o": (d, d)}
        return {f"self_attn.{n}_proj": s for n, s in attention.items()} | {
            "mlp.gate_proj": (mlp, d), "mlp.up_proj": (mlp, d), "mlp.down_proj": (d, mlp),
        }  # fmt: skip

    @property
    def targets(self) -> list[tuple[str, tuple[int, int]]]:
        """The same under their paths in the model."""
        return [(f"model.layers.0.{name}", shape) for name, shape in self.shapes.items()]

    @property
    def entries(self) -> int:
        """Values of one layer."""
        return sum(m * n for m, n in self.shapes.values())

    @property
    def edges(self) -> int:
        """Σ (d_out + d_in) of one layer: a LoRA has this many values per rank."""
        return sum(m + n for m, n in self.shapes.values())

    @property
    def bytes(self) -> float:
        """Of the complete model in bfloat16."""
        return 2.0 * (self.entries * self.layers + self.vocabulary * self.d)


SMALL = Model("d 1024", 1024, 512, 3072, 1, 0)
QWEN = Model("Qwen3 1.7B", 2048, 1024, 6144, 28, 151936)
LLAMA_8B = Model("Llama 3.1 8B", 4096, 1024, 14336, 32, 2 * 128256)
LLAMA_70B = Model("Llama 3.1 70B", 8192, 1024, 28672, 80, 2 * 128256)
LLAMA_405B = Model("Llama 3.1 405B", 16384, 1024, 53248, 126, 2 * 128256)


@dataclass(frozen=True)
class Point:
    """What is measured: one layer of a model, T adapters of rank r."""

    model: Model
    count: int
    rank: int

    @property
    def label(self) -> str:
        """For tables."""
        return f"{self.model.name}, T {self.count}, r {self.rank}"


FITTED = (
    Point(SMALL, 2, 16),
    Point(SMALL, 2, 64),
    Point(QWEN, 2, 64),
    Point(QWEN, 4, 64),
    Point(QWEN, 8, 16),
    Point(SMALL, 2, 256),
)
PREDICTED = (Point(LLAMA_8B, 2, 64), Point(LLAMA_70B, 2, 64))
MANY = Point(QWEN, 16, 64)  # inspected only
#: Terms of a layer's time, in 10⁹; R = T r.
TERMS: dict[str, dict[str, Callable[[Point], float]]] = {
    "linear": {"R Σ(m+n)": lambda p: p.count * p.rank * p.model.edges},
    "ties, core": {
        "R² Σ(m+n)": lambda p: (p.count * p.rank) ** 2 * p.model.edges,
        "R³ per module": lambda p: 7 * (p.count * p.rank) ** 3,
    },
    "inspect": {
        "R Σmn": lambda p: p.count * p.rank * p.model.entries,
        "T² Σmn": lambda p: p.count**2 * p.model.entries,
        "R² Σ(m+n)": lambda p: (p.count * p.rank) ** 2 * p.model.edges,
    },
}


class Bench:
    """One run in a folder that is removed after it."""

    def __init__(self, folder: Path, points: Sequence[Point]) -> None:
        self.folder, self.points = folder, points
        self.raw: dict[str, Any] = {}
        self.used: dict[tuple[str, Point], Usage] = {}  # by work

    def run(self) -> Iterator[Section]:
        """Measure everything and yield the tables."""
        for point in self.points:
            self._measure(point)
        yield self._measured()
        if set(FITTED) <= {*self.points}:
            yield self._fitted()
            yield self._models()
        yield from self._bakes()

    def _measure(self, point: Point) -> None:
        places = self._adapters(point, Path("base"))
        settings: dict[str, dict[str, Any]] = {
            "linear": {"method": "linear"},
            "ties, core": {"method": "ties", "density": 0.2, "space": "core"},
            "ties, delta": {"method": "ties", "density": 0.2, "space": "delta", "rank": point.rank},
        }
        for work in WORKS:
            if (work == "ties, delta" and point.model.d > LLAMA_8B.d) or (work != "inspect" and point == MANY):
                continue
            merge = work in settings
            given = {**settings[work], "out": str(self.folder / "out"), "force": True} if merge else {}
            used = run_job(
                "work", script="scale_jobs.py", command="merge" if merge else "inspect", adapters=places, settings=given
            )
            self.used[work, point] = self.raw[f"{work}; {point.label}"] = used
        rmtree(self.folder)

    def _adapters(self, point: Point, base: Path) -> list[str]:
        """Make the adapters of one layer; return their folders."""
        places = [self.folder / f"adapter{t}" for t in range(point.count)]
        for seed, place in enumerate(places):
            place.mkdir(parents=True)
            synthetic.make_adapter(place, point.model.targets, seed, base, rank=point.rank)
        return [str(place) for place in places]

    def _measured(self) -> Section:
        section = Section("One layer, one thread: CPU time, peak memory above Python with torch and plait", WORKS)
        for point in self.points:
            cells = tuple(_used(self.used.get((work, point))) for work in WORKS)
            section.rows.append(Row(point.label, cells))
        section.notes.append(
            "Merges include reading, sha256 of adapters and result, writing, flushing. ties, delta is truncated to r."
        )
        return section

    def _fitted(self) -> Section:
        section = Section(
            "Fitted: seconds per 10⁹ of every term, per layer", ("terms", "error of the fit", "8B, 70B: predicted / measured")
        )
        for work, terms in TERMS.items():
            factors, error = self._fit(work)
            ratios = [
                sum(f * x for f, x in zip(factors, self._row(work, p), strict=True)) / self.used[work, p]["cpu_seconds"]
                for p in PREDICTED
            ]
            named = zip(terms, factors[1:], strict=True)
            text = f"{factors[0]:.3f} s + " + " + ".join(f"{f:.3g} · {name}" for name, f in named if f > 0)
            section.rows.append(Row(work, (text, f"{error:.0%}", ", ".join(f"{r:.2f}" for r in ratios))))
        return section

    def _row(self, work: str, point: Point) -> list[float]:
        return [1.0, *(term(point) / 1e9 for term in TERMS[work].values())]

    def _fit(self, work: str) -> tuple[list[float], float]:
        """Return factors ≥ 0 of a constant and the terms, of least squares of relative errors, and the largest of these."""
        seconds = np.array([self.used[work, p]["cpu_seconds"] for p in FITTED])
        rows = np.array([self._row(work, p) for p in FITTED]) / seconds[:, None]
        kept = list(range(rows.shape[1]))
        while True:
            found = np.linalg.lstsq(rows[:, kept], np.ones(len(rows)), rcond=None)[0]
            if (found >= 0).all() or len(kept) == 1:
                break
            kept.pop(int(found.argmin()))
        factors = np.zeros(rows.shape[1])
        factors[kept] = found
        self.raw[f"factors: {work}"] = factors.tolist()
        return factors.tolist(), float(abs(rows @ factors - 1).max())

    def _models(self) -> Section:
        section = Section("Complete models, T 2, r 64: a measured layer × layers, one thread", ("adapter", "result", *WORKS))
        for point in (Point(QWEN, 2, 64), *PREDICTED):
            model, cells = point.model, []
            for work in WORKS:
                usage = self.used.get((work, point))
                cells.append("–" if usage is None else _time(usage["cpu_seconds"] * model.layers))
            size = 4.0 * point.rank * model.edges * model.layers
            section.rows.append(Row(model.name, (_size(size), _size(size * point.count), *cells)))
        section.notes.append(
            "Bytes are exact: 4 r Σ(m+n) per layer and adapter in float32; an exact result has rank T r. Memory does not "
            "depend on layers. Start-up is not part of it."
        )
        return section

    def _bakes(self) -> Iterator[Section]:
        """Bake one layer, and take a linear function of bytes and products from two sizes."""
        models = [m for m in (QWEN, LLAMA_8B) if any(p.model is m for p in self.points)]
        if len(models) < 2:
            return
        section = Section(
            "Bake of one layer, bfloat16, two adapters of r 64, one thread", ("bytes", "CPU", "peak memory", "CPU per GB")
        )
        found = {}
        for model in models:
            usage = self._bake(model)
            size = 2 * model.entries
            found[model] = usage
            cells = (
                _size(size),
                _time(usage["cpu_seconds"]),
                f"{usage['peak_anonymous'] / MB:.0f} MB",
                _time(usage["cpu_seconds"] / size * GB),
            )
            section.rows.append(Row(model.name, cells))
            self.raw[f"bake; {model.name}"] = usage
        section.notes.append("With the sha256 of base, adapters and result. Anonymous memory; mapped files are not counted.")
        yield section
        rate, hashing = found[LLAMA_8B]["cpu_seconds"] / (2 * LLAMA_8B.entries), _hashing()
        self.raw["seconds per byte"] = {"bake": rate, "sha256": hashing}
        yield _on_one(rate)
        yield _on_nodes(rate, hashing)

    def _bake(self, model: Model) -> Usage:
        import torch
        from safetensors.torch import save_file

        base, file = self.folder / "base", self.folder / "base" / "model.safetensors"
        base.mkdir(parents=True)
        save_file({f"{n}.weight": torch.full(s, 0.01, dtype=torch.bfloat16) for n, s in model.targets}, file)
        (base / "config.json").write_text(json.dumps({"tie_word_embeddings": False}), encoding="utf-8")
        settings = {"base": str(base), "out": str(self.folder / "baked"), "method": "linear"}
        places = self._adapters(Point(model, 2, synthetic.RANK), base)
        used = run_job("work", script="scale_jobs.py", command="bake", adapters=places, settings=settings)
        rmtree(self.folder)
        return used


def _hashing() -> float:
    """Return the seconds of sha256 per byte, on one thread."""
    data = bytes(1 << 28)
    start = time.process_time()
    hashlib.sha256(data)
    return (time.process_time() - start) / len(data)


def _on_one(rate: float) -> Section:
    """Return what bakes of complete models take of a processor, at CPU seconds per byte."""
    section = Section("Bakes of complete models, extrapolated by bytes from 8B's layer", ("bytes", "CPU"))
    for model in (QWEN, LLAMA_8B, LLAMA_70B, LLAMA_405B):
        section.rows.append(Row(model.name, (_size(model.bytes), _time(rate * model.bytes))))
    return section


def _on_nodes(rate: float, hashing: float) -> Section:
    """Return what a bake of the 405B model takes on nodes: what is slowest of processors, one file's hash and storage.

    Args:
        rate: CPU seconds per byte of the model.
        hashing: of sha256.
    """
    model, shards, cores = LLAMA_405B, 191, 16
    size = model.bytes
    section = Section(
        f"{model.name} on nodes of {cores} cores: {_size(size)} in {shards} files",
        ("files per node", "nodes' work", "storage 2 GB/s", "storage 20 GB/s", "20 GB/s, base hashed"),
    )
    for nodes in (1, 4, 16, 64):
        turns = -(-shards // nodes)  # a node makes one file at a time
        work = turns * size / shards * max(rate / cores, hashing)
        slow, fast = (max(work, 2 * size / (bandwidth * GB)) for bandwidth in (2, 20))
        hashed = max(work, 3 * size / (20 * GB), hashing * size)
        cells = (str(turns), *(_time(t) for t in (work, slow, fast, hashed)))
        section.rows.append(Row(f"{nodes} node" + "s" * (nodes > 1), cells))
    section.notes.append(
        f"Arithmetic, not a run, from {rate * GB:.1f} CPU seconds per GB of a bake and {hashing * GB:.2f} of sha256. A node "
        "makes a file with all its cores, and hashes it on one, in order. The base is read once and the result written once, "
        "at the storage's bandwidth in total. A base whose sha256 is not noted is read again, and hashed by the driver on one "
        "thread."
    )
    return section


def _used(usage: Usage | None) -> str:
    return "–" if usage is None else f"{_time(usage['cpu_seconds'])}, {usage['peak_rss'] / MB:.0f} MB"


def _time(seconds: float) -> str:
    if seconds >= 600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds:.0f} s" if seconds >= 20 else f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def _size(size: float) -> str:
    return f"{size / GB:.3g} GB" if size >= GB else f"{size / MB:.3g} MB"


def main() -> None:
    """Parse arguments, measure, report."""
    options = report.arguments(__doc__, "the smallest layers", cache=False)
    machine = report.machine()
    points = FITTED[:2] if options.quick else (*FITTED, MANY, *PREDICTED)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), points)
        sections = list(bench.run())
    report.conclude(RESULTS, machine, sections, bench.raw, quick=options.quick, as_markdown=options.markdown)


if __name__ == "__main__":
    main()
