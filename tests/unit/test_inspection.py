"""Every statistic against a literal float64 reading on dense matrices, and the checks of compatibility."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from plait.adapters import Adapter
from plait.errors import AdapterError, PlanError
from plait.inspection.compatibility import (
    base_model_problems,
    check_compatibility,
    dora_problems,
    excluded_spaces,
    max_lora_rank,
    naming_problems,
    serving,
    shape_problems,
    short_name,
)
from plait.inspection.report import Inspection, inspect_adapters
from plait.linalg import blocks
from tests.every import every

Shapes = dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
Q, V, UP = (f"model.layers.{{}}.{m}" for m in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"))


def write(folder: Path, tensors: dict[str, torch.Tensor], **config) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "adapter_model.safetensors")
    raw = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "org/Base", **config}
    (folder / "adapter_config.json").write_text(json.dumps(raw))
    return folder


def key(path: str, part: str) -> str:
    return f"base_model.model.{path}.{part}" + ("" if "embedding" in part else ".weight")


def linear(path: str, d_out: int, d_in: int, rank: int, draw) -> dict[str, torch.Tensor]:
    return {key(path, "lora_A"): draw(rank, d_in), key(path, "lora_B"): draw(d_out, rank)}


def drawing(seed: int, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def mixed(seed: int, ranks: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Two layers of linear modules, a convolution with groups, an embedding, fused experts."""
    draw = drawing(seed, dtype)
    q, v, rest = ranks
    tensors = {}
    for layer in (0, 1):
        tensors |= linear(Q.format(layer), 12, 16, q, draw) | linear(V.format(layer), 6, 16, v, draw)
    tensors[key("model.embed_tokens", "lora_embedding_A")] = draw(rest, 30)
    tensors[key("model.embed_tokens", "lora_embedding_B")] = draw(16, rest)
    tensors[key("model.layers.1.conv", "lora_A")] = draw(4, 3, 5)  # 2 groups of rank 2
    tensors[key("model.layers.1.conv", "lora_B")] = draw(8, 2, 1)
    tensors[key("model.layers.1.mlp.experts", "lora_A")] = draw(3 * 4, 10)  # 3 experts of rank 4
    tensors[key("model.layers.1.mlp.experts", "lora_B")] = draw(7, 4 * 3)
    return tensors


EXPERTS = {"target_parameters": ["mlp.experts.down_proj"]}


def dense(folder: Path) -> dict[str, list[np.ndarray]]:
    """Read a file of `mixed` again, by its own means: path → the float64 matrices of each module."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = {
        k.removeprefix("base_model.model."): v.double() for k, v in load_file(folder / "adapter_model.safetensors").items()
    }
    result = {}
    for name, a in tensors.items():
        if ".lora_A" not in name and ".lora_embedding_A" not in name:
            continue
        path = name.split(".lora_")[0]
        b = tensors[name.replace("_A", "_B")]
        alpha = config.get("alpha_pattern", {}).get(path, config["lora_alpha"])
        rank = config["r"] if path.endswith("experts") else a.shape[0]
        s = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        if path.endswith("conv"):
            delta = [s * torch.einsum("or,rik->oik", b[4 * g : 4 * g + 4, :, 0], a[2 * g : 2 * g + 2]) for g in (0, 1)]
            result[path] = [d.flatten(1).numpy() for d in delta]
        elif path.endswith("experts"):
            delta = s * torch.einsum("ore,eri->eoi", b.view(7, 4, 3), a.view(3, 4, 10))
            result[path + ".down_proj"] = list(delta.numpy())
        else:
            result[path] = [(s * b @ a).numpy()]
    return result


def flat(modules: dict[str, list[np.ndarray]], like: dict[str, list[np.ndarray]]) -> np.ndarray:
    parts = [m.ravel() if path in modules else 0 * m.ravel() for path in like for m in modules.get(path, like[path])]
    return np.concatenate(parts)


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
    """Ranks, scaling rules and sets of modules all differ; "c" lacks the second layer's q_proj."""
    a = write(tmp_path / "a", mixed(1, (4, 3, 2)), **EXPERTS)
    b = write(tmp_path / "b", mixed(2, (2, 3, 5)), use_rslora=True, lora_alpha=3, **EXPERTS)
    tensors = {k: v for k, v in mixed(3, (4, 4, 4)).items() if Q.format(1) not in k}
    c = write(tmp_path / "c", tensors, alpha_pattern={Q.format(0): 40, V.format(1): 1}, **EXPERTS)
    return [Adapter.open(folder, folder.name) for folder in (a, b, c)]


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
        monkeypatch.setattr(blocks, "MATRIX_BLOCK_ELEMENTS", 97)
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


