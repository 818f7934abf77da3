"""What the doctor found: a line each, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Status = Literal["good", "note", "bad"]
_MARKS = {"good": "ok  ", "note": "note", "bad": "BAD "}

# What a remedy is worth, most first: without the first nothing runs, the last saves some memory.
RUNS, RIGHT, OVERLAPS, RATE, MEMORY = 5, 4, 3, 2, 1


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the examination.

    Attributes:
        topic: what was looked at, such as "link".
        status: "good", "note" (nothing wrong, or nothing to be done) or "bad".
        text: what was seen.
        remedy: what to change; empty where nothing is to be changed.
        gain: how much the remedy is worth, one of the constants above; remedies are listed in this order.
    """

    topic: str
    status: Status
    text: str
    remedy: str = ""
    gain: int = 0

    def __str__(self) -> str:
        return f"{_MARKS[self.status]}  {self.topic:<12}  {self.text}"


def remedies(findings: Iterable[Finding]) -> list[str]:
    """What to change, in order of gain; bad things before notes of the same gain."""
    asked = [finding for finding in findings if finding.remedy]
    asked.sort(key=lambda finding: (-finding.gain, finding.status != "bad"))
    return list(dict.fromkeys(finding.remedy for finding in asked))
