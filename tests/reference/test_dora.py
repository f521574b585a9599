"""DoRA (Liu et al. 2024, eq. 5): W' = m ⊙ (W + s B A) / ‖W + s B A‖, row by row; a linear merge of DoRAs is a DoRA."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from plait.errors import PlanError
from tests.adapters_on_disk import Linear, read_deltas, write_adapter
from tests.reference.harness import recipe, run

SHAPES = {"layers.0.proj": (6, 5), "layers.1.proj": (4, 7)}
PLAIN = {m: Linear(*s) for m, s in SHAPES.items()}
WEIGHTS = [0.6, -0.3, 0.8]


def effective(weight, delta, magnitude):
    """Eq. 5; a plain LoRA is W + s B A."""
    turned = weight + delta
    return turned if magnitude is None else (magnitude / np.linalg.norm(turned, axis=1))[:, None] * turned


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A base, two DoRAs of different ranks, and a plain LoRA between them that lacks a module."""
    folder = tmp_path_factory.mktemp("dora")
    rng = np.random.default_rng(0)
    base = {m: rng.standard_normal(s) for m, s in SHAPES.items()}
    (folder / "base").mkdir()
    save_file(
        {f"model.{m}.weight": torch.tensor(w, dtype=torch.float32) for m, w in base.items()},
        folder / "base" / "model.safetensors",
    )
    written, magnitudes = {}, {}
    for name, rank in (("a", 2), ("c", 3)):
        magnitudes[name] = {m: np.float32(rng.uniform(0.5, 3, s[0])) for m, s in SHAPES.items()}
        modules = {m: Linear(*s, magnitude=magnitudes[name][m]) for m, s in SHAPES.items()}
        written[name] = write_adapter(folder / name, modules, r=rank, rslora=name == "c", seed=rank)
    written["b"] = write_adapter(folder / "b", {"layers.0.proj": PLAIN["layers.0.proj"]}, seed=9)
    return folder / "base", base, {n: written[n] for n in "abc"}, magnitudes


def merged_weights(folder, base):
    deltas = read_deltas(folder, PLAIN)
    tensors = load_file(folder / "adapter_model.safetensors")
    assert json.loads((folder / "adapter_config.json").read_text())["use_dora"] is True
    found = {}
    for module, weight in base.items():
        magnitude = tensors[f"base_model.model.{module}.lora_magnitude_vector"].double().numpy()
        found[module] = effective(weight, deltas[module], magnitude)
    return found


@pytest.mark.parametrize("method", ["linear", "uniform"])
def test_the_merged_dora_is_the_sum_of_the_changes(tmp_path, scene, method):
    """W + Σ wₜ (W'ₜ − W), computed on dense weights."""
    base_folder, base, written, magnitudes = scene
    result = run(tmp_path / "out", written, WEIGHTS, method=method, scale=0.7, base_model=str(base_folder))
    factor = 0.7 / (3 if method == "uniform" else 1)
    for module, found in merged_weights(result.folder, base).items():
        weight = np.float32(base[module]).astype(np.float64)
        changes = [
            w * (effective(weight, a.deltas.get(module, 0 * weight), magnitudes.get(n, {}).get(module)) - weight)
            for (n, a), w in zip(written.items(), WEIGHTS, strict=True)
        ]
        np.testing.assert_allclose(found, weight + factor * sum(changes), atol=2e-5)
    assert result.record.result == "exact"


def test_a_truncated_dora_keeps_the_row_norms(tmp_path, scene):
    """The magnitudes are those of the factors as written: every row of the merged weight keeps its exact length factor."""
    base_folder, base, written, _ = scene
    exact = run(tmp_path / "exact", written, WEIGHTS, base_model=str(base_folder))
    short = run(tmp_path / "short", written, WEIGHTS, base_model=str(base_folder), output={"rank": 1})
    deltas = {"exact": read_deltas(exact.folder, PLAIN), "short": read_deltas(short.folder, PLAIN)}
    for module, weight in base.items():
        gains = []
        for kind, result in (("exact", exact), ("short", short)):
            magnitude = load_file(result.folder / "adapter_model.safetensors")[
                f"base_model.model.{module}.lora_magnitude_vector"
            ]
            gains.append(magnitude.double().numpy() / np.linalg.norm(np.float32(weight) + deltas[kind][module], axis=1))
        np.testing.assert_allclose(gains[0], gains[1], rtol=1e-5)


