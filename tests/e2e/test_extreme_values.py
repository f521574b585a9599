"""Factors near the ends of float32: the right result, or a refusal that names module and adapter; never zeros."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import plait
from plait.errors import PlanError
from plait.methods import METHODS
from tests.command_line import exit_code

MODULES = {f"model.layers.0.self_attn.{p}_proj": (12, 10) for p in "qkv"}


def adapter(folder: Path, seed: int, *, b: float = 1.0, a: float = 1.0, entry: float | None = None) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (rows, columns) in MODULES.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = a * torch.randn(3, columns, generator=generator)
        tensors[f"base_model.model.{module}.lora_B.weight"] = b * torch.randn(rows, 3, generator=generator)
    if entry is not None:
        tensors["base_model.model.model.layers.0.self_attn.k_proj.lora_B.weight"][2, 1] = entry
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "base_model_name_or_path": "base", "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def deltas(folder: Path) -> dict[str, torch.Tensor]:
    config = json.loads((folder / "adapter_config.json").read_text())
    scaling = config["lora_alpha"] / config["r"]
    tensors = {n: t.double() for n, t in load_file(folder / "adapter_model.safetensors").items()}
    names = [n.removesuffix(".lora_A.weight") for n in tensors if n.endswith(".lora_A.weight")]
    return {n: scaling * tensors[f"{n}.lora_B.weight"] @ tensors[f"{n}.lora_A.weight"] for n in names}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adapter(tmp_path / "plain", 0)


@pytest.mark.parametrize("settings", [{"b": 1e30}, {"a": 1e19, "b": 1e-25}, {"b": 1e-19, "a": 1e-19}, {"b": 1e-41}])
@pytest.mark.parametrize("rank", ["auto", 3])
def test_a_sum_is_the_sum_of_the_deltas(tmp_path, settings, rank):
    adapter(tmp_path / "odd", 1, **settings)
    result = plait.merge(["odd", "plain"], out="out", method="linear", rank=rank)
    ours, first, second = (deltas(tmp_path / n) for n in ("out", "odd", "plain"))
    for module, delta in ours.items():
        whole = first[module] + second[module]
        if rank == 3:
            u, s, vh = torch.linalg.svd(whole)
            whole = (u[:, :3] * s[:3]) @ vh[:3]
        assert (delta - whole).norm() <= 1e-5 * whole.norm()
    printed = any("computed in float64" in note for note in result.record.notes)
    assert printed == (rank == 3), "what is only put side by side needs no squares"


@pytest.mark.parametrize("settings", [{"b": 1e30}, {"b": 1e-30}])
def test_a_sum_of_more_directions_than_the_matrix_has_is_the_sum(tmp_path, settings):
    """It is brought to the matrix's rank by an SVD, which squares, though nothing of it is left out."""
    names = [adapter(tmp_path / f"odd{seed}", seed, **settings).name for seed in (1, 2, 3, 4)]
    result = plait.merge(names, out="out", method="linear")
    ours, *theirs = (deltas(tmp_path / n) for n in ("out", *names))
    for module, delta in ours.items():
        whole = sum(one[module] for one in theirs)
        assert (delta - whole).norm() <= 1e-5 * whole.norm()
    assert any("computed in float64" in note for note in result.record.notes)


@pytest.mark.parametrize("method", ["sce", "pcb", "tsv", "iso_c", "ties"])
def test_a_method_gives_what_it_gives_for_the_same_numbers_of_ordinary_size(tmp_path, method):
    for name, size in (("a", 1e30), ("b", 1e30), ("x", 1.0), ("y", 1.0)):
        adapter(tmp_path / name, {"a": 1, "x": 1}.get(name, 2), b=size)
    plait.merge(["a", "b"], out="large", method=method, rank=6)
    plait.merge(["x", "y"], out="usual", method=method, rank=6)
    usual = deltas(tmp_path / "usual")
    for module, delta in deltas(tmp_path / "large").items():
        assert usual[module].any()
        assert (delta * 1e-30 - usual[module]).norm() <= 1e-4 * usual[module].norm()


