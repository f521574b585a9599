"""Contract tests for merge methods, ours and those of others.

    from plait.testing import check_method

    def test_my_method_keeps_the_contract():
        check_method(MY_METHOD)

Each row of `CONTRACT` is a property that every method has: degenerate shapes, zeros, seeds, order, blocks, workers, scale,
gauge, rank. Where pytest should show every row separately, parametrize over `CONTRACT` and call `check_property`.
"""

from plait.testing.cohorts import Cohort, cohort
from plait.testing.contract import CONTRACT, check_method, check_property, subject_of
from plait.testing.properties import Property
from plait.testing.subject import Subject

__all__ = ["CONTRACT", "Cohort", "Property", "Subject", "check_method", "check_property", "cohort", "subject_of"]
