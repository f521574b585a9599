"""Merge methods: one file per family, and the registry. A new family is one file and one line here."""

from plait.methods import linear, ties, dare, magnitude, della, consensus, geometric, legacy  # noqa: F401  (registered in this order)
from plait.methods import spectral  # noqa: F401
from plait.methods import solved  # noqa: F401
from plait.methods.base import (
    METHODS,
    Block,
    ElementwiseMethod,
    LinearMethod,
    Method,
    MethodParams,
    NoParams,
    Preset,
    Source,
    Survey,
    register,
)
from plait.methods.pipelines import pipeline_method

METHODS.load_plugins()
register(pipeline_method())  # last: it takes the stages of all the others

__all__ = [
    "METHODS",
    "Block",
    "ElementwiseMethod",
    "LinearMethod",
    "Method",
    "MethodParams",
    "NoParams",
    "Preset",
    "Source",
    "Survey",
    "register",
]
