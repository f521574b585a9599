"""How adapters relate, in numbers: against dense matrices in float64, and what changes none of them."""

from __future__ import annotations

import re
from itertools import combinations

import numpy as np
import pytest
import torch

from plait.adapters import Adapter
from plait.inspection import geometry
from plait.inspection.report import inspect_adapters
from tests.inspected import SHAPES, changed, dense, drawing, flat, key, make_cohort, open_linear, write


def cosine_of(x: np.ndarray, y: np.ndarray) -> float:
    return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))


def conflict_of(x: np.ndarray, y: np.ndarray) -> float:
    both = (x != 0) & (y != 0)
    return float((np.sign(x) != np.sign(y))[both].mean())


def weighted_conflict_of(x: np.ndarray, y: np.ndarray) -> float:
    weight = np.abs(x * y)
    return float(weight[np.sign(x) != np.sign(y)].sum() / weight.sum())


def overlap_of(x: np.ndarray, y: np.ndarray, ranks: tuple[int, int], *, rows: bool) -> float:
    """The median cosine of the principal angles, from the singular vectors of the dense matrices."""
    bases = []
    for matrix, rank in ((x, ranks[0]), (y, ranks[1])):
        u, _, vh = np.linalg.svd(matrix, full_matrices=False)
        bases.append(vh[:rank].T if rows else u[:, :rank])
    return float(np.median(np.linalg.svd(bases[0].T @ bases[1], compute_uv=False)))


@pytest.fixture
def cohort(tmp_path):
    return make_cohort(tmp_path)


@pytest.fixture
def deltas(cohort):
    return [dense(adapter.folder) for adapter in cohort]


def in_layer(modules: dict[str, list[np.ndarray]], layer: str) -> dict[str, list[np.ndarray]]:
    return {p: m for p, m in modules.items() if p == layer or p.startswith(layer + ".")}


PAIR_MEASURES = [("cosine", cosine_of), ("conflict", conflict_of), ("weighted_conflict", weighted_conflict_of)]


