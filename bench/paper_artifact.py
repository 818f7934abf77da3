"""The published artifact of Deep Optimizer States, and the ZeRO-3 it is compared with, on virtual lanes.

What they do in which order follows their code (DataStates/DeepSpeed, branch deep-optimizer-states); what it costs is
the machine's profile. Three things of the code hold on every machine, so they are constants here: it touches host
memory more often than one fused pass would, moves gradients down, up and down again, and holds its main thread for a
moment at each visit to the device. That moment is fitted, once, to all update times of both machines.
"""

from __future__ import annotations

from dataclasses import dataclass

from bench.paper_tables import Run, Tables
from offload.hardware import HardwareProfile
from offload.lanes import Event, Lanes, Work
from offload.lanes.virtual import TimedWork, VirtualMachine
from offload.perf_model import Rates

# Host memory traffic of a CPU update in bytes a parameter: unscale fp32 gradients in place (4 + 4), then Adam reads
# gradient, master and moments (16) and writes master and moments (12).
ADAM_HOST_BYTES = 36
DOWNCAST_HOST_BYTES = 6  # a thread reads masters (4) and writes 16-bit parameters (2) beside the next update
STATE_BYTES = 12
VISIT_STALL_S = 0.012  # joining the copies, plugging states into torch's optimizer and launching it

FORWARD_OPERATIONS = 2  # per parameter and token
BACKWARD_OPERATIONS = 4


@dataclass(frozen=True, slots=True)
class Times:
    """Simulated seconds of one iteration; ``overhead`` is what lies between the phases, from the tables."""

    forward: float
    backward: float
    update: float
    overhead: float

    @property
    def phases(self) -> float:
        return self.forward + self.backward + self.update

    @property
    def iter(self) -> float:
        return self.phases + self.overhead


def simulate(run: Run, profile: HardwareProfile, tables: Tables) -> Times:
    """Simulate one iteration of ``run``: each phase from idle lanes, as the artifact synchronizes between them."""
    numels = tables.numels_of(run.model, run.num_ranks, run.subgroup_size)
    num_on_cpu = int(run.cpu_ratio * len(numels))  # the tail is resident on the device
    program = _Artifact(run, profile, tables.models[run.model].num_layers, numels, num_on_cpu)
    return Times(
        program.forward_s(), program.backward_s(), program.update_s(), overhead=tables.overhead_s[run.schedule]
    )


@dataclass(frozen=True, slots=True)
class _Artifact:
    run: Run
    profile: HardwareProfile
    num_layers: int
    numels: list[int]
    num_on_cpu: int

    def _lanes(self) -> tuple[VirtualMachine, Lanes]:
        rates = Rates.from_profile(self.profile, num_ranks=min(self.run.num_ranks, self.profile.num_ranks_per_node))
        machine = VirtualMachine(rates.host_dram_bytes_per_s)
        # One set of device buffers: states go down before the next come up, in the same streams.
        return machine, rates.lanes(machine, serial_link=self.run.schedule == "interleaved")

    def _layer_s(self, operations: int, latency_s: float) -> float:
        """Seconds of arithmetic of one layer. A rank computes with all parameters, of which it owns its share."""
        numel = sum(self.numels) * self.run.num_ranks / self.num_layers
        num_tokens = self.run.sequence * self.run.micro_batch
        return operations * numel * num_tokens / self.profile.device_flops + latency_s

    def _visits_device(self, i: int) -> bool:
        return self.run.schedule == "interleaved" and (i + 1) % self.run.update_stride == 0

    def forward_s(self) -> float:
        machine, lanes = self._lanes()
        for layer in range(self.num_layers):
            seconds = self._layer_s(FORWARD_OPERATIONS, self.profile.forward_layer_latency_s)
            lanes.compute.submit(TimedWork(f"forward {layer}", seconds=seconds))
        return machine.run()

    def backward_s(self) -> float:
        """Layers one after the other; gradients follow on the same stream, so nothing hides them."""
        machine, lanes = self._lanes()
        owned = sum(self.numels) // self.num_layers
        on_cpu = sum(n for i, n in enumerate(self.numels[: self.num_on_cpu]) if not self._visits_device(i))
        on_cpu //= self.num_layers
        operations = BACKWARD_OPERATIONS + (FORWARD_OPERATIONS if self.run.recompute else 0)
        for layer in range(self.num_layers):
            seconds = self._layer_s(operations, self.profile.backward_layer_latency_s)
            done = lanes.compute.submit(TimedWork(f"backward {layer}", seconds=seconds))
            done = lanes.d2h.submit(Work(f"16-bit down {layer}", num_bytes=2 * owned), after=(done,))
            done = lanes.h2d.submit(Work(f"16-bit up {layer}", num_bytes=2 * owned), after=(done,))
            if self.run.schedule == "zero3":  # blocking, converted by the CPU
                upcast = TimedWork(f"upcast {layer}", seconds=on_cpu / self.profile.blocking_upcast_params_per_s)
                done = lanes.d2h.submit(upcast, after=(done,))
            else:  # asynchronous, converted by the device
                done = lanes.d2h.submit(Work(f"fp32 down {layer}", num_bytes=4 * on_cpu), after=(done,))
            lanes.compute.wait(done)
        return machine.run()

    def update_s(self) -> float:
        machine, lanes = self._lanes()
        if self.run.schedule == "interleaved":
            self._interleaved_update(lanes)
        else:
            for i, numel in enumerate(self.numels[: self.num_on_cpu]):
                self._update_cpu(lanes, i, ADAM_HOST_BYTES).synchronize()
                seconds = numel / self.profile.blocking_downcast_params_per_s
                lanes.h2d.submit(TimedWork(f"downcast {i}", seconds=seconds)).synchronize()
        for i, numel in enumerate(self.numels[self.num_on_cpu :], start=self.num_on_cpu):
            lanes.compute.submit(Work(f"R{i}", numel=numel)).synchronize()
        return machine.run()

    def _update_cpu(self, lanes: Lanes, i: int, host_bytes: int) -> Event:
        numel = self.numels[i]
        return lanes.host.submit(Work(f"C{i}", numel=numel, host_bytes=host_bytes * numel))

    def _interleaved_update(self, lanes: Lanes) -> None:
        """The main thread updates on the CPU while states are copied, and joins the copies at each visit."""
        stride = self.run.update_stride
        prefetched: Event | None = None
        visited: tuple[int, Event] | None = None
        for i in range(self.num_on_cpu):
            if self._visits_device(i):
                assert prefetched is not None
                prefetched.synchronize()
                lanes.host.submit(TimedWork(f"launch {i}", seconds=VISIT_STALL_S)).synchronize()
                visited = i, lanes.compute.submit(Work(f"G{i}", numel=self.numels[i]))
                continue
            if i % stride == 0:
                if visited is not None:
                    last, updated = visited
                    lanes.d2h.submit(Work(f"F{last}", num_bytes=STATE_BYTES * self.numels[last]), after=(updated,))
                following = i + stride - 1
                if following < self.num_on_cpu:
                    states = Work(f"P{following}", num_bytes=STATE_BYTES * self.numels[following])
                    prefetched = lanes.h2d.submit(states)
            updated = self._update_cpu(lanes, i, ADAM_HOST_BYTES + DOWNCAST_HOST_BYTES)
            updated.synchronize()
            lanes.h2d.submit(Work(f"U{i}", num_bytes=2 * self.numels[i]), after=(updated,))