def open_linear(folder: Path, shapes: dict[str, tuple[int, int]], *, rank: int = 4, seed: int = 0, **config) -> Adapter:
    draw = drawing(seed)
    tensors = {k: v for path, (m, n) in shapes.items() for k, v in linear(path, m, n, rank, draw).items()}
    return Adapter.open(write(folder, tensors, **{"r": rank, "lora_alpha": 2 * rank, **config}), folder.name)


def changed(adapter: Adapter, folder: Path, change, **config) -> Adapter:
    """Write an adapter again with (A, B) of every module changed; all are linear."""
    tensors = load_file(adapter.file.path)
    for name in [n for n in tensors if ".lora_A." in n]:
        twin = name.replace("lora_A", "lora_B")
        tensors[name], tensors[twin] = change(tensors[name], tensors[twin])
    return Adapter.open(write(folder, tensors, **{**adapter.config.raw, **config}), folder.name)


SHAPES = {p.format(i): s for i in range(3) for p, s in ((Q, (24, 32)), (V, (8, 32)), (UP, (40, 32)))}


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


class TestReports:
    def test_facts(self, cohort):
        a, b, c = inspect_adapters(cohort).adapters
        assert (a.kind, b.kind, c.kind) == ("LoRA", "rsLoRA", "LoRA")
        assert (a.ranks, b.ranks, c.ranks) == ((2, 3, 4), (2, 3, 4, 5), (2, 4))
        assert b.scaling_rule == "alpha/sqrt(r)"
        assert b.scalings == pytest.approx([3 / 5**0.5, 3 / 4**0.5, 3 / 3**0.5, 3 / 2**0.5])
        assert c.alphas == (1, 8, 40)
        assert (a.modules, c.modules) == (7, 6)
        assert {(k.name, k.kind, k.count) for k in a.module_kinds} == {
            ("q_proj", "linear", 2),
            ("v_proj", "linear", 2),
            ("conv", "conv", 1),
            ("down_proj", "experts", 1),
            ("embed_tokens", "embedding", 1),
        }
        assert [(t.name, t.layers, t.modules) for t in a.towers] == [("model.layers", 2, 6)]
        assert a.outside == ("model.embed_tokens",)
        assert a.parameters == sum(t.numel() for t in mixed(1, (4, 3, 2)).values())
        assert a.bytes == cohort[0].file.path.stat().st_size
        assert a.dtypes == ("F32",)
        assert a.base_model == "org/Base"

    def test_towers_are_apart(self, tmp_path):
        shapes = {"audio.layers.0.q": (8, 6), "audio.layers.1.q": (8, 6), "text.layers.0.q": (8, 6), "lm_head": (9, 8)}
        pair = [open_linear(tmp_path / str(i), shapes, seed=i) for i in (0, 1)]
        found = inspect_adapters(pair)
        assert [(t.name, t.layers, t.modules) for t in found.adapters[0].towers] == [
            ("audio.layers", 2, 2),
            ("text.layers", 1, 1),
        ]
        assert [layer.layer for layer in found.comparison.layers] == [
            "audio.layers.0",
            "audio.layers.1",
            "text.layers.0",
            "lm_head",
        ]

    def test_layers_are_in_the_order_of_numbers(self, tmp_path):
        adapter = open_linear(tmp_path / "a", {f"m.layers.{i}.q": (4, 4) for i in range(12)}, rank=2)
        assert [layer.layer for layer in inspect_adapters([adapter]).adapters[0].layers] == [f"m.layers.{i}" for i in range(12)]

    def test_heads_tokens_and_biases(self, tmp_path):
        tensors = linear("m.layers.0.q", 8, 8, 4, drawing(0)) | {
            "base_model.model.score.weight": torch.ones(2, 8),
            "base_model.model.score.bias": torch.ones(2),
            "base_model.model.m.embed_tokens.weight": torch.ones(30, 8),
            "base_model.model.m.emb.token_adapter.trainable_tokens_delta": torch.ones(2, 8),
            "base_model.model.m.layers.0.q.base_layer.bias": torch.ones(8),
        }
        report = inspect_adapters([Adapter.open(write(tmp_path / "a", tensors), "a")]).adapters[0]
        assert {(t.path, t.role, t.shape) for t in report.full_tensors} == {
            ("score.weight", "head", (2, 8)),
            ("score.bias", "head", (2,)),
            ("m.embed_tokens.weight", "embedding", (30, 8)),
            ("m.emb.token_adapter.trainable_tokens_delta", "tokens", (2, 8)),
            ("m.layers.0.q.base_layer.bias", "bias", (8,)),
        }
        assert any("single tokens" in w for w in report.warnings)

    def test_warnings(self, tmp_path):
        quiet = open_linear(tmp_path / "quiet", SHAPES)
        assert inspect_adapters([quiet]).adapters[0].warnings == ()
        grouped = {k: v for k, v in mixed(1, (4, 4, 4)).items() if ".conv." in k}
        assert inspect_adapters([Adapter.open(write(tmp_path / "g", grouped), "g")]).adapters[0].warnings == ()
        other = changed(quiet, tmp_path / "other", lambda a, b: (a, b), r=16)
        assert "another rank" in inspect_adapters([other]).adapters[0].warnings[0]
        fresh = changed(quiet, tmp_path / "fresh", lambda a, b: (a, 0 * b))
        assert "zero delta" in inspect_adapters([fresh]).adapters[0].warnings[0]
        activated = changed(quiet, tmp_path / "activated", lambda a, b: (a, b), alora_invocation_tokens=[1])
        assert "aLoRA" in inspect_adapters([activated]).adapters[0].warnings[0]
        head = Adapter.open(write(tmp_path / "head", {"base_model.model.score.weight": torch.ones(2, 8)}), "head")
        report = inspect_adapters([head])
        assert "no LoRA" in report.adapters[0].warnings[0]
        assert report.adapters[0].norm == 0
        assert report.adapters[0].stable_rank is None
        assert not report.compatibility.can_merge

    def test_an_untrained_adapter_beside_a_trained_one(self, tmp_path):
        one = open_linear(tmp_path / "one", SHAPES)
        zero = changed(one, tmp_path / "zero", lambda a, b: (a, 0 * b))
        comparison = inspect_adapters([one, zero]).comparison
        assert comparison.cosine[0][1] is None
        assert comparison.conflict[0][1] is None
        assert comparison.weighted_conflict[0][1] is None
        assert comparison.overlap_b[0][1] is None
        assert comparison.scale_ratio is None
        assert comparison.overlap_a[0][1] == pytest.approx(1)

    def test_json_and_back(self, cohort):
        found = inspect_adapters(cohort)
        text = json.dumps(found.model_dump(mode="json"), allow_nan=False)
        assert Inspection.model_validate_json(text) == found

    def test_one_adapter_is_not_compared(self, cohort):
        found = inspect_adapters(cohort[:1])
        assert found.comparison is None
        assert found.compatibility.can_merge

    def test_no_adapter(self):
        with pytest.raises(PlanError, match="no adapter"):
            inspect_adapters([])

    def test_nan_is_refused(self, tmp_path):
        adapter = open_linear(tmp_path / "a", SHAPES)
        broken = changed(adapter, tmp_path / "broken", lambda a, b: (a, b * torch.nan))
        threads = torch.get_num_threads()
        with pytest.raises(AdapterError, match=r"'broken'.*NaN"):
            inspect_adapters([adapter, broken])
        assert torch.get_num_threads() == threads

    def test_progress(self, cohort):
        class Listener:
            message: list[object] = []  # noqa: RUF012

            def start(self, stage: str, total: int) -> None:
                self.message += [stage, total]

            def advance(self, steps: int = 1) -> None:
                self.message.append(steps)

            def finish(self) -> None:
                self.message.append("end")

        inspect_adapters(cohort, progress=Listener())
        assert Listener.message == ["compare", 7, *[1] * 7, "end"]


