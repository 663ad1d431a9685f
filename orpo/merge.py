"""An adapter and its base model, saved as one model that needs no peft.

python -m orpo.merge ADAPTER_FOLDER OUTPUT_FOLDER
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from orpo.command import run_command
from orpo.packages import require
from orpo.setup import find_dtype, reading


def merge_adapter(
    adapter: str | Path, output: str | Path, *, dtype: str | None = "auto", trust_remote_code: bool = False
) -> Any:
    """Saves the base model of the adapter in the folder `adapter`, with the adapter added in, in the folder `output`.

    The base model is loaded anew, unquantized: a LoRA that was trained on a 4-bit model is added to the weights that
    the 4-bit ones were rounded from, so its logits are not quite those of training.

    Args:
        adapter: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``, as the trainer saves it.
        output: where the whole model is saved, with the tokenizer that lies in `adapter`.
        dtype: of the merged weights; "auto" is that of the base model's files.
        trust_remote_code: run Python code that comes with the base model.

    Returns:
        The merged model.

    Raises:
        ImportError: peft is not installed.
        ValueError: `adapter` holds no adapter, or a broken one, or `output` is a file.
    """
    require("peft", "merging an adapter")
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    adapter, output = Path(adapter), Path(output)
    weights = adapter / "adapter_model.safetensors"
    if not weights.is_file() or not (adapter / "adapter_config.json").is_file():
        raise ValueError(f"{adapter} holds no adapter: adapter_config.json and adapter_model.safetensors are needed")
    if output.is_file():
        raise ValueError(f"{output} is a file, where a folder has to be made")
    with reading(adapter):
        config = peft.PeftConfig.from_pretrained(adapter)
    options = {"revision": config.revision, "dtype": find_dtype(dtype), "trust_remote_code": trust_remote_code}
    with reading(config.base_model_name_or_path, runs_code=trust_remote_code):
        model = AutoModelForCausalLM.from_pretrained(config.base_model_name_or_path, **options)
    with reading(adapter):
        with safe_open(weights, "pt") as file:
            adapted = list(file.keys())
        _untie_if_adapted(model, adapted)
        merged = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    merged.save_pretrained(output)
    AutoTokenizer.from_pretrained(adapter, trust_remote_code=trust_remote_code).save_pretrained(output)
    return merged


def _untie_if_adapted(model: nn.Module, adapted: list[str]) -> None:
    """Gives the head its own weight where the adapter changes it, or the embeddings, and both share one.

    Merged into the shared tensor, what was trained for the one would change the other as well.
    """
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    names = [name for name, module in model.named_modules() if module is head or module is embeddings]
    if head.weight is not embeddings.weight or not any(f".{name}." in key for name in names for key in adapted):
        return
    with torch.no_grad():
        head.weight = nn.Parameter(head.weight.clone())
    model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m orpo.merge", description=merge_adapter.__doc__.splitlines()[0])
    parser.add_argument("adapter")
    parser.add_argument("output")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, float16 or auto.")
    parser.add_argument("--trust_remote_code", action="store_true", help="Run Python code that comes with the model.")
    args = parser.parse_args()
    merge_adapter(args.adapter, args.output, dtype=args.dtype, trust_remote_code=args.trust_remote_code)
    print(args.output)


if __name__ == "__main__":
    run_command("python -m orpo.merge", main)
