"""Merges of the same adapters that share results: the same bits, read once, within a number of bytes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from plait.adapters.adapter import Adapter
from plait.merging import combine
from plait.merging.combine import Combiner
from plait.merging.inventory import Inventory, take_inventory
from plait.merging.kept import KeptResults
from plait.mixture.merged import merged_modules
from plait.recipes.request import read_request
from plait.recipes.schema import LayerWeights
from plait.spaces import SPACES
from plait.spaces.core import Core
from plait.stages.pipeline import Pipeline
from plait.testing import cohort
from tests.every import every

CANDIDATES: list[dict[str, Any]] = [
    {"method": "ties", "space": "core"},
    {"method": "ties", "space": "core", "scale": 0.3},
    {"method": "ties", "space": "core", "density": 0.7},
    {"method": "ties", "space": "core", "weights": {"adapter0": 2.0}},
    {"method": "ties", "space": "core", "transforms": ["layer_l2_normalize"]},
    {"method": "ties", "space": "knots"},
    {"method": "ties", "space": "delta"},
    {"method": "dare_ties", "space": "core"},
    {"method": "dare_ties", "space": "core", "seed": 3},
    {"method": "iso_cts"},
    {"method": "iso_cts", "scale": 2.0},
    {"method": "tsv"},
    {"method": "linear"},
    {"method": "ties", "space": "delta", "weights": {"adapter0": 2.0}},
    {"method": "ties", "space": "delta", "weights": {"adapter0": 2.0}, "scale": 0.3},
    {"method": "ties", "space": "delta", "flavor": "peft", "weights": {"adapter0": 2.0}},
    {"method": "ties", "space": "delta", "flavor": "peft", "weights": {"adapter1": 2.0}},
    {"method": "ties", "space": "delta", "weights": {"adapter0": 1e-30}},  # all modules in float64
    {"method": "ties", "space": "delta", "weighted_vote": True, "zero_sign": "majority", "weights": {"adapter0": 2.0}},
    {"method": "ties", "space": "delta", "weighted_vote": True, "zero_sign": "majority"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("kept")
    cohort([(12, 8)] * 5, [3, 3], dtype=torch.float32).save(place)
    return place


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("wide")
    cohort([(70, 68), (70, 68), (66, 90), (70, 68), (66, 90)], [3, 3], dtype=torch.float32).save(place)
    return place


def inventory(folder: Path, settings: dict[str, Any]) -> Inventory:
    recipe, _ = read_request(None, {f"adapter{i}": folder / f"adapter{i}" for i in range(2)}, settings)
    return take_inventory(recipe)


def bits(found: Inventory) -> list[tuple[str, bytes, bytes]]:
    return [
        (m.target, s.a.numpy().tobytes(), s.b.numpy().tobytes())
        for m in merged_modules(found, workers=2)
        if m.factors is not None
        for s in m.factors.slices
    ]


@every("most", [3000, 1 << 30])
def test_candidates_that_share_results_have_the_bits_of_those_that_do_not(folder: Path, most: int) -> None:
    first = inventory(folder, CANDIDATES[0])
    shared = KeptResults(most)
    for settings in [*CANDIDATES, *CANDIDATES]:
        recipe = inventory(folder, settings).recipe
        assert bits(replace(first, recipe=recipe, kept=shared)) == bits(replace(first, recipe=recipe)), settings


WEIGHED_LAST: list[dict[str, Any]] = [
    {"method": "ties", "flavor": "peft"},
    {"method": "ties", "flavor": "fusion_bench"},
    {"method": "ties", "sign": "frequency"},
    {"method": "magnitude_prune", "density": 0.4},
    {"method": "breadcrumbs"},
    {"method": "dare_ties"},
    {"method": "della"},
]
WEIGHED_BEFORE: list[dict[str, Any]] = [
    {"method": "ties", "flavor": "mergekit"},
    {"method": "sce"},
    {"method": "magmax"},
    {"method": "ram"},
    {"method": "ties", "transforms": ["layer_l2_normalize"], "weighted_vote": True},
]


@every("settings", [*WEIGHED_LAST, *WEIGHED_BEFORE])
@every("space", ["delta", "core"])
@every("room", [1 << 20, 5000])
def test_what_only_weights_are_missing_in_is_kept_with_the_same_bits(
    wide: Path, settings: dict[str, Any], space: str, room: int
) -> None:
    """Modules of several shapes, which are truncated together, from matrices that are kept as far as there is room."""
    first = inventory(wide, {**settings, "space": space})
    shared = KeptResults(unweighted=room)
    for weights in ({}, {"adapter0": 2.0}, {"adapter0": -0.3, "adapter1": 0.7}, {"adapter1": 0.0}):
        recipe = inventory(wide, {**settings, "space": space, "weights": weights}).recipe
        assert bits(replace(first, recipe=recipe, kept=shared)) == bits(replace(first, recipe=recipe)), weights


@every("settings", [*WEIGHED_LAST, *WEIGHED_BEFORE])
def test_other_weights_compute_no_entries_where_they_come_last(
    wide: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    counts: Counter[str] = Counter()
    reach = Pipeline.reach
    first = replace(inventory(wide, {**settings, "space": "delta"}), kept=KeptResults(unweighted=1 << 20))
    bits(first)
    with monkeypatch.context() as patched:
        patched.setattr(Pipeline, "reach", lambda self, *given: (counts.update(["reached"]), reach(self, *given))[1])
        bits(replace(first, recipe=inventory(wide, {**settings, "space": "delta", "weights": {"adapter0": 2.0}}).recipe))
    assert bool(counts["reached"]) == (settings in WEIGHED_BEFORE)


def test_a_matrix_that_has_no_room_is_not_made_as_a_whole(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: Counter[str] = Counter()
    unweighted = Pipeline.unweighted
    monkeypatch.setattr(Pipeline, "unweighted", lambda self, *given: (counts.update(["made"]), unweighted(self, *given))[1])
    plain = inventory(wide, {"method": "ties", "space": "delta"})
    expected = bits(plain)
    assert bits(replace(plain, kept=KeptResults(unweighted=20_000))) == expected
    assert counts["made"] == 0
    assert bits(replace(plain, kept=KeptResults(unweighted=1 << 20))) == expected
    assert counts["made"] > 0, "where there is room"


def test_what_does_not_change_is_not_computed_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: Counter[str] = Counter()
    read, frame, unscaled = Adapter.read, Core.frame, Combiner._unscaled
    monkeypatch.setattr(Adapter, "read", lambda self, *given: (counts.update(["read"]), read(self, *given))[1])
    monkeypatch.setattr(Core, "frame", lambda self, *given: (counts.update(["frame"]), frame(self, *given))[1])
    monkeypatch.setattr(Combiner, "_unscaled", lambda self, *of: (counts.update(["merged"]), unscaled(self, *of))[1])
    first = replace(inventory(folder, CANDIDATES[0]), kept=KeptResults())

    def computed(settings: dict[str, Any]) -> tuple[int, int, int]:
        counts.clear()
        merged_modules(replace(first, recipe=inventory(folder, settings).recipe), workers=1)
        return counts["read"], counts["frame"], counts["merged"]

    assert computed(CANDIDATES[0]) == (10, 5, 5)  # two adapters, five modules, in three passes
    assert [computed(settings) for settings in CANDIDATES[1:4]] == [(0, 0, 0), (0, 0, 5), (0, 0, 5)], "the scale comes last"
    assert computed(CANDIDATES[4]) == (10, 5, 5), "another transform takes norms of its own, and is another frame"
    assert [computed(settings) for settings in CANDIDATES[9:13]] == [(0, 0, 5), (0, 0, 0), (0, 0, 5), (0, 0, 0)]


def test_of_dense_merges_only_what_has_changed_is_computed_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: Counter[str] = Counter()
    survey, unscaled = Combiner.observe, Combiner._unscaled
    monkeypatch.setattr(Combiner, "observe", lambda self, *given: (counts.update(["seen"]), survey(self, *given))[1])
    monkeypatch.setattr(Combiner, "_unscaled", lambda self, *given: (counts.update(["cut"]), unscaled(self, *given))[1])
    first = inventory(folder, {"method": "ties", "space": "delta"})
    shared = replace(first, kept=KeptResults())
    one_layer = LayerWeights(policy="per_layer", layers={"model.layers.0": {"adapter0": 2.0}})
    for changes, work in (
        ({}, (10, 5)),  # five modules, in two passes
        ({"scale": 0.3}, (0, 0)),
        ({"weights": one_layer}, (0, 1)),
    ):
        recipe = first.recipe.changed(**changes)
        counts.clear()
        found = bits(replace(shared, recipe=recipe))
        assert (counts["seen"], counts["cut"]) == work, changes
        assert found == bits(replace(first, recipe=recipe)), changes


@every("space", ["core", "knots"])
def test_one_merge_makes_frames_once_as_far_as_there_is_room(space: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, cls = list[str](), type(SPACES[space])
    frame = cls.frame
    monkeypatch.setattr(cls, "frame", lambda self, *given: (made.append(space), frame(self, *given))[1])
    found, counts = list[Any](), list[int]()
    for room in (0, 600, 1440, 1 << 20):  # a frame is of 768 or 672 bytes; what is small of it, of 288 or 144
        monkeypatch.setattr(combine, "FRAME_BYTES", room)
        made.clear()
        found.append(bits(inventory(folder, {"method": "ties", "space": space})))
        counts.append(len(made))
    assert found[1:] == found[:1] * 3
    few = 2 if space == "core" else 4  # modules of which only what is small is kept: once for surveys, once at the end
    assert counts == [15, 2 * few + 3 * (5 - few), 9 if space == "core" else 8, 5]


def test_the_settings_that_were_used_least_recently_go_first() -> None:
    kept, made = KeptResults(10), list[str]()

    def get(settings: str, module: str, size: int | None = 4) -> str:
        def make() -> str:
            made.append(f"{settings}{module}")
            return made[-1]

        return kept.result(settings, module, make, lambda _: size)

    assert [get(*at) for at in ("ax", "bx", "ax")] == ["ax", "bx", "ax"]
    get("c", "x")  # b goes
    get("a", "x")
    assert made == ["ax", "bx", "cx"]
    get("b", "x")  # c goes
    get("d", "x", None)
    get("d", "x", 11)  # neither is kept, the second since it is larger than all
    get("d", "x")
    assert made == ["ax", "bx", "cx", "bx", "dx", "dx", "dx"]
