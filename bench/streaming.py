"""How close does layer streaming come to the physical limit, and how far is it ahead of peers?

    python -m bench.streaming [--quick] [--json FILE]

Everything runs on the emulated accelerator, so all times are simulated, in seconds of its virtual clock, by the rates
below (profile "bench-link": a link of 1 GB/s and a device whose arithmetic is set so that computing takes a quarter of,
as long as, or four times as long as the link). The limit of a pass is ``max(compute, streamed bytes / link)``, where
compute is what the same model takes without offloading.

- ours: offload.stream, all blocks streamed, and half of them;
- accelerate: its own cpu_offload on the emulated device;
- diffusers: its own apply_group_offloading on the emulated device, with a stream, by block and by leaf, with and
  without record_stream.

Ours and peers run the same module on the same link, where link and compute balance, in three settings: equal blocks
and unequal ones with no more on the device than streaming needs (ours: two to four places), and equal blocks under a
budget of half the weights. Peers have no use for a budget: accelerate holds one weight at a time, diffusers two blocks
or leaves. The headline figures are those of the budget.

A mixture of experts, of which two of sixteen in a block are used in a pass, some far oftener than others, runs with its
experts cached in the room of half of them, and streamed with their blocks under the same budget.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import offload
from offload._table import format_table
from offload.streaming.placement import spread_evenly
from offload.testing import sim

LINK_BYTES_PER_S = 1e9
WIDTH, BATCH = 256, 4
WARM_UPS, PASSES = 2, 3
BUDGET = "equal blocks, budget of half the weights"
RATIOS = {"link-bound": 0.25, "balanced": 1.0, "compute-bound": 4.0}
_ROUTED_PASSES = 30
Timed = Callable[[Tensor], Tensor]


class Block(nn.Module):
    """A residual block of one inner width."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, inner, bias=False)
        self.down = nn.Linear(inner, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x))


class Chain(nn.Module):
    """Blocks behind a small module of another kind, without which diffusers 0.42 neither prefetches nor waits."""

    def __init__(self, inners: Sequence[int]) -> None:
        super().__init__()
        self.stem = nn.LayerNorm(WIDTH)
        self.blocks = nn.ModuleList(Block(inner) for inner in inners)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x


class Mixture(nn.Module):
    """A block of experts, with a router that draws by Zipf's law."""

    def __init__(self, seed: int, num_experts: int = 16) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Block(WIDTH) for _ in range(num_experts))
        self._draws = random.Random(seed)
        self._ranked = [*range(num_experts)]
        self._draws.shuffle(self._ranked)

    def forward(self, x: Tensor) -> Tensor:
        weights = [1 / (rank + 1) for rank in range(len(self._ranked))]
        for expert in sorted(set(self._draws.choices(self._ranked, weights, k=2))):
            x = self.experts[expert](x)
        return x


class Mixtures(Chain):
    def __init__(self, num_blocks: int) -> None:
        super().__init__([])
        self.blocks = nn.ModuleList(Mixture(seed) for seed in range(num_blocks))


def inners(num_blocks: int, *, unequal: bool) -> list[int]:
    """Inner widths; unequal ones come in a cycle of five that no window divides."""
    return [WIDTH * (2 + [0, 3, 1, 4, 2][i % 5] if unequal else 4) // 2 for i in range(num_blocks)]


def weight_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.itemsize for p in model.parameters())


def set_machine(ratio: float) -> None:
    """A device that computes a block in ``ratio`` times what its weights take over the link."""
    flops = 2 * BATCH * LINK_BYTES_PER_S / 4 / ratio  # two a weight and sequence; four bytes a weight
    sim.set_profile(
        h2d_bytes_per_s=LINK_BYTES_PER_S,
        d2h_bytes_per_s=LINK_BYTES_PER_S,
        pageable_bytes_per_s=LINK_BYTES_PER_S / 2,
        flops=flops,
        memory_bytes_per_s=1e15,
        latency_s=1e-6,
        launch_s=1e-7,
    )


@torch.no_grad()
def pass_s(run: Timed, num_passes: int = PASSES) -> float:
    """Simulated seconds of a pass in the steady state."""
    x = torch.zeros(BATCH, WIDTH, device="sim")
    for _ in range(WARM_UPS):
        run(x)
    torch.accelerator.synchronize()
    begin_s = sim.host_time_s()
    for _ in range(num_passes):
        run(x)
    torch.accelerator.synchronize()
    return (sim.host_time_s() - begin_s) / num_passes


