"""One life of a training run that is disturbed on purpose: ``python -m tests.soak FOLDER STEPS SEED``.

Trains a small language model on the emulated device from the folder's checkpoint on, if there is one. What memory it
may take, which plan it follows in each step and which faults befall it are drawn from the seed; none of them may change
a bit of the weights, which it writes to the folder at the end. ``tests/test_soak.py`` kills it and starts it again.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import offload
from offload.testing import faults, sim
from tests.training import random_plan

CONTEXT, BATCH, WIDTH = 16, 8, 48
TEXT = (Path(__file__).parent.parent / "LICENSE").read_bytes()
FAULT_RATE = 0.02  # of steps
PLAN_RATE = 0.3
MAX_STEPS_BETWEEN_SAVES = 20


class CharModel(nn.Module):
    """Predicts the next byte from those before it: embedding, attention, two layers, tied output."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128, WIDTH)
        self.position = nn.Parameter(torch.zeros(CONTEXT, WIDTH))
        self.attention = nn.Linear(WIDTH, 3 * WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.out = nn.LayerNorm(WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position
        query, key, value = self.attention(x).chunk(3, dim=-1)
        scores = query @ key.transpose(-1, -2) / WIDTH**0.5
        future = torch.full_like(scores, -1e9).triu(1)
        x = x + (scores + future).softmax(-1) @ value
        x = x + self.down(torch.relu(self.up(self.norm(x))))
        return self.out(x) @ self.embedding.weight.t()


def loss_of(model: nn.Module, step: int, device: str) -> Tensor:
    rng = random.Random(step)
    starts = [rng.randrange(len(TEXT) - CONTEXT - 1) for _ in range(BATCH)]
    rows = torch.tensor([list(TEXT[i : i + CONTEXT + 1]) for i in starts]) % 128
    logits = model(rows[:, :-1].to(device))
    return nn.functional.cross_entropy(logits.reshape(-1, 128), rows[:, 1:].reshape(-1).to(device))


def new_model(device: str) -> CharModel:
    torch.manual_seed(0)
    return CharModel().to(device)


def one_step(model: nn.Module, optimizer: offload.AdamW, step: int, device: str) -> None:
    optimizer.zero_grad()
    loss_of(model, step, device).backward()
    optimizer.clip_grad_norm_(1.0)
    optimizer.step()


def say(*words: object) -> None:
    print(*words, flush=True)


class Life:
    """From one start of the process to its end."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.checkpoint = folder / "checkpoint"
        self.rng = random.Random(seed)
        self.model, self.optimizer, self.step = self.born()

    def options(self) -> dict[str, Any]:
        """Budgets and placement of this run."""
        plan = self.rng.choice(["auto", "device", "host", offload.Stride(2), offload.Static(0.3)])
        return {
            "plan": plan,
            "overlap": self.rng.choice(["none", "backward", "next_forward"]),
            "subgroup_numel": self.rng.choice([2000, 5000, 12000]),
            "num_slots": self.rng.choice([None, 1, 3]) if plan in ("auto", "device") else None,
            "device_budget": self.rng.choice([None, "300KB", "1MB"]) if plan == "auto" else None,
            "pinned_budget": self.rng.choice([None, "600KB"]) if plan == "auto" else None,
        }

    def born(self) -> tuple[CharModel, offload.AdamW, int]:
        """A model and an optimizer, under a fault in construction now and then, with what the checkpoint holds."""
        model, options = new_model("sim"), self.options()
        fault = self.rng.choice([None, "pin", "allocation"])
        if fault is None:
            optimizer = offload.AdamW(model.parameters(), lr=3e-3, **options)
        else:
            with faults.fail(fault, self.rng.randint(1, 6)):
                try:
                    optimizer = offload.AdamW(model.parameters(), lr=3e-3, **options)
                except torch.OutOfMemoryError:
                    say("refused")
                    optimizer = None
            optimizer = optimizer or offload.AdamW(model.parameters(), lr=3e-3, plan="host")
        if not self.checkpoint.exists():
            return model, optimizer, 0
        return model, optimizer, offload.load(self.checkpoint, optimizer, model)["step"]

    def live(self, num_steps: int) -> None:
        next_save = self.step
        while self.step < num_steps:
            if self.step >= next_save:
                say("saving", self.step)
                offload.save(self.checkpoint, self.optimizer, self.model, extra={"step": self.step})
                next_save = self.step + self.rng.randint(1, MAX_STEPS_BETWEEN_SAVES)
            homes = self.optimizer.runtime.homes
            if self.rng.random() < PLAN_RATE and homes.num_slots and homes.num_staging and self.all_may_visit():
                self.optimizer.set_plan(random_plan(self.optimizer, self.rng))
            if self.rng.random() < FAULT_RATE:
                self.step_with_fault()
            else:
                one_step(self.model, self.optimizer, self.step, "sim")
                self.step += 1
                say("step", self.step)
        self.optimizer.synchronize()

    def all_may_visit(self) -> bool:
        runtime = self.optimizer.runtime
        return runtime.homes.visitors | runtime.homes.residents == set(range(len(runtime.subgroups)))

    def step_with_fault(self) -> None:
        """A step in which something fails. If it left anything half done, go back to the checkpoint."""
        kind = self.rng.choice(["task", "copy", "launch", "allocation"])
        with faults.fail(kind, self.rng.randint(1, 40)):
            try:
                one_step(self.model, self.optimizer, self.step, "sim")
                self.optimizer.synchronize()
            except RuntimeError as error:
                failed: RuntimeError | None = error.with_traceback(None)
            else:
                failed = None
        if failed is None:
            self.step += 1
            return
        say("fault", kind)
        try:
            self.optimizer.runtime.check_usable()
        except RuntimeError:
            say("reload")
            del self.model, self.optimizer
            self.model, self.optimizer, self.step = self.born()


def main() -> None:
    folder, num_steps, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    sim.load()
    sim.configure("random", seed=seed, races=False)
    life = Life(folder, seed)
    life.live(num_steps)
    weights = {name: param.detach().cpu() for name, param in life.model.named_parameters()}
    torch.save(weights, folder / "weights.part")
    (folder / "weights.part").replace(folder / "weights.pt")
    say("done")


if __name__ == "__main__":
    main()
