"""An adapter and its base model, saved as one model that needs no peft."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orpo.model.adapters import WEIGHTS, load_adapter, read_config, trained_tokens
from orpo.model.encoder_decoder import is_encoder_decoder
from orpo.model.load import load_model, load_tokenizer
from orpo.packages import require

# Marks a folder as an earlier merge's, which a later one may replace.
RECORD = "orpo_merge.json"


def merge_adapter(
    adapter: str | Path, output: str | Path, *, dtype: str | None = "auto", trust_remote_code: bool = False
) -> Any:
    """Saves the base model of the adapter in the folder `adapter`, with the adapter added in, in the folder `output`.

    The base model is loaded anew, unquantized: a LoRA trained on a 4-bit model is added to weights before rounding, so
    that its logits differ a little from those of training. The merged model is loaded again, and its logits on a few
    tokens are compared with the adapter's, before `output` appears.

    Args:
        adapter: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``, as the trainer saves it.
        output: where the whole model is saved, with the tokenizer in `adapter`, or else the base model's. It has to be
            new or empty, or the folder of an earlier merge, which is replaced.
        dtype: of the merged weights; "auto" is that of the base model's files.
        trust_remote_code: run Python code that comes with the base model.

    Returns:
        The merged model, as loaded from `output`.

    Raises:
        ImportError: peft is not installed.
        ValueError: `adapter` holds no adapter, or one that cannot be merged, `output` holds something else, or the
            merged model's logits are not the adapter's. Nothing is left in `output` then.
    """
    require("peft", "merging an adapter")
    # Resolved, since a link cannot be replaced by a folder, and "." has no name.
    adapter, output = Path(adapter), Path(output).resolve()
    if not (adapter / WEIGHTS).is_file() or not (adapter / "adapter_config.json").is_file():
        raise ValueError(f"{adapter} holds no adapter: adapter_config.json and {WEIGHTS} are needed")
    config = read_config(adapter)
    check_output(output, adapter, config.base_model_name_or_path)
    if config.is_prompt_learning:
        raise ValueError(f"{adapter} is a {config.peft_type.value} adapter, tokens before the input: no weight has it")
    options = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    model = load_adapter(adapter, **options)
    ids = _trial_tokens(model, trained_tokens(config))
    expected = _logits(model, ids)
    merged = _merge(model)
    part = output.with_name(f".{output.name}-{os.getpid()}")
    part.mkdir(parents=True)
    try:
        merged.save_pretrained(part)
        load_tokenizer(str(adapter), trust_remote_code=trust_remote_code).save_pretrained(part)
        # Two models at once would need twice the memory.
        del model, merged
        reloaded = load_model(str(part), **options)
        _compare(_logits(reloaded, ids), expected, reloaded, str(adapter))
        record = {**_sources(adapter, dtype), "base": config.base_model_name_or_path, "revision": config.revision}
        files = sorted(path.name for path in part.iterdir())
        (part / RECORD).write_text(json.dumps({**record, "files": [*files, RECORD]}, indent=1) + "\n")
        if output.is_dir():
            shutil.rmtree(output)
        part.rename(output)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    reloaded.config._name_or_path = reloaded.name_or_path = str(output)
    return reloaded


def is_merged(output: str | Path, adapter: str | Path, dtype: str | None) -> bool:
    """Whether :func:`merge_adapter` has saved this very adapter in `output`, in `dtype`."""
    return _sources(adapter, dtype).items() <= _read_record(output).items()


def _read_record(output: str | Path) -> dict[str, Any]:
    """What :func:`merge_adapter` left in `output`; empty where there is no such record, or a damaged one."""
    try:
        record = json.loads(Path(output, RECORD).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) and isinstance(record.get("files"), list) else {}


def _sources(adapter: str | Path, dtype: Any) -> dict[str, str]:
    with Path(adapter, WEIGHTS).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"adapter": str(Path(adapter).absolute()), "weights": digest, "dtype": str(dtype)}


def check_output(output: str | Path, adapter: str | Path, base: str | None = None) -> None:
    """Refuses an `output` that holds anything but an earlier merge.

    Args:
        output: the folder to write.
        adapter: the adapter's folder.
        base: folder or name of its base model.

    Raises:
        ValueError: `output` is a file, the folder of adapter or base model, or holds files that no merge wrote.
    """
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"the merged model cannot be saved in {output}, which is a file: name a folder")
    for what, folder in (("adapter", adapter), ("base model", base)):
        if folder and Path(folder).is_dir() and Path(folder).resolve() == output.resolve():
            raise ValueError(f"the merged model would overwrite its {what}: {output} is its folder, name another one")
    if not output.is_dir():
        return
    own = _read_record(output).get("files", [])
    others = sorted(path.name for path in output.iterdir() if path.name not in own)
    if others:
        raise ValueError(
            f"{output} is not empty, and no earlier merge wrote {', '.join(others[:3])}"
            f"{' and more' if len(others) > 3 else ''}: name a new folder, or remove what lies there"
        )


def _merge(model: Any) -> Any:
    """The base model of `model`, a ``PeftModel``, with the adapter in its weights."""
    base = model.get_base_model()
    head, embeddings = _plain(base.get_output_embeddings()), _plain(base.get_input_embeddings())
    # Merged into a tensor that both share, the change of one would also change the other.
    tied = head.weight is embeddings.weight
    if tied:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    merged = model.merge_and_unload()
    if tied:
        head, embeddings = merged.get_output_embeddings(), merged.get_input_embeddings()
        same = _equal_but_for_rounding(head.weight, embeddings.weight)
        if same:
            head.weight = embeddings.weight
        merged.config.get_text_config().tie_word_embeddings = merged.config.tie_word_embeddings = same
    return merged


def _plain(module: nn.Module) -> nn.Module:
    """The base model's module inside peft's wrappers."""
    while True:
        inner = getattr(module, "original_module", None) or getattr(module, "base_layer", None)
        if inner is None:
            return module
        module = inner


def _equal_but_for_rounding(one: Tensor, other: Tensor) -> bool:
    # One adapter of both is multiplied out in another order for each.
    return torch.allclose(one, other, rtol=2 * torch.finfo(one.dtype).eps, atol=torch.finfo(one.dtype).eps)


def _trial_tokens(model: Any, trained: list[int]) -> Tensor:
    """int64 (rows, 16): tokens whose embeddings were trained, the vocabulary's last tokens, and random ones."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    ids = [*trained[:32], *range(max(vocabulary - 8, 0), vocabulary)]
    ids += torch.randint(vocabulary, (64 - len(ids),), generator=generator).tolist()
    return torch.tensor(ids)[torch.randperm(64, generator=generator)].reshape(4, 16).to(model.device)


@torch.no_grad()
def _logits(model: Any, ids: Tensor) -> Tensor:
    """float32 (positions, vocabulary)."""
    model.eval()
    decoder = {"decoder_input_ids": ids} if is_encoder_decoder(model) else {}
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), **decoder).logits.float().flatten(0, 1)


def _compare(found: Tensor, expected: Tensor, model: Any, adapter: str) -> None:
    """Refuses logits that differ anywhere by more than rounding explains.

    Raises:
        ValueError: the message has the difference and the bound.
    """
    squares = (found - expected).square()
    difference = torch.maximum(squares.mean(0).max(), squares.mean(1).max()).sqrt().item()
    # Each layer adds a rounding of its own.
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", 1)
    scale = expected.square().mean().sqrt().item()
    bound = 1e-3 + 8 * torch.finfo(model.dtype).eps * layers**0.5 * scale
    if not difference <= bound:
        raise ValueError(
            f"the merged model's logits differ from those of {adapter} around its base by {difference:.3g} (root mean "
            f"square of one token or position), and rounding to {model.dtype} explains {bound:.3g}: nothing is saved. "
            "The adapter itself is whole; use it as it is, or merge in float32 (--dtype float32)"
        )
