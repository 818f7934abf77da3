"""Microbenchmarks of a machine: its link, what overlaps with what, and what an update costs on it.

:func:`run_suite` measures, :class:`Report` holds what was found. The method is in [Note: how the streams are blocked]
in ``harness.py``: work starts together on streams that were filled while they were blocked, times are medians, contents
are verified, and work that is to disturb outlasts what it disturbs.
"""

from __future__ import annotations

from offload.interconnect.results import Change, Report, Result, compare, format_value
from offload.interconnect.settings import Settings
from offload.interconnect.suite import PARTS, Suite, rates_of, run_suite

__all__ = [
    "PARTS",
    "Change",
    "Report",
    "Result",
    "Settings",
    "Suite",
    "compare",
    "format_value",
    "rates_of",
    "run_suite",
]
