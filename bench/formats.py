"""Two LoRAs of SDXL in kohya's form, merged by plait and by a dense delta with an SVD per module: `python bench/formats.py`.

Random factors of rank 64 in float16 for every module that kohya's scripts adapt in SDXL: the attention blocks of the UNet, and
both text encoders. The dense way is that of the common scripts: per module both deltas as float32 matrices, their sum,
`torch.linalg.svd`, the first 64 directions. It is timed on one module of every shape, and the whole file's time is those times
their number; writing is not counted for it. Every measurement is a fresh process. Results go to
`bench/results/formats.json` too.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import Any

import report
import sdxl
from processes import run_job, time_command
from report import Row, Section

RESULTS = Path(__file__).parent / "results" / "formats.json"
WEIGHTS = (0.7, 0.5)
TARGET = 50
RUNS: dict[str, dict[str, Any]] = {"linear, exact": {"method": "linear"}, "svd, rank 64": {"method": "svd", "rank": sdxl.RANK}}


def run(cache: Path, raw: dict[str, Any], *, quick: bool) -> list[Section]:
    """Measure everything.

    Args:
        cache: where files are kept.
        raw: receives the single figures.
        quick: one small shape of the dense way, and no command.
    """
    modules, out = sdxl.modules(), cache / "out"
    counts = sdxl.counts(modules)
    probes = {shape: name for name, shape in reversed(modules.items()) if not quick or max(shape) < 1000}
    adapters = [str(cache / f"sdxl-{i}.safetensors") for i in (0, 1)]
    shutil.rmtree(out, ignore_errors=True)
    _say("making two adapters (once)")
    run_job("make", script="sdxl_jobs.py", paths=adapters)
    ours: dict[str, Any] = {}
    given: dict[str, Any]
    for label, settings in RUNS.items():
        given = {"adapters": adapters, "out": str(out / label), "settings": settings | {"weights": list(WEIGHTS)}}
        ours[label] = run_job("plait_merge", **given)
        _say(f"{label}: {ours[label]['work']['seconds']:.1f} s")
    words = ("-m", "plait", "merge", *adapters, "--weights", *map(str, WEIGHTS), "--force", "-o", str(out / "command"))
    command = 0.0 if quick else time_command(*words)
    dense = run_job("dense", script="sdxl_jobs.py", paths=adapters, modules=list(probes.values()), weights=WEIGHTS)
    found = {label: str(out / label / "lora.safetensors") for label in RUNS}
    given = {"paths": adapters, "modules": list(probes.values()), "weights": WEIGHTS, "results": found}
    errors = run_job("errors", script="sdxl_jobs.py", **given)
    theirs = {
        kind: sum(counts[shape] * dense["modules"][name][kind] for shape, name in probes.items())
        for kind in ("seconds", "cpu_seconds")
    }
    raw |= {"plait": ours, "command": command, "dense": dense, "dense, all modules": theirs, "errors": errors}
    shutil.rmtree(out, ignore_errors=True)
    return [_times(ours, command, theirs, probes, counts), _exactness(errors, dense)]


def _times(
    ours: dict[str, Any], command: float, theirs: dict[str, float], probes: dict[tuple[int, int], str], counts: Any
) -> Section:
    section = Section(f"Two SDXL LoRAs of rank {sdxl.RANK}, {sum(counts.values())} modules", ("plait", "dense + SVD", "ratio"))
    for label, result in ours.items():
        for kind, word in (("seconds", "wall"), ("cpu_seconds", "CPU")):
            mine = result["work"][kind]
            ratio = theirs[kind] / mine
            cells = (f"{mine:.1f} s", f"{theirs[kind]:.0f} s", f"{ratio:.0f}×")
            section.rows.append(Row(f"{label}, {word}", cells, f"≥ {TARGET}×", ratio >= TARGET))
    section.rows.append(Row("linear, the whole command", (f"{command:.1f} s", "", "")))
    shapes = ", ".join(f"{counts[shape]} of {shape[0]} × {shape[1]}" for shape in probes)
    section.notes = [
        "plait: without imports; reading, writing and hashes included. The linear merge is exact, at up to twice the rank; "
        "svd is the best approximation at the rank that the dense way writes.",
        f"Dense: one module of every shape, times their number ({shapes}).",
    ]
    return section


def _exactness(errors: dict[str, Any], dense: dict[str, Any]) -> Section:
    section = Section("Distance to the sum in float64, one module of every shape", ("largest error",))
    exact = max(errors["relative"]["linear, exact"])
    section.rows.append(Row("plait linear, |error| / |sum|", (f"{exact:.1e}",), "≤ 1e-6", exact <= 1e-6))
    best = max(errors["over best"]["svd, rank 64"])
    section.rows.append(Row("plait svd, error over the best of rank 64", (f"{best:.6f}",), "≤ 1.0001", best <= 1.0001))
    worst = max(m["error"] for m in dense["modules"].values())
    section.rows.append(Row("dense + SVD, |error| / |sum|", (f"{worst:.2f}",)))
    section.notes = ["plait writes float32. A sum of two adapters of rank 64 has rank 128: rank 64 cannot hold it."]
    return section


def _say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def main() -> None:
    """Parse arguments, measure, report."""
    options = report.arguments(__doc__, "the dense way on the small shapes alone")
    about: dict[str, Any] = report.machine()
    raw: dict[str, Any] = {}
    sections = run(options.cache.resolve(), raw, quick=options.quick)
    report.conclude(RESULTS, about, sections, raw, quick=options.quick, as_markdown=options.markdown)


if __name__ == "__main__":
    main()