def copy_of_ordinary_size(source: Path, out: Path, *, a: float = 1.0, b: float = 1.0) -> None:
    out.mkdir(parents=True)
    tensors = load_file(source / "adapter_model.safetensors")
    ordinary = {n: (t.double() * (a if "lora_A" in n else b)).float() for n, t in tensors.items()}
    save_file(ordinary, out / "adapter_model.safetensors")
    (out / "adapter_config.json").write_text((source / "adapter_config.json").read_text())


_OWN_SETTINGS = {"regmean", "regmean_sequential", "ssr", "weighted", "weighted_delta"}  # other input than adapters alone


@pytest.mark.parametrize("method", sorted(set(METHODS) - _OWN_SETTINGS))
def test_digits_below_the_smallest_normal_number_are_kept(tmp_path, method):
    size = 2.0**-139 if method == "model_stock" else 2.0**-145  # that one makes deltas that have little in common smaller yet
    for seed, name in enumerate("pq", 1):
        adapter(tmp_path / name, seed, b=size)
        copy_of_ordinary_size(tmp_path / name, tmp_path / "usual" / name, b=1 / size)
    weights = [0.3, 0.7]
    plait.merge(["p", "q"], out="small", method=method, rank=6, weights=weights)
    plait.merge(["usual/p", "usual/q"], out="ordinary", method=method, rank=6, weights=weights)
    ordinary = deltas(tmp_path / "ordinary")
    for module, delta in deltas(tmp_path / "small").items():
        assert (delta / size - ordinary[module]).norm() <= 2e-5 * ordinary[module].norm()


@pytest.mark.parametrize(("dtype", "b", "a"), [("float16", 1e-7, 1e2), ("float16", 1e6, 1e-6), ("bfloat16", 1e-39, 1.0)])
def test_what_the_outputs_dtype_holds_only_as_another_pair_of_factors(tmp_path, dtype, b, a):
    adapter(tmp_path / "odd", 1, b=b, a=a)
    plait.merge(["odd"], out="out", method="linear", dtype=dtype)
    tolerance = 2 * torch.finfo(getattr(torch, dtype)).eps
    expected = deltas(tmp_path / "odd")
    assert all((d - expected[m]).norm() <= tolerance * expected[m].norm() for m, d in deltas(tmp_path / "out").items())


def test_one_entry_near_the_end_of_float32(tmp_path, capsys):
    adapter(tmp_path / "odd", 1, entry=3.4e37)
    for method in ("tsv", "sce"):
        assert exit_code("merge", "odd", "plain", "--method", method, "-o", f"out-{method}") == 0
        assert all(torch.isfinite(d).all() and d.any() for d in deltas(tmp_path / f"out-{method}").values())
        assert "computed in float64, since adapter 'odd' has extreme values: 1 target modules" in " ".join(
            capsys.readouterr().err.split()
        )
    assert exit_code("inspect", "odd", "plain") == 0
    assert exit_code("compress", "odd", "--energy", "0.9", "-o", "small") == 0


@pytest.mark.parametrize(
    "output", [{}, {"rank": 2, "method": "ties", "dtype": "float16"}, {"kind": "delta", "dtype": "float16"}, {"method": "tsv"}]
)
def test_what_overflows_names_module_and_adapter(tmp_path, output):
    adapter(tmp_path / "odd", 1, entry=3.4e38)
    message = r"k_proj: the merged values overflow.*: adapter 'odd' has values of the order of 3\.4e\+38 there\.$"
    with pytest.raises(PlanError, match=message):
        plait.merge(["odd", "plain"], out="out", **output)
    assert not (tmp_path / "out").exists()


def test_weights_that_leave_nothing_are_refused(tmp_path):
    adapter(tmp_path / "odd", 1, b=1e-38)
    message = r"k_proj: the weights or the scale are so small that the merged values vanish in float32: adapter 'odd' has"
    with pytest.raises(PlanError, match=message):
        plait.merge(["odd"], out="out", method="linear", weights=[1e-10])
    adapter(tmp_path / "untrained", 2, b=0.0)
    plait.merge(["untrained"], out="zero", method="linear")
