"""Tensor in, tensor out: low-rank algebra, sparsifying, sign election, keyed randomness.

Knows nothing of names, files, LoRA configurations or recipes.
"""