def test_what_a_truncation_keeps_is_told_of_the_whole_change(tmp_path, scene):
    """‖ΔW‖² and what is lost of it, on dense weights; no other factors of that rank would have lost less."""
    base_folder, base, written, _ = scene
    exact = run(tmp_path / "exact", written, WEIGHTS, base_model=str(base_folder))
    short = run(tmp_path / "short", written, WEIGHTS, base_model=str(base_folder), output={"rank": 2})
    whole, kept = (merged_weights(r.folder, base) for r in (exact, short))
    for record in short.record.modules:
        weight = np.float32(base[record.target]).astype(np.float64)
        energy = np.square(whole[record.target] - weight).sum()
        lost = np.square(whole[record.target] - kept[record.target]).sum()
        assert record.energy == pytest.approx(energy, rel=1e-5)
        assert record.kept == pytest.approx(1 - lost / energy, abs=1e-5)
        magnitude = (
            load_file(exact.folder / "adapter_model.safetensors")[f"base_model.model.{record.target}.lora_magnitude_vector"]
            .double()
            .numpy()
        )
        delta = read_deltas(exact.folder, PLAIN)[record.target]
        gain = magnitude / np.linalg.norm(weight + delta, axis=1)
        least = np.square(np.linalg.svd(gain[:, None] * delta, compute_uv=False)[2:]).sum()
        assert lost == pytest.approx(least, rel=1e-3)


@pytest.mark.parametrize("share", [0.9, 0.99, 0.9999, 1.0])
def test_a_rank_by_energy_keeps_that_share_of_the_whole_change(tmp_path, scene, share):
    base_folder, base, written, _ = scene
    ranks = {
        r: run(tmp_path / str(r), written, WEIGHTS, base_model=str(base_folder), output={"rank": r}) for r in (1, 2, 3, 4, 5)
    }
    least = {
        m: min(r for r, x in ranks.items() if {y.target: y.kept for y in x.record.modules}[m] >= share - 1e-9) for m in base
    }
    settings = {"rank": f"energy:{share}", "layout": "pattern"}
    found = run(tmp_path / "energy", written, WEIGHTS, base_model=str(base_folder), output=settings)
    assert {m.target: m.rank for m in found.record.modules} == least


def test_a_transform_of_doras_is_refused(tmp_path, scene):
    base_folder, _, written, _ = scene
    with pytest.raises(PlanError, match="transforms: layer_l2_normalize of DoRA adapters"):
        run(tmp_path / "out", written, WEIGHTS, base_model=str(base_folder), transforms=["layer_l2_normalize"])


def test_one_dora_of_weight_one_is_itself(tmp_path, scene):
    base_folder, base, written, magnitudes = scene
    result = run(tmp_path / "out", {"a": written["a"]}, base_model=str(base_folder))
    for module, found in merged_weights(result.folder, base).items():
        expected = effective(np.float32(base[module]), written["a"].deltas[module], magnitudes["a"][module])
        np.testing.assert_allclose(found, expected, atol=2e-5)


def test_weights_that_make_a_row_vanish_are_refused(tmp_path, scene):
    """With m twice the norm of the row, ΔW = W + …, and weight −1 leaves nothing to rescale."""
    base_folder, base, _, _ = scene
    zero = np.zeros((2, 5)), np.zeros((6, 2))
    norms = np.linalg.norm(np.float32(base["layers.0.proj"]), axis=1)
    modules = {"layers.0.proj": Linear(6, 5, values=zero, magnitude=2 * norms)}
    written = {"a": write_adapter(tmp_path / "a", modules)}
    with pytest.raises(PlanError, match="6 rows of the base model vanish"):
        run(tmp_path / "out", written, [-1.0], base_model=str(base_folder))


def test_only_linear_methods_are_offered(tmp_path, scene):
    base_folder, _, written, _ = scene
    for method in ("ties", {"name": "linear", "space": "factors"}):
        with pytest.raises(PlanError, match="DoRA"):
            run(tmp_path / "out", {"a": written["a"]}, method=method, base_model=str(base_folder))
    with pytest.raises(PlanError, match="rescales the rows"):
        run(tmp_path / "out", {"a": written["a"]})
    assert recipe({"a": written["a"]}).base_model is None
