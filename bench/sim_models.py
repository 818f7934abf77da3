"""Do models train on the emulated device as on the CPU, and at what cost? python -m bench.sim_models [--json FILE]

- gradients: the largest difference from the CPU's, of small models of each kind, with executor "lazy";
- host waits of one step of forward and backward (0 is what a dense transformer should need);
- cost: seconds of a step over the CPU's at about 20 million parameters, with race detection and poisoning on.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.small_models import DENSE_TRANSFORMERS, MODELS, TINY, TWENTY_MILLION, Case, Inputs
from offload.testing import sim

TIMED_MODELS = ("llama", "gpt2")
REPEATS = 7
DEVICE_CAPACITY = "4GiB"


def step(case: Case, model: nn.Module, inputs: Inputs) -> Tensor:
    """Forward and backward; the gradients are left in the parameters."""
    model.zero_grad()
    loss = case.loss(model, inputs)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def compare(case: Case) -> dict[str, Any]:
    """One step on the CPU and one on the device."""
    on_device, inputs = copy.deepcopy(case.model).to("sim"), case.inputs_on("sim")
    expected_loss = step(case, case.model, case.inputs)
    sim.configure("sync")
    # The first step makes what models make once; statistics of batches must not be counted twice.
    step(case, copy.deepcopy(on_device), inputs)
    sim.configure("lazy")
    loss = step(case, on_device, inputs)
    num_ops, num_host_waits = sim.counts()
    pairs = list(zip(case.model.parameters(), on_device.parameters(), strict=True))
    differences = [_difference(ours.grad, theirs.grad) for theirs, ours in pairs if theirs.grad is not None]
    return {
        "num_parameters": case.numel, "loss_difference": abs(loss.item() - expected_loss.item()),
        "gradient_difference": max(differences), "num_ops": num_ops, "num_host_waits": num_host_waits,
        "races": len(sim.races()),
    }  # fmt: skip


def _difference(ours: Tensor | None, theirs: Tensor) -> float:
    """The largest, as a part of the largest gradient where that is over 1."""
    assert ours is not None
    return float((ours.cpu() - theirs).abs().max() / theirs.abs().max().clamp(min=1))


def cost(case: Case) -> dict[str, float]:
    """Seconds of a step, the least disturbed of several that take turns."""
    on_device, inputs = copy.deepcopy(case.model).to("sim"), case.inputs_on("sim")
    sim.configure("sync", races=True, poison=True)

    def on_sim() -> None:
        step(case, on_device, inputs)
        torch.accelerator.synchronize()

    def on_cpu() -> None:
        step(case, case.model, case.inputs)

    times_s: dict[Callable[[], None], list[float]] = {on_cpu: [], on_sim: []}
    for _ in range(REPEATS):
        for run, seconds in times_s.items():
            start_s = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start_s)
    cpu_s, sim_s = min(times_s[on_cpu]), min(times_s[on_sim])
    return {"num_parameters": case.numel, "cpu_s": cpu_s, "sim_s": sim_s, "sim_over_cpu": sim_s / cpu_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    options = parser.parse_args()
    sim.load()
    sim.configure("sync", capacity=DEVICE_CAPACITY)
    torch.manual_seed(0)
    compared = {name: compare(make(TINY)) for name, make in MODELS.items()}
    costs = {name: cost(MODELS[name](TWENTY_MILLION)) for name in TIMED_MODELS}
    result = {
        "gradient_difference": max(figures["gradient_difference"] for figures in compared.values()),
        "host_waits_of_dense_transformers": sum(compared[name]["num_host_waits"] for name in DENSE_TRANSFORMERS),
        "sim_over_cpu": max(figures["sim_over_cpu"] for figures in costs.values()),
        "models": compared, "costs": costs, "num_threads": torch.get_num_threads(),
    }  # fmt: skip
    for name, value in result.items():
        print(f"{name}: {json.dumps(value, indent=1) if isinstance(value, dict) else value}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
