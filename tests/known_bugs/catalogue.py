"""What a known bug is, and how to run one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch

# Runs a minimal program of ours on the emulated device, with the bug or without.
Program = Callable[[ModuleType, bool], None]


@dataclass(frozen=True, slots=True)
class KnownBug:
    """A mistake that was made in a project of this class.

    Attributes:
        name: what goes wrong.
        seen_in: where it was, as far as it has a public place.
        says: words of the report that name it.
        program: the mistake in few lines; called as ``program(sim, has_bug)``.
    """

    name: str
    seen_in: str
    says: str
    program: Program


PROGRAMS: list[KnownBug] = []


def known_bug(seen_in: str, *, says: str) -> Callable[[Program], Program]:
    """Adds a program to :data:`PROGRAMS`, called as its function is."""

    def add(program: Program) -> Program:
        PROGRAMS.append(KnownBug(program.__name__.replace("_", " "), seen_in, says, program))
        return program

    return add


def reports_of(bug: KnownBug, has_bug: bool) -> list[str]:
    """What the emulated device says of ``bug``'s program: races, warnings, and waits where none is allowed."""
    from offload.testing import sim

    sim.load()
    sim.reset()
    try:
        bug.program(sim, has_bug)
    except RuntimeError as error:
        if "sim: " not in str(error):  # the device's own reports alone count
            raise
        return [str(error)]
    finally:
        torch.accelerator.synchronize()
    return sim.races() + sim.warnings()


def run_all() -> tuple[int, int]:
    """How many bugs are named where they are, and how many programs without their bug are reported all the same."""
    reported = sum(any(bug.says in report for report in reports_of(bug, has_bug=True)) for bug in PROGRAMS)
    false_reports = sum(bool(reports_of(bug, has_bug=False)) for bug in PROGRAMS)
    return reported, false_reports
