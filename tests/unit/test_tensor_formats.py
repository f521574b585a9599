"""A format of tensor files is one class and its name in `TENSOR_FORMATS`: nothing else names files of tensors."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import save_file

from plait.adapters import Adapter
from plait.checkpoints.checkpoint import BaseCheckpoint
from plait.checkpoints.digests import weight_digests
from plait.hub import download, parse_reference, resolve, resolve_model
from plait.tensorfiles.formats import TENSOR_FORMATS
from plait.tensorfiles.reader import SafetensorsFile


class Third(SafetensorsFile):
    """Safetensors by other names."""

    suffix = ".third"
    adapter_name = "adapter_model.third"
    model_name = "third.third"
    model_files = "third*.third"


@pytest.fixture(autouse=True)
def added(monkeypatch):
    asking = [m for name, m in sys.modules.items() if name.startswith("plait.") and hasattr(m, "TENSOR_FORMATS")]
    for module in asking:
        monkeypatch.setattr(module, "TENSOR_FORMATS", (*TENSOR_FORMATS, Third))


def test_an_adapter_and_a_base_model_are_read_from_it(tmp_path):
    factors = {"A": torch.ones(2, 4), "B": torch.ones(4, 2)}
    names = {f"base_model.model.model.layers.0.mlp.up_proj.lora_{x}.weight": factors[x] for x in "AB"}
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    save_file(names, tmp_path / Third.adapter_name)
    assert list(Adapter.open(tmp_path, "a").targets) == ["model.layers.0.mlp.up_proj"]

    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    save_file({"model.layers.0.mlp.up_proj.weight": torch.ones(4, 4)}, base / Third.model_name)
    assert list(weight_digests(base)) == [Third.model_name]
    (shard,) = BaseCheckpoint.open(str(base)).shards
    assert [name for name, _ in shard.in_order] == ["model.layers.0.mlp.up_proj.weight"]


def test_it_is_fetched_where_there_is_no_other(tmp_path, monkeypatch):
    held = {"adapter_config.json", Third.adapter_name, "config.json", "third-1.third", "third.third.index.json", "x.gguf"}
    fetched: list[list[str]] = []

    def fetch(reference, commit, paths, **_):
        fetched.append(sorted(paths))
        return tmp_path

    monkeypatch.setattr(download, "_listing", lambda reference: ("0" * 40, sorted(held), None))
    monkeypatch.setattr(download, "_fetch", fetch)
    resolve(parse_reference("org/a"))
    resolve_model("org/a")
    assert fetched == [
        ["adapter_config.json", Third.adapter_name],
        ["adapter_config.json", "config.json", "third-1.third", "third.third.index.json"],
    ]
