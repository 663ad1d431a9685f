"""A trainer of a tiny model, on CPU, and what it logged."""

from tiny import SEVEN, make_model, make_tokenizer

from orpo import ORPOConfig, ORPOTrainer


def make_args(tmp_path, **settings):
    defaults = {
        "output_dir": str(tmp_path),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return ORPOConfig(**{**defaults, **settings})


def make_trainer(tmp_path, model=None, train_dataset=SEVEN, **settings):
    options = {
        k: settings.pop(k) for k in ("eval_dataset", "peft_config", "data_collator", "compute_metrics") if k in settings
    }
    model = make_model("llama") if model is None else model
    tokenizer = settings.pop("tokenizer", None) or make_tokenizer()
    return ORPOTrainer(
        model=model, args=make_args(tmp_path, **settings), train_dataset=train_dataset, tokenizer=tokenizer, **options
    )


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]
