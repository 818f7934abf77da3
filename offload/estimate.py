"""How much memory a training job takes before it runs: per rank and phase on the device, and on the host.

What the model itself takes (:class:`ModelCost`) comes from a formula for transformers, here, or from running the user's
module on tensors without memory (:mod:`offload.tracing`).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from offload.hardware import HardwareProfile
from offload.layer_costs import BACKWARD_OPERATIONS, FORWARD_OPERATIONS, Layer
from offload.monitor import MemoryMonitor
from offload.pool import MemoryBill, format_bytes, parse_bytes

# What the allocator cannot use, because free blocks have other sizes than what is asked for, over what is in use.
# Assumed: it depends on shapes and allocator; torch's memory_reserved() over memory_allocated() tells.
FRAGMENTATION = 0.08
ZERO_STAGES = (0, 1, 2, 3)


@dataclass(frozen=True, slots=True)
class TransformerShape:
    """A decoder-only transformer, as far as memory and arithmetic depend on it.

    Attributes:
        hidden, ffn: widths of the residual stream and of the MLP.
        num_kv_heads: fewer than ``num_heads`` with grouped queries.
        gated: the MLP has three matrices (SwiGLU), not two.
        tied: embedding and output projection are one matrix.
    """

    num_layers: int
    hidden: int
    ffn: int
    num_heads: int
    num_kv_heads: int
    vocab: int
    gated: bool = True
    tied: bool = False

    def __post_init__(self) -> None:
        for key, value in asdict(self).items():
            if not isinstance(value, bool) and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{key}={value!r} is not possible; give a whole number from 1 upward")
        if self.hidden % self.num_heads or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"hidden={self.hidden}, num_heads={self.num_heads} and num_kv_heads={self.num_kv_heads} do not divide "
                f"each other; heads must divide hidden, and key-value heads the heads"
            )

    @property
    def kv_width(self) -> int:
        return self.hidden // self.num_heads * self.num_kv_heads

    @property
    def layer_numel(self) -> int:
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * self.kv_width
        return attention + (3 if self.gated else 2) * self.hidden * self.ffn + 2 * self.hidden

    @property
    def numel(self) -> int:
        embeddings = (1 if self.tied else 2) * self.vocab * self.hidden
        return self.num_layers * self.layer_numel + embeddings + self.hidden

    def saved_numel_per_token(self) -> int:
        """Elements a layer saves for backward, with attention that saves no scores (flash attention).

        Inputs of both norms and of what follows them, queries, keys, values, what attention returns, and in the MLP
        what each matrix and the activation function return.
        """
        return 6 * self.hidden + 2 * self.kv_width + (4 if self.gated else 2) * self.ffn


# Published configurations. 'kv' and 'ffn' as in the models' config files.
SHAPES: dict[str, TransformerShape] = {
    "gpt2": TransformerShape(12, 768, 3072, 12, 12, 50257, gated=False, tied=True),
    "llama-7b": TransformerShape(32, 4096, 11008, 32, 32, 32000),
    "llama-13b": TransformerShape(40, 5120, 13824, 40, 40, 32000),
    "llama-3-8b": TransformerShape(32, 4096, 14336, 32, 8, 128256),
    "llama-70b": TransformerShape(80, 8192, 28672, 64, 8, 32000),
    "llama-3-70b": TransformerShape(80, 8192, 28672, 64, 8, 128256),
    "llama-3-405b": TransformerShape(126, 16384, 53248, 128, 8, 128256),
    "gpt-1t": TransformerShape(128, 25600, 102400, 160, 160, 51200, gated=False),  # Megatron-LM (arXiv 2104.04473)
}
# Keys of a model's config.json, as transformers writes it.
_CONFIG_KEYS = {
    "num_layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "ffn": "intermediate_size",
    "num_heads": "num_attention_heads",
    "vocab": "vocab_size",
}
_SHAPE_KEYS = ("num_layers", "hidden", "ffn", "num_heads", "num_kv_heads", "vocab")


def parse_shape(text: str) -> TransformerShape:
    """A shape from its name, from a model's config.json, or from ``num_layers=32,hidden=4096,...``.

    ``num_kv_heads`` is ``num_heads`` where it is not given; ``gated`` and ``tied`` are 0 or 1.

    Raises:
        ValueError: naming what is wrong, and the known names.
    """
    if text in SHAPES:
        return SHAPES[text]
    if text.endswith(".json"):
        return _from_config(Path(text))
    known = f"give one of {', '.join(SHAPES)}, a config.json, or {'=...,'.join(_SHAPE_KEYS)}=..."
    if "=" not in text:
        raise ValueError(f"no model shape {text!r}: {known}; a module is given as package.module:function")
    values: dict[str, Any] = {}
    for item in text.split(","):
        key, _, value = item.partition("=")
        if key not in TransformerShape.__dataclass_fields__ or not value.isdecimal():
            raise ValueError(f"{item!r} in the model shape {text!r} is not KEY=NUMBER; {known}")
        values[key] = bool(int(value)) if key in ("gated", "tied") else int(value)
    values.setdefault("num_kv_heads", values.get("num_heads"))
    if missing := [key for key in _SHAPE_KEYS if values.get(key) is None]:
        raise ValueError(f"the model shape {text!r} lacks {', '.join(missing)}; {known}")
    return TransformerShape(**values)


def _from_config(path: Path) -> TransformerShape:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        values = {key: config[name] for key, name in _CONFIG_KEYS.items()}
    except OSError as error:
        raise ValueError(f"cannot read the model's configuration {path}: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no configuration of a decoder with {', '.join(_CONFIG_KEYS.values())}") from error
    num_kv_heads = config.get("num_key_value_heads") or values["num_heads"]
    return TransformerShape(**values, num_kv_heads=num_kv_heads, tied=bool(config.get("tie_word_embeddings", False)))


@dataclass(frozen=True, slots=True)
class ModelCost:
    """What one forward and backward of one rank take, optimizer state and ZeRO aside.

    Attributes:
        numel: trainable parameters.
        param_itemsize: bytes of one parameter, and of its gradient.
        num_layers: equal layers that the work is spread over.
        forward_flops, backward_flops: floating-point operations of one micro-batch, recomputation included.
        saved_bytes: activations that all layers together keep from forward to backward.
        working_bytes: what backward takes beyond that at its most: of one layer, with recomputation.
        head_bytes: logits and loss, there at the end of forward and the beginning of backward only.
    """

    name: str
    numel: int
    param_itemsize: int
    num_layers: int
    forward_flops: float
    backward_flops: float
    saved_bytes: int
    working_bytes: int
    head_bytes: int = 0

    def layers(self, profile: HardwareProfile, grad_bytes: int) -> list[Layer]:
        """The layers as the performance model takes them; ``grad_bytes`` of gradients stay on the device in all."""
        num = self.num_layers
        forward_s = self.forward_flops / num / profile.device_flops + profile.forward_layer_latency_s
        backward_s = self.backward_flops / num / profile.device_flops + profile.backward_layer_latency_s
        layer = Layer(forward_s, backward_s, grad_bytes // num, self.saved_bytes // num, self.working_bytes)
        return [layer] * num


def transformer_cost(
    name: str,
    shape: TransformerShape,
    *,
    micro_batch: int,
    seq: int,
    recompute: bool = True,
    param_itemsize: int = 2,
) -> ModelCost:
    """What a transformer takes, by formula: 16-bit activations, flash attention, no dropout, one micro-batch.

    With ``recompute`` each layer keeps its input only and runs forward again in backward. Arithmetic is 2 operations a
    parameter and token in forward and 4 in backward (the embedding's rows are looked up, not multiplied), and 4 times
    the width for each pair of positions in attention, half of which are masked.
    """
    for key, value in (("micro_batch", micro_batch), ("seq", seq)):
        if value < 1:
            raise ValueError(f"{key}={value} is not possible; give 1 or more")
    num_tokens = micro_batch * seq
    layer_bytes = 2 * shape.saved_numel_per_token() * num_tokens
    grads_of_widest = 2 * (2 * shape.ffn + shape.hidden) * num_tokens
    multiplied = shape.num_layers * shape.layer_numel + shape.vocab * shape.hidden
    attention = 2 * shape.num_layers * shape.hidden * seq * num_tokens  # 4 a pair, half of the pairs
    forward = FORWARD_OPERATIONS * multiplied * num_tokens + attention
    backward = forward * BACKWARD_OPERATIONS / FORWARD_OPERATIONS
    return ModelCost(
        name=name,
        numel=shape.numel,
        param_itemsize=param_itemsize,
        num_layers=shape.num_layers,
        forward_flops=forward,
        backward_flops=backward + (forward if recompute else 0),
        saved_bytes=shape.num_layers * (2 * shape.hidden * num_tokens if recompute else layer_bytes),
        working_bytes=grads_of_widest + (layer_bytes if recompute else 0),
        head_bytes=(2 + 4 + 4) * shape.vocab * num_tokens,  # logits, in float32 for the loss, and their gradient
    )


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes of one rank. ``peak_bytes`` is by phase, margin included; ``parts`` add up to the peaks, see ``lines``."""

    param_bytes: int
    grad_bytes: int
    saved_bytes: int
    working_bytes: int
    bill: MemoryBill
    fragmentation: float
    num_ranks_per_node: int

    @property
    def peak_bytes(self) -> dict[str, int]:
        """Most device memory in each phase. Gradients grow in backward as activations go: the larger end counts."""
        base = self.param_bytes + self.bill.device_bytes
        forward = base + self.saved_bytes
        backward = base + max(self.saved_bytes + self.working_bytes, self.grad_bytes + self.working_bytes)
        update = base + self.grad_bytes
        phases = {"forward": forward, "backward": backward, "update": update}
        return {phase: round(num_bytes * (1 + self.fragmentation)) for phase, num_bytes in phases.items()}

    @property
    def device_bytes(self) -> int:
        return max(self.peak_bytes.values())

    def headroom_bytes(self, device_memory_bytes: int) -> dict[str, int]:
        """What each phase leaves of the device's memory; negative where it does not fit."""
        return {phase: device_memory_bytes - peak for phase, peak in self.peak_bytes.items()}

    def as_dict(self) -> dict[str, Any]:
        """Bytes by name, for JSON."""
        bill = self.bill
        return {
            "device": {
                "parameters": self.param_bytes, "gradients": self.grad_bytes, "activations": self.saved_bytes,
                "working": self.working_bytes, "slots": bill.slot_bytes, "resident_state": bill.resident_bytes,
                "fragmentation": self.fragmentation, "peak": self.peak_bytes,
            },
            "host": {
                "state": bill.host_state_bytes, "staging": bill.staging_bytes, "total": bill.host_bytes,
                "pinned": bill.pinned_bytes, "node_total": bill.host_bytes * self.num_ranks_per_node,
            },
        }  # fmt: skip

    def __str__(self) -> str:
        bill, peaks = self.bill, self.peak_bytes
        return "\n".join(
            (
                "memory of one rank",
                f"  device  parameters {format_bytes(self.param_bytes)}, gradients {format_bytes(self.grad_bytes)}, "
                f"activations {format_bytes(self.saved_bytes)} kept and {format_bytes(self.working_bytes)} working, "
                f"slots {format_bytes(bill.slot_bytes)}, resident state {format_bytes(bill.resident_bytes)}",
                "  peaks   " + ", ".join(f"{phase} {format_bytes(peak)}" for phase, peak in peaks.items())
                + f" ({self.fragmentation:.0%} for fragmentation included)",
                f"  host    state {format_bytes(bill.host_state_bytes)}, staging {format_bytes(bill.staging_bytes)}; "
                f"{format_bytes(bill.pinned_bytes)} of {format_bytes(bill.host_bytes)} pinned; "
                f"{format_bytes(bill.host_bytes * self.num_ranks_per_node)} for the "
                f"{self.num_ranks_per_node} ranks of a node",
            )
        )  # fmt: skip


def estimate_memory(
    cost: ModelCost,
    bill: MemoryBill | None = None,
    *,
    num_ranks: int = 1,
    num_ranks_per_node: int = 1,
    zero_stage: int = 3,
    grad_itemsize: int | None = None,
    fragmentation: float = FRAGMENTATION,
) -> MemoryEstimate:
    """Memory of one of ``num_ranks`` data-parallel ranks.

    Args:
        bill: what the optimizer takes; None for nothing (to learn what is left for it).
        zero_stage: what ZeRO shards over the ranks: states from 1, gradients from 2, parameters from 3. One gathered
            layer stands beside sharded parameters.
        grad_itemsize: bytes of one gradient; None for those of a parameter.
    """
    if zero_stage not in ZERO_STAGES:
        raise ValueError(f"zero_stage={zero_stage} is unknown; give one of {ZERO_STAGES}")
    if num_ranks < 1:
        raise ValueError(f"num_ranks={num_ranks} is no number of ranks; give 1 or more")
    model_bytes = cost.numel * cost.param_itemsize
    param_bytes = model_bytes
    if zero_stage >= 3 and num_ranks > 1:
        param_bytes = model_bytes // num_ranks + model_bytes // cost.num_layers
    return MemoryEstimate(
        param_bytes=param_bytes,
        grad_bytes=cost.numel * (grad_itemsize or cost.param_itemsize) // (num_ranks if zero_stage >= 2 else 1),
        saved_bytes=cost.saved_bytes,
        working_bytes=max(cost.working_bytes, cost.head_bytes),
        bill=MemoryBill() if bill is None else bill,
        fragmentation=fragmentation,
        num_ranks_per_node=min(num_ranks, num_ranks_per_node),
    )


def measured_budget(
    monitor: MemoryMonitor,
    device_memory: int | str,
    *,
    held: MemoryBill | None = None,
    fragmentation: float = FRAGMENTATION,
) -> int:
    """Device bytes that an optimizer may take, from the peaks of a training that ran under ``monitor``.

    Slots and resident states are there in every phase, so the phase with the least headroom decides.

    Args:
        device_memory: of the device, or the part of it to use, in bytes or as text ("80GiB").
        held: the bill of the optimizer that ran, whose memory the next one has again; None where it took none.

    Raises:
        ValueError: before the first step under the monitor, without an accelerator, or if the training itself took more
            than ``device_memory``.
    """
    capacity = parse_bytes(device_memory, "device_memory")
    if capacity is None:
        raise ValueError("device_memory=None is no size; give bytes or a text as '80GiB'")
    phases = monitor.profile()
    if not phases:
        raise ValueError("no sample of any phase yet: run one training step under the monitor first")
    left = min(monitor.headroom(phase, capacity) for phase in phases) + (0 if held is None else held.device_bytes)
    if left < 0:
        raise ValueError(
            f"device_memory={device_memory!r} is less than training took at its peak; the least that would do is "
            f"{format_bytes(capacity - left)}, without any state on the device"
        )
    return int(left / (1 + fragmentation))
