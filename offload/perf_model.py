"""The performance model: a prediction is the very plan, run by the very executor, on virtual lanes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from offload.executor import run_update
from offload.hardware import HardwareProfile
from offload.lanes import Lanes, Work
from offload.lanes.virtual import MARK, Cost, VirtualEvent, VirtualMachine
from offload.plan import Placement, Plan
from offload.subgroup import Slot, Staging, Subgroup
from offload.timeline import Span


@dataclass(frozen=True, slots=True)
class Rates:
    """What one rank's work costs while nothing else runs, and what work at the same time shares.

    Link rates in bytes/s each way, update rates in parameters/s, latencies in seconds for each copy and each update on
    the device. ``both_bytes_per_s`` is the rate each way while both directions are busy; ``host_dram_bytes_per_s`` the
    rank's share of host memory, of which a copied byte takes ``host_bytes_per_h2d_byte`` or ``..._d2h_byte``. Where
    these are unlimited, the rates are those of lanes that run at the same time.
    """

    h2d_bytes_per_s: float
    d2h_bytes_per_s: float
    host_update_params_per_s: float
    device_update_params_per_s: float
    copy_latency_s: float = 0.0
    launch_latency_s: float = 0.0
    both_bytes_per_s: float = math.inf
    host_dram_bytes_per_s: float = math.inf
    host_bytes_per_h2d_byte: float = 1.0
    host_bytes_per_d2h_byte: float = 1.0

    @classmethod
    def from_profile(
        cls, profile: HardwareProfile, *, state_format: str = "fp32", num_ranks: int | None = None
    ) -> Rates:
        """Rates of a named machine.

        Args:
            state_format: of the optimizer state, which the CPU's update rate depends on.
            num_ranks: ranks at work on the machine, which share its cores and memory evenly; None for the profile's
                number.

        Raises:
            ValueError: for an unknown format, or more ranks than the machine has devices.
        """
        share = 1.0 if num_ranks is None else profile.share_of(num_ranks)
        return cls(
            h2d_bytes_per_s=profile.h2d_bytes_per_s,
            d2h_bytes_per_s=profile.d2h_bytes_per_s,
            host_update_params_per_s=profile.host_update_rate(state_format) * share,
            device_update_params_per_s=profile.device_update_params_per_s,
            copy_latency_s=profile.copy_latency_s,
            launch_latency_s=profile.launch_latency_s,
            both_bytes_per_s=profile.both_bytes_per_s,
            host_dram_bytes_per_s=profile.host_dram_bytes_per_s * share,
            host_bytes_per_h2d_byte=profile.host_bytes_per_h2d_byte,
            host_bytes_per_d2h_byte=profile.host_bytes_per_d2h_byte,
        )

    def costs(self) -> dict[str, Cost]:
        """Costs of virtual lanes."""
        launch_s, host_rate, device_rate = (
            self.launch_latency_s, self.host_update_params_per_s, self.device_update_params_per_s,
        )  # fmt: skip
        device = Cost(lambda work: launch_s + work.numel / device_rate)
        return {
            "compute": device,
            "update": device,
            "host": Cost(lambda work: work.numel / host_rate, lambda work: work.host_bytes),
            "h2d": self._copy_cost(self.h2d_bytes_per_s, self.host_bytes_per_h2d_byte),
            "d2h": self._copy_cost(self.d2h_bytes_per_s, self.host_bytes_per_d2h_byte),
        }

    def _copy_cost(self, bytes_per_s: float, host_bytes_per_byte: float) -> Cost:
        latency_s = self.copy_latency_s

        def seconds(work: Work) -> float:
            return latency_s + work.num_bytes / bytes_per_s

        return Cost(seconds, lambda work: work.num_bytes * host_bytes_per_byte)

    def lanes(self, machine: VirtualMachine, *, serial_link: bool = False, overlapped: bool = False) -> Lanes:
        """Virtual lanes of one rank of ``machine``, whose memory is the rank's share where there is one rank."""
        both = self.both_bytes_per_s
        up, down = (1.0 if both >= alone else both / alone for alone in (self.h2d_bytes_per_s, self.d2h_bytes_per_s))
        return machine.lanes(self.costs(), duplex_speeds=(up, down), serial_link=serial_link, overlapped=overlapped)


@dataclass(frozen=True, slots=True)
class Prediction:
    """What one step of ``plan`` takes.

    Attributes:
        update_s: seconds from idle lanes until all lanes are done, the last flush included.
        params_ready_s: seconds until all parameters are new, so that the next forward may start.
    """

    plan: Plan
    update_s: float
    params_ready_s: float
    events: tuple[VirtualEvent, ...] = field(default=(), repr=False, compare=False)

    @property
    def spans(self) -> tuple[Span, ...]:
        """What ran when."""
        return spans_of(self.events)


def spans_of(events: Sequence[VirtualEvent]) -> tuple[Span, ...]:
    """Work that ran on virtual lanes, for the timeline."""
    return tuple(Span(e.lane.name, e.name, e.start_s, e.end_s) for e in events if e.name != MARK)


class Predictor:
    """Predicts plans for the same subgroups on the same machine."""

    def __init__(self, subgroups: Sequence[Subgroup], rates: Rates | HardwareProfile) -> None:
        self.rates = Rates.from_profile(rates) if isinstance(rates, HardwareProfile) else rates
        self._subgroups = [subgroup.sizes_only() for subgroup in subgroups]

    def predict(self, plan: Plan) -> Prediction:
        """Time one step of ``plan`` from idle lanes until the last flush and upload."""
        # Events that an earlier prediction left on the subgroups are done: they hold nothing up.
        machine = VirtualMachine(self.rates.host_dram_bytes_per_s)
        lanes = self.rates.lanes(machine)
        run_update(
            plan,
            self._subgroups,
            [Slot(i) for i in range(plan.num_buffers(Placement.DEVICE))],
            [Staging(i) for i in range(plan.num_buffers(Placement.HOST))],
            lanes,
        )
        params_ready = lanes.compute.mark()
        update_s = machine.run()
        assert isinstance(params_ready, VirtualEvent)
        return Prediction(plan, update_s, params_ready.end_s, tuple(machine.events))


def predict(plan: Plan, subgroups: Sequence[Subgroup], rates: Rates | HardwareProfile) -> Prediction:
    """Time one step of ``plan`` from idle lanes until the last flush and upload.

    Args:
        plan: of these subgroups.
        rates: measured rates, or a machine's profile for state in fp32 and all its ranks at work.
    """
    return Predictor(subgroups, rates).predict(plan)
