"""Small base models with every kind of layer that LoRA adapts, and adapters of them made by PEFT itself."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D


class Experts(nn.Module):
    """Fused experts, as transformers v5 stores them: one 3-D parameter per projection."""

    def __init__(self, experts: int = 3, hidden: int = 8, inner: int = 10) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(experts, inner, hidden) * 0.3)
        self.down_proj = nn.Parameter(torch.randn(experts, hidden, inner) * 0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = torch.einsum("bth,eih->beti", x, self.gate_up_proj).tanh()
        return torch.einsum("beti,ehi->bth", inner, self.down_proj)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 8)
        self.v_proj = nn.Linear(8, 6)
        self.back = nn.Linear(6, 8)
        self.c_attn = Conv1D(8, 8)
        self.experts = Experts()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.q_proj(x) + self.back(self.v_proj(x)).tanh()
        return x + self.c_attn(x).tanh() + self.experts(x)


class Net(nn.Module):
    """Embedding, blocks, convolutions, head; ids (batch, 16) → (batch, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.layers = nn.ModuleList([Block(), Block()])
        self.conv1 = nn.Conv1d(8, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(1, 4, (3, 2))
        self.grouped = nn.Conv1d(6, 6, 3, padding=1, groups=2)
        self.head = nn.Linear(6, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        x = self.conv1(x.mT).tanh()
        x = x + self.grouped(x)
        planes = self.conv2(x.unsqueeze(1)).mean((1, 2, 3))
        return self.head(x.mean(-1)) + planes.unsqueeze(1)


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().eval()


def save_base(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in net().state_dict().items()}, folder / "model.safetensors")
    return folder


def peft_adapter(folder: Path, seed: int, **config: object) -> Path:
    """Make an adapter with PEFT and random values everywhere, so that nothing is zero by initialization."""
    torch.manual_seed(seed)
    model = get_peft_model(net(), LoraConfig(**{"r": 4, "lora_alpha": 8, **config}))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=generator))
            elif "lora_" in name or "modules_to_save" in name or "trainable_tokens_delta" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.save_pretrained(folder)
    return folder


def both_active(folders: dict[str, Path], weights: dict[str, float], ids: torch.Tensor) -> torch.Tensor:
    """Return the output of the base with all adapters active, their scalings times the weights."""
    names = list(folders)
    model = PeftModel.from_pretrained(net(), folders[names[0]], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(folders[name], name)
    for module in model.modules():
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, dict):
            for name, weight in weights.items():
                if name in scaling:
                    scaling[name] *= weight
    model.base_model.set_adapter(names)
    with torch.no_grad():
        return model.eval()(ids)


def loaded(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Return the output of the base with one adapter loaded, with no missing and no unexpected key."""
    model = PeftModel.from_pretrained(net(), folder)
    report = model.load_adapter(folder, "again")
    assert not [k for k in report.missing_keys if "lora" in k]
    assert not report.unexpected_keys
    model.set_adapter("default")
    with torch.no_grad():
        return model.eval()(ids)