class TestAgainstDense:
    def test_every_module_is_there(self, cohort, deltas):
        for adapter, modules in zip(cohort, deltas, strict=True):
            assert sorted(modules) == sorted(adapter.targets)

    def test_norms(self, cohort, deltas):
        found = inspect_adapters(cohort)
        for t, modules in enumerate(deltas):
            whole = np.linalg.norm(flat(modules, modules))
            assert found.adapters[t].norm == pytest.approx(whole, rel=1e-6)
            assert found.comparison.norms[t] == pytest.approx(whole, rel=1e-6)
            assert [layer.layer for layer in found.adapters[t].layers] == [
                "model.layers.0",
                "model.layers.1",
                "model.embed_tokens",
            ]
            for layer in found.adapters[t].layers:
                part = in_layer(modules, layer.layer)
                assert layer.norm == pytest.approx(np.linalg.norm(flat(part, part)), rel=1e-6)

    @pytest.mark.parametrize(("measure", "literal"), PAIR_MEASURES)
    def test_pairs(self, cohort, deltas, measure, literal):
        comparison = inspect_adapters(cohort).comparison
        for i, j in combinations(range(3), 2):
            expected = literal(flat(deltas[i], deltas[0]), flat(deltas[j], deltas[0]))
            assert getattr(comparison, measure)[i][j] == pytest.approx(expected, abs=1e-6)
            assert getattr(comparison, measure)[j][i] == getattr(comparison, measure)[i][j]

    @pytest.mark.parametrize(("measure", "literal"), PAIR_MEASURES)
    def test_pairs_per_layer(self, cohort, deltas, measure, literal):
        comparison = inspect_adapters(cohort).comparison
        assert [layer.layer for layer in comparison.layers] == [
            "model.layers.0",
            "model.layers.1",
            "model.embed_tokens",
        ]
        assert [(layer.tower, layer.index) for layer in comparison.layers] == [
            ("model.layers", 0),
            ("model.layers", 1),
            (None, None),
        ]
        for layer in comparison.layers:
            like = in_layer(deltas[0], layer.layer)
            x = [flat(in_layer(d, layer.layer), like) for d in deltas]
            for i, j in combinations(range(3), 2):
                assert getattr(layer, measure)[i][j] == pytest.approx(literal(x[i], x[j]), abs=1e-6)

    def test_scale_ratio(self, cohort, deltas):
        comparison = inspect_adapters(cohort).comparison
        whole = [np.linalg.norm(flat(d, d)) for d in deltas]
        assert comparison.scale_ratio == pytest.approx(max(whole) / min(whole), rel=1e-6)
        for layer in comparison.layers:
            norms = [np.linalg.norm(flat(part, part)) for part in (in_layer(d, layer.layer) for d in deltas)]
            assert layer.norms == pytest.approx(norms, rel=1e-6)
            assert layer.scale_ratio == pytest.approx(max(norms) / min(norms), rel=1e-6)

    @pytest.mark.parametrize("rows", [True, False])
    def test_overlaps(self, cohort, deltas, rows):
        comparison = inspect_adapters(cohort).comparison
        matrix = comparison.overlap_a if rows else comparison.overlap_b
        chances = []
        for i, j in combinations(range(3), 2):
            medians = []
            for path in deltas[i].keys() & deltas[j].keys():
                ranks = (cohort[i].targets[path].rank, cohort[j].targets[path].rank)
                pairs = list(zip(deltas[i][path], deltas[j][path], strict=True))
                medians.append(np.median([overlap_of(x, y, ranks, rows=rows) for x, y in pairs]))
                chances += [(max(ranks) / x.shape[1 if rows else 0]) ** 0.5 for x, _ in pairs]
            assert matrix[i][j] == pytest.approx(np.median(medians), abs=1e-6)
        chance = comparison.overlap_a_chance if rows else comparison.overlap_b_chance
        assert chance == pytest.approx(np.median(chances))

    def test_concentration(self, cohort, deltas):
        for report, modules in zip(inspect_adapters(cohort).adapters, deltas, strict=True):
            power = [np.linalg.svd(m, compute_uv=False) ** 2 for matrices in modules.values() for m in matrices]
            assert report.stable_rank == pytest.approx(np.mean([p.sum() / p[0] for p in power]), rel=1e-5)
            ranks = [int(np.argmax(p.cumsum() / p.sum() >= 0.99)) + 1 for p in power]
            assert report.rank_for_99 == pytest.approx(np.mean(ranks))

    def test_chance_is_what_random_subspaces_show(self, tmp_path):
        pair = [
            open_linear(tmp_path / str(seed), {f"layers.{i}.q": (64, 48) for i in range(40)}, rank=8, seed=seed)
            for seed in (1, 2)
        ]
        comparison = inspect_adapters(pair).comparison
        assert comparison.overlap_a_chance == pytest.approx((8 / 48) ** 0.5)
        assert 0.75 * comparison.overlap_a_chance < comparison.overlap_a[0][1] < comparison.overlap_a_chance
        assert 0.75 * comparison.overlap_b_chance < comparison.overlap_b[0][1] < comparison.overlap_b_chance
        assert comparison.conflict[0][1] == pytest.approx(0.5, abs=0.01)

    def test_the_size_of_a_block_does_not_matter(self, cohort, monkeypatch):
        whole = inspect_adapters(cohort).comparison
        monkeypatch.setattr(geometry, "TILE_ELEMENTS", 97)
        cut = inspect_adapters(cohort).comparison
        assert cut.conflict == whole.conflict
        for i, row in enumerate(cut.weighted_conflict):
            assert row == pytest.approx(whole.weighted_conflict[i], abs=1e-6)

    def test_double_precision_is_kept(self, tmp_path):
        """Beside 1e9, 1e-3 needs more digits than float32 has."""
        a = torch.tensor([[1, 1], [1, -1]], dtype=torch.float64)
        opened = []
        for name, small in (("x", 1e-3), ("y", -1e-3)):  # ΔW = [±1e-3, 2e9]
            tensors = {
                key("layers.0.q", "lora_A"): a,
                key("layers.0.q", "lora_B"): torch.tensor([[1e9 + small, -1e9]], dtype=torch.float64),
            }
            opened.append(Adapter.open(write(tmp_path / name, tensors, r=2, lora_alpha=2), name))
        assert inspect_adapters(opened).comparison.conflict[0][1] == 0.5

    def test_only_entries_non_zero_in_both_count(self, tmp_path):
        b = {"x": [[1.0], [0.0], [2.0], [-1.0]], "y": [[1.0], [5.0], [-3.0], [0.0]]}
        opened = []
        for name, column in b.items():
            tensors = {
                key("layers.0.q", "lora_A"): torch.tensor([[1.0, 0.0, 2.0]]),
                key("layers.0.q", "lora_B"): torch.tensor(column),
            }
            opened.append(Adapter.open(write(tmp_path / name, tensors, r=1, lora_alpha=1), name))
        comparison = inspect_adapters(opened).comparison
        assert comparison.conflict[0][1] == 0.5  # rows 1 and 3, columns 1 and 3
        assert comparison.weighted_conflict[0][1] == pytest.approx(6 / 7)


