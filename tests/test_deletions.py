"""Every piece of handling in tests/deletions has a test that fails without it: ``make deletions`` takes each out."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest brings there

ROOT = Path(__file__).resolve().parent.parent
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "out", "*.egg-info")


class Deletion(NamedTuple):
    """What happens (fault), where it is handled (a text that is once in the file), and what fails without it.

    ``instead``: what takes the text's place, so that the rest still runs.
    """

    fault: str
    file: str
    text: str
    test: str
    instead: str = ""


DELETIONS = [
    Deletion(**entry)
    for path in sorted(ROOT.glob("tests/deletions/*.toml"))
    for entry in tomllib.loads(path.read_text())["deletion"]
]


def run(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Bytecode is not kept: a file is changed back within the same second, to the same size perhaps."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=tree, env=environment, text=True, timeout=250,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, with the extension as it is built here."""
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("deletions") / "tree", ignore=NOT_COPIED))


def test_the_list_is_of_these_sources() -> None:
    functions: dict[str, set[str]] = {}
    for deletion in DELETIONS:
        assert (ROOT / deletion.file).read_text().count(deletion.text) == 1, deletion
        file, function = deletion.test.split("::")
        if file not in functions:
            nodes = ast.walk(ast.parse((ROOT / file).read_text()))
            functions[file] = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
        assert function in functions[file], deletion


@pytest.mark.slow
@pytest.mark.parametrize("deletion", DELETIONS, ids=lambda each: f"{each.file}: {each.fault}")
def test_it_is_missed(tree: Path, deletion: Deletion) -> None:
    file = tree / deletion.file
    before = {path: path.read_bytes() for path in (file, *tree.glob("offload/*.so"))}
    file.write_text(file.read_text().replace(deletion.text, deletion.instead))
    try:
        if file.is_relative_to(tree / "csrc"):
            run(tree, "setup.py", "--quiet", "build_ext", "--inplace").check_returncode()
        ran = run(tree, "-m", "pytest", "-x", "-q", "--timeout=100", "-p", "no:cacheprovider", deletion.test)
    except subprocess.TimeoutExpired:
        return  # for ever: that is missed too
    finally:
        for path, content in before.items():
            path.write_bytes(content)
    crashed = ran.returncode < 0
    assert crashed or ran.returncode == pytest.ExitCode.TESTS_FAILED, ran.stdout
