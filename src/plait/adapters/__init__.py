"""LoRA on disk and in memory: formats, names, and the exact algebra of low-rank deltas. Independent of merging."""

from plait.adapters.adapter import Adapter, Target
from plait.adapters.lowrank import LowRank
from plait.adapters.names import LayerKey, layer_key

__all__ = ["Adapter", "LayerKey", "LowRank", "Target", "layer_key"]
