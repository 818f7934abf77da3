"""What a state format costs in training: a small language model, trained once in each format, held against fp32.

    python -m bench.state_formats [--steps 600] [--optimizer AdamW] [--json FILE]

A byte-level transformer in bfloat16 learns the sources of Python's standard library, which are on every machine. All
runs see the same batches from the same initial weights, so they differ by the format alone; fp32 with other batches
("fp32, other data") shows how much of a difference is chance.
"""

from __future__ import annotations

import argparse
import json
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import offload
from offload._table import format_table
from offload.kernels import STATE_FORMATS

WIDTH, NUM_LAYERS, NUM_HEADS, CONTEXT, BATCH = 64, 2, 4, 64, 16
LEARNING_RATES = {"AdamW": 2e-3, "Adam": 2e-3, "Lion": 3e-4, "Adagrad": 2e-2, "SGD": 0.2}
AVERAGED = 0.2  # the losses of the last part of a run are averaged


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        heads = self.qkv(self.attention_norm(x)).view(batch, length, 3, NUM_HEADS, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*heads.unbind(), is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, WIDTH))
        return x + self.mlp(self.mlp_norm(x))


class ByteModel(nn.Module):
    """A decoder over bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(NUM_LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def corpus() -> Tensor:
    """The standard library's modules, as bytes."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)


def batches(text: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(text) - CONTEXT - 1, (BATCH, 1), generator=generator)
        window = text[starts + torch.arange(CONTEXT + 1)].long()
        yield window[:, :-1], window[:, 1:]


@dataclass(frozen=True, slots=True)
class Run:
    """One training: the mean loss of its last part, and how far its weights are from fp32's."""

    name: str
    state_bytes_per_param: float
    loss: float
    loss_minus_fp32: float
    weight_distance: float
    same_losses: int
    losses: list[float]


def train(
    optimizer_name: str, state_format: str, text: Tensor, num_steps: int, seed: int
) -> tuple[Any, list[float], Any]:
    torch.manual_seed(0)
    model = ByteModel().bfloat16()
    optimizer = getattr(offload, optimizer_name)(
        model.parameters(), lr=LEARNING_RATES[optimizer_name], state_format=state_format
    )
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.02, total_iters=50)
    losses = []
    for _, (inputs, targets) in zip(range(num_steps), batches(text, seed), strict=False):
        loss = F.cross_entropy(model(inputs).float().flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        warmup.step()
        losses.append(float(loss.detach()))
    return torch.cat([p.detach().float().flatten() for p in model.parameters()]), losses, optimizer


def compare(optimizer_name: str, num_steps: int) -> list[Run]:
    """Every format, and fp32 once more with other batches."""
    text, runs = corpus(), []
    reference: tuple[Tensor, list[float]] | None = None
    for state_format, seed in [*((name, 0) for name in STATE_FORMATS), ("fp32", 1)]:
        weights, losses, optimizer = train(optimizer_name, state_format, text, num_steps, seed)
        reference = (weights, losses) if reference is None else reference
        last = max(1, int(num_steps * AVERAGED))
        loss, reference_loss = (sum(each[-last:]) / last for each in (losses, reference[1]))
        runs.append(
            Run(
                state_format if seed == 0 else "fp32, other data",
                optimizer.bill.host_state_bytes / weights.numel(),
                loss,
                loss - reference_loss,
                float((weights - reference[0]).norm() / reference[0].norm()),
                sum(a == b for a, b in zip(losses, reference[1], strict=True)),
                losses,
            )
        )
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--optimizer", default="AdamW", choices=LEARNING_RATES)
    parser.add_argument("--json", type=Path, help="write every loss too")
    options = parser.parse_args()
    runs = compare(options.optimizer, options.steps)
    header = ("state", "bytes/param", "loss", "loss - fp32", "weights from fp32", "equal losses")
    rows = [
        (r.name, f"{r.state_bytes_per_param:.2f}", f"{r.loss:.4f}", f"{r.loss_minus_fp32:+.4f}",
         f"{r.weight_distance:.3f}", f"{r.same_losses} of {options.steps}")
        for r in runs
    ]  # fmt: skip
    print(f"{options.optimizer}, {options.steps} steps, mean loss of the last {AVERAGED:.0%}")
    print(format_table([header, *rows]))
    if options.json:
        options.json.write_text(json.dumps([asdict(run) for run in runs]), encoding="utf-8")


if __name__ == "__main__":
    main()
