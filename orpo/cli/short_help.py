"""What ``orpo-train --help`` prints: the options that most runs need, one line each; ``--help_all`` has every one."""

from __future__ import annotations

import argparse

# Options by what they are about, each with its line; where it is empty, with the first sentence of the option's own.
GROUPS = {
    "Model": {
        "model_name_or_path": "a folder or a name on the hub, of a model or an adapter",
        "dtype": "of the weights: float32, bfloat16, float16, auto",
        "attn_implementation": "eager, sdpa, flash_attention_2, ...",
        "chat_template": "a Jinja template, or a file that holds one, in place of the tokenizer's",
    },
    "Data": {
        "dataset_name": "a file, a folder, or a data set of the hub",
        "eval_dataset_name": "held-out pairs, if elsewhere",
        "dataset_train_split": 'for example "train" or "train[200:]"',
        "dataset_test_split": "where evaluation reads; of a data set test, of a file all",
        "max_length": "most tokens of prompt and answer together",
        "max_prompt_length": "prompts of pairs that are too long are cut to this many tokens",
    },
    "Loss": {
        "preset": "trl; paper: beta 1, no end token in the NLL; response_only: no prompt in the NLL",
        "beta": "weight of the odds-ratio term, the paper's lambda; 0.1, or 1 with the paper's preset",
        "layout": "auto, padded, packed, or shared: each prompt once for both answers",
        "logits_budget": "bytes kept between logits and gradient; 0: least memory",
    },
    "Training": {
        "learning_rate": "1e-6 moves little: try 2e-5, with LoRA 2e-4",
        "num_train_epochs": "passes over the pairs",
        "max_steps": "optimizer steps in place of epochs, where above 0",
        "per_device_train_batch_size": "pairs to a device and step",
        "gradient_accumulation_steps": "such batches to an optimizer step",
        "lr_scheduler_type": "linear, cosine, constant, ...",
        "warmup_steps": "steps of rising learning rate; below 1, a fraction of the run",
        "bf16": "mixed precision; by default on a GPU that has it",
        "gradient_checkpointing": "less memory, a third more time",
        "seed": "of everything that is drawn",
    },
    "LoRA": {
        "use_peft": "train a LoRA instead of the whole model",
        "lora_r": "its rank",
        "lora_alpha": "its scale: alpha / r",
        "lora_target_modules": "modules that have one, by name, or all-linear",
        "load_in_4bit": "load the base model in 4 bits (QLoRA)",
        "merge_adapter": "also save the whole model, in output_dir/merged",
    },
    "Evaluation": {
        "eval_strategy": "no, steps or epoch",
        "eval_steps": "steps between evaluations; logging_steps where it is not given",
        "load_best_model_at_end": "keep the weights of the best evaluation",
        "early_stopping_patience": "evaluations without an improvement after which a run ends",
        "generate_during_eval": "answer a few held-out prompts at each",
    },
    "Output": {
        "output_dir": "of the model, its card, curves and checkpoints",
        "logging_steps": "optimizer steps from log to log",
        "save_steps": "from checkpoint to checkpoint",
        "save_total_limit": "checkpoints that are kept; all where it is not given",
        "resume_from_checkpoint": "a checkpoint, or false; by default the newest complete one in output_dir",
        "report_to": "tensorboard, wandb, trackio",
    },
    "Runs as files": {"config": "a YAML file of options, or the name of a recipe"},
}


def short_help(parser: argparse.ArgumentParser) -> str:
    """The help text: the parser's description, then a line for each option of `GROUPS`, with its default."""
    defaults: dict[str, object] = {}
    for action in parser._actions:
        defaults.setdefault(action.dest, getattr(action.default, "value", action.default))
    lines = [(parser.description or "").strip()]
    for title, options in GROUPS.items():
        lines.append(f"{title}:")
        for name, text in options.items():
            default = defaults[name]
            shown = "" if default in (None, False, argparse.SUPPRESS) or default == -1 else f" [{default}]"
            lines.append(f"  --{name}".ljust(34) + text + shown)
    return "\n".join(lines)
