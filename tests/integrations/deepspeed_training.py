"""Small trainings with DeepSpeed on the emulated device, whose every bit is compared."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from offload.kernels import AdamScalars, adam_step

VOCABULARY, WIDTH, NUM_LAYERS = 61, 24, 3  # no multiple of what partitions are padded to
HYPER = {"lr": 1e-2, "betas": (0.8, 0.97), "eps": 1e-8, "weight_decay": 0.05}
SUB_GROUP_SIZE = 1000


class Model(nn.Module):
    """A language model of one token, with layers of different sizes."""

    def __init__(self, *, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(NUM_LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = x + (checkpoint(layer, x, use_reentrant=False) if self.recompute else layer(x)).tanh()
        return F.cross_entropy(self.head(self.norm(x)).float().flatten(0, 1), tokens.flatten())


class ReferenceAdam(torch.optim.Optimizer):
    """Our definition of the update as plain as can be: one pass over the fp32 gradients that DeepSpeed hands over."""

    def __init__(self, params: Any, **hyper: Any) -> None:
        super().__init__(params, hyper)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state.update(step=0, exp_avg=torch.zeros_like(param), exp_avg_sq=torch.zeros_like(param))
                state["step"] += 1
                hyper = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
                scalars = AdamScalars.at_step(step=state["step"], decoupled=True, **hyper)
                grad = param.grad.detach().contiguous()
                adam_step(param.detach(), state["exp_avg"], state["exp_avg_sq"], grad, scalars=scalars)


class Trained(NamedTuple):
    losses: list[Tensor]
    params: dict[str, Tensor]
    masters: dict[str, Tensor]


def config(stage: int, dtype: str = "bf16", *, clip: float = 0.5, num_micro: int = 1, **extra: Any) -> dict[str, Any]:
    """A DeepSpeed configuration that offloads nothing yet."""
    found: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": num_micro,
        "gradient_clipping": clip,
        "zero_optimization": {
            "stage": stage, "sub_group_size": SUB_GROUP_SIZE, "stage3_param_persistence_threshold": 0,
            "reduce_bucket_size": 2000, "overlap_comm": True,
        },
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},  # else each step waits for the whole device
        **extra,
    }  # fmt: skip
    if dtype != "fp32":
        found[dtype] = {"enabled": True, **({"initial_scale_power": 8} if dtype == "fp16" else {})}
    return found


def ours(found: dict[str, Any], **block: Any) -> dict[str, Any]:
    """The configuration ``found`` with the optimizer offloaded to our runtime."""
    found["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    return {**found, "optimizer": {"type": "AdamW", "params": dict(HYPER)}, "interleaved_offload": block}


def reference(found: dict[str, Any]) -> dict[str, Any]:
    """The configuration ``found`` for DeepSpeed alone, with :class:`ReferenceAdam`."""
    return {**found, "zero_allow_untested_optimizer": True}


def engine_of(configuration: dict[str, Any], model: nn.Module | None = None, **arguments: Any) -> Any:
    """An engine over the model that every test begins with."""
    from offload.integrations.deepspeed import initialize

    torch.manual_seed(0)
    model = Model() if model is None else model
    if "interleaved_offload" not in configuration and "optimizer" not in configuration:
        arguments.setdefault("optimizer", ReferenceAdam(arguments.pop("model_parameters", model.parameters()), **HYPER))
    arguments.setdefault("model_parameters", model.parameters())
    return initialize(model=model, config=configuration, **arguments)[0]


def tokens_of(micro_step: int, device: str = "sim") -> Tensor:
    generator = torch.Generator().manual_seed(1000 + micro_step)
    return torch.randint(0, VOCABULARY, (4, 8), generator=generator).to(device)


def train(
    engine: Any,
    num_steps: int = 4,
    *,
    first: int = 0,
    device: str = "sim",
    before_step: Callable[[int], object] = lambda step: None,
) -> Trained:
    """Train ``num_steps`` steps from number ``first``; ``before_step(step)`` runs between backward and step."""
    losses = []
    num_micro = engine.gradient_accumulation_steps()
    for micro_step in range(first * num_micro, (first + num_steps) * num_micro):
        loss = engine(tokens_of(micro_step, device))
        engine.backward(loss)
        before_step(micro_step // num_micro)
        engine.step()
        losses.append(loss.detach().cpu())
    return Trained(losses, *snapshot(engine))


def snapshot(engine: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Whole parameters and their fp32 masters by name, on the CPU."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    named = dict(engine.module.named_parameters())
    masters = {name: safe_get_full_fp32_param(param).detach().cpu().clone() for name, param in named.items()}
    with GatheredParameters(list(named.values()), enabled=engine.zero_optimization_stage() == 3):
        params = {name: param.detach().cpu().clone() for name, param in named.items()}
    return params, masters


def close(engine: Any) -> None:
    """Let go of an engine: hooks, pinned memory, and tensors in the cycles that it makes."""
    engine.destroy()
    gc.collect()
