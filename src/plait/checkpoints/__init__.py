"""Base models on disk: their files, the names of their tensors, their architecture, quantized ones."""
