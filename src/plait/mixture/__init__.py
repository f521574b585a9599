"""The live model: the base once in memory, adapters stacked on it, coefficients as data."""

from plait.mixture.coefficients import Granularity
from plait.mixture.merged import LiveMerge, load
from plait.mixture.mixture import Mixture

__all__ = ["Granularity", "LiveMerge", "Mixture", "load"]