class TestInvariance:
    def test_the_gauge_changes_nothing(self, tmp_path):
        pair = [open_linear(tmp_path / f"{i}", SHAPES, rank=3 + i, seed=i) for i in (1, 2)]
        draw = drawing(9)

        def turn(a, b):
            g = draw(len(a), len(a)) + 3 * torch.eye(len(a))
            return (torch.linalg.inv(g.double()) @ a.double()).float(), (b.double() @ g.double()).float()

        turned = [changed(pair[0], tmp_path / "turned", turn), pair[1]]
        before, after = (inspect_adapters(p).comparison for p in (pair, turned))
        for measure in ("cosine", "overlap_a", "overlap_b", "conflict", "weighted_conflict"):
            assert getattr(after, measure)[0][1] == pytest.approx(getattr(before, measure)[0][1], abs=2e-5), measure
        one, other = inspect_adapters(pair).adapters[0], inspect_adapters(turned).adapters[0]
        assert one.stable_rank == pytest.approx(other.stable_rank, rel=1e-4)
        assert one.norm == pytest.approx(other.norm, rel=1e-5)

    def test_zero_padding_changes_nothing(self, tmp_path):
        pair = [open_linear(tmp_path / f"{i}", SHAPES, rank=4, seed=i) for i in (1, 2)]

        def pad(a, b):
            return torch.nn.functional.pad(a, (0, 0, 0, 4)), torch.nn.functional.pad(b, (0, 4))

        padded = [changed(pair[0], tmp_path / "padded", pad, r=8, lora_alpha=16), pair[1]]
        before, after = (inspect_adapters(p) for p in (pair, padded))
        for measure in ("cosine", "overlap_a", "overlap_b", "conflict", "weighted_conflict"):
            found = getattr(after.comparison, measure)[0][1]
            assert found == pytest.approx(getattr(before.comparison, measure)[0][1], abs=1e-6), measure
        assert after.comparison.overlap_a_chance == before.comparison.overlap_a_chance
        assert after.adapters[0].stable_rank == pytest.approx(before.adapters[0].stable_rank)
        assert after.adapters[0].rank_for_99 == before.adapters[0].rank_for_99

    def test_equal_adapters(self, tmp_path):
        one = open_linear(tmp_path / "one", SHAPES)
        two = changed(one, tmp_path / "two", lambda a, b: (a, b))
        comparison = inspect_adapters([one, two]).comparison
        for layer in (comparison, *comparison.layers):
            assert layer.cosine[0][1] == pytest.approx(1)
            assert layer.conflict == ((0, 0), (0, 0))
            assert layer.weighted_conflict[0][1] == pytest.approx(0, abs=1e-6)
            assert layer.scale_ratio == pytest.approx(1)
        assert comparison.overlap_a[0][1] == pytest.approx(1)
        assert comparison.overlap_b[0][1] == pytest.approx(1)
        assert comparison.shared_init.status == "shared"

    def test_opposite_adapters(self, tmp_path):
        one = open_linear(tmp_path / "one", SHAPES)
        two = changed(one, tmp_path / "two", lambda a, b: (a, -2 * b))
        comparison = inspect_adapters([one, two]).comparison
        assert comparison.cosine[0][1] == pytest.approx(-1)
        assert comparison.conflict[0][1] == 1
        assert comparison.weighted_conflict[0][1] == pytest.approx(1)
        assert comparison.scale_ratio == pytest.approx(2)
        assert any("against each other" in finding for finding in comparison.findings)

    def test_order_turns_rows_and_columns_only(self, cohort):
        forth, back = inspect_adapters(cohort).comparison, inspect_adapters(cohort[::-1]).comparison
        for measure in ("cosine", "overlap_a", "overlap_b", "conflict", "weighted_conflict"):
            turned = [row[::-1] for row in getattr(back, measure)[::-1]]
            assert np.array(turned, float) == pytest.approx(np.array(getattr(forth, measure), float), abs=1e-6)

    def test_workers_change_nothing(self, cohort):
        threads = re.findall(r"max_threads.*?(\d+)", torch.__config__.parallel_info())
        assert inspect_adapters(cohort, workers=1) == inspect_adapters(cohort, workers=5)
        assert re.findall(r"max_threads.*?(\d+)", torch.__config__.parallel_info()) == threads


class TestSharedInit:
    def make(self, tmp_path, mix: float, count: int = 2) -> list[Adapter]:
        """Adapters whose A share a part; mix 0 is one A for all."""
        first = open_linear(tmp_path / "0", {k: (64, 96) for k in SHAPES}, seed=0)
        draw = drawing(5)
        return [first] + [
            changed(first, tmp_path / str(i), lambda a, b: (a + mix * draw(*a.shape), draw(*b.shape))) for i in range(1, count)
        ]

    @pytest.mark.parametrize(
        ("mix", "status", "word"), [(0.1, "shared", "ill-conditioned"), (1.2, "partial", "partly"), (20, "separate", "every")]
    )
    def test_status(self, tmp_path, mix, status, word):
        audit = inspect_adapters(self.make(tmp_path, mix)).comparison.shared_init
        assert audit.status == status
        assert word in audit.words
        assert audit.pairs == ((("0", "1"),) if status == "shared" else ())

    def test_only_the_pairs_that_share(self, tmp_path):
        adapters = [*self.make(tmp_path, 0.1), open_linear(tmp_path / "x", {k: (64, 96) for k in SHAPES}, seed=77)]
        audit = inspect_adapters(adapters).comparison.shared_init
        assert audit.status == "shared"
        assert audit.pairs == (("0", "1"),)
        assert "0 + 1" in audit.words

    def test_no_common_module_no_audit(self, tmp_path):
        one = open_linear(tmp_path / "one", {"layers.0.q": (8, 8)})
        two = open_linear(tmp_path / "two", {"layers.1.v": (8, 8)}, seed=1)
        comparison = inspect_adapters([one, two]).comparison
        assert comparison.shared_init is None
        assert comparison.overlap_a == ((1, None), (None, 1))
        assert comparison.conflict[0][1] is None
        assert comparison.cosine[0][1] == 0  # two task vectors side by side are orthogonal
