"""Merges that learn from unlabelled texts what they lost."""
