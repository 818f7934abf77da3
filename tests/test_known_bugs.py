"""The emulated device reports the bugs that projects of this class had, and nothing where they are not."""

from __future__ import annotations

from types import ModuleType

import pytest

from tests.known_bugs import PROGRAMS, KnownBug, reports_of, run_all


@pytest.mark.parametrize("bug", PROGRAMS, ids=lambda bug: bug.name)
def test_known_bug(sim: ModuleType, bug: KnownBug) -> None:
    assert bug.says in "\n".join(reports_of(bug, has_bug=True))
    assert reports_of(bug, has_bug=False) == []


def test_all_in_figures(sim: ModuleType) -> None:
    assert len(PROGRAMS) >= 12
    assert run_all() == (len(PROGRAMS), 0)