class TestFindings:
    def findings(self, *adapters: Adapter) -> str:
        return "\n".join(inspect_adapters(adapters).comparison.findings)

    def test_scale(self, tmp_path):
        one = open_linear(tmp_path / "one", SHAPES)
        large = changed(one, tmp_path / "large", lambda a, b: (a, 3 * b))
        assert "'large' is 3.0 times as large as 'one'" in self.findings(one, large)
        assert "similar size" in self.findings(one, changed(one, tmp_path / "two", lambda a, b: (a, 1.2 * b)))

    def test_alignment(self, tmp_path):
        one, two = (open_linear(tmp_path / str(i), SHAPES, seed=i) for i in (1, 2))
        assert "nearly orthogonal" in self.findings(one, two)
        assert "much the same" in self.findings(one, changed(one, tmp_path / "x", lambda a, b: (a, 1.1 * b)))

    def test_ranges(self, tmp_path):
        adapters = [open_linear(tmp_path / str(i), SHAPES, seed=i) for i in range(3)]
        comparison = inspect_adapters(adapters).comparison
        values = [comparison.conflict[i][j] for i, j in combinations(range(3), 2)]
        ends = sorted({f"{100 * v:.0f}" for v in (min(values), max(values))})
        assert f"differ in {'–'.join(ends)} % of the cases" in comparison.findings[1]

    def test_nothing_in_common(self, tmp_path):
        one = open_linear(tmp_path / "one", {"layers.0.q": (8, 8)})
        zero = changed(one, tmp_path / "zero", lambda a, b: (a, 0 * b))
        assert "nothing to compare" in self.findings(one, zero)


