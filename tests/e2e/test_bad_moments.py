"""Files of second moments that are damaged, or of something else: a merge that a recipe gives them to refuses them by name."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import plait
from plait.results.digests import sha256
from tests.bad_input import MODULES, adapter, refused
from tests.command_line import exit_code

FIRST = next(iter(MODULES))
ORIGIN = {
    "adapter": "", "base": "0" * 64, "texts": {}, "tokens": 8, "sampled": 0, "key": "0" * 64, "plait": plait.__version__,
}  # fmt: skip


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        adapter(tmp_path / name, seed=seed)
        inputs = {module: torch.randn(50, d_in) for module, (_, d_in) in MODULES.items()}
        plait.save_moments(f"{name}.safetensors", {module: x.T @ x / len(x) for module, x in inputs.items()})
    entries = [{"name": name, "path": f"./{name}", "moments": f"./{name}.safetensors"} for name in "ab"]
    recipe = {"version": 1, "adapters": entries, "method": {"name": "regmean"}}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    return tmp_path


def _entry(file: Path, edit) -> None:
    tensors = load_file(file)
    tensors[FIRST] = edit(tensors[FIRST])
    save_file(tensors, file)


def _metadata(file: Path, **fields: str) -> None:
    with safe_open(file, "pt") as held:
        known = held.metadata() or {}
    save_file(load_file(file), file, metadata=known | fields)


def _origin(file: Path, **changes: object) -> None:
    own = {"adapter": sha256(Path("b/adapter_model.safetensors"))}
    _metadata(file, **{"plait.origin": json.dumps(ORIGIN | own | changes)})


def _without_module(file: Path) -> None:
    tensors = load_file(file)
    del tensors[FIRST]
    save_file(tensors, file)


def _rows_of_whole_numbers(file: Path) -> None:
    tensors = load_file(file)
    del tensors[FIRST]
    save_file(tensors | {f"{FIRST}:rows": torch.ones(3, 6, dtype=torch.int64)}, file)


DAMAGE = {
    "cut short": lambda f: f.write_bytes(f.read_bytes()[:-8]),
    "header cut short": lambda f: f.write_bytes(f.read_bytes()[:40]),
    "empty": lambda f: f.write_bytes(b""),
    "missing": Path.unlink,
    "a folder": lambda f: (f.unlink(), f.mkdir()),
    "an adapter's own tensors": lambda f: f.write_bytes(Path("a/adapter_model.safetensors").read_bytes()),
    "NaN": lambda f: _entry(f, lambda t: t * math.nan),
    "infinite": lambda f: _entry(f, lambda t: t * math.inf),
    "not square": lambda f: _entry(f, lambda t: t[:-1].contiguous()),
    "other width": lambda f: _entry(f, lambda t: torch.eye(7)),
    "a vector": lambda f: _entry(f, lambda t: t[0].contiguous()),
    "whole numbers": lambda f: _entry(f, lambda t: torch.eye(6, dtype=torch.int64)),
    "true and false": lambda f: _entry(f, lambda t: torch.eye(6).bool()),
    "rows of whole numbers": _rows_of_whole_numbers,
    "negative diagonal": lambda f: _entry(f, lambda t: -t),
    "not symmetric": lambda f: _entry(f, lambda t: t + torch.ones(6, 6).triu(1)),
    "no module": _without_module,
    "negative tokens": lambda f: _origin(f, tokens=-5),
    "negative sampled": lambda f: _origin(f, sampled=-1),
    "tokens as a text": lambda f: _origin(f, tokens="many"),
    "tokens of 400 digits": lambda f: _metadata(f, **{"plait.origin": json.dumps(ORIGIN).replace(": 8", ": " + "1" * 400)}),
    "of another adapter": lambda f: _origin(f, adapter="1" * 64),
    "deep origin": lambda f: _metadata(f, **{"plait.origin": "[" * 10_000}),
    "deep sharing": lambda f: _metadata(f, **{"plait.shared": '{"a":' * 10_000 + "1" + "}" * 10_000}),
    "sharing of a list": lambda f: _metadata(f, **{"plait.shared": "[1]"}),
    "sharing with nothing": lambda f: _metadata(f, **{"plait.shared": json.dumps({FIRST: "elsewhere"})}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_moments_are_refused_by_name(place, capsys, damage):
    DAMAGE[damage](place / "b.safetensors")
    assert "b.safetensors" in refused(capsys, "merge", "recipe.json", "-o", "out")


def test_an_origin_of_the_adapter_itself_is_taken(place):
    _origin(place / "b.safetensors")
    assert exit_code("merge", "recipe.json", "-o", "out") == 0
