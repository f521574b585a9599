"""What the benchmarks merge: LoRA adapters and a base model with the shapes of Qwen3-1.7B and random values.

Adapters have A ~ N(0, 1/d_in) and columns of B that shrink geometrically, as trained ones do; float32, which is what PEFT
saves. Everything is a function of its seed and is made once per cache folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree

LAYERS_PER_FILE = 5
RANK = 64
DECAY = 0.02  # the last column of B against the first
CONFIG = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
SHAPES = {  # (d_out, d_in)
    "self_attn.q_proj": (2048, 2048),
    "self_attn.k_proj": (1024, 2048),
    "self_attn.v_proj": (1024, 2048),
    "self_attn.o_proj": (2048, 2048),
    "mlp.gate_proj": (6144, 2048),
    "mlp.up_proj": (6144, 2048),
    "mlp.down_proj": (2048, 6144),
}


@dataclass(frozen=True)
class Materials:
    """The files of one size.

    Attributes:
        layers: number of transformer layers.
        base: folder of the base model.
        adapters: folders of the adapters.
    """

    layers: int
    base: Path
    adapters: tuple[Path, Path]

    @property
    def modules(self) -> int:
        """Number of target modules."""
        return self.layers * len(SHAPES)

    @property
    def adapter_parameters(self) -> int:
        """Number of values in one adapter."""
        return self.layers * sum(RANK * (m + n) for m, n in SHAPES.values())

    @property
    def delta_entries(self) -> int:
        """Number of entries of all dense deltas of one adapter."""
        return self.layers * sum(m * n for m, n in SHAPES.values())


def locate(cache: Path, layers: int) -> Materials:
    """Name the files of one size, whether they exist or not."""
    folder = cache / f"qwen3-1.7b-{layers}-layers-r{RANK}"
    return Materials(layers, folder / "base", (folder / "adapter-0", folder / "adapter-1"))


def make(materials: Materials, *, base: bool = True) -> None:
    """Make what does not exist yet; a folder appears under its name only when it is whole."""
    if base:
        _once(materials.base, lambda place: _make_base(place, materials.layers))
    for seed, folder in enumerate(materials.adapters):
        _once(folder, lambda place, seed=seed: make_adapter(place, targets(materials.layers), seed, materials.base))


def make_module(folder: Path, name: str, shape: tuple[int, int]) -> tuple[Path, Path]:
    """Make two adapters of one module of layer 0, of any shape; return their folders."""
    pair = (folder / "adapter-0", folder / "adapter-1")
    for seed, place in enumerate(pair):
        _once(place, lambda place, seed=seed: make_adapter(place, [(f"model.layers.0.{name}", shape)], seed, Path("base")))
    return pair


def make_sharded_base(cache: Path, layers: int) -> Path:
    """Make a base model of the same shapes in files of about 0.5 GB, written layer by layer; return its folder."""
    folder = cache / f"qwen3-1.7b-{layers}-layers-sharded"
    _once(folder, lambda place: _make_sharded_base(place, layers))
    return folder


def warm(materials: Materials) -> None:
    """Read every file once, so that all sides find them in the page cache."""
    for folder in (materials.base, *materials.adapters):
        for path in sorted(folder.glob("*.safetensors")):
            with path.open("rb", buffering=0) as file:
                while file.read(1 << 24):
                    pass


def targets(layers: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield every target module with its shape."""
    for layer in range(layers):
        for name, shape in SHAPES.items():
            yield f"model.layers.{layer}.{name}", shape


def _once(folder: Path, make_in: Callable[[Path], None]) -> None:
    if folder.exists():
        return
    place = folder.with_name(f".{folder.name}.partial")
    rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    make_in(place)
    place.rename(folder)


def _make_base(place: Path, layers: int) -> None:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(**CONFIG, num_hidden_layers=layers, max_window_layers=layers, dtype="bfloat16")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        Qwen3ForCausalLM(config).save_pretrained(place)
    finally:
        torch.set_default_dtype(before)


def _make_sharded_base(place: Path, layers: int) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import Qwen3Config

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.02).bfloat16()

    generator = torch.Generator().manual_seed(0)
    hidden, head = int(CONFIG["hidden_size"]), int(CONFIG["head_dim"])
    groups = [{"model.embed_tokens.weight": random(int(CONFIG["vocab_size"]), hidden), "model.norm.weight": random(hidden)}]
    index: dict[str, str] = {}
    count = 1 + -(-layers // LAYERS_PER_FILE)
    for number in range(1, count + 1):
        group = groups.pop() if groups else {}
        for layer in range((number - 2) * LAYERS_PER_FILE, min(layers, (number - 1) * LAYERS_PER_FILE)) if number > 1 else ():
            start = f"model.layers.{layer}"
            group |= {f"{start}.{name}.weight": random(*shape) for name, shape in SHAPES.items()}
            group |= {f"{start}.{name}.weight": random(hidden) for name in ("input_layernorm", "post_attention_layernorm")}
            group |= {f"{start}.self_attn.{name}.weight": random(head) for name in ("q_norm", "k_norm")}
        file = f"model-{number:05}-of-{count:05}.safetensors"
        save_file(group, place / file, metadata={"format": "pt"})
        index |= dict.fromkeys(group, file)
    size = sum(p.stat().st_size for p in place.iterdir())
    (place / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": index}), encoding="utf-8"
    )
    config = Qwen3Config(**CONFIG, num_hidden_layers=layers, max_window_layers=layers, dtype="bfloat16")
    config.architectures = ["Qwen3ForCausalLM"]
    config.save_pretrained(place)


def make_adapter(place: Path, targets: Iterable[tuple[str, tuple[int, int]]], seed: int, base: Path, rank: int = RANK) -> None:
    """Write an adapter into an empty folder.

    Args:
        place: the folder.
        targets: module → (d_out, d_in).
        seed: of the values.
        base: the base model, as its configuration names it.
        rank: of all modules; alpha equals it.
    """
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    columns = DECAY ** (torch.arange(rank) / (rank - 1))
    tensors = {}
    for target, (d_out, d_in) in targets:
        name = f"base_model.model.{target}"
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, d_in, generator=generator) * d_in**-0.5
        tensors[f"{name}.lora_B.weight"] = torch.randn(d_out, rank, generator=generator) * columns * 0.02
    save_file(tensors, place / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted(name.rpartition(".")[2] for name in SHAPES),
    }
    (place / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