class TestBaseModels:
    def named(self, tmp_path, *names: str | None) -> list[Adapter]:
        return [
            open_linear(tmp_path / f"a{i}", {"layers.0.q": (8, 8)}, base_model_name_or_path=name)
            for i, name in enumerate(names)
        ]

    def test_spelling_does_not_matter(self, tmp_path):
        assert base_model_problems(self.named(tmp_path, "Org/Base", "org/base/", "ORG/BASE"), None) == []

    def test_different(self, tmp_path):
        (problem,) = base_model_problems(self.named(tmp_path, "org/Base", "org/Other", "org/base"), None)
        assert "'a0', 'a2': 'org/Base'" in problem
        assert "'a1': 'org/Other'" in problem
        assert "--base-id" in problem

    def test_a_given_base_overrides(self, tmp_path):
        adapters = self.named(tmp_path, "org/Base", "org/Other")
        assert base_model_problems(adapters, "org/Base") == []
        assert not check_compatibility(adapters).can_merge
        assert check_compatibility(adapters, base_model="org/Base").can_merge

    def test_a_missing_name_is_a_note(self, tmp_path):
        adapters = self.named(tmp_path, "org/Base", None)
        assert base_model_problems(adapters, None) == []
        found = check_compatibility(adapters)
        assert found.can_merge
        assert "'a1' names no base model" in found.notes[0]

    def test_revisions_are_a_note(self, tmp_path):
        adapters = [
            open_linear(tmp_path / str(r), {"layers.0.q": (8, 8)}, revision=r, base_model_name_or_path="b") for r in ("x", "y")
        ]
        assert any("revisions" in note and "x x, y y" in note for note in check_compatibility(adapters).notes)


class TestShapes:
    def test_equal_shapes(self, cohort):
        assert shape_problems(cohort) == []

    def test_one_line_for_all_layers(self, tmp_path):
        one = open_linear(tmp_path / "one", SHAPES)
        two = open_linear(tmp_path / "two", {p: (m, 64 if "q_proj" in p else n) for p, (m, n) in SHAPES.items()})
        (problem,) = shape_problems([one, two])
        assert problem.startswith("shapes differ for q_proj in 3 places, such as 'model.layers.0.self_attn.q_proj'")
        assert "'one' has [24, 32]; 'two' has [24, 64]" in problem

    def test_kinds_differ(self, tmp_path):
        one = open_linear(tmp_path / "one", {"emb": (8, 20)})
        draw = drawing(0)
        tensors = {key("emb", "lora_embedding_A"): draw(4, 20), key("emb", "lora_embedding_B"): draw(8, 4)}
        two = Adapter.open(write(tmp_path / "two", tensors), "two")
        (problem,) = shape_problems([one, two])
        assert "'two' has embedding [8, 20]" in problem

    def test_such_modules_are_left_out_of_the_comparison(self, tmp_path):
        one = open_linear(tmp_path / "one", SHAPES)
        two = open_linear(tmp_path / "two", {p: (m, 64 if "q_proj" in p else n) for p, (m, n) in SHAPES.items()}, seed=1)
        found = inspect_adapters([one, two])
        assert not found.compatibility.can_merge
        rest = {p: m for p, m in dense(one.folder).items() if "q_proj" not in p}
        assert found.comparison.norms[0] == pytest.approx(np.linalg.norm(flat(rest, rest)), rel=1e-6)
        assert found.adapters[0].norm > found.comparison.norms[0]