# ---- runners: each makes a fresh model run somehow, and says how to undo it


def unstreamed(sizes: Sequence[int]) -> float:
    return pass_s(Chain(sizes).to("sim"))


def ours(sizes: Sequence[int], num_resident: int = 0) -> dict[str, Any]:
    """Time, plan and memory of offload.stream with some blocks resident, evenly spread."""
    model = Chain(sizes)
    streamed = spread_evenly(len(sizes), len(sizes) - num_resident)
    names = [f"blocks.{i}" for i in range(len(sizes)) if i not in streamed]
    torch.accelerator.empty_cache()
    torch.accelerator.reset_peak_memory_stats()
    handle = offload.stream(model, "1GiB", reserve=0, resident=names, verbose=False)
    seconds = pass_s(model)
    found = {
        "pass_s": seconds,
        "plan": str(handle.plan),
        "streamed_bytes": handle.plan.streamed_bytes,
        "weight_bytes_billed": handle.bill.weight_bytes,
        "peak_bytes": torch.accelerator.max_memory_allocated(),
    }
    handle.remove()
    return found


def with_accelerate(sizes: Sequence[int]) -> float:
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules

    model = Chain(sizes)
    cpu_offload(model, execution_device=torch.device("sim"))
    seconds = pass_s(model)
    remove_hook_from_submodules(model)
    return seconds


def with_diffusers(sizes: Sequence[int], level: str, *, record_stream: bool) -> float:
    from diffusers.hooks import apply_group_offloading

    let_diffusers_see_streams()
    model = Chain(sizes)
    apply_group_offloading(
        model,
        onload_device=torch.device("sim"),
        offload_type=level,
        num_blocks_per_group=1 if level == "block_level" else None,
        use_stream=True,
        record_stream=record_stream,
    )
    return pass_s(model)


def let_diffusers_see_streams() -> None:
    """Device modules offer ``stream(s)`` as a context, which for torch.Stream is the stream itself."""
    module: Any = torch.get_device_module("sim")
    module.stream = lambda stream: stream


# ---- what is compared


