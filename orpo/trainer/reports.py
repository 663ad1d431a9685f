"""What a run leaves beside its weights: the model card, samples during evaluation, and when it stops early."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, Trainer

from orpo.report.card import model_card
from orpo.trainer.samples import EvalSamples


class ReportingTrainer(Trainer):
    """``Trainer`` that writes a model card about ORPO, samples answers, and stops early, as its ``args`` say.

    The class that derives from it has ``_save_whole_model``, of :class:`orpo.runs.checkpoints.CheckpointingTrainer`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._card_details: dict[str, Any] = {}
        if self.args.early_stopping_patience is not None:
            self.add_callback(
                EarlyStoppingCallback(self.args.early_stopping_patience, self.args.early_stopping_threshold)
            )
        if self.args.generate_during_eval:
            self.add_callback(EvalSamples(self))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """``Trainer``'s, with the model card beside the weights.

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