class TestNames:
    def pair(self, tmp_path, one: dict[str, tuple[int, int]], two: dict[str, tuple[int, int]]) -> list[str]:
        adapters = [open_linear(tmp_path / n, s, rank=2) for n, s in (("one", one), ("two", two))]
        return naming_problems(adapters)

    def layers(self, begun: str, shape: tuple[int, int] = (8, 8), count: int = 3) -> dict[str, tuple[int, int]]:
        return {f"{begun}layers.{i}.self_attn.{m}": shape for i in range(count) for m in ("q_proj", "v_proj")}

    @pytest.mark.parametrize(
        ("one", "two"),
        [
            ("model.language_model.", "language_model.model."),
            ("model.", "model.language_model."),
            ("", "model."),
            ("model.", "base.model."),
            ("transformer.", "model."),
            ("gpt_neox.", "model.decoder."),
            ("transformer.", "model.language_model."),
            ("bert.", "roberta."),
            ("visual.", "vision_tower."),
        ],
    )
    def test_prefix_drift(self, tmp_path, one, two):
        (problem,) = self.pair(tmp_path, self.layers(one), self.layers(two))
        assert repr(one.rstrip(".")) in problem
        assert repr(two.rstrip(".")) in problem

    @pytest.mark.parametrize(
        ("one", "two"),
        [
            ("model.encoder.", "model.decoder."),
            ("vision_model.", "language_model.model."),
            ("text_model.encoder.", "vision_model.encoder."),
            ("text_encoder.", "text_encoder_2."),
            ("model.", "vision_tower."),
            ("talker.", "thinker."),
            ("tower_a.", "tower_b."),
        ],
    )
    def test_two_towers_are_no_drift(self, tmp_path, one, two):
        assert self.pair(tmp_path, self.layers(one), self.layers(two)) == []

    def test_other_layers_are_no_drift(self, tmp_path):
        low, high = ({f"m.layers.{i}.q": (8, 8) for i in span} for span in (range(3), range(3, 6)))
        assert self.pair(tmp_path, low, high) == []

    def test_other_shapes_are_no_drift(self, tmp_path):
        assert self.pair(tmp_path, self.layers("model."), self.layers("model.language_model.", (8, 12))) == []

    def test_a_shared_layer_is_no_drift(self, tmp_path):
        both = {"model.layers.9.self_attn.q_proj": (8, 8)}
        one, two = self.layers("model.") | both, self.layers("model.language_model.") | both
        assert self.pair(tmp_path, one, two) == []

    def test_a_shared_head_hides_no_drift(self, tmp_path):
        one, two = (self.layers(begun) | {"lm_head": (8, 8)} for begun in ("model.", "transformer."))
        (problem,) = self.pair(tmp_path, one, two)
        assert "'model' and 'transformer'" in problem

    def test_the_container_of_the_layers_by_another_name(self, tmp_path):
        one, two = ({f"{begun}.{i}.attn.q": (8, 8) for i in range(2)} for begun in ("transformer.h", "model.layers"))
        (problem,) = self.pair(tmp_path / "a", one, two)
        assert "'transformer.h' and 'model.layers'" in problem
        blocks = {f"{begun}_blocks.{i}.attn.q": (8, 8) for begun in ("down", "up") for i in range(2)}
        one, two = ({p: s for p, s in blocks.items() if p.startswith(begun)} for begun in ("down", "up"))
        assert self.pair(tmp_path / "b", one, two) == []

    def test_modules_in_no_layer_are_no_drift(self, tmp_path):
        one, two = ({f"{head}.dense": (8, 8), "out": (8, 8)} for head in ("pooler", "classifier"))
        assert self.pair(tmp_path, one, two) == []

    def test_most_modules_must_have_a_partner(self, tmp_path):
        one = self.layers("model.", count=1) | {f"model.layers.{i}.mlp.up": (8, 8) for i in range(9)}
        two = self.layers("model.language_model.", count=1) | {f"model.language_model.layers.{i}.x": (8, 8) for i in range(9)}
        assert self.pair(tmp_path, one, two) == []

    def test_fused_and_separate_experts(self, tmp_path):
        draw = drawing(0)
        tensors = {key("m.layers.0.experts", "lora_A"): draw(6, 8), key("m.layers.0.experts", "lora_B"): draw(8, 6)}
        fused = Adapter.open(write(tmp_path / "fused", tensors, r=2, target_parameters=["experts.down_proj"]), "fused")
        apart = open_linear(tmp_path / "apart", {f"m.layers.0.experts.{e}.w2": (8, 8) for e in range(3)}, rank=2)
        for pair in ([fused, apart], [apart, fused]):
            (problem,) = naming_problems(pair)
            assert problem.startswith("'fused' adapts the fused experts")

    @pytest.mark.parametrize(
        ("fused", "apart"),
        [
            ("attn.in_proj", "attn.wq"),
            ("attention.query_key_value", "attention.query"),
            ("self_attn.qkv_linear", "attn.q_proj"),
            ("cross.to_kv", "cross.to_k"),
            ("mlp.gate_and_up_proj", "mlp.up_proj"),
            ("ff.wi", "ff.wi_1"),
            ("mlp.fc1", "mlp.fc1_g"),
            ("mlp.fc1", "mlp.fc1_x"),
            ("mlp.fc1", "mlp.fc12"),
            ("mlp.gate_up", "mlp.up"),
            ("feed_forward.gate_up_proj", "mlp.gate_proj"),
            ("mlp.linear_fc1", "mlp.linear_fc1_gate"),
            ("attn.Wqkv", "attn.Wq"),
            ("attn.to_added_qkv", "attn.add_q_proj"),
            ("attn.in_proj_qkvz", "attn.in_proj_z"),
        ],
    )
    def test_fused_and_separate_projections_of_any_layer(self, tmp_path, fused, apart):
        one, two = {f"m.layers.0.{fused}": (8, 8)}, {f"m.layers.1.{apart}": (8, 8)}
        for number, pair in enumerate(((one, two), (two, one))):
            (problem,) = self.pair(tmp_path / fused / str(number), *pair)
            assert fused in problem
            assert apart in problem
        both = one | {f"m.layers.0.{apart}": (8, 8)}  # a model that has both
        assert self.pair(tmp_path / fused / "both", both, two) == []

    @pytest.mark.parametrize(("one", "two"), [("mlp.gate_up_proj", "mlp.gate"), ("mlp.fc1", "mlp.fc2"), ("mlp.w1", "mlp.w2")])
    def test_projections_that_a_model_has_together(self, tmp_path, one, two):
        assert self.pair(tmp_path, {f"m.layers.0.{one}": (8, 8)}, {f"m.layers.0.{two}": (8, 8)}) == []

    def test_one_word_more_within_every_layer(self, tmp_path):
        one = {f"m.layers.{i}.attn.inner.{q}": (8, 8) for i in range(2) for q in "qv"}
        two = {f"m.layers.{i}.attn.{q}": (8, 8) for i in range(3) for q in "qv"}
        (problem,) = self.pair(tmp_path / "a", one, two)
        assert "differ by the word 'inner'" in problem
        assert self.pair(tmp_path / "b", one | {"m.layers.0.attn.q": (8, 8)}, two) == []  # a model that has both

    def test_fused_experts_and_single_ones_of_another_container(self, tmp_path):
        draw = drawing(0)
        tensors = {key("m.layers.0.mlp.experts", "lora_A"): draw(6, 8), key("m.layers.0.mlp.experts", "lora_B"): draw(8, 6)}
        fused = Adapter.open(write(tmp_path / "fused", tensors, r=2, target_parameters=["experts.down_proj"]), "fused")
        apart = open_linear(tmp_path / "apart", {f"m.layers.0.moe.experts.{e}.w2": (8, 8) for e in range(3)}, rank=2)
        assert any(p.startswith("'fused' adapts the fused experts") for p in naming_problems([fused, apart]))


