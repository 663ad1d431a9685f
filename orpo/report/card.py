"""The model card: what was trained from what, on what, how, how well, and what to cite."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from orpo import __version__
from orpo.data.prepared import summary_of
from orpo.ranks import data_ranks
from orpo.report.markdown import code, table, text

# Settings that describe a run to others. Paths, secrets and settings of one machine are left out.
SHOWN = (
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "num_train_epochs", "max_steps"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "optim", "weight_decay", "max_grad_norm"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "neftune_noise_alpha", "bf16", "fp16", "seed", "data_seed"),
    *("max_length", "max_prompt_length", "max_completion_length", "truncation_mode", "truncation"),
    *("score_turns", "max_bad_rows", "pair_by_prompt", "disable_dropout"),
    *("layout", "train_sampling_strategy", "early_stopping_patience", "early_stopping_threshold"),
)
NOT_METRICS = ("_runtime", "_samples_per_second", "_steps_per_second", "_model_preparation_time")
SPANS = {"prompt_and_chosen": "prompt and chosen answer", "chosen": "chosen answer alone"}
CITATION = f"""```bibtex
@inproceedings{{hong2024orpo,
  title = {{{{ORPO}}: Monolithic Preference Optimization without Reference Model}},
  author = {{Hong, Jiwoo and Lee, Noah and Thorne, James}},
  booktitle = {{Proceedings of the 2024 Conference on Empirical Methods in Natural Language Processing}},
  year = {{2024}},
  eprint = {{2403.07691}},
  archivePrefix = {{arXiv}}
}}

@software{{fused_orpo,
  title = {{fused-orpo: Odds Ratio Preference Optimization with a fused loss}},
  author = {{{{The fused-orpo maintainers}}}},
  version = {{{__version__}}}
}}
```"""


def model_card(
    trainer: Any,
    folder: str | Path,
    *,
    model_name: str | None = None,
    finetuned_from: str | None = None,
    dataset: str | Sequence[str] | None = None,
    dataset_args: str | Sequence[str] | None = None,
    dataset_tags: str | Sequence[str] | None = None,
    eval_dataset: str | None = None,
    license: str | None = None,
    language: str | Sequence[str] | None = None,
    tags: str | Sequence[str] | None = None,
    tasks: str | Sequence[str] | None = None,
) -> ModelCard:
    """The card, for `folder`, of what `trainer` has trained.

    Args:
        trainer: an :class:`orpo.ORPOTrainer`, trained or not.
        folder: where the card goes. ``curves.png`` is shown if it lies there.
        model_name: the heading. Default: the name of `folder`.
        finetuned_from: the base model. Default: where the model, or the one below its adapter, was loaded from. For a
            local folder the text has the folder's name, and the metadata the base that the folder's own card names.
        dataset: names of the data sets; a local file is named without its folder, and not linked.
        dataset_args: a configuration or a split, for each of `dataset`.
        dataset_tags: data sets on the hub that the metadata links. Default: those in `dataset` that are not local.
        eval_dataset: name of the held-out pairs, if they are not a part of `dataset`.
        license: Default: the one in the card of a local base model; left out where there is none.
        language, tags, tasks: of the metadata. Tags are added to "orpo" and "generated_from_trainer".

    Returns:
        the card, not yet saved.
    """
    adapters = getattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config", {})
    base = finetuned_from or _base_model(trainer, adapters)
    names = _listed(dataset)
    encoder_decoder = bool(getattr(trainer.model.config, "is_encoder_decoder", False))
    known = _card_of(base)
    # Readers do not have a local base's folder; they may know the model that its card names as its own base.
    origin = known.base_model if known and isinstance(known.base_model, str) else None
    metadata = ModelCardData(
        base_model=base if base and not _is_local(base) else origin,
        datasets=_listed(dataset_tags) or [name for name in names if not _is_local(name)] or None,
        language=language,
        license=license or (known.license if known else None),
        library_name="peft" if adapters else "transformers",
        model_name=model_name or Path(folder).absolute().name,
        pipeline_tag=(_listed(tasks) or ["text2text-generation" if encoder_decoder else "text-generation"])[0],
        tags=list(dict.fromkeys(["orpo", "generated_from_trainer", *(["lora"] if adapters else []), *_listed(tags)])),
    )
    parts = [
        f"# {text(metadata.model_name)}",
        f"{_described(base, adapters)}{f' (made from {code(origin)})' if origin else ''}, trained on preference pairs "
        "with [ORPO](https://arxiv.org/abs/2403.07691), Odds Ratio Preference Optimization, by fused-orpo.",
        "## Data",
        _data(trainer, names, _listed(dataset_args), eval_dataset),
        "## Loss",
        _loss(trainer.args, encoder_decoder),
        "## Settings",
        _settings(trainer, adapters),
        *_evaluation(trainer),
        *(["## Curves", "![loss and metrics by step](curves.png)"] if (Path(folder) / "curves.png").is_file() else []),
        "## Versions",
        _versions(bool(adapters)),
        "## Citation",
        CITATION,
    ]
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def _listed(value: str | Sequence[str] | None) -> list[str]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)


def _is_local(name: str) -> bool:
    return name.startswith((".", "/", "~")) or Path(name).exists() or name.count("/") > 1


def _shown_name(name: str) -> str:
    """`name` without the folders of the machine it lies on."""
    return code(Path(name).name if _is_local(name) else name)


def _base_model(trainer: Any, adapters: dict[str, Any]) -> str | None:
    for adapter in adapters.values():
        if adapter.base_model_name_or_path:
            return adapter.base_model_name_or_path
    return getattr(getattr(trainer.model, "config", None), "_name_or_path", None) or None


def _card_of(base: str | None) -> ModelCardData | None:
    card = Path(base, "README.md") if base and Path(base).is_dir() else None
    if card is None or not card.is_file():
        return None
    try:
        return ModelCard.load(card, ignore_metadata_errors=True).data
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        # A base model's broken card must not end a run that has trained.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        warnings.warn(f"{card} could not be read, and the model card goes without it: {reason}", stacklevel=2)
        return None


def _described(base: str | None, adapters: dict[str, Any]) -> str:
    name = "a model made on the spot" if base is None else _shown_name(base)
    return f"A LoRA on {name}" if adapters else name[0].upper() + name[1:]


def _data(trainer: Any, names: list[str], details: list[str], eval_dataset: str | None) -> str:
    labels = [f"{_shown_name(n)} ({text(d)})" for n, d in zip(names, details, strict=False)]
    labels += [_shown_name(n) for n in names[len(labels) :]]
    if eval_dataset is not None:
        labels.append(f"{_shown_name(eval_dataset)}, held out")
    return "\n".join(f"* {line}" for line in [*labels, *map(text, describe_rows(trainer))])


def describe_rows(trainer: Any) -> list[str]:
    """A line for each set of pairs: how many rows were kept, and what was dropped and cut."""
    held_out = trainer.eval_dataset
    several = {f"eval ({key})": data for key, data in held_out.items()} if isinstance(held_out, dict) else None
    sets = {"train": trainer.train_dataset, **(several or {"eval": held_out})}
    return [f"{name}: {_rows(data)}" for name, data in sets.items() if data is not None]


def _rows(data: Any) -> str:
    return summary_of(data) or (f"{len(data):,} pairs" if hasattr(data, "__len__") else "a stream")


def _loss(args: Any, encoder_decoder: bool) -> str:
    eos = "" if args.nll_scores_eos else ", without end-of-sequence tokens"
    over = {
        "global": "means over all tokens and pairs of an optimizer step, over all ranks and micro-batches",
        "micro_batch": "the mean of micro-batch means",
    }[args.normalization]
    return (
        "`loss = nll_weight * NLL - beta * log sigmoid(log odds(chosen) - log odds(rejected))`, where `odds(y) = p / "
        "(1 - p)` and `log p` is the mean log-probability of the answer's tokens.\n\n"
        f"* beta {args.beta}, nll_weight {args.nll_weight} (preset `{args.preset}`)\n"
        f"* the NLL scores {SPANS['chosen' if encoder_decoder else args.nll_span]}{eos}\n"
        f"* normalization `{args.normalization}`: {over}"
    )


def _settings(trainer: Any, adapters: dict[str, Any]) -> str:
    head, changed = describe_settings(trainer, adapters)
    if not changed:
        return f"{head}. All settings are the defaults."
    return f"{head}. What differs from the defaults:\n\n" + table(("setting", "value"), changed.items())


def describe_settings(trainer: Any, adapters: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """A sentence about batch and learning rate, and the settings that differ from the defaults."""
    args = trainer.args
    values, defaults = args.to_dict(), type(args).__dataclass_fields__
    changed = {name: values[name] for name in SHOWN if values[name] != _json(defaults[name].default)}
    if not args.bf16 and not args.bf16_by_default:
        changed.pop("bf16", None)
    for adapter in adapters.values():
        for name in ("r", "lora_alpha", "lora_dropout", "target_modules"):
            value = getattr(adapter, name, None)
            if name == "lora_dropout" and args.disable_dropout:
                value = 0.0
            changed[f"adapter: {name}"] = ", ".join(sorted(value)) if isinstance(value, set) else value
    ranks = data_ranks(args.parallelism_config, args.world_size)
    pairs = args.per_device_train_batch_size * args.gradient_accumulation_steps * ranks
    head = f"{pairs} pairs an optimizer step on {args.world_size} process{'es' if args.world_size > 1 else ''}"
    steps = f"; {trainer.state.global_step} steps were taken" if trainer.state.global_step else ""
    return f"{head}, learning rate {args.learning_rate:g}{steps}", changed


def _json(value: Any) -> Any:
    return getattr(value, "value", value)


def _evaluation(trainer: Any) -> list[str]:
    """Heading and table of each held-out metric; nothing where nothing was evaluated."""
    latest, best = held_out_metrics(trainer)
    if not latest:
        return []
    parts = ["## Held-out pairs", table(("metric", "value", "step"), ((k, *v) for k, v in latest.items()))]
    if best:
        parts.append(
            f"The weights are those of step {best}, the best by {code(trainer.args.metric_for_best_model)}: "
            f"{trainer.state.best_metric:.4g}."
        )
    return parts


def held_out_metrics(trainer: Any) -> tuple[dict[str, tuple[Any, int]], int | None]:
    """Each held-out metric without ``eval_``: its value, as text, and step; and the step of the best weights.

    The values are those of the best weights where they were loaded, else the last ones.
    """
    latest: dict[str, tuple[Any, Any]] = {}
    state, history = trainer.state, trainer.state.log_history
    best = state.best_global_step if trainer.args.load_best_model_at_end else None
    # Where a run evaluates more often than it saves, the best step may not be saved: other weights are loaded, or none.
    if best and not str(state.best_model_checkpoint).endswith(f"-{best}"):
        best = None
    # An evaluation of the best weights at the end is logged with the last step's number.
    if best:
        history = [e for e in history if e.get("step") == best and any(k.startswith("eval_") for k in e)] or history
    for entry in history:
        for name, value in entry.items():
            if name.startswith("eval_") and not name.endswith(NOT_METRICS):
                shown = f"{value:.4g}" if isinstance(value, float) else value
                latest[name.removeprefix("eval_")] = shown, entry["step"]
    return latest, best


def _versions(has_adapter: bool) -> str:
    packages = ["torch", "transformers", "accelerate", "datasets", "tokenizers", *(["peft"] if has_adapter else [])]
    found = {"fused-orpo": __version__, "Python": platform.python_version(), **{p: version(p) for p in packages}}
    return "\n".join(f"* {name} {number}" for name, number in found.items())
