"""Merge methods: one file per family, and the registry. A new family is one file and one line here."""

from plait.methods import linear, ties, dare, magnitude, della, legacy  # noqa: F401  (registered in this order)
from plait.methods.base import (
    METHODS,
    Block,
    ElementwiseMethod,
    LinearMethod,
    Method,
    MethodParams,
    NoParams,
    Source,
    Survey,
    register,
)

METHODS.load_plugins()

__all__ = [
    "METHODS",
    "Block",
    "ElementwiseMethod",
    "LinearMethod",
    "Method",
    "MethodParams",
    "NoParams",
    "Source",
    "Survey",
    "register",
]