class TestOtherChecks:
    def test_dora_needs_the_base(self, tmp_path):
        tensors = linear("layers.0.q", 8, 8, 4, drawing(0)) | {key("layers.0.q", "lora_magnitude_vector"): torch.ones(8)}
        dora = Adapter.open(write(tmp_path / "dora", tensors, use_dora=True), "dora")
        (problem,) = dora_problems([dora], None)
        assert "'dora'" in problem
        assert "'org/Base'" in problem
        assert dora_problems([dora], "org/Base") == []
        report = inspect_adapters([dora])
        assert report.adapters[0].kind == "DoRA"
        assert "s·B·A alone" in report.adapters[0].warnings[0]
        assert report.serving.adapters[0].refused == ("DoRA",)

    def test_mixed_ranks_exclude_factors(self, cohort, tmp_path):
        assert list(excluded_spaces(cohort)) == ["factors"]
        assert "such as 'model.embed_tokens' (a 2, b 5, c 4)" in excluded_spaces(cohort)["factors"]
        pair = [open_linear(tmp_path / f"p{i}", SHAPES, rank=4, seed=i) for i in (0, 1)]
        assert excluded_spaces(pair) == {}

    def test_ranks_that_differ_between_modules_alone_exclude_nothing(self, tmp_path):
        tensors = linear("l.0.q", 8, 8, 2, drawing(0)) | linear("l.0.v", 8, 8, 4, drawing(1))
        pair = [Adapter.open(write(tmp_path / n, tensors), n) for n in "ab"]
        assert excluded_spaces(pair) == {}

    def test_coverage_and_head_notes(self, cohort, tmp_path):
        found = check_compatibility(cohort)
        assert (found.common, found.modules) == (6, 7)
        assert any("6 of 7 target modules" in note and "a 7, b 7, c 6" in note for note in found.notes)
        tensors = linear("l.0.q", 8, 8, 4, drawing(0)) | {
            "base_model.model.score.weight": torch.ones(2, 8),
            "base_model.model.score.bias": torch.ones(2),
            key("l.0.q", "lora_B").replace("weight", "bias"): torch.ones(8),
        }
        adapter = Adapter.open(write(tmp_path / "head", tensors), "head")
        notes = check_compatibility([adapter]).notes
        assert any("(head: score)" in note for note in notes)
        assert any("lora_bias in 'head'" in note for note in notes)
        assert serving([adapter]).adapters[0].refused == ("full tensors (score)", "lora_bias")

    def test_all_problems_at_once(self, tmp_path):
        one = open_linear(tmp_path / "one", SHAPES, base_model_name_or_path="x")
        two = open_linear(tmp_path / "two", {p: (m, 2 * n) for p, (m, n) in SHAPES.items()}, base_model_name_or_path="y")
        assert len(check_compatibility([one, two]).problems) == 4  # the base, and three kinds of module


