"""Do torch's operators do on the emulated device what they do on the CPU? python -m bench.sim_opinfo [--quick]

Goes through torch's OpInfo database: forward and backward, in place and with out=, in float32 and bfloat16, first
samples. Operators are checked in processes that are started again when one dies, so a crash is counted and named.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

QUICK_SAMPLES, SAMPLES = 1, 5  # of each operator, variant and dtype
QUICK_VARIANTS = ("forward", "backward")
VARIANTS = (*QUICK_VARIANTS, "in-place", "out")
ANSWER_LIMIT_S = 120.0  # of one operator; the slowest takes some seconds
DEVICE_CAPACITY = "8GiB"

# Why an operator differs, where that is meant.
_STATISTICS = "its statistics have the dtype and size that Meta kernels give them (float32, full), not the CPU's"
_SPARSE = "the device has no sparse tensors, and says so"
KNOWN_DIFFERENCES = {
    "_batch_norm_with_update": _STATISTICS, "_native_batch_norm_legit": _STATISTICS, "native_batch_norm": _STATISTICS,
    "native_layer_norm": _STATISTICS, "sparse.mm.reduce": _SPARSE, "sparse.sampled_addmm": _SPARSE,
    "to_sparse": _SPARSE,
}  # fmt: skip

Outcomes = list[tuple[str, str, str]]  # check, status, reason
Check = Callable[[str, int, tuple[str, ...]], Outcomes]


def check(name: str, num_samples: int, variants: tuple[str, ...]) -> Outcomes:
    """One operator, in a worker process: the imports take seconds, and register the device."""
    import torch

    from bench.opinfo_checks import check_operator
    from offload.testing import sim

    torch.set_num_threads(1)
    sim.load()
    sim.configure("lazy", capacity=DEVICE_CAPACITY)
    return [tuple(outcome) for outcome in check_operator(name, num_samples, variants)]


class Worker:
    """A process that answers one question at a time, and is replaced when it dies or does not answer."""

    def __init__(self, check: Check) -> None:
        self._check = check
        self._process: Any = None
        self._connection: Connection | None = None

    def ask(self, *question: Any) -> tuple[Outcomes, str]:
        """The outcomes, or what became of the process."""
        connection = self._connection or self._start()
        connection.send(question)
        try:
            if connection.poll(ANSWER_LIMIT_S):
                return connection.recv(), ""
            crash = f"no answer in {ANSWER_LIMIT_S:g} s"
        except (EOFError, ConnectionResetError):
            self._process.join()
            crash = _describe_exit(self._process.exitcode)
        self.stop()
        return [], crash

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
        self._connection = None

    def _start(self) -> Connection:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_answer, args=(self._check, theirs), daemon=True)
        self._process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        self._connection.recv()  # it is ready: what it imports is not counted as the time of an answer
        return self._connection


def _answer(check: Check, connection: Connection) -> None:
    connection.send("ready")
    while True:
        connection.send(check(*connection.recv()))


def _describe_exit(code: int) -> str:
    return f"died with {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"


@dataclass(slots=True)
class Sweep:
    """What became of each operator."""

    outcomes: dict[str, Outcomes] = field(default_factory=dict)
    crashes: dict[str, str] = field(default_factory=dict)

    @property
    def supported(self) -> list[str]:
        """Operators that the CPU could run, and those whose process died."""
        answered = [
            name for name, found in self.outcomes.items() if any(status != "unsupported" for _, status, _ in found)
        ]
        return [*answered, *self.crashes]

    @property
    def disagreeing(self) -> dict[str, list[str]]:
        """By operator, why if that is known, and what each check saw."""
        found = {
            name: [f"{check}: {reason}" for check, status, reason in outcomes if status == "disagree"]
            for name, outcomes in sorted(self.outcomes.items())
        }
        return {
            name: [KNOWN_DIFFERENCES.get(name, "not known why"), *checks] for name, checks in found.items() if checks
        }

    @property
    def agree_fraction(self) -> float:
        """Of the supported operators, those that agree in every check."""
        return 1 - (len(self.disagreeing) + len(self.crashes)) / max(1, len(self.supported))


def sweep(
    names: Iterable[str], num_samples: int, variants: tuple[str, ...], check: Check = check, num_workers: int = 2
) -> Sweep:
    """Check every operator of ``names`` in one of ``num_workers`` processes."""
    found, waiting = Sweep(), queue.SimpleQueue[str]()
    for name in names:
        waiting.put(name)

    def work() -> None:
        worker = Worker(check)
        while True:
            try:
                name = waiting.get_nowait()
            except queue.Empty:
                return worker.stop()
            outcomes, crash = worker.ask(name, num_samples, variants)
            if crash:
                found.crashes[name] = crash
            else:
                found.outcomes[name] = outcomes

    threads = [threading.Thread(target=work) for _ in range(num_workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def known_bugs() -> tuple[int | None, int | None]:
    """How many of the programs with a known bug were reported, and of those without; None where there are none."""
    if importlib.util.find_spec("tests.known_bugs") is None:
        return None, None
    from offload.testing import sim
    from tests import known_bugs

    sim.load()
    return known_bugs.run_all()


def figures(found: Sweep) -> dict[str, Any]:
    checks = Counter(status for outcomes in found.outcomes.values() for _, status, _ in outcomes)
    num_reported, num_false = known_bugs()
    return {
        "agree_fraction": round(found.agree_fraction, 4), "num_operators": len(found.supported),
        "crashes": len(found.crashes), "crashed": found.crashes, "disagreeing": found.disagreeing,
        "known_bugs_reported": num_reported, "false_reports": num_false, "checks": dict(checks.most_common()),
    }  # fmt: skip


def operator_names() -> list[str]:
    from bench.opinfo_checks import OPERATORS

    return list(OPERATORS)


def main() -> None:
    from offload.testing import sim

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="forward and backward only, one sample each")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these operators instead of all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    options = parser.parse_args()
    sim.load()  # built here if need be: a worker has so long for its answer
    start_s = time.perf_counter()
    num_samples, variants = (QUICK_SAMPLES, QUICK_VARIANTS) if options.quick else (SAMPLES, VARIANTS)
    found = sweep(options.only or operator_names(), num_samples, variants, num_workers=min(4, os.cpu_count() or 1))
    result = {**figures(found), "seconds": round(time.perf_counter() - start_s, 1)}
    for name, value in result.items():
        print(f"{name}: {json.dumps(value, indent=1 if isinstance(value, dict) else None)}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
