"""PEFT's own `add_weighted_adapter` beside plait: factor-wise types in space `factors`; `cat` and `*svd` where it is right."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from tests.adapters_on_disk import Linear, Written, read_deltas
from tests.reference.harness import assert_equal, run
from tests.small_models import net, peft_adapter

MODULES = {
    f"layers.{i}.{name}": Linear(*shape)
    for i in (0, 1)
    for name, shape in {"q_proj": (8, 8), "v_proj": (6, 8), "back": (8, 6)}.items()
}
ALPHAS = {"a": 8, "b": 3, "c": 5}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Three adapters of one rank and different alphas; and PEFT's model with all of them."""
    folder = tmp_path_factory.mktemp("peft")
    targets = ["q_proj", "v_proj", "back"]
    written = {
        n: peft_adapter(folder / n, seed, r=4, lora_alpha=alpha, target_modules=targets)
        for seed, (n, alpha) in enumerate(ALPHAS.items())
    }
    model = PeftModel.from_pretrained(net(), written["a"], adapter_name="a")
    for name in ("b", "c"):
        model.load_adapter(written[name], name)
    return {n: Written(f, {}, {}, {}) for n, f in written.items()}, model


def peft_merge(model, names, weights, **options):
    """Return target → delta of what PEFT makes of some adapters."""
    model.add_weighted_adapter(list(names), list(weights), "merged", **options)
    try:
        layers = {name: module for name, module in model.base_model.model.named_modules() if name in MODULES}
        return {name: layer.get_delta_weight("merged").detach().double().numpy() for name, layer in layers.items()}
    finally:
        model.delete_adapter("merged")  # a name that exists would be left as it is, in silence


def plait_merge(out, saved, weights, **fields):
    return read_deltas(run(out, saved, weights, **fields).folder, MODULES)


WEIGHTS = {"two": [0.7, 0.4], "three": [1.0, 0.5, 2.0], "negative": [0.8, -0.6, 0.3]}


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ({"name": "linear"}, {"combination_type": "linear"}),
        ({"name": "ties", "density": 0.5}, {"combination_type": "ties", "density": 0.5}),
        ({"name": "ties", "density": 0.2}, {"combination_type": "ties", "density": 0.2}),
        (
            {"name": "ties", "density": 0.7, "sign": "frequency"},
            {"combination_type": "ties", "density": 0.7, "majority_sign_method": "frequency"},
        ),
        ({"name": "magnitude_prune", "density": 0.3}, {"combination_type": "magnitude_prune", "density": 0.3}),
        ({"name": "magnitude_prune", "density": 0.75}, {"combination_type": "magnitude_prune", "density": 0.75}),
    ],
    ids=lambda x: "-".join(map(str, x.values())) if "name" in x else "",
)
def test_factors_are_merged_as_peft_merges_them(tmp_path, saved, method, options, weights):
    files, model = saved
    chosen = {n: files[n] for n in list(files)[: len(weights)]}
    expected = peft_merge(model, chosen, weights, **options)
    found = plait_merge(tmp_path / "out", chosen, weights, method={**method, "space": "factors"})
    assert_equal(found, expected, 1e-6)


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_cat(tmp_path, saved, weights):
    files, model = saved
    chosen = {n: files[n] for n in list(files)[: len(weights)]}
    expected = peft_merge(model, chosen, weights, combination_type="cat")
    assert_equal(plait_merge(tmp_path / "out", chosen, weights, method="cat"), expected)


@pytest.mark.parametrize("rank", [None, 2, 6])
def test_svd(tmp_path, saved, rank):
    """PEFT decomposes the dense sum; plait the factors."""
    files, model = saved
    expected = peft_merge(model, files, WEIGHTS["negative"], combination_type="svd", svd_rank=rank)
    output = {"rank": rank or "auto"}
    assert_equal(plait_merge(tmp_path / "out", files, WEIGHTS["negative"], method="svd", output=output), expected, 1e-5)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ties_svd", {"majority_sign_method": "total"}),
        ("ties_svd", {"majority_sign_method": "frequency"}),
        ("magnitude_prune_svd", {}),
    ],
)
@pytest.mark.parametrize("rank", [None, 6])
def test_dense_types_with_svd(tmp_path, saved, name, options, rank):
    """On the dense deltas, scaling inside and weights outside, truncated to the largest rank."""
    files, model = saved
    weights = WEIGHTS["three"]
    expected = peft_merge(model, files, weights, combination_type=name, density=0.5, svd_rank=rank, **options)
    sign = {"sign": options["majority_sign_method"]} if options else {}
    found = plait_merge(
        tmp_path / "out", files, weights, method={"name": name, "density": 0.5, **sign}, output={"rank": rank or "auto"}
    )
    assert_equal(found, expected, 1e-5)


def test_the_product_of_sums_is_not_the_sum_of_products(saved, tmp_path):
    """Why `factors` is for reproduction only: the cross terms are as large as the merge."""
    files, _ = saved
    exact = plait_merge(tmp_path / "exact", files, WEIGHTS["three"], method="linear")
    apart = plait_merge(tmp_path / "apart", files, WEIGHTS["three"], method={"name": "linear", "space": "factors"})
    for module, x in exact.items():
        difference = torch.tensor(apart[module] - x).norm() / torch.tensor(x).norm()
        assert difference > 0.5
