"""A trainer that prints a first line, writes a model card, samples answers and stops early."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from orpo.ranks import describe_ranks
from orpo.report.card import model_card
from orpo.trainer.samples import EvalSamples
from orpo.trainer.start import describe_training, odd_rate


class StartLine(TrainerCallback):
    """Says before the first step what is trained and how, and warns of an odd learning rate.

    Args:
        own_optimizer: whether the user gave an optimizer, whose rate is not that of the settings.
        ranks: what is said of the ranks, or None.
    """

    def __init__(self, own_optimizer: bool, ranks: str | None) -> None:
        self.own_optimizer, self.ranks = own_optimizer, ranks

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Prints the line, except where a finished run is started again."""
        if not args.should_log or state.global_step >= state.max_steps:
            return
        if self.ranks:
            print(self.ranks)
        print(describe_training(model, args, state.max_steps))
        if not self.own_optimizer and (said := odd_rate(args, hasattr(model, "peft_config"))):
            warnings.warn(said, stacklevel=2)


class ReportingTrainer(Trainer):
    """``Trainer`` that writes a model card about ORPO, samples answers, and stops early, as its ``args`` say.

    The class that derives from it has ``_save_whole_model``, of :class:`orpo.runs.checkpoints.CheckpointingTrainer`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._card_details: dict[str, Any] = {}
        # First of all callbacks: after the progress bar's, the line would be printed beside the bar.
        start_line = StartLine(self.optimizer is not None, describe_ranks(self.accelerator))
        self.callback_handler.callbacks.insert(0, start_line)
        if self.args.early_stopping_patience is not None:
            self.add_callback(
                EarlyStoppingCallback(self.args.early_stopping_patience, self.args.early_stopping_threshold)
            )
        if self.args.generate_during_eval:
            self.add_callback(EvalSamples(self))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """``Trainer``'s, and it writes the model card.

        Raises:
            orpo.runs.non_finite.NonFiniteError: a weight that was trained is NaN or infinite.
        """
        self._save_whole_model(output_dir, _internal_call)
        if not _internal_call and self.is_world_process_zero():
            self._write_card(output_dir or self.args.output_dir)

    def create_model_card(self, **details: Any) -> None:
        """Writes ``output_dir/README.md``: :func:`orpo.report.card.model_card` with `details`, which later cards keep.

        ``push_to_hub`` calls it, and takes `details` too.
        """
        self._card_details |= {name: value for name, value in details.items() if value is not None}
        if self.is_world_process_zero():
            self._write_card(self.args.output_dir)

    def _write_card(self, folder: str) -> None:
        model_card(self, folder, **self._card_details).save(Path(folder) / "README.md")
