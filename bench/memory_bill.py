"""Does the bill say what a process takes? Host and locked memory from outside, and runs under limits.

Each configuration trains in fresh processes, which this one looks at through /proc and, where it may make memory
control groups, limits: ``python -m bench.memory_bill``. Memory of the emulated device is the process's own, so it is
counted with what the bill says of host and device together.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CONFIGS: dict[str, dict[str, Any]] = {
    "cpu, fp32": {"device": "cpu"},
    "cpu, bf16 parameters": {"device": "cpu", "dtype": "bfloat16"},
    "cpu, split16": {"device": "cpu", "dtype": "bfloat16", "state_format": "split16"},
    "cpu, bf16 moments": {"device": "cpu", "dtype": "bfloat16", "state_format": "bf16"},
    "cpu, Lion": {"device": "cpu", "optimizer": "Lion"},
    "host": {"plan": "host"},
    "host, small subgroups": {"plan": "host", "subgroup_numel": 1 << 18},
    "device": {"plan": "device"},
    "device, 4 slots": {"plan": "device", "num_slots": 4},
    "stride 2": {"plan": "stride"},
    "static 0.3": {"plan": "static"},
    "auto, residents": {"plan": "auto", "device_budget": "100MB"},
    "stride 2, next forward": {"plan": "stride", "overlap": "next_forward"},
    "device, split16": {"plan": "device", "dtype": "bfloat16", "state_format": "split16"},
}
NUM_STEPS = 4


# ---- in the fresh process


def child(config: dict[str, Any]) -> None:
    import torch

    import offload
    from offload.testing import sim

    torch.set_num_threads(1)
    device = config.pop("device", "sim")
    if device == "sim":
        sim.load()
        sim.configure(races=False)
        sim.lock_pages(True)
    dtype = getattr(torch, config.pop("dtype", "float32"))
    make = getattr(offload, config.pop("optimizer", "AdamW"))
    plan = {"stride": offload.Stride(2), "static": offload.Static(0.3)}.get(config.get("plan", "auto"))
    arguments = {"overlap": "none", "subgroup_numel": 1 << 20, **config, **({"plan": plan} if plan else {})}

    def model(num_layers: int) -> torch.nn.Module:
        layers = [torch.nn.Linear(512, 512, bias=False) for _ in range(num_layers)]
        return torch.nn.Sequential(*layers).to(device, dtype)

    def train(trained: torch.nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        x = torch.ones(4, 512, device=device, dtype=dtype)
        for _ in range(NUM_STEPS):
            trained.zero_grad(set_to_none=False)
            trained(x).square().mean().backward()
            if optimizer is not None:
                optimizer.step()
        if optimizer is not None:
            optimizer.synchronize()

    small = model(8)  # starts threads and loads all that is loaded once
    train(small, make(small.parameters(), **{**arguments, "device_budget": None}))
    del small
    trained = model(80)
    train(trained, None)
    say(warm=True)
    sys.stdin.readline()
    train(trained, None)  # what training takes at most without an optimizer
    bill = make.bill_of(trained.parameters(), **arguments)
    say(host=bill.host_bytes, device=bill.device_bytes, pinned=bill.pinned_bytes)
    sys.stdin.readline()
    try:
        optimizer = make(trained.parameters(), **arguments)
    except offload.BudgetError as error:
        say(refused=str(error))
    else:
        train(trained, optimizer)
        say(refused=None)
    sys.stdin.readline()


def say(**values: object) -> None:
    print(json.dumps(values), flush=True)


# ---- outside


class Process:
    """A fresh process that trains one configuration, in a control group of its own if there is one."""

    def __init__(self, config: dict[str, Any], group: Path | None) -> None:
        self.group = group
        command = [sys.executable, "-m", "bench.memory_bill", "--child", json.dumps(config)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if group is not None:
            (group / "cgroup.procs").write_text(str(self._process.pid))
        assert self.hear() == {"warm": True}
        self.forget_peak()
        self.go_on()
        self.bill = self.hear()
        self.peak_before = self.status_bytes("VmHWM")

    def hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            return {"killed": self._process.wait()}
        heard: dict[str, Any] = json.loads(line)
        return heard

    def go_on(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def status_bytes(self, field: str) -> int:
        text = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(text.split(f"{field}:")[1].split()[0]) * 1024

    def forget_peak(self) -> None:
        Path(f"/proc/{self._process.pid}/clear_refs").write_text("5")

    def end(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.go_on()
        self._process.communicate()


def run(config: dict[str, Any], group: Path | None, factor: float, *, items: tuple[str, ...]) -> dict[str, Any]:
    """What becomes of a run whose control group leaves it ``factor`` times these items of its bill, and what it took.

    "taken" is by how much an optimizer raises what training takes at most, in bytes.
    """
    process = Process(config, group)
    before = {field: process.status_bytes(field) for field in ("VmRSS", "VmLck")}
    if group is not None:
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.usage_in_bytes").read_text())
        used -= int(stat["total_inactive_file"]) + int(stat["total_active_file"]) - int(stat["total_mapped_file"])
        limit = used + process.peak_before - before["VmRSS"] + int(factor * sum(process.bill[item] for item in items))
        (group / "memory.limit_in_bytes").write_text(str(limit))
    process.forget_peak()
    process.go_on()
    heard = process.hear()
    seen = {"billed": total(process.bill), "billed_pinned": process.bill["pinned"], "taken": 0, "pinned": 0}
    if "killed" not in heard:
        seen["taken"] = process.status_bytes("VmHWM") - process.peak_before
        seen["pinned"] = process.status_bytes("VmLck") - before["VmLck"]
    process.end()
    if group is not None:
        (group / "memory.limit_in_bytes").write_text("-1")
    outcome = "killed" if "killed" in heard else "completed" if heard["refused"] is None else "refused"
    return {**seen, "outcome": outcome}


def total(bill: dict[str, int]) -> int:
    return bill["host"] + bill["device"]


@contextlib.contextmanager
def control_group() -> Iterator[Path | None]:
    """A memory control group (v1) within our own; None where none may be made."""
    paths = [line.split(":")[2] for line in Path("/proc/self/cgroup").read_text().splitlines() if ":memory:" in line]
    group = Path("/sys/fs/cgroup/memory" + paths[0]) / f"memory-bill-{os.getpid()}" if paths else None
    try:
        if group is not None:
            group.mkdir()
    except OSError:
        group = None
    yield group
    if group is not None:
        group.rmdir()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--only", help="configurations whose name has this in it")
    options = parser.parse_args()
    if options.child:
        return child(json.loads(options.child))
    print(f"{'configuration':24} {'billed':>10} {'peak':>10} {'off':>7} {'pinned':>10} {'locked':>10} {'off':>7}  "
          f"5 % above    20 % below")  # fmt: skip
    with control_group() as group:
        for name, config in CONFIGS.items():
            if options.only and options.only not in name:
                continue
            above = run(config, group, 1.05, items=("host", "device"))
            below = {"outcome": "not run", "taken": 0} if group is None else run(config, group, 0.8, items=("host",))
            print(f"{name:24} {mib(above['billed'])} {mib(above['taken'])} {off(above['taken'], above['billed'])} "
                  f"{mib(above['billed_pinned'])} {mib(above['pinned'])} "
                  f"{off(above['pinned'], above['billed_pinned'])}  "
                  f"{above['outcome'] if group is not None else 'not run':12} "
                  f"{below['outcome']}, {mib(max(0, below['taken'])).strip()} taken", flush=True)  # fmt: skip
    return None


def mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:6.1f} MiB"


def off(actual: int, expected: int) -> str:
    return f"{100 * (actual / expected - 1):+6.2f}%" if expected else f"{'-':>7}"


if __name__ == "__main__":
    main()
