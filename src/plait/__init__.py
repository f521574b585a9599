"""Many LoRA adapters in; one adapter, or one model, out."""

__version__ = "0.1.0"
