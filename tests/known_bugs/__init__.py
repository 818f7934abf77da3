"""Minimal programs with the bugs that projects of this class had, each with its bug and without."""

from tests.known_bugs import copies, hosts, lifetimes, rings  # noqa: F401 - they fill the catalogue
from tests.known_bugs.catalogue import PROGRAMS, KnownBug, reports_of, run_all

__all__ = ["PROGRAMS", "KnownBug", "reports_of", "run_all"]