def limits(num_blocks: int) -> dict[str, Any]:
    """Ours over the limit, for equal and unequal blocks, all streamed and half of them."""
    found = {}
    for kind, unequal in (("equal", False), ("unequal", True)):
        sizes = inners(num_blocks, unequal=unequal)
        for name, ratio in RATIOS.items():
            for num_resident in (0, num_blocks // 2):
                set_machine(ratio)
                compute_s = unstreamed(sizes)
                run = ours(sizes, num_resident)
                bound_s = max(compute_s, run["streamed_bytes"] / LINK_BYTES_PER_S)
                found[f"{kind}, {name}, {num_resident} of {num_blocks} resident"] = {
                    **run,
                    "compute_s": compute_s,
                    "bound_s": bound_s,
                    "bound_fraction": bound_s / run["pass_s"],
                }
    return found


def peers(num_blocks: int) -> dict[str, dict[str, float]]:
    """Simulated seconds of a pass of each, by setting."""
    settings = {
        "equal blocks": (False, 1.0, 0),
        "unequal blocks": (True, 1.0, 0),
        BUDGET: (False, 0.5, num_blocks // 2),  # the link takes twice as long for all, so as long for half of them
    }
    found = {}
    for setting, (unequal, ratio, num_resident) in settings.items():
        set_machine(ratio)
        sizes = inners(num_blocks, unequal=unequal)
        times = {
            "unstreamed": unstreamed(sizes),
            "ours": ours(sizes, num_resident)["pass_s"],
            "accelerate": with_accelerate(sizes),
        }
        for level in ("block_level", "leaf_level"):
            for record_stream in (False, True):
                name = f"diffusers {level}{', record_stream' if record_stream else ''}"
                times[name] = with_diffusers(sizes, level, record_stream=record_stream)
        found[setting] = times
    return found


def mixture(num_blocks: int) -> dict[str, float]:
    """Simulated seconds of a pass with experts cached and with their blocks, where the link binds."""
    set_machine(RATIOS["link-bound"])
    found = {}
    for name, experts in (("cached", "auto"), ("with their block", None)):
        model = Mixtures(num_blocks)
        handle = offload.stream(model, weight_bytes(model) // 2, reserve=0, experts=experts, verbose=False)
        x = torch.zeros(BATCH, WIDTH, device="sim")
        with torch.no_grad():
            for _ in range(_ROUTED_PASSES):  # the cache learns
                model(x)
        if handle.expert_cache is not None:
            counts = handle.expert_cache.counts
            counts.num_visits = counts.num_loads = 0
        found[name] = pass_s(model, num_passes=_ROUTED_PASSES)
        if handle.expert_cache is not None:
            found["loads per visit"] = counts.num_loads / counts.num_visits
        handle.remove()
    return found


def over_ours(times: dict[str, float], peer: str) -> float:
    """The fastest variant of a peer over ours."""
    return min(seconds for name, seconds in times.items() if name.startswith(peer)) / times["ours"]


def wall_clock(num_blocks: int) -> float:
    """As a check on the virtual clock: measured seconds of a pass of ours where the link binds and is throttled."""
    set_machine(RATIOS["link-bound"])
    sim.configure("threads")
    model = Chain(inners(num_blocks, unequal=False))
    offload.stream(model, "1GiB", reserve=0, resident=[], verbose=False)
    x = torch.zeros(BATCH, WIDTH, device="sim")
    times_s = []
    with torch.no_grad():
        for _ in range(5):
            begin_s = time.perf_counter()
            model(x)
            torch.accelerator.synchronize()
            times_s.append(time.perf_counter() - begin_s)
    sim.configure("sync", races=False)
    return statistics.median(times_s)


def measure(num_blocks: int) -> dict[str, Any]:
    sim.load()
    sim.reset()
    sim.configure("sync", races=False, poison=False)
    torch.set_num_threads(1)  # the arithmetic is tiny, and its threads would only wait for each other
    cases, settings = limits(num_blocks), peers(num_blocks)

    def worst(kind: str) -> float:
        return min(case["bound_fraction"] for name, case in cases.items() if name.startswith(kind))

    return {
        "clock": "simulated, profile bench-link",
        "num_blocks": num_blocks,
        "bound_fraction": worst("equal"),
        "bound_fraction_unequal": worst("unequal"),
        "vs_accelerate": over_ours(settings[BUDGET], "accelerate"),
        "vs_diffusers": over_ours(settings[BUDGET], "diffusers"),
        "vs_accelerate_by_setting": {name: over_ours(times, "accelerate") for name, times in settings.items()},
        "vs_diffusers_by_setting": {name: over_ours(times, "diffusers") for name, times in settings.items()},
        "peers_pass_s": settings,
        "mixture": mixture(num_blocks // 4),
        "cases": cases,
        "wall_clock_pass_s": wall_clock(num_blocks),
        "wall_clock_bound_s": cases[f"equal, link-bound, 0 of {num_blocks} resident"]["bound_s"],
    }


def report(result: dict[str, Any]) -> str:
    rows = [("case (simulated)", "pass ms", "limit ms", "of the limit")]
    for name, case in result["cases"].items():
        times = (case["pass_s"], case["bound_s"])
        rows.append((name, *(f"{seconds * 1e3:.3f}" for seconds in times), f"{case['bound_fraction']:.3f}"))
    lines = [format_table(rows), ""]
    for setting, times in result["peers_pass_s"].items():
        rows = [(f"{setting}, balanced (simulated)", "pass ms", "over ours")]
        for name, seconds in times.items():
            rows.append((name, f"{seconds * 1e3:.3f}", f"{seconds / times['ours']:.2f}"))
        lines += [format_table(rows), ""]
    cached, whole, loads = (result["mixture"][key] for key in ("cached", "with their block", "loads per visit"))
    lines.append(
        f"mixture (simulated), experts cached in half of their bytes: {cached * 1e3:.3f} ms a pass, {loads:.2f} loads "
        f"a visit; with their block: {whole * 1e3:.3f} ms ({whole / cached:.2f}x)"
    )
    wall_s, bound_s = result["wall_clock_pass_s"], result["wall_clock_bound_s"]
    lines.append(
        f"as a check, on this machine's clock with the link throttled: {wall_s * 1e3:.3f} ms a pass, "
        f"{bound_s / wall_s:.3f} of the limit"
    )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer blocks")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(arguments)
    result = measure(20 if options.quick else 40)
    print(report(result))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
