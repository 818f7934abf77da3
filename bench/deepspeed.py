"""Iterations of DeepSpeed's own offloading and of the plugin, on the same emulated hardware (simulated).

Run: python -m bench.deepspeed [--quick] [--json FILE] [--profile NAME] [--tokens N]. Needs DeepSpeed.

The device is emulated and its clock virtual: copies, kernels and launches take what the profile says. So does the
host's work, at the profile's rates for everyone: updates, and each pass of DeepSpeed's over gradients or masters. All
share the bandwidth of host memory with the copies. DeepSpeed's copies from pageable memory are as fast as others.

The model is a miniature: fixed costs (launches, copy latencies) are scaled by its size over that of a model of
7 billion parameters, and the device's rate of arithmetic by the tokens of its step over those of ``--tokens``.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offload.hardware import HardwareProfile
from offload.kernels import AdamScalars, adam_step
from offload.testing import sim

PROFILE = "h100-sxm-16-cores"
FULL_NUMEL = 7e9  # what the miniature stands for
# What DeepSpeed's passes read and write in host memory, a parameter.
UPDATE_BYTES = 28  # three states, and an fp32 gradient that is only read
UNSCALE_BYTES = 8  # an fp32 gradient
DOWNCAST_BYTES = 6  # an fp32 master to 16 bits
CLIP = 1.0


@dataclass(frozen=True, slots=True)
class Size:
    """Of the miniature: width and number of layers, tokens of a step, elements of a sub-group, steps."""

    width: int
    num_layers: int
    tokens: int
    sub_group_size: int
    num_warm_up: int  # of which the plugin's plan="auto" needs some to measure and decide
    num_steps: int
    full_tokens: int = 2048  # that the step of the model it stands for has on each device


QUICK = Size(width=128, num_layers=6, tokens=64, sub_group_size=70_000, num_warm_up=20, num_steps=16)
FULL = Size(width=384, num_layers=16, tokens=256, sub_group_size=10**6, num_warm_up=20, num_steps=16)


class Block(nn.Module):
    """The matrices of a transformer's layer; attention itself would add nothing that is compared."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.out(self.qkv(self.norm(x)))
        return x + self.down(F.gelu(self.up(x)))


class Miniature(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(size.width) for _ in range(size.num_layers))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.float().square().mean()


# ---- what the host's work costs


