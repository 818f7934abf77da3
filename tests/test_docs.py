"""The documentation runs: every Python block of a page, in order, in one namespace; links lead somewhere."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import offload
import offload.cli
from offload.jobs import equal_subgroups

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
ELSEWHERE = {
    "testing.md": "tests/testing/test_pytest_plugin.py runs its example as a project of its own",
}
LIBRARY = {"huggingface.md": "accelerate", "lightning.md": "lightning"}
NAMES = [page.name for page in PAGES]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


class Chat(nn.Module):
    """Enough of a language model for what pages call: blocks that repeat, and ``generate``."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def generate(self, x: torch.Tensor) -> torch.Tensor:
        return self(x)


def reader(device: str) -> dict[str, Any]:
    """What somebody who reads a page has at hand."""
    model = Chat().to(device=device, dtype=torch.bfloat16)
    optimizer = offload.AdamW(model.parameters())
    inputs = torch.randn(2, 64, device=device, dtype=torch.bfloat16)

    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        return model(batch).square().mean()

    def train_one_step() -> None:
        loss_of(inputs).backward()
        optimizer.step()
        optimizer.zero_grad()

    host = offload.Placement.HOST
    subgroups = equal_subgroups(7_000_000_000, 150_000_000, param_itemsize=2)
    return {
        "torch": torch, "nn": nn, "pytest": pytest, "offload": offload, "model": model, "optimizer": optimizer,
        "params": model.parameters(), "inputs": {"x": inputs}, "train_one_step": train_one_step, "step": 1,
        "loss_of": loss_of, "micro_batches": [inputs, inputs],
        "scheduler": torch.optim.lr_scheduler.ConstantLR(optimizer),
        "subgroups": subgroups, "plan": offload.lower([host] * len(subgroups), num_slots=0, num_staging=2),
    }  # fmt: skip


def save_checkpoint(folder: Path) -> None:
    """A tiny model as transformers saves it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=6, num_key_value_heads=2, **sizes)).save_pretrained(folder)


@pytest.fixture
def namespace(sim: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    monkeypatch.chdir(tmp_path)
    yield reader("sim")
    torch.accelerator.synchronize()


@pytest.fixture
def alone(sim: ModuleType) -> Iterator[None]:
    """The only rank of a group."""
    dist.init_process_group("sim_gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def accelerate_as_before() -> Iterator[None]:
    """Accelerate keeps device and precision of its first use in globals."""
    yield
    if "accelerate" in sys.modules:
        sys.modules["accelerate"].state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("name", [page.name for page in PAGES if blocks(page, "python")])
@pytest.mark.usefixtures("accelerate_as_before")
def test_python_blocks_run(name: str, namespace: dict[str, Any], request: pytest.FixtureRequest) -> None:
    if name in ELSEWHERE:
        pytest.skip(ELSEWHERE[name])
    if name in LIBRARY:
        pytest.importorskip(LIBRARY[name])
    if name == "fsdp2.md":
        request.getfixturevalue("alone")
    page = next(page for page in PAGES if page.name == name)
    for block in blocks(page, "python"):
        for folder in re.findall(r'from_pretrained\("([\w-]+)"', block):
            save_checkpoint(Path(folder))
        block = block.replace("6GiB", "36KiB")  # the models here are as much smaller
        exec(compile(block, f"{name}: {block.splitlines()[0]}", "exec"), namespace)


@pytest.mark.parametrize("name", NAMES)
def test_json_blocks_are_json(name: str) -> None:
    for block in blocks(next(page for page in PAGES if page.name == name), "json"):
        json.loads(block if block.lstrip().startswith("{") else f"{{{block}}}")


def commands() -> list[str]:
    """Calls of ``offload`` in blocks of shell, each without its comment."""
    shell = [block for page in PAGES for language in ("sh", "console") for block in blocks(page, language)]
    lines = [re.split("  #| > ", line.removeprefix("$ "))[0].strip() for block in shell for line in block.splitlines()]
    return sorted({line for line in lines if line.startswith("offload ")})


@pytest.mark.parametrize("command", commands())
def test_commands_are_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names and options are those of the command line; what a command does has tests of its own."""
    for module in offload.cli.COMMANDS.values():
        monkeypatch.setattr(module, "run", lambda options: 0)
    assert offload.cli.main(shlex.split(command)[1:]) == 0


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    page = next(page for page in PAGES if page.name == name)
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        there = page if not path else (page.parent / path).resolve()
        assert there.exists(), f"{name} links to {target}"
        assert not anchor or anchor in anchors(there), f"{name} links to {target}"


def test_every_page_is_in_the_site() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r"(\w+\.md)", navigation))
    assert listed == {page.name for page in PAGES if page.parent.name == "docs"}
