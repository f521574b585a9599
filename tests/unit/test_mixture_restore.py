"""Contexts of the mixture: what acts, what is put back, what is refused."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from plait.adapters.lowrank import LowRank
from plait.errors import AdapterError, PlanError
from plait.linalg.blocks import RowBlocks
from plait.mixture import Mixture
from tests.adapters_on_disk import Conv, Linear, write_adapter
from tests.every import every
from tests.mixtures import IDS, PLAIN, cohort, dense_output, fingerprint, opened, part
from tests.small_models import net


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cohort")
    held = cohort(folder)
    rows = torch.randn(2, 8)
    for i, name in enumerate("xy"):
        held[name] = write_adapter(
            folder / name,
            part("layers.0.q_proj"),
            seed=7 + i,
            trainable_token_indices=[3, 5 + i],
            extra={
                "head.weight": torch.randn(4 + i, 6),
                "head.bias": torch.randn(4 + i),
                "layers.0.v_proj.base_layer.bias": torch.randn(6),
                "embed.token_adapter.trainable_tokens_delta": rows + i,
            },
        )
    return Mixture(net(), opened(held))


def low_rank(path: str, seed: int = 0) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    shape = {"layers.0.q_proj": (8, 8), "embed": (8, 20), "head": (4, 6), "layers.1.c_attn": (8, 8), "conv1": (6, 24)}[path]
    return LowRank(torch.randn(2, shape[1], generator=generator), torch.randn(shape[0], 2, generator=generator))


def as_rows(delta: LowRank) -> RowBlocks:
    return RowBlocks(delta.shape, lambda start, stop: delta.b[start:stop] @ delta.a, torch.float32)


def contexts(mixture):
    ones = torch.ones(5)
    dense = {p: [as_rows(low_rank(p))] for p in ("embed", "head", "layers.1.c_attn", "conv1")}
    return {
        "active": lambda: mixture.active({"a": 0.5, "c": 2.0}),
        "active with heads": lambda: mixture.active({"x": 1.0}),
        "heads alone": lambda: mixture.active({}, heads="y"),
        "mixed": lambda: mixture.mixed(ones, heads="x"),
        "attached": lambda: mixture.attached({"layers.0.q_proj": [low_rank("layers.0.q_proj")]}, heads="y"),
        "attached, dense": lambda: mixture.attached(dense, heads="x"),
    }


NAMES = ("active", "active with heads", "heads alone", "mixed", "attached", "attached, dense")


class Boom(Exception):
    pass


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", ["quietly", "raising", "raising inside the model"])
def test_the_base_is_put_back_exactly(mixture, name, how, monkeypatch):
    base, bits = mixture.model(IDS), fingerprint(mixture.model)
    if how == "quietly":
        with contexts(mixture)[name]() as model:
            assert not torch.equal(model(IDS)[:, :4], base)
    elif how == "raising":

        def use() -> None:
            with contexts(mixture)[name]() as model:
                model(IDS)
                raise Boom

        with pytest.raises(Boom):
            use()
    else:

        def fail(*args: object) -> None:
            raise Boom

        monkeypatch.setattr("torch.einsum", fail)  # within fused experts, while ΔW hides a parameter
        with pytest.raises(Boom), contexts(mixture)[name]() as model:
            model(IDS)
        monkeypatch.undo()
    assert fingerprint(mixture.model) == bits
    assert torch.equal(mixture.model(IDS), base)


@every("outer", NAMES)
@every("inner", NAMES)
def test_contexts_nest_and_the_inner_one_stands_in_for_the_outer(mixture, outer, inner):
    made = contexts(mixture)
    with made[inner]() as model:
        alone = model(IDS)
    with made[outer]() as model:
        before, lam = model(IDS), mixture.coefficients
        with made[inner]() as model:
            assert torch.equal(model(IDS), alone)
        assert torch.equal(model(IDS), before)
        assert mixture.coefficients is lam


def test_a_failure_while_attaching_leaves_nothing(mixture, monkeypatch):
    bits = fingerprint(mixture.model)
    original, calls = nn.Module.register_forward_hook, []

    def fail_at_fifth(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == 5:
            raise Boom
        return original(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "register_forward_hook", fail_at_fifth)
    with pytest.raises(Boom), mixture.active({"x": 1.0}):
        pass
    monkeypatch.undo()
    assert fingerprint(mixture.model) == bits
    with mixture.active({"a": 1.0}) as model:
        assert not torch.equal(model(IDS), net()(IDS))


def test_the_wrong_adapter_would_be_noticed(mixture):
    """Each adapter on its own gives another output, so that comparisons of outputs tell them apart."""
    outputs = []
    for name in "abc":
        with mixture.active({name: 1.0}) as model:
            outputs.append(model(IDS))
    assert all(not torch.allclose(outputs[i], outputs[j], atol=1e-2) for i, j in ((0, 1), (0, 2), (1, 2)))


# heads, token rows, biases


def test_heads_rows_and_biases_are_those_of_the_active_adapter(mixture):
    x, y = mixture._heads["x"], mixture._heads["y"]
    assert (len(x), len(y)) == (4, 4)
    with mixture.active({"x": 1.0}) as model:
        assert model(IDS).shape == (3, 4)
        rows = model.embed.weight[[3, 5]].clone()
        bias = model.layers[0].v_proj.bias.clone()
    with mixture.active({"y": 0.3}) as model:
        assert model(IDS).shape == (3, 5)
        torch.testing.assert_close(model.embed.weight[[3, 6]], rows + 1)
        assert not torch.equal(model.layers[0].v_proj.bias, bias)
    with mixture.active({"x": 1.0}, heads=False) as model:
        assert torch.equal(model.head.weight, net().head.weight)
    with mixture.active({"a": 1.0}, heads="x") as model:
        assert not torch.equal(model.head.weight, net().head.weight)


def test_two_adapters_with_heads_need_a_choice(mixture):
    with pytest.raises(PlanError, match=r"x, y each bring full tensors .* choose whose are used: heads='x'"):
        mixture.active({"x": 0.5, "y": 0.5}).__enter__()
    with mixture.active({"x": 0.5, "y": 0.5}, heads="y") as model:
        assert model(IDS).shape == (3, 5)


def test_a_tied_head_keeps_its_weight_but_shares_trained_rows(tmp_path):
    torch.manual_seed(0)
    model = nn.Module()
    model.embed, model.head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
    model.head.weight = model.embed.weight
    before = model.embed.weight.detach().clone()
    held = {
        "whole": write_adapter(tmp_path / "w", {}, extra={"embed.weight": torch.ones(10, 4)}),
        "rows": write_adapter(
            tmp_path / "r",
            {},
            trainable_token_indices={"embed": [2]},
            extra={"embed.token_adapter.trainable_tokens_delta": torch.ones(1, 4)},
        ),
    }
    mixture = Mixture(model, opened(held))
    with mixture.active({}, heads="whole"):
        assert torch.equal(model.embed.weight, torch.ones(10, 4))
        assert torch.equal(model.head.weight, before)
    with mixture.active({}, heads="rows"):
        assert torch.equal(model.embed.weight[2], torch.ones(4))
        assert torch.equal(model.head.weight[2], torch.ones(4))
    assert model.embed.weight is model.head.weight
    assert torch.equal(model.embed.weight, before)


# attached


def test_attached_low_rank_and_dense_results_are_base_plus_delta(tmp_path, mixture):
    paths = ("layers.0.q_proj", "embed", "layers.1.c_attn", "conv1")
    low = {p: [low_rank(p)] for p in paths}
    held = cohort(tmp_path, {"m": part(*paths)})
    for p in paths:
        dense = low_rank(p).dense().double()
        held["m"].deltas[p] = (dense.mT if p == "embed" else dense.view(6, 8, 3) if p == "conv1" else dense).numpy()
    expected = dense_output(held, lambda name, path: 1.0).float()
    for merged in (low, {p: [as_rows(d[0])] for p, d in low.items()}):
        with mixture.attached(merged) as model:
            torch.testing.assert_close(model(IDS), expected, rtol=1e-5, atol=1e-5)


def test_attached_fused_parameters(tmp_path):
    held = cohort(tmp_path, {"m": part("layers.0.experts.gate_up_proj", "layers.0.experts.down_proj")})
    mixture = Mixture(net(), opened(held))
    expected = dense_output(held, lambda name, path: 1.0).float()
    (adapter,) = opened(held)
    low = {p: [s.scaled(t.scaling) for s in adapter.read(p)] for p, t in adapter.targets.items()}
    dense = {p: [as_rows(s) for s in slices] for p, slices in low.items()}
    some = {p: [slices[0], *map(as_rows, slices[1:])] for p, slices in low.items()}
    for merged in (low, dense, some):
        with mixture.attached(merged) as model:
            torch.testing.assert_close(model(IDS), expected, rtol=1e-5, atol=1e-5)


def test_a_dense_result_is_rounded_once_as_a_bake_rounds(tmp_path):
    mixture = Mixture(net().bfloat16(), [])
    delta = low_rank("layers.0.q_proj")
    before = mixture.model.layers[0].q_proj.weight.detach().clone()
    with mixture.attached({"layers.0.q_proj": [as_rows(delta)]}) as model:
        expected = (before.float() + delta.dense()).bfloat16()
        assert torch.equal(model.layers[0].q_proj.weight, expected)


def test_zero_padding_changes_no_bit(mixture):
    """A merged adapter is written with one rank for all modules; the ranks that only fill it up do not act."""
    delta = low_rank("layers.0.q_proj")
    outputs = []
    for d in (delta, delta.padded(7)):
        with mixture.attached({"layers.0.q_proj": [d]}) as model:
            outputs.append(model(IDS))
    assert torch.equal(*outputs)


def test_a_merge_result_that_was_placed_acts_again_and_on_its_own_mixture_only(tmp_path, mixture):
    delta = low_rank("layers.0.q_proj")
    merged = {"layers.0.q_proj": [delta], "layers.1.c_attn": [as_rows(low_rank("layers.1.c_attn"))]}
    with mixture.attached(merged) as model:
        expected = model(IDS)
    with mixture.attached({"layers.0.q_proj": [delta.scaled(2.0)]}):
        placed = mixture.placed(merged)  # while another acts
    for _ in range(2):
        with mixture.attached(placed) as model:
            assert torch.equal(model(IDS), expected)
    with pytest.raises(PlanError, match="placed on another Mixture"), Mixture(net(), []).attached(placed):
        pass


# what is refused


def test_names_and_weights_are_checked_together(mixture):
    with pytest.raises(PlanError) as error:
        mixture.active({"aa": 1.0, "b": float("nan")}).__enter__()
    assert "no adapter is named 'aa'" in str(error.value)
    assert "the weight of 'b' is nan" in str(error.value)
    with pytest.raises(PlanError, match="no adapter is named 'nobody'"):
        mixture.active({}, heads="nobody").__enter__()


def test_coefficients_need_something_that_acts(mixture):
    def turn(context) -> None:
        with context:
            mixture.set_coefficients(torch.ones(5))

    merged = {"layers.0.q_proj": [low_rank("layers.0.q_proj")]}
    for context in (nullcontext(), mixture.active({}), mixture.attached(merged)):
        with pytest.raises(PlanError, match="enter one of them first"):
            turn(context)


def test_what_does_not_fit_is_listed_at_once(tmp_path):
    held = {
        "a": write_adapter(tmp_path / "a", {"layers.0.q_proj": Linear(9, 8), "layers.0.q_pro": Linear(8, 8)}),
        "b": write_adapter(tmp_path / "b", {"conv2": Linear(4, 6), "grouped": Conv(6, 3, (3,))}),
    }
    with pytest.raises(PlanError) as error:
        Mixture(net(), opened(held))
    text = str(error.value)
    assert "adapter 'a': 'layers.0.q_pro': the model has no such module. Did you mean 'layers.0.q_proj'?" in text
    assert "adapter 'a': 'layers.0.q_proj' maps 8 → 8 in the model, the delta is 8 → 9" in text
    assert "adapter 'b': 'conv2' is of kind conv in the model and of kind linear in the adapter" in text
    assert "adapter 'b': 'grouped' maps" in text


def test_layers_that_are_not_covered_are_errors(tmp_path):
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "norm": nn.LayerNorm(8), "bag": nn.EmbeddingBag(5, 8)})
    held = {
        "a": write_adapter(tmp_path / "a", {"attention.out_proj": Linear(8, 8), "norm": Linear(8, 8), "bag": Linear(8, 8)}),
    }
    with pytest.raises(PlanError) as error:
        Mixture(model, opened(held))
    assert "'attention.out_proj': nn.MultiheadAttention reads its weights without calling a layer" in str(error.value)
    assert "'norm': LayerNorm is not covered" in str(error.value)
    assert "'bag': EmbeddingBag is not covered" in str(error.value)


def test_heads_without_a_place_are_errors(tmp_path):
    held = {"a": write_adapter(tmp_path / "a", part("head"), extra={"score.weight": torch.ones(2, 8)})}
    with pytest.raises(PlanError, match=r"'score\.weight': the model has no such tensor"):
        Mixture(net(), opened(held))
    held = {"b": write_adapter(tmp_path / "b", part("head"), extra={"embed.weight": torch.ones(21, 8)})}
    with pytest.raises(
        PlanError, match=r"adapter 'b': 'embed.weight': the adapter's tensor is \[21, 8\], the model's is \[20, 8\]"
    ):
        Mixture(net(), opened(held))


def test_values_that_are_not_finite_are_errors(tmp_path):
    bad = write_adapter(tmp_path / "a", part("head"))
    from safetensors.torch import load_file, save_file

    tensors = load_file(bad.folder / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("inf")
    save_file(tensors, bad.folder / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="NaN or infinite"):
        Mixture(net(), opened({"a": bad}))


def test_merged_targets_must_fit(mixture):
    with pytest.raises(PlanError, match=r"'layers\.9\.q_proj': the model has no such module"):
        mixture.attached({"layers.9.q_proj": [low_rank("layers.0.q_proj")]}).__enter__()
    with pytest.raises(PlanError, match="'head' maps 6 → 4 in the model, the delta is 8 → 8"):
        mixture.attached({"head": [low_rank("layers.0.q_proj")]}).__enter__()
    grouped = as_rows(LowRank(torch.ones(1, 18), torch.ones(3, 1)))
    with pytest.raises(PlanError, match="grouped convolution reads all channels"):
        mixture.attached({"grouped": [grouped, grouped]}).__enter__()


def test_paths_with_and_without_the_prefix_of_the_task_model(tmp_path):
    held = cohort(tmp_path, {"a": {f"model.{p}": m for p, m in PLAIN.items()}})
    wrapped = nn.ModuleDict({"model": net()})
    with Mixture(wrapped, opened(held)).active({"a": 1.0}) as model:
        expected = model["model"](IDS)
    with Mixture(net(), opened(held)).active({"a": 1.0}) as model:
        torch.testing.assert_close(model(IDS), expected)
    short = cohort(tmp_path / "short", {"a": PLAIN})
    ambiguous = nn.ModuleDict({"left": net(), "right": net()})
    with pytest.raises(PlanError, match="'conv1': the model has no such module"):
        Mixture(ambiguous, opened(short))


# beside other machinery


def test_two_mixtures_of_one_model_never_add_up(tmp_path):
    held = cohort(tmp_path, {"a": part("layers.0.q_proj"), "b": part("layers.0.q_proj")})
    a, b = opened(held)
    model = net()
    one, other = Mixture(model, [a]), Mixture(model, [b])
    with one.active({"a": 1.0}):
        expected = model(IDS)
        for attempt in (lambda: other.active({"b": 1.0}), lambda: other.active({}), lambda: other.attached({})):
            with pytest.raises(PlanError, match=r"another Mixture acts on this model.*Leave its `with` block"), attempt():
                pass
        with pytest.raises(PlanError, match=r"another Mixture acts"):
            Mixture(model, [b])
        with one.active({}), one.active({"a": 1.0}):
            assert torch.equal(model(IDS), expected)
        assert torch.equal(model(IDS), expected)
    with other.active({"b": 1.0}):
        assert not torch.equal(model(IDS), expected)


def test_code_compiled_before_sees_what_acts_later(mixture):
    model = mixture.model
    torch._dynamo.config.skip_nnmodule_hook_guards = True  # as torch has it
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        bare = compiled(IDS)
        for weights in ({"a": 1.0}, {"b": 0.5, "c": 1.0}, {"a": 1.0}):
            with mixture.active(weights):
                expected = model(IDS)
                assert not torch.allclose(expected, bare)
                torch.testing.assert_close(compiled(IDS), expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(compiled(IDS), bare, rtol=1e-4, atol=1e-4)


def test_an_output_that_a_hook_made_a_leaf_is_not_written_into(mixture):
    """Reentrant gradient checkpointing asks for a gradient of the embedding's output so."""
    weights = torch.ones(5, requires_grad=True)
    with mixture.mixed(weights) as model:
        model(IDS).sum().backward()
    expected, weights.grad = weights.grad, None
    hook = mixture.model.embed.register_forward_hook(lambda module, args, output: output.requires_grad_())
    try:
        with mixture.mixed(weights) as model:
            model(IDS).sum().backward()
    finally:
        hook.remove()
    torch.testing.assert_close(weights.grad, expected)
