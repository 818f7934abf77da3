"""Imports go one way, device-specific calls stay in one file, and nothing in the tree names a machine."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "offload"

# From the bottom up: a module imports modules of the layers below its own only, never of its own layer. A new module
# gets its line here; if it fits nowhere, ask whether it is one room or two.
LAYERS: tuple[frozenset[str], ...] = tuple(
    map(
        frozenset,
        (
            {"limits", "signals", "watchdog", "torch_functions"},
            {"plan", "kernels", "accelerators", "hardware", "processors", "shards", "tensor_file"},
            {
                "lanes",
                "accounting",
                "gradients",
                "host_memory",
                "meters",
                "pending",
                "watched",
                "phase_hooks",
                "_table",
                "facts",
                "state_layout",
                "state_entries",
                "rules",
                "ring",
                "shrink",
            },
            {"subgroup", "module_waits", "pending_reads", "monitor", "timeline"},
            {"testing", "pool", "policy", "executor", "adam"},
            {"master_reading"},
            {
                "conductor",
                "snapshot",
                "early",
                "final_gradients",
                "homes",
                "ordering",
                "layout",
                "masters",
                "perf_model",
            },
            {"bounds", "beliefs", "final_gradients", "layer_costs", "options"},
            {"phases"},
            {"scheduling", "estimate", "calibration", "timing", "optimizer_state", "updates"},
            {"planner", "tracing", "overlaps"},
            {"candidates"},
            {"controller", "jobs", "memory"},
            {"plan_in_force", "passing_slots"},
            {"runtime", "streaming"},
            {"record", "live", "update_in_backward"},
            {"arguments", "explain", "verdict"},
            {"insight"},
            {"offloaded_state"},
            {"optimizer", "compat"},
            {"optimizers"},
            {"interconnect", "checkpoint"},
            {"report", "doctor"},
            {"cli"},
            {"__init__"},
        ),
    )
)
LAYER_OF = {module: height for height, layer in enumerate(LAYERS) for module in layer}
# Private halves of a module, which may know it as it knows them.
HALVES = {"_drawing": "timeline"}


def room_of(module: str) -> str:
    """``offload.lanes.base`` and ``offload/lanes/base.py`` are both in the room ``lanes``."""
    parts = module.split(".")
    room = parts[1] if len(parts) > 1 else "__init__"
    return HALVES.get(room, room)


def sources(folder: Path = PACKAGE) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def dotted(path: Path) -> str:
    relative = path.relative_to(ROOT).with_suffix("")
    return ".".join(part for part in relative.parts if part != "__init__")


def run_time_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below ``node`` but those under ``if TYPE_CHECKING:``, which never run."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            continue
        yield child
        yield from run_time_nodes(child)


def imported_modules(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """(module, line) of every import, those inside functions included; ``from offload import plan`` is both."""
    for node in run_time_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            if node.module == "offload":
                yield from ((f"offload.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield node.module, node.lineno


def upward_imports(path: Path, text: str) -> list[str]:
    own = room_of(dotted(path))
    found = []
    for module, line in imported_modules(ast.parse(text)):
        if module.split(".")[0] != "offload" or room_of(module) == own:
            continue
        if LAYER_OF.get(room_of(module), 0) >= LAYER_OF[own]:
            found.append(f"{path.relative_to(ROOT)}:{line} ({own}) imports {module}, which is not below it")
    return found


def cuda_calls(path: Path, text: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(text)):
        named = isinstance(node, ast.Attribute) and node.attr == "cuda" and ast.unparse(node.value) == "torch"
        imported = isinstance(node, ast.Import) and any(a.name.startswith("torch.cuda") for a in node.names)
        from_torch = isinstance(node, ast.ImportFrom) and (
            (node.module or "").startswith("torch.cuda")
            or (node.module == "torch" and any(alias.name == "cuda" for alias in node.names))
        )
        if named or imported or from_torch:
            found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    return found


def test_every_module_has_a_layer() -> None:
    rooms = {room_of(dotted(path)) for path in sources()}
    assert rooms <= LAYER_OF.keys(), "give the new modules a layer in LAYERS"


def test_no_layer_names_a_module_that_is_gone() -> None:
    assert LAYER_OF.keys() <= {room_of(dotted(path)) for path in sources()}


@pytest.mark.parametrize("path", sources(), ids=dotted)
def test_imports_go_down(path: Path) -> None:
    if room_of(dotted(path)) in LAYER_OF:
        assert not upward_imports(path, path.read_text(encoding="utf-8"))


def test_integrations_are_known_to_nobody() -> None:
    for path in sources():
        modules = [module for module, _ in imported_modules(ast.parse(path.read_text(encoding="utf-8")))]
        assert not [module for module in modules if "integrations" in module.split(".")], path


def test_torch_cuda_is_called_in_one_file_only() -> None:
    paths = [path for path in (*sources(), *sources(ROOT / "integrations")) if path != PACKAGE / "accelerators/cuda.py"]
    found = [call for path in paths for call in cuda_calls(path, path.read_text(encoding="utf-8"))]
    assert not found, "use torch.accelerator, torch.Stream and torch.Event"


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("plan.py", "from offload.executor import run_update"),
        ("plan.py", "def late():\n    import offload.runtime"),
        ("executor.py", "from offload import optimizer"),
        ("lanes/base.py", "from offload.subgroup import Subgroup"),
        ("kernels/op.py", "import offload"),
    ],
)
def test_upward_imports_are_found(path: str, text: str) -> None:
    assert upward_imports(PACKAGE / path, text)


def test_downward_and_type_only_imports_are_allowed() -> None:
    text = "from offload.plan import Plan\nif TYPE_CHECKING:\n    from offload.runtime import Runtime"
    assert not upward_imports(PACKAGE / "executor.py", text)


@pytest.mark.parametrize(
    "text", ["import torch.cuda", "from torch import cuda", "from torch.cuda import Stream", "torch.cuda.synchronize()"]
)
def test_cuda_calls_are_found(text: str) -> None:
    assert cuda_calls(PACKAGE / "runtime.py", text)


# Where a package comes from is the business of the machine that installs it, and a path of a machine is nobody's.
LOCAL = re.compile(
    r"(?<![\w.}])/(?:home|root|Users|opt|mnt|srv|work)/\w"
    r"|\bpypi\.org|pythonhosted|download\.pytorch|anaconda\.org|--(?:extra-)?index-url|--find-links",
)
SCANNED = (".ci", "bench", "csrc", "docs", "examples", "integrations", "offload", "scripts", "tests")
TEXT = {".c", ".cpp", ".h", ".inl", ".json", ".md", ".py", ".sh", ".toml", ".txt", ".yaml", ".yml", ".in", ""}


def written_files() -> Iterator[Path]:
    for folder in SCANNED:
        yield from (path for path in (ROOT / folder).rglob("*") if "__pycache__" not in path.parts)
    yield from (path for path in ROOT.iterdir() if path.name != ".git")  # a file in a linked work tree, with its path


def test_no_file_names_a_machine() -> None:
    found = []
    for path in written_files():
        if not path.is_file() or path.suffix not in TEXT or path == Path(__file__).resolve():
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
            if LOCAL.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not found


@pytest.mark.parametrize("text", ["cd /home/me/offload", "see /opt/x", "pip install --index-url …", "https://pypi.org"])
def test_names_of_machines_are_found(text: str) -> None:
    assert LOCAL.search(text)
