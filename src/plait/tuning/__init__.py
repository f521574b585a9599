"""Merges that learn from unlabeled texts what they lost."""
