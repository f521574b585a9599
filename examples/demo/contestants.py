"""Who takes part in the leaderboard: per method a handful of scales, and at most one other parameter.

Scales follow from what a method does: one that adds deltas up needs less than 1, one that averages them needs more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ADDS = (0.17, 0.33, 0.6)
KEEPS = (0.7, 1.0, 1.4)  # the result has the size of a delta
AVERAGES = (0.5, 0.71, 1.0, 1.4)
SOLVES = (1.0, 1.3)
Settings = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Contestant:
    """A method with all settings that are tried on validation.

    Attributes:
        name: short, for the command line.
        label: as the table shows it.
        variants: settings of `plait.merge`, or of PEFT's `add_weighted_adapter`.
        scales: on the merged delta; every one with every variant.
        moments: whether it needs second moments of inputs.
        by_peft: who makes it.
    """

    name: str
    label: str
    variants: Sequence[Settings]
    scales: Sequence[float]
    moments: bool = False
    by_peft: bool = False


def plait(method: str, scales: Sequence[float], *variants: Settings, name: str = "", **more: Any) -> Contestant:
    """Return a method of plait, with parameters that differ between its variants and `more` that do not."""
    named, moments = name or method, bool(more.pop("moments", False))
    label = f"`{method}`" + (f", {named.removeprefix(method).strip(' -')}" if named != method else "")
    settings = [{"method": method, **more, **v} for v in variants or ({},)]
    return Contestant(named, label, settings, scales, moments=moments)


def peft(name: str, scales: Sequence[float], **settings: Any) -> Contestant:
    """Return a merge made by PEFT itself, with the scale as the weight of every adapter."""
    return Contestant(name, name, [settings], scales, by_peft=True)


_DENSITIES = ({"density": 0.2}, {"density": 0.5})
_RIDGES = ({"ridge": 0.01}, {"ridge": 0.1})
CONTESTANTS: tuple[Contestant, ...] = (
    # data: second moments of 200 texts per task
    plait("regmean", SOLVES, *_RIDGES, moments=True),
    plait("ssr", SOLVES, {"ridge": 0.001}, {"ridge": 0.01}, moments=True),
    # no data
    plait("linear", ADDS),
    plait("ties", AVERAGES, *_DENSITIES, space="core", flavor="core_space", name="ties core"),
    plait("iso_c", KEEPS),
    plait("tsv", ADDS),
    plait("wudi", KEEPS, {"ridge": 0.1}, {"ridge": 1.0}),
    plait("iso_cts", KEEPS),
    plait("svc", ADDS),
    plait("pico", KEEPS),
    plait("ctm", AVERAGES),
    plait("dc_merge", KEEPS),
    plait("cart", ADDS),
    plait("star", ADDS),
    plait("ties", AVERAGES, {"density": 0.2}, space="delta", name="ties delta"),
    plait("ties", AVERAGES, {"density": 0.5}, space="knots", flavor="core_space", name="ties knots"),
    plait("dare_linear", ADDS, {"density": 0.5}, space="core", name="dare_linear core"),
    plait("dare_ties", AVERAGES, {"density": 0.5}, space="core", name="dare_ties core"),
    plait("della", AVERAGES, space="core", name="della core"),
    plait("breadcrumbs", ADDS, space="core", name="breadcrumbs core"),
    plait("magnitude_prune", ADDS, {"density": 0.5}, space="core", name="magnitude_prune core"),
    plait("sce", AVERAGES, space="core", name="sce core"),
    plait("consensus", ADDS, space="core", name="consensus core"),
    plait("pcb", AVERAGES, space="core", name="pcb core"),
    plait("ram", AVERAGES, space="core", name="ram core"),
    plait("magmax", KEEPS, space="core", name="magmax core"),
    plait("multislerp", AVERAGES),
    plait("karcher", AVERAGES),
    plait("metagpt", AVERAGES),
    plait("model_stock", AVERAGES),
    plait("norm_match", KEEPS),
    # PEFT itself
    peft("PEFT linear", ADDS, combination_type="linear"),
    peft("PEFT ties .2", AVERAGES, combination_type="ties", density=0.2),
    peft("PEFT ties .5", AVERAGES, combination_type="ties", density=0.5),
)
QUICK = ("linear", "ties core", "regmean", "wudi")