class TestServing:
    def test_settings(self):
        assert [max_lora_rank(r) for r in (1, 8, 9, 257, 512, 513)] == [8, 8, 16, 320, 512, None]

    def test_sum_of_ranks(self, tmp_path):
        adapters = [open_linear(tmp_path / str(r), {"l.0.q": (64, 48), "l.0.k": (6, 48)}, rank=r) for r in (8, 16, 4)]
        found = serving(adapters)
        assert [s.rank for s in found.adapters] == [8, 16, 4]
        assert [s.max_lora_rank for s in found.adapters] == [8, 16, 8]
        assert found.merged_rank == 28
        assert found.merged_max_lora_rank == 32
        assert all(s.refused == () for s in found.adapters)

    def test_a_sum_has_no_more_rank_than_its_modules(self, tmp_path):
        adapters = [open_linear(tmp_path / str(i), {"l.0.k": (6, 48)}, rank=4) for i in range(3)]
        assert serving(adapters).merged_rank == 6

    def test_modules_of_one_adapter_alone_do_not_add_up(self, tmp_path):
        adapters = [open_linear(tmp_path / str(i), {f"l.{i}.q": (64, 64)}, rank=8) for i in range(2)]
        assert serving(adapters).merged_rank == 8

    def test_patterns_are_not_read(self, tmp_path):
        adapter = open_linear(tmp_path / "a", {"l.0.q": (8, 8), "l.0.v": (8, 8)}, alpha_pattern={"q": 3})
        assert "scalings of 1 module " in serving([adapter]).adapters[0].refused[0]
        uniform = open_linear(tmp_path / "b", {"l.0.q": (8, 8)}, use_rslora=True)
        assert serving([uniform]).adapters[0].refused == ()

    def test_convolutions(self, cohort):
        assert any("convolutions (conv)" in r for r in serving(cohort).adapters[0].refused)


@every(
    ("path", "short"),
    [
        ("model.layers.0.self_attn.q_proj", "q_proj"),
        ("lm_head", "lm_head"),
        ("unet.attn.to_out.0", "to_out.0"),
        ("h.0.c_attn", "c_attn"),
        ("seq.0", "seq.0"),
        ("m.layers.1.experts.w1", "w1"),
    ],
)
def test_short_names(path, short):
    assert short_name(path) == short
