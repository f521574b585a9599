"""Recipes in other forms: earlier releases, mergekit, other tools."""
