"""Advice for an option that does not exist: what other trainers' settings are called here."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence

_HELD_OUT = "dataset_test_split 'train[:5%]' and dataset_train_split 'train[5%:]'"
_ORPO = "nothing: orpo-train does ORPO alone, leave it out"

# Name -> (whose it is, what to use here).
ELSEWHERE = {
    "base_model": ("axolotl", "model_name_or_path"),
    "datasets": ("axolotl and TRL", "dataset_name, one file, folder or data set of the hub"),
    "val_set_size": ("axolotl", _HELD_OUT),
    "rl": ("axolotl", _ORPO),
    "orpo_alpha": ("axolotl", "beta"),
    "rl_beta": ("axolotl", "beta"),
    "sequence_len": ("axolotl", "max_length"),
    "micro_batch_size": ("axolotl", "per_device_train_batch_size"),
    "eval_batch_size": ("axolotl", "per_device_eval_batch_size"),
    "num_epochs": ("axolotl", "num_train_epochs"),
    "lr_scheduler": ("axolotl", "lr_scheduler_type"),
    "optimizer": ("axolotl", "optim"),
    "flash_attention": ("axolotl", "attn_implementation flash_attention_2"),
    "sample_packing": ("axolotl", "layout packed"),
    "adapter": ("axolotl", "use_peft, and load_in_4bit for qlora"),
    "lora_target_linear": ("axolotl", "lora_target_modules all-linear"),
    "stage": ("LLaMA-Factory", _ORPO),
    "pref_loss": ("LLaMA-Factory", _ORPO),
    "pref_beta": ("LLaMA-Factory", "beta"),
    "dataset": ("LLaMA-Factory", "dataset_name, one file, folder or data set of the hub"),
    "val_size": ("LLaMA-Factory", _HELD_OUT),
    "cutoff_len": ("LLaMA-Factory", "max_length"),
    "flash_attn": ("LLaMA-Factory", "attn_implementation, flash_attention_2 for fa2"),
    "finetuning_type": ("LLaMA-Factory", "use_peft, where it is lora"),
    "lora_rank": ("LLaMA-Factory", "lora_r"),
    "lora_target": ("LLaMA-Factory", "lora_target_modules, all-linear for all"),
    "additional_target": ("LLaMA-Factory", "lora_modules_to_save"),
    "quantization_bit": ("LLaMA-Factory", "load_in_4bit or load_in_8bit"),
    "template": ("LLaMA-Factory", "chat_template, a Jinja template or a file that holds one"),
    "preprocessing_num_workers": ("LLaMA-Factory", "dataset_num_proc"),
    "streaming": ("TRL and LLaMA-Factory", "dataset_streaming"),
    "test_split_size": ("TRL", _HELD_OUT),
    "env": ("TRL", "nothing: set environment variables in the shell"),
    "alpha": ("the paper's code", "beta"),
    "lr": ("many scripts", "learning_rate"),
    "epochs": ("many scripts", "num_train_epochs"),
    "batch_size": ("many scripts", "per_device_train_batch_size"),
    "model": ("many scripts", "model_name_or_path"),
    "data": ("many scripts", "dataset_name"),
    "lora_modules": ("many scripts", "lora_target_modules"),
    "output": ("many scripts", "output_dir"),
    "per_gpu_train_batch_size": ("an older transformers", "per_device_train_batch_size"),
    "per_gpu_eval_batch_size": ("an older transformers", "per_device_eval_batch_size"),
    "adafactor": ("an older transformers", "optim adafactor"),
}


def advice(name: str, known: Collection[str], prefix: str = "") -> str | None:
    """Advice on `name`, which is none of `known`: what to use in its place, or the nearest name that is known.

    Args:
        name: the name as it was given, without `prefix`, with underscores or hyphens.
        known: the names that exist, each with `prefix`.
        prefix: "--" for options on the line.
    """
    if found := ELSEWHERE.get(name.replace("-", "_")):
        tool, ours = found
        return f"the name in {tool} for {ours}"
    near = difflib.get_close_matches(prefix + name, known, n=1)
    return f"did you mean {near[0]}?" if near else None


def say_unknown(words: Sequence[str], known: Collection[str]) -> str:
    """The error for `words` on the line that are no options, with the nearest of those that are."""
    texts = []
    for word in words:
        name = word.partition("=")[0]
        said = advice(name.removeprefix("--"), known, prefix="--" if name.startswith("--") else "")
        if word.startswith("--") or (said or "").startswith("did"):
            texts.append(f"{word} is no option" + (f", {said}" if said else ""))
    return "; ".join(texts or [f"nothing takes {' '.join(words)}"])
