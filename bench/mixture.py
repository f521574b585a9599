"""The live mixture compared with PEFT and with dense deltas, in one run: `python bench/mixture.py [--quick] [--markdown]`.

SmolLM2-135M with the demo's three adapters and a random one, all linear layers, r 8 each. PEFT has one active LoRA of r 32.
Variants take turns in one process; the fastest of their turns counts. Judged is CPU time of all threads, which other work
on the machine changes least; wall time is next to it. Results go to `bench/results/mixture.json` too.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import report
from processes import HERE, run_job
from report import Row, Section

sys.path.insert(0, str(HERE.parent / "examples" / "demo"))
from base_model import base_model

RESULTS = HERE / "results" / "mixture.json"
DEMO = HERE.parent / "examples" / "demo" / "adapters"
SCRIPT = "mixture_jobs.py"
SHAPE = (8, 64)
SMALL = (1, 64)  # a short batch, where forming dense weights weighs most
VARIANTS = ["base", "mixture", "PEFT", "PEFT, the base's dtype", "applied", "dense", "streamed"]
DENSE = {
    "applied": "W x + Σ λ ΔW x, dense ΔW held",
    "dense": "(W + Σ λ ΔW) x, dense ΔW held",
    "streamed": "(W + Σ λ ΔW) x, dense ΔW formed when needed",
}
CANDIDATES = 8
MB = 1e6


def run(cache: Path, rounds: int, raw: dict[str, Any]) -> list[Section]:
    """Measure everything."""
    common: dict[str, Any] = {"base": str(base_model()), "adapters": adapters(cache)}

    def job(label: str, name: str, **arguments: Any) -> dict[str, Any]:
        raw[label] = run_job(name, script=SCRIPT, **common, **arguments)
        return raw[label]

    sections = []
    for dtype in ("bfloat16", "float32"):
        found = job(f"times {dtype}", "times", dtype=dtype, shape=SHAPE, rounds=rounds, variants=VARIANTS)
        peaks = {v: job(f"memory {dtype} {v}", "memory", dtype=dtype, shape=SHAPE, variant=v) for v in VARIANTS if v != "base"}
        sections.append(_beside(dtype, found, peaks))
    found = job("times small", "times", dtype="bfloat16", shape=SMALL, rounds=2 * rounds, variants=VARIANTS)
    sections.append(_beside(f"bfloat16, a batch of {SMALL[0]} × {SMALL[1]}", found, {}))
    sections.append(_agreement(job("agreement", "agreement", shape=SMALL, variants=list(DENSE))))
    sections.append(_switching(job("switching", "switching"), job, rounds))
    return sections


def adapters(cache: Path) -> list[str]:
    """Return the folders of the four adapters; the random one is made in the cache."""
    folders = sorted(str(p) for p in DEMO.iterdir() if p.is_dir())
    random = cache / "random"
    run_job("random_adapter", script=SCRIPT, like=folders[0], out=str(random))
    return [*folders, str(random)]


def _beside(title: str, found: dict[str, Any], peaks: dict[str, Any]) -> Section:
    section = Section(f"Four adapters on SmolLM2-135M, {title}", ("mixture", "other", "CPU time", "wall time"))
    for work, name in (("forward", "forward"), ("step", "forward + backward to λ")):
        section.rows.append(_ratio(f"{name}, the bare base", found, work, "base", None))
        section.rows.append(_ratio(f"{name}, PEFT with one LoRA of r 32", found, work, "PEFT", 1.2))
        section.rows.append(_ratio(f"{name}, PEFT, factors in the base's dtype", found, work, "PEFT, the base's dtype", 1.2))
        for variant, words in DENSE.items():
            section.rows.append(_ratio(f"{name}, {words}", found, work, variant, 1 / 3 if work == "step" else None))
    added = {v: found[v]["step"]["cpu"] - found["base"]["step"]["cpu"] for v in VARIANTS}
    for variant in ("PEFT", *DENSE):
        ratio = f"{added['mixture'] / added[variant]:.2f}×" if added[variant] > 0 else "–"
        cells = (_time(added["mixture"]), _time(added[variant]), ratio, "")
        section.rows.append(Row(f"the same, on top of the bare base's, {DENSE.get(variant, variant)}", cells))
    section.notes.append(
        "The bare base's backward pass goes to the first layer's input: what learning anything costs at least."
    )
    section.notes.append(
        "Dense: every adapter's ΔW is a matrix of W's size. Applied one by one, each costs a product as W does, forward and "
        "backward; summed into W in every step, a pass over W's memory, and the backward pass the gradient of all of W, which "
        "counts most in a short batch."
    )
    for variant in peaks:
        if variant != "mixture":
            target = 1.1 if variant.startswith("PEFT") else None
            ours, theirs = (peaks[v]["all"]["peak_rss"] for v in ("mixture", variant))
            cells = (_mb(ours), _mb(theirs), f"{ours / theirs:.2f}×", "")
            words = DENSE.get(variant, variant)
            section.rows.append(_judged(f"peak memory of steps, model included, {words}", cells, ours / theirs, target))
    return section


def _agreement(found: dict[str, Any]) -> Section:
    section = Section("Gradients to λ in float32, largest difference by the mixture's largest", ("", "", "", ""))
    for variant, words in DENSE.items():
        section.rows.append(Row(words, (f"{found[variant]:.1e}", "", "", ""), "≤ 1e-04", found[variant] <= 1e-4))
    return section


def _switching(took: dict[str, Any], job: Any, rounds: int) -> Section:
    section = Section("Switching, and many candidates in one pass", ("", "", "", ""))
    exchange = ("", f"{took['exchange'] * 1e3:.3f} ms", "", "")
    section.rows.append(Row("exchange coefficients", exchange, "≤ 1 ms", took["exchange"] <= 1e-3))
    section.rows.append(Row("enter another set of adapters", ("", f"{took['enter'] * 1e3:.3f} ms", "", "")))
    for shape in ((1, 16), SMALL, SHAPE):
        found = job(f"candidates {shape}", "candidates", dtype="bfloat16", shape=shape, rounds=rounds, count=CANDIDATES)
        together, apart = found["together"], found["apart"]
        cells = (
            _time(together["cpu"]), _time(apart["cpu"]),
            f"{apart['cpu'] / together['cpu']:.2f}×", f"{apart['wall'] / together['wall']:.2f}×",
        )  # fmt: skip
        section.rows.append(
            Row(f"{CANDIDATES} candidates on {shape[0]} × {shape[1]}: one pass, {CANDIDATES} passes, gain", cells)
        )
    return section


def _ratio(work: str, found: dict[str, Any], kind: str, other: str, target: float | None) -> Row:
    ours, theirs = found["mixture"][kind], found[other][kind]
    ratio = ours["cpu"] / theirs["cpu"]
    cells = (_time(ours["cpu"]), _time(theirs["cpu"]), f"{ratio:.2f}×", f"{ours['wall'] / theirs['wall']:.2f}×")
    return _judged(work, cells, ratio, target)


def _judged(work: str, cells: tuple[str, ...], ratio: float, target: float | None) -> Row:
    return Row(work, cells) if target is None else Row(work, cells, f"≤ {target:.2f}×", ratio <= target)


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _mb(size: float) -> str:
    return f"{size / MB:.0f} MB"


if __name__ == "__main__":
    report.take_turns(__doc__, run, RESULTS, rounds=3)
