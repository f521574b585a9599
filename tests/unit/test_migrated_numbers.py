"""Recipes in other forms merge to the numbers that the older framework and mergekit would give."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from plait.linalg.keyed import Key
from plait.merging.combine import pipeline_of
from plait.merging.weighting import module_weights, towers_of
from plait.methods import Block
from plait.recipes.loading import build_recipe, load_recipe
from plait.recipes.writing import to_yaml
from plait.stages.base import GramCombine, LinearCombine
from tests.recipe_texts import quietly


def merged(recipe, x: torch.Tensor, module: str = "model.layers.3.self_attn.q_proj") -> torch.Tensor:
    """Merge the deltas x (T, p, q) of one module by a recipe, in one block."""
    pipeline, weights = (
        pipeline_of(recipe),
        torch.tensor(module_weights(recipe, module, towers_of([module])), dtype=torch.float64),
    )
    if isinstance(pipeline.combine, LinearCombine):
        weights = pipeline.combine.coefficients(weights, module)
    if isinstance(pipeline.combine, GramCombine):
        weights = pipeline.combine.coefficients(weights, x.flatten(1) @ x.flatten(1).mT)
    keys = tuple(Key(0, (a.name,)) for a in recipe.adapters)
    statistics = []
    for survey in pipeline.surveys():
        reduction, done = survey.start(len(x)), False
        while not done:
            reduction.observe(Block(x, weights, 0, keys, tuple(statistics)))
            done = reduction.end_pass()
        statistics.append(reduction.values)
    return recipe.scale * pipeline.combine_block(Block(x, weights, 0, keys, tuple(statistics)))


def deltas(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("k", [1, 20, 33, 100])
def test_a_migrated_ties_merges_as_it_did(k):
    """Keep the ceil(n k / 100) largest of each vector, elect by mass, average those that agree, times lambda."""
    old = {"adapters": ["./a", "./b", "./c"], "method": "ties", "method_params": {"k": k, "lambda": 1.5}}
    x = deltas(3)
    kept = torch.zeros_like(x)
    for t, vector in enumerate(x.flatten(1)):
        top = vector.abs().argsort(descending=True)[: -(-42 * k // 100)]
        kept[t].view(-1)[top] = vector[top]
    sign = kept.sum(0).sign()
    agrees = (kept.sign() == sign) & (sign != 0)
    expected = 1.5 * (kept * agrees).sum(0) / agrees.sum(0).clamp(min=1)

    torch.testing.assert_close(merged(quietly(build_recipe, old), x), expected)


@pytest.mark.parametrize("layer", [0, 3, 4])
def test_a_migrated_policy_weighs_as_it_did(layer):
    policy = {"type": "per_layer", "default": 0.5, "overrides": {0: 0.8, 3: 0.3}}
    recipe = quietly(build_recipe, {"adapters": ["./a", "./b"], "method": "weighted_delta", "lambda_policy": policy})
    share = {0: 0.8, 3: 0.3}.get(layer, 0.5)
    x = deltas(2)

    torch.testing.assert_close(merged(recipe, x, f"model.layers.{layer}.mlp.up_proj"), share * x[0] + (1 - share) * x[1])


def mergekit_sce(x, select_topk=1.0):
    mask = torch.ones_like(x[0])
    if select_topk < 1:
        variance = x.var(0, unbiased=False)
        mask = (variance >= variance.flatten().sort(descending=True).values[int(select_topk * variance.numel()) - 1]).double()
    x = x * mask
    w = (x**2).mean((1, 2)) / (x**2).mean((1, 2)).sum()
    agrees = (x.sign() == torch.where(x.sum(0) >= 0, 1.0, -1.0)) * w.view(-1, 1, 1)
    return (x * agrees).sum(0) / torch.where(agrees.sum(0) == 0, 1, agrees.sum(0))


def mergekit_ram(x, epsilon=1e-5, r=0.0, alpha=0.2):
    active = x.abs() > epsilon
    counts = active.sum(0)
    shared, own = (active & (counts > 1)), (active & (counts == 1))
    gain = 1 + r * (shared.sum((1, 2)) / own.sum((1, 2)).clamp(min=1)).clamp(max=alpha)
    return (x * own * gain.view(-1, 1, 1) + x * shared / counts.clamp(min=1)).sum(0)


def mergekit_multislerp(x, weights, *, normalize=True):
    w = torch.tensor(weights, dtype=x.dtype)
    w = (w / w.sum() if normalize else w).view(-1, 1, 1)
    norms = x.flatten(1).norm(dim=1).view(-1, 1, 1)
    mean = (w * x / norms).sum(0)
    return mean / mean.norm() * (w * norms).sum()


def mergekit_nuslerp(x, t):
    theta = torch.acos((x[0] * x[1]).sum() / (x[0].norm() * x[1].norm()))
    return (torch.sin((1 - t) * theta) * x[0] + torch.sin(t * theta) * x[1]) / torch.sin(theta)


def mergekit_model_stock(x):
    unit = x.flatten(1) / x.flatten(1).norm(dim=1, keepdim=True)
    cosine = (unit @ unit.mT).triu(1).sum() / 3
    return 3 * cosine / (1 + 2 * cosine) * x.mean(0)


@pytest.mark.parametrize(
    ("method", "weights", "parameters", "expected"),
    [
        ("sce", None, {}, mergekit_sce),
        ("sce", None, {"select_topk": 0.3}, lambda x: mergekit_sce(x, 0.3)),
        ("ram", None, {}, mergekit_ram),
        ("ram", None, {"epsilon": 0.8}, lambda x: mergekit_ram(x, 0.8)),
        ("ramplus_tl", None, {"epsilon": 1.2}, lambda x: mergekit_ram(x, 1.2, r=0.1)),
        ("ramplus_tl", None, {"epsilon": 1.2, "r": 2, "alpha": 5}, lambda x: mergekit_ram(x, 1.2, r=2, alpha=5)),
        ("multislerp", [0.5, 1.5, 0.25], {}, lambda x: mergekit_multislerp(x, [0.5, 1.5, 0.25])),
        (
            "multislerp",
            [0.5, 1.5, 0.25],
            {"normalize_weights": False},
            lambda x: mergekit_multislerp(x, [0.5, 1.5, 0.25], normalize=False),
        ),
        ("nuslerp", [0.6, 0.2], {}, lambda x: mergekit_nuslerp(x, 0.25)),
        ("nuslerp", [1, -1], {}, lambda x: mergekit_nuslerp(x, 0.5)),
        ("model_stock", None, {}, mergekit_model_stock),
        ("breadcrumbs_ties", [0.5, 1.5, 0.25], {"density": 0.5, "gamma": 0.1}, "gta"),
        ("della_linear", [0.5, 1.5, 0.25], {}, "gta"),
    ],
)
def test_mergekits_other_methods_merge_as_there(method, weights, parameters, expected):
    names = "abc"[: len(weights or "abc")]
    models = [
        {"model": f"org/base+./{n}", "parameters": {"weight": w} if w else {}}
        for n, w in zip(names, weights or [0] * 3, strict=True)
    ]
    recipe = quietly(
        build_recipe, {"merge_method": method, "base_model": "org/base", "models": models, "parameters": parameters}
    )
    x = deltas(len(names))
    if expected == "gta":
        expected = partial(mergekit, weights=weights, elects=method.endswith("ties"), **parameters)
    reference = expected(x)
    torch.testing.assert_close(merged(recipe, x), reference)
    assert load_recipe(to_yaml(recipe)) == recipe
    if method == "ramplus_tl":
        assert pipeline_of(recipe).combine.scope == "module", "mergekit counts in one tensor at a time"


def mergekit(x, *, weights, density=1.0, gamma=None, elects=False, normalize=False, scale=1.0):
    """What mergekit does with task vectors: trim each, weigh, elect signs, sum, divide, scale."""
    kept = torch.zeros_like(x)
    for t, vector in enumerate(x.flatten(1)):
        order = vector.abs().argsort(descending=True)
        n, top = len(vector), int((gamma or 0) * len(vector))
        top = min(top, n - int(density * n))
        order = order if density >= 1 else order[top : top + int(density * n)]
        kept[t].view(-1)[order] = vector[order]
    w = torch.tensor(weights, dtype=torch.float64).view(-1, 1, 1)
    weighed = kept * w
    majority = torch.where(weighed.sum(0) >= 0, 1.0, -1.0)
    mask = (weighed.sign() == majority).double() if elects else torch.ones_like(weighed)
    divisor = (w * mask).sum(0)
    result = (weighed * mask).sum(0)
    return scale * (result / torch.where(divisor == 0, 1, divisor) if normalize else result)


@pytest.mark.parametrize(
    ("method", "parameters", "settings_", "expected"),
    [
        ("linear", {}, {}, {"normalize": True}),
        ("linear", {"normalize": False}, {}, {}),
        ("task_arithmetic", {"lambda": 0.7}, {}, {"scale": 0.7}),
        ("task_arithmetic", {"normalize": True}, {}, {"normalize": True}),
        ("ties", {}, {"density": 0.4}, {"density": 0.4, "elects": True, "normalize": True}),
        ("ties", {"density": 0.4, "lambda": 2.0}, {}, {"density": 0.4, "elects": True, "normalize": True, "scale": 2.0}),
        ("ties", {"normalize": False}, {"density": 0.4}, {"density": 0.4, "elects": True}),
        ("ties", {}, {}, {"elects": True, "normalize": True}),
        ("dare_linear", {"normalize": True}, {}, {"normalize": True}),
        ("dare_ties", {}, {}, {"elects": True}),
        ("dare_ties", {"normalize": True}, {}, {"elects": True, "normalize": True}),
        ("della", {}, {}, {"elects": True, "normalize": True}),
        ("breadcrumbs", {}, {"density": 0.5, "gamma": 0.1}, {"density": 0.5, "gamma": 0.1}),
        ("breadcrumbs", {}, {"density": 0.5, "gamma": 0.7}, {"density": 0.5, "gamma": 0.7}),
        ("breadcrumbs", {}, {}, {}),
    ],
)
def test_a_mergekit_recipe_merges_as_mergekit_does(method, parameters, settings_, expected):
    weights = [0.5, 1.5, 0.25]
    models = [
        {"model": f"org/base+./{name}", "parameters": {"weight": w, **settings_}}
        for name, w in zip("abc", weights, strict=True)
    ]
    recipe = quietly(build_recipe, {"merge_method": method, "models": models, "parameters": parameters})
    x = deltas(3)

    torch.testing.assert_close(merged(recipe, x), mergekit(x, weights=weights, **expected))
