"""Factors that learn on the live model: what acts and the gradients, for every kind of layer, beside dense deltas."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from plait.adapters.adapter import Adapter
from plait.adapters.lowrank import LowRank
from plait.errors import PlanError
from plait.mixture import Mixture
from tests.adapters_on_disk import write_adapter
from tests.mixtures import EVERY, IDS, fingerprint
from tests.small_models import net

Deltas = Mapping[str, list[LowRank]]


@pytest.fixture
def mixture(tmp_path: Path) -> Mixture:
    return Mixture(net().double(), [Adapter.open(write_adapter(tmp_path / "a", EVERY, r=3, fan_in_fan_out=True).folder, "a")])


@pytest.fixture
def deltas(tmp_path: Path) -> Deltas:
    adapter = Adapter.open(write_adapter(tmp_path / "b", EVERY, r=4, seed=7, fan_in_fan_out=True).folder, "b")
    return {t: [s.scaled(entry.scaling) for s in adapter.read(t)] for t, entry in adapter.targets.items()}


def dense_output(deltas: Mapping[str, list[Tensor]]) -> Tensor:
    """Return what the base says with dense deltas, (d_out, d_in) per matrix, added to its weights."""
    model = net().double()
    weights: dict[str, Tensor] = dict(model.named_parameters())
    for path, parts in deltas.items():
        key = path if path in weights else f"{path}.weight"
        stored = weights[key]
        whole = torch.stack(parts) if stored.ndim == 3 and path.endswith("_proj") else torch.cat(parts)
        if path.endswith("c_attn") or path == "embed":
            whole = whole.mT
        weights[key] = stored + whole.reshape(stored.shape)
    output: Tensor = functional_call(model, weights, (IDS,))
    return output


def test_act_as_the_dense_deltas_and_so_do_their_gradients(mixture: Mixture, deltas: Deltas) -> None:
    factors = mixture.learned(deltas)
    with mixture.learning(factors) as model:
        loss = model(IDS).square().mean()
        loss.backward()
    leaves = {
        t: [(s.a.double().requires_grad_(), s.b.double().requires_grad_()) for s in found]
        for t, found in factors.deltas().items()
    }
    wanted = dense_output({t: [b @ a for a, b in found] for t, found in leaves.items()}).square().mean()
    wanted.backward()
    torch.testing.assert_close(loss, wanted)
    got = dict(factors.named())
    for target, found in leaves.items():
        for i, (a, b) in enumerate(found):
            assert float(a.grad.norm()) > 0
            torch.testing.assert_close(got[f"{target}.a"].grad[i].double(), a.grad, rtol=1e-5, atol=1e-8, msg=target)
            torch.testing.assert_close(got[f"{target}.bt"].grad[i].mT.double(), b.grad, rtol=1e-5, atol=1e-8, msg=target)


def test_leave_no_trace_on_the_base(mixture: Mixture, deltas: Deltas) -> None:
    before, plain = fingerprint(mixture.model), mixture.model(IDS)
    factors = mixture.learned(deltas)
    with mixture.learning(factors) as model:
        assert not torch.equal(model(IDS), plain)
    assert fingerprint(mixture.model) == before
    assert torch.equal(mixture.model(IDS), plain)


def test_what_acts_is_what_was_refreshed(mixture: Mixture, deltas: Deltas) -> None:
    factors = mixture.learned(deltas)
    state = factors.state()
    with mixture.learning(factors) as model, torch.no_grad():
        first = model(IDS)
        factors.scale(0.0)
        assert torch.equal(model(IDS), mixture_output(mixture))
        factors.load(state)
        assert torch.equal(model(IDS), first)


def mixture_output(mixture: Mixture) -> Tensor:
    with mixture.active(None) as model:
        output: Tensor = model(IDS)
        return output


def test_scale_multiplies_every_delta(mixture: Mixture, deltas: Deltas) -> None:
    factors = mixture.learned(deltas)
    factors.scale(-1.5)
    for target, found in factors.deltas().items():
        for delta, before in zip(found, deltas[target], strict=True):
            torch.testing.assert_close(delta.dense(), -1.5 * before.dense(), rtol=1e-4, atol=1e-4)


def test_are_the_best_of_a_smaller_rank(mixture: Mixture, deltas: Deltas) -> None:
    for target, found in mixture.learned(deltas, rank=2).deltas().items():
        for delta, before in zip(found, deltas[target], strict=True):
            assert delta.rank == 2
            u, s, vh = torch.linalg.svd(before.dense().double(), full_matrices=False)
            torch.testing.assert_close(delta.dense().double(), (u[:, :2] * s[:2]) @ vh[:2], rtol=1e-4, atol=1e-4)


def test_a_fresh_start_is_zero_and_can_learn(mixture: Mixture, deltas: Deltas) -> None:
    factors = mixture.learned(deltas)
    factors.restart(0)
    with mixture.learning(factors) as model:
        output = model(IDS)
        output.square().mean().backward()
    assert torch.equal(output.detach(), mixture_output(mixture))
    assert any(float(p.grad.abs().max()) > 0 for p in factors.parameters())


def test_another_shape_is_refused(mixture: Mixture) -> None:
    with pytest.raises(PlanError, match="right base"):
        mixture.learned({"layers.0.q_proj": [LowRank.zero((3, 4), rank=1)]})