@contextmanager
def charged(profile: HardwareProfile) -> Iterator[None]:
    """Charge DeepSpeed's work on the host in virtual time while active. The plugin's lanes charge their own."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Stage3

    update, unscale, copy_back = DeepSpeedCPUAdam.step, Stage3.unscale_and_clip_grads, (
        Stage3._reassign_or_swap_out_partitioned_parameters
    )  # fmt: skip
    # The conversion alone: the copy behind it is the device's to charge.
    downcast_s = max(0.0, 1 / profile.blocking_downcast_params_per_s - 2 / profile.both_bytes_per_s)

    def charge_update(self: Any, *args: Any, **kwargs: Any) -> Any:
        numel = sum(p.numel() for g in self.param_groups for p in g["params"])
        sim.host_charge(numel / profile.host_update_params_per_s, "CPU Adam", numel * UPDATE_BYTES)
        return update(self, *args, **kwargs)

    def charge_unscale(self: Any, sub_group_id: int, *args: Any) -> None:
        if self.subgroup_to_device[sub_group_id] == "cpu":
            num_bytes = self.fp16_partitioned_groups_flat_numel[sub_group_id] * UNSCALE_BYTES
            sim.host_charge(num_bytes / profile.host_dram_bytes_per_s, "unscale", num_bytes)
        unscale(self, sub_group_id, *args)

    def charge_copy_back(self: Any, sub_group_id: int) -> None:
        if self.subgroup_to_device[sub_group_id] == "cpu":
            numel = self.fp16_partitioned_groups_flat_numel[sub_group_id]
            sim.host_charge(numel * downcast_s, "downcast", numel * DOWNCAST_BYTES)
        copy_back(self, sub_group_id)

    with (
        mock.patch.object(DeepSpeedCPUAdam, "step", charge_update),
        mock.patch.object(Stage3, "unscale_and_clip_grads", charge_unscale),
        mock.patch.object(Stage3, "_reassign_or_swap_out_partitioned_parameters", charge_copy_back),
    ):
        yield


class UpdateInPlace:
    """Our kernel behind the interface of DeepSpeed's compiled extension, which takes minutes to build.

    In virtual time it costs what it is charged, whoever computes it.
    """

    def create_adam(self, *_args: Any) -> None: ...

    def destroy_adam(self, *_args: Any) -> None: ...

    def adam_update(
        self, _id: int, step: int, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
        _bias_correction: bool, param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor,
    ) -> None:  # fmt: skip
        scalars = AdamScalars.at_step(
            lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay, step=int(step), decoupled=True
        )
        adam_step(param.detach(), exp_avg, exp_avg_sq, grad, scalars=scalars)


# ---- one case


def emulate(profile: HardwareProfile, size: Size, numel: int) -> None:
    """Set the emulated device to the miniature of ``profile``."""
    scale = numel / FULL_NUMEL
    sim.set_profile(
        h2d_bytes_per_s=profile.both_bytes_per_s,
        d2h_bytes_per_s=profile.both_bytes_per_s,
        pageable_bytes_per_s=profile.both_bytes_per_s,
        host_bytes_per_h2d_byte=profile.host_bytes_per_h2d_byte,
        host_bytes_per_d2h_byte=profile.host_bytes_per_d2h_byte,
        host_dram_bytes_per_s=profile.host_dram_bytes_per_s,
        host_update_params_per_s=profile.host_update_params_per_s,
        device_update_params_per_s=profile.device_update_params_per_s,
        memory_bytes_per_s=profile.device_memory_bytes_per_s,
        flops=profile.device_flops * size.tokens / size.full_tokens,
        latency_s=profile.copy_latency_s * scale,
        launch_s=profile.launch_latency_s * scale,
    )
    sim.configure("sync", capacity="4GiB", races=False, poison=False)


def configuration(size: Size, offload_optimizer: dict[str, Any], block: dict[str, Any] | None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": CLIP,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "weight_decay": 0.01}},
        "zero_optimization": {
            "stage": 3, "sub_group_size": size.sub_group_size, "overlap_comm": True,
            "stage3_param_persistence_threshold": 0, "reduce_bucket_size": size.sub_group_size,
            "stage3_prefetch_bucket_size": size.sub_group_size,
            "offload_optimizer": {"device": "cpu", "pin_memory": True, **offload_optimizer},
        },
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},  # else each step waits for the whole device
    }  # fmt: skip
    return found if block is None else {**found, "interleaved_offload": block}


def measure(
    profile: HardwareProfile, size: Size, offload_optimizer: dict[str, Any], block: dict[str, Any] | None
) -> dict[str, Any]:
    """Virtual seconds of an iteration, and bytes a parameter and direction."""
    from deepspeed.ops.op_builder import CPUAdamBuilder

    from offload.integrations.deepspeed import initialize

    torch.manual_seed(0)
    model = Miniature(size)
    numel = sum(p.numel() for p in model.parameters())
    emulate(profile, size, numel)
    with mock.patch.object(CPUAdamBuilder, "load", return_value=UpdateInPlace()):
        engine, *_ = initialize(
            model=model, config=configuration(size, offload_optimizer, block), model_parameters=model.parameters()
        )
    x = torch.randn(size.tokens, size.width, dtype=torch.bfloat16).to("sim")
    partition = None if block is None else engine.optimizer.offloaded.partition

    def at_rest_s() -> float:
        if partition is not None:
            partition.synchronize()
        torch.accelerator.synchronize()
        return sim.host_time_s()

    def iterate() -> None:
        engine.backward(engine(x))
        engine.step()

    with charged(profile):
        for _ in range(size.num_warm_up if block is not None else 2):
            iterate()
        # Between two moments at which nothing is in flight, so the last update of all is hidden by nothing.
        start_s, first = at_rest_s(), len(sim.trace())
        for _ in range(size.num_steps):
            iterate()
        iteration_s = (at_rest_s() - start_s) / size.num_steps
    moved = Counter[str]()
    for span in sim.trace()[first:]:
        moved[span.engine] += span.num_bytes
    found: dict[str, Any] = {"iteration_s": iteration_s} | {
        f"{name}_bytes_per_param": moved[name] / numel / size.num_steps for name in ("d2h", "h2d")
    }
    if partition is not None:
        found["plan"] = str(partition.plan)
    engine.destroy()
    return found | {"numel": numel}


CASES: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "zero_offload": ({}, None),
    "twinflow": ({"ratio": 0.5}, None),
    "ours_host_in_order": ({}, {"plan": "host", "overlap": "none"}),
    "ours_host": ({}, {"plan": "host"}),
    "ours_in_order": ({}, {"plan": "auto", "overlap": "none"}),
    "ours": ({}, {"plan": "auto"}),
    "ours_static": ({}, {"resident_fraction": 0.5}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller model and fewer steps")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--profile", default=PROFILE, help=f"hardware profile by name or file (default: {PROFILE})")
    parser.add_argument(
        "--tokens", type=int, default=QUICK.full_tokens, help="of a step on a device: how long forward and backward are"
    )
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)

    from offload.integrations.deepspeed.emulated import use_emulated_device

    use_emulated_device()
    profile = HardwareProfile.load(options.profile)
    size = replace(QUICK if options.quick else FULL, full_tokens=options.tokens)
    print(f"{'simulated, ' + profile.name:<32}iteration  down    up (bytes a parameter)")
    cases = {}
    for name, arguments in CASES.items():
        case = cases[name] = measure(profile, size, *arguments)
        gc.collect()  # engines are cycles, and the next case wants their memory
        moved = f"{case['d2h_bytes_per_param']:6.2f}{case['h2d_bytes_per_param']:6.2f}"
        print(f"{name + ', ms':<32}{1e3 * case['iteration_s']:9.4f}{moved}", flush=True)
    ours_s = cases["ours"]["iteration_s"]
    found: dict[str, Any] = {
        "profile": f"{profile.name} (simulated)",
        "clipping": CLIP,
        "tokens": size.full_tokens,
        "cases": cases,
        "vs_zero_offload": cases["zero_offload"]["iteration_s"] / ours_s,
        # With half of the state on the device, as TwinFlow has it; and with none.
        "vs_twinflow": cases["twinflow"]["iteration_s"] / cases["ours_static"]["iteration_s"],
        "vs_twinflow_without_residents": cases["twinflow"]["iteration_s"] / ours_s,
        "vs_in_order": cases["ours_in_order"]["iteration_s"] / ours_s,
    }
    for key in ("vs_zero_offload", "vs_twinflow", "vs_twinflow_without_residents", "vs_in_order"):
        print(f"{key}: {found[key]:.2f}x (simulated)")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
