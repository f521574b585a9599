"""Tensor in, tensor out: low-rank algebra, sparsifying, sign election, keyed randomness.

Independent of names, files, LoRA configurations or recipes.
"""
