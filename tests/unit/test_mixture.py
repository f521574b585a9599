"""The live mixture against dense weights in float64: every kind of layer, every granularity, gradients, candidates."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from plait.adapters import LowRank, layouts
from plait.adapters.layouts import LAYOUTS, Conv1D, Embedding, Layout
from plait.errors import PlanError
from plait.mixture import Mixture
from plait.mixture import layers as live
from tests.every import every
from tests.mixtures import EVERY, FUSED, IDS, PLAIN, cohort, dense_output, opened
from tests.small_models import net

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return cohort(tmp_path_factory.mktemp("cohort"))


@pytest.fixture(scope="module")
def mixture(written):
    return Mixture(net().double(), opened(written))


@pytest.fixture(scope="module")
def canonical(written):
    return Mixture(net().double(), opened(written), factors="canonical")


WEIGHTS = (  # exact in float32, as λ is
    {"a": 1.0},
    {"b": 1.0},
    {"c": -0.5},
    {"a": 0.75, "b": -0.5},
    {"a": 0.25, "c": 2.0},  # one that does not act between them
    {"c": 0.125, "a": 0.5, "b": 1.5},
)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_active_adapters_are_their_weighted_sum(mixture, written, weights):
    expected = dense_output(written, lambda name, path: weights.get(name, 0.0))
    with mixture.active(weights) as model:
        torch.testing.assert_close(model(IDS), expected, **CLOSE)


@pytest.mark.parametrize("weights", [None, {}, {"a": 0.0}], ids=str)
def test_no_adapter_is_the_bare_base_bit_for_bit(mixture, weights):
    with mixture.active(weights) as model:
        assert torch.equal(model(IDS), net().double()(IDS))


@pytest.mark.parametrize("target", EVERY)
def test_every_kind_of_layer_on_its_own(tmp_path, target):
    held = cohort(tmp_path, {"a": {target: EVERY[target]}, "b": {target: EVERY[target]}})
    weights = {"a": 0.5, "b": -1.25}
    with Mixture(net().double(), opened(held)).active(weights) as model:
        got = model(IDS)
    torch.testing.assert_close(got, dense_output(held, lambda name, path: weights[name]), **CLOSE)
    assert not torch.allclose(got, net().double()(IDS))


def layer_of(path: str) -> str:
    return "layers.0" if path.startswith("layers.0") else "layers.1" if path.startswith("layers.1") else ""


def coefficients(axes, granularity, seed=0):
    torch.manual_seed(seed)
    return torch.randn(axes.shape(granularity), dtype=torch.float64, requires_grad=True)


def shares(axes, granularity, values):
    """Return what `dense_output` asks for, for every granularity but directions."""
    rows = {"task": lambda path: (), "layer": lambda path: (axes.layers.index(layer_of(path)),)}
    row = rows.get(granularity, lambda path: (axes.modules.index(path),))
    return lambda name, path: values[(*row(path), axes.tasks.index(name))]


@pytest.mark.parametrize("granularity", ["task", "layer", "module"])
def test_coefficients_and_their_gradients_equal_dense_weights(mixture, written, granularity):
    values = coefficients(mixture.axes, granularity)
    expected = dense_output(written, shares(mixture.axes, granularity, values))
    with mixture.mixed(values, granularity) as model:
        got = model(IDS)
    torch.testing.assert_close(got, expected, **CLOSE)
    probe = torch.randn_like(expected)
    (wanted,) = torch.autograd.grad((expected * probe).sum(), values)
    (found,) = torch.autograd.grad((got * probe).sum(), values)
    torch.testing.assert_close(found, wanted, **CLOSE)
    assert found.abs().max() > 0.1


@pytest.mark.parametrize("granularity", ["task", "layer", "module", "direction"])
def test_gradients_equal_finite_differences(canonical, granularity):
    values = (0.2 * coefficients(canonical.axes, granularity, seed=3)).detach().requires_grad_()
    with canonical.mixed(values, granularity) as model:
        (gradient,) = torch.autograd.grad(model(IDS).square().sum(), values)
        direction = torch.randn_like(gradient)
        with torch.no_grad():
            ends = []
            for step in (1e-5, -1e-5):
                canonical.set_coefficients(values + step * direction)
                ends.append(model(IDS).square().sum())
    torch.testing.assert_close((gradient * direction).sum(), (ends[0] - ends[1]) / 2e-5, rtol=1e-6, atol=1e-6)


def test_directions_are_singular_directions(tmp_path):
    """λ = 1 on the k-th direction alone is σₖ uₖ vₖᵀ, whatever the factors that were trained."""
    held = cohort(tmp_path, {"a": {"layers.0.v_proj": EVERY["layers.0.v_proj"]}})
    mixture = Mixture(net().double(), opened(held), factors="canonical")
    u, s, vh = torch.linalg.svd(torch.tensor(held["a"].deltas["layers.0.v_proj"]), full_matrices=False)
    assert mixture.axes.shape("direction") == (1, 2)
    for k in range(2):
        held["a"].deltas["layers.0.v_proj"] = (s[k] * torch.outer(u[:, k], vh[k])).numpy()
        with mixture.mixed(torch.eye(2, dtype=torch.float64)[k : k + 1], "direction") as model:
            torch.testing.assert_close(model(IDS), dense_output(held, lambda name, path: 1.0), **CLOSE)


def test_ones_in_every_direction_are_all_adapters_as_trained(canonical, written):
    expected = dense_output(written, lambda name, path: 1.0)
    with canonical.mixed(torch.ones(canonical.axes.shape("direction"), dtype=torch.float64), "direction") as model:
        torch.testing.assert_close(model(IDS), expected, **CLOSE)


def test_gradients_reach_the_input_as_through_dense_weights(tmp_path):
    """What lies before an adapted layer is learned through it: an input that requires gradients gets the same ones."""
    held = cohort(tmp_path, {"a": {"embed": PLAIN["embed"], "layers.1.q_proj": PLAIN["layers.1.q_proj"]}})
    mixture = Mixture(net().double(), opened(held))
    layer = mixture.model.layers[1].q_proj
    delta = torch.tensor(held["a"].deltas["layers.1.q_proj"])
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    with mixture.active({"a": 0.75}):
        (found,) = torch.autograd.grad(layer(x).square().sum(), x)
    dense = torch.nn.functional.linear(x, layer.weight + 0.75 * delta, layer.bias)
    (wanted,) = torch.autograd.grad(dense.square().sum(), x)
    torch.testing.assert_close(found, wanted, **CLOSE)


def test_the_tensor_itself_is_used_and_may_be_the_result_of_others(mixture):
    raw = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    with mixture.mixed(torch.tanh(raw)) as model:
        model(IDS).sum().backward()
    assert raw.grad is not None
    assert raw.grad.abs().min() > 0
    values = torch.zeros(3, dtype=torch.float64)
    with mixture.mixed(values) as model:
        before = model(IDS)
        values[0] = 1.0
        assert mixture.coefficients is values
        assert not torch.equal(model(IDS), before)


def test_only_h_is_kept_for_gradients_to_coefficients(tmp_path):
    """Two small products need their inner value, (tokens, R), and neither adapters' outputs nor the layer's input."""
    held = cohort(tmp_path, {n: {"head": PLAIN["head"]} for n in "abcde"})
    mixture = Mixture(net(), opened(held))
    layer, sizes = mixture.model.head, []
    lam = torch.ones(5, requires_grad=True)
    x = torch.randn(1000, 6)
    with (
        mixture.mixed(lam),
        torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t),
    ):
        layer(x)
    assert sum(s for s in sizes if s >= 1000) == 1000 * mixture.axes.ranks[0]


# rows


@pytest.fixture(scope="module")
def rowwise(tmp_path_factory):
    held = cohort(tmp_path_factory.mktemp("rows"), {n: PLAIN for n in "abc"})
    return Mixture(net().double(), opened(held), factors="canonical")


@pytest.mark.parametrize("granularity", ["task", "layer", "module", "direction"])
def test_rows_of_a_batch_equal_separate_passes(rowwise, granularity):
    torch.manual_seed(1)
    rows = torch.randn(3, *rowwise.axes.shape(granularity), dtype=torch.float64)
    with rowwise.candidates(rows, granularity) as model:
        together = model(IDS)
    for row, ids, got in zip(rows, IDS, together, strict=True):
        with rowwise.mixed(row, granularity) as model:
            torch.testing.assert_close(got, model(ids[None])[0], **CLOSE)
    assert not torch.allclose(together[0], together[1])


def test_gradients_of_rows_equal_those_of_separate_passes(rowwise):
    rows = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    with rowwise.candidates(rows) as model:
        (found,) = torch.autograd.grad(model(IDS).square().sum(), rows)
    for i in range(3):
        values = rows.detach()[i].clone().requires_grad_()
        with rowwise.mixed(values) as model:
            (wanted,) = torch.autograd.grad(model(IDS[i : i + 1]).square().sum(), values)
        torch.testing.assert_close(found[i], wanted, **CLOSE)


def test_rows_follow_flattened_tokens_and_refuse_what_they_cannot_follow(rowwise):
    rows = torch.randn(3, 3, dtype=torch.float64)
    layer, x = rowwise.model.head, torch.randn(3, 5, 6, dtype=torch.float64)
    with rowwise.candidates(rows):
        torch.testing.assert_close(layer(x.flatten(0, 1)), layer(x).flatten(0, 1), **CLOSE)
        with pytest.raises(PlanError, match=r"'head' sees 4 rows, the candidates are 3 rows"):
            layer(torch.randn(4, 5, 6, dtype=torch.float64))
        with pytest.raises(PlanError, match=r"'head' sees no rows"):
            layer(torch.randn(6, dtype=torch.float64))


def test_rows_are_refused_where_a_parameter_is_shared_by_them(mixture):
    with (
        pytest.raises(PlanError, match=r"'layers\.0\.experts\.down_proj' is a fused parameter, shared by all rows"),
        mixture.candidates(torch.ones(3, 3)),
    ):
        pass


# axes


def test_axes_name_the_entries(mixture):
    axes = mixture.axes
    assert axes.tasks == ("a", "b", "c")
    assert axes.layers == ("layers.0", "layers.1", "")
    assert axes.modules == tuple(sorted(EVERY))
    held = {path: 2 + 4 + (0 if "layers.1" in path else 3) for path in EVERY}
    assert axes.ranks == tuple(held[path] for path in axes.modules)
    assert axes.shape("direction") == (len(EVERY), 9)
    assert set(FUSED) < set(axes.modules)


@every(
    ("values", "granularity", "message"),
    [
        (torch.ones(2), "task", r"coefficients are \[2\]; per task they are \[3\] here"),
        (torch.ones(3), "layer", r"coefficients are \[3\]; per layer they are \[3, 3\] here"),
        (torch.ones(3, dtype=torch.bfloat16), "task", "coefficients are torch.bfloat16; small steps vanish"),
        (torch.ones(10, 9), "direction", "need canonical factors"),
        (torch.ones(3), "block", "granularity is 'block'; it must be one of task, layer, module, direction"),
    ],
)
def test_wrong_coefficients_are_refused(mixture, values, granularity, message):
    with pytest.raises(PlanError, match=message), mixture.mixed(values, granularity):
        pass


def test_directions_leave_no_room_for_biases(tmp_path):
    biased = dataclasses.replace(PLAIN["head"], bias=np.ones(4))
    held = cohort(tmp_path, {"a": {"head": biased}})
    mixture = Mixture(net(), opened(held), factors="canonical")
    with pytest.raises(PlanError, match="'head' has DoRA or lora_bias, which are not directions"):
        mixture.mixed(torch.ones(1, 2), "direction").__enter__()


def test_small_steps_of_coefficients_are_seen_in_bfloat16(tmp_path):
    """λ is float32 and is rounded only with the product: 0.3 and 0.3005 are one number in bfloat16."""
    held = cohort(tmp_path, {"a": {"head": PLAIN["head"]}})
    mixture = Mixture(net().bfloat16(), opened(held))
    x = torch.randn(64, 6).bfloat16()
    outputs = []
    for value in (0.3, 0.3005):
        with mixture.mixed(torch.tensor([value])):
            outputs.append(mixture.model.head(x))
    assert torch.tensor(0.3).bfloat16() == torch.tensor(0.3005).bfloat16()
    assert outputs[0].dtype == torch.bfloat16
    assert not torch.equal(*outputs)


def test_autocast_takes_part_and_leaves_the_factors_alone(tmp_path):
    held = cohort(tmp_path, {"a": {"head": PLAIN["head"]}, "b": {"head": PLAIN["head"]}})
    mixture = Mixture(net(), opened(held))
    layer, x = mixture.model.head, torch.randn(64, 6, requires_grad=True)
    values = torch.tensor([0.5, -2.0], requires_grad=True)
    with mixture.mixed(values):
        exact = layer(x)
        wanted = torch.autograd.grad(exact.square().sum(), (values, x))
        with torch.autocast("cpu", torch.bfloat16):
            rough = layer(x)
        found = torch.autograd.grad(rough.square().sum(), (values, x))
        assert torch.equal(layer(x), exact)
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), exact, rtol=0.02, atol=0.02 * float(exact.detach().abs().max()))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.float(), other, rtol=0.05, atol=0.02 * float(other.abs().max()))


def test_order_of_adapters_is_no_matter(written):
    weights = {"a": 0.75, "b": -0.5, "c": 0.25}
    outputs = []
    for order in itertools.permutations(written):
        with Mixture(net().double(), opened({n: written[n] for n in order})).active(weights) as model:
            outputs.append(model(IDS))
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0], **CLOSE)


def test_every_layout_of_an_adapter_has_a_live_layer():
    assert {*live._LAYERS} <= {*LAYOUTS} - {Conv1D}, "the factors of a Conv1D are those of a linear layer"
    for layout in {*LAYOUTS} - {Conv1D}:
        live.layer_type(layout)
    derived = type("Derived", (Embedding,), {})
    assert live.layer_type(derived) is live.layer_type(Embedding)
    with pytest.raises(StopIteration):
        live.layer_type(type("Another", (Layout,), {}))  # what is derived from `Layout` alone needs a class of its own
    assert len({layout.kind for layout in LAYOUTS}) == len(LAYOUTS)


def test_a_layout_derived_from_linear_acts_on_linear_layers_and_claims_none(tmp_path, monkeypatch):
    """As CONTRIBUTING.md adds one: here with names of its own for A and B."""

    class Transposed(layouts.Linear):
        kind = "transposed"

        @classmethod
        def claims(cls, shapes, *, is_parameter):
            return True

        @classmethod
        def _of(cls, a, b, rank):
            return cls(b[1], a[0]), a[1]

        def unpack(self, a, b):
            return [LowRank(a.mT.contiguous(), b.mT.contiguous())]

        def packed_shapes(self, rank):
            return (self.d_in, rank), (rank, self.d_out)

    monkeypatch.setattr(layouts, "LAYOUTS", (Transposed, *LAYOUTS))
    held = cohort(tmp_path, {"a": {"head": EVERY["head"]}})
    file = tmp_path / "a" / "adapter_model.safetensors"
    save_file({name: x.mT.contiguous() for name, x in load_file(file).items()}, file)
    (adapter,) = opened(held)
    assert type(adapter.targets["head"].layout) is Transposed
    assert type(layouts.module_layout(torch.nn.Linear(2, 3))) is layouts.Linear
    with Mixture(net().double(), [adapter]).active({"a": 0.5}) as model:
        torch.testing.assert_close(model(IDS), dense_output(held, lambda name, path: 0.5), **CLOSE)
