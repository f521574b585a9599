"""Every statistic against a literal float64 reading on dense matrices, and the checks of compatibility."""

from __future__ import annotations

import json
from itertools import combinations

import numpy as np
import pytest
import torch

from plait.adapters import Adapter
from plait.errors import AdapterError, PlanError
from plait.inspection.compatibility import (
    base_model_problems,
    check_compatibility,
    dora_problems,
    excluded_spaces,
    max_lora_rank,
    serving,
    shape_problems,
    short_name,
)
from plait.inspection.different_names import naming_problems
from plait.inspection.report import Inspection, inspect_adapters
from tests.every import every
from tests.inspected import (
    SHAPES,
    changed,
    dense,
    drawing,
    flat,
    key,
    linear,
    make_cohort,
    mixed,
    open_linear,
    write,
)

Shapes = dict[str, tuple[tuple[int, ...], tuple[int, ...]]]


@pytest.fixture
def cohort(tmp_path):
    return make_cohort(tmp_path)


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

    def test_nan_is_refused(self, tmp_path, four_threads):
        adapter = open_linear(tmp_path / "a", SHAPES)
        broken = changed(adapter, tmp_path / "broken", lambda a, b: (a, b * torch.nan))
        with pytest.raises(AdapterError, match=r"'broken'.*NaN"):
            inspect_adapters([adapter, broken])
        assert torch.get_num_threads() == 4

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

    def test_equal_names_are_no_drift(self, tmp_path):
        """Whatever words they differ by within one adapter."""
        names = {f"layers.0.self_attn.{n}": (8, 8) for n in ("q_proj", "module.q_proj", "qkv_proj")}
        assert self.pair(tmp_path, names, names) == []

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
        assert any("layers of kind conv (conv)" in r for r in serving(cohort).adapters[0].refused)


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
