"""Resumed runs train on the rows that the interrupted run would have had; finished runs train on none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, RandomSampler, Sampler
from transformers import EarlyStoppingCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import has_length

from orpo.ranks import from_rank_0
from orpo.runs.find_checkpoint import find_fault
from orpo.runs.record import describe_run
from orpo.runs.samplers import LengthGroups, pairs_of_rows
from orpo.runs.stream_places import StreamPlaces


class ResumingTrainer(StreamPlaces):
    """``Trainer`` that goes on after a checkpoint with the rows that a run without interruption would have."""

    _train_sampler: Sampler | None = None

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        sampler = super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        if isinstance(sampler, LengthGroupedSampler):
            sampler = LengthGroups(sampler.lengths, sampler.batch_size, seed)
        elif isinstance(sampler, RandomSampler) and getattr(self.data_collator, "shares_prompts", False):
            sampler = pairs_of_rows(sampler.data_source, seed) or sampler
        self._train_sampler = sampler
        return sampler

    def get_train_dataloader(self) -> DataLoader:
        """``Trainer``'s, but its sampler is told the epoch on several ranks after a resume too."""
        dataloader = super().get_train_dataloader()
        if hasattr(self._train_sampler, "set_epoch"):
            dataloader.set_sampler(self._train_sampler)
        return dataloader

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        """``Trainer``'s: the epoch in which to go on, and how many of its batches are done."""
        position = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if trial is not None:
            # Described here: a search sets the trial's model and settings after the call of train().
            self._run_settings = describe_run(self)
        if resume_from_checkpoint is None:
            return position
        # Trainer takes logging_steps, eval_steps and save_steps from the checkpoint, and would ignore new ones.
        self.state.compute_steps(self.args, max_steps)
        state = TrainerState.load_from_json(str(Path(resume_from_checkpoint, TRAINER_STATE_NAME)))
        self._find_best(state, Path(resume_from_checkpoint))
        finished = self._why_finished(state, max_steps)
        if finished is not None:
            if self.args.should_log:
                print(f"the run is finished, {finished}: nothing is trained")
            return num_train_epochs, 0
        self._refuse_unknown_order()
        if has_length(self.train_dataset):
            return position
        return self._go_on_in_stream(state, Path(resume_from_checkpoint))

    def _find_best(self, state: TrainerState, resumed: Path) -> None:
        """Finds the best checkpoint beside the one resumed from, since their folder may have been moved or renamed."""
        if state.best_model_checkpoint is None:
            return
        best = resumed.parent / Path(state.best_model_checkpoint).name
        if not best.is_dir():
            if self.state.best_model_checkpoint is None:
                if self.args.should_log:
                    print(f"{best}, the best checkpoint so far, is gone: the best is looked for from here on")
                # It is gone: later checkpoints, compared with its metric, might never count as best.
                self.state.best_metric = self.state.best_global_step = None
            return
        if self.state.best_model_checkpoint is None and self.args.should_log:
            # Trainer has just warned that it ignores the best checkpoint.
            print(f"the best checkpoint so far is {best}")
        self.state.best_model_checkpoint = str(best)

    def _why_finished(self, state: TrainerState, max_steps: int) -> str | None:
        """Says how the run that left `state` ended, or None if it had not. Restores the patience of early stopping."""
        if state.global_step >= max_steps:
            return f"step {state.global_step} of {max_steps}"
        for callback in self.callback_handler.callbacks:
            if not isinstance(callback, EarlyStoppingCallback):
                continue
            saved = state.stateful_callbacks.get(type(callback).__name__, {})
            saved = saved[0] if isinstance(saved, list) else saved
            # With a count from 0 the run would go on longer than without the interruption.
            waited = saved.get("attributes", {}).get("early_stopping_patience_counter", 0)
            callback.early_stopping_patience_counter = waited
            if waited >= callback.early_stopping_patience:
                return f"stopped early at step {state.global_step} with early_stopping_patience {waited}"
        return None

    def _refuse_unknown_order(self) -> None:
        args = self.args
        random = args.train_sampling_strategy == "random" and has_length(self.train_dataset)
        if random and not args.accelerator_config.use_seedable_sampler and not args.ignore_data_skip:
            raise ValueError(
                "accelerator_config: use_seedable_sampler is False, and the order of the rows is drawn from a state "
                "that a resumed run does not have: leave it True, or set ignore_data_skip to go on with other rows"
            )

    def _took_no_step(self) -> bool:
        """Whether this training took no step, since it resumed a run that had ended."""
        return self.state.global_step == self._initial_global_step

    def _load_best_model(self) -> None:
        """``Trainer``'s, also for an adapter with a name of its own, whose folder ``Trainer`` does not look into."""
        best = Path(self.state.best_model_checkpoint)
        # Rank 0 decides: another node may have its own disk.
        if fault := from_rank_0(self.accelerator, lambda: find_fault(best, contents=True)):
            raise ValueError(
                f"{best}, the best checkpoint, {fault} and is not loaded: load_best_model_at_end false keeps the last "
                "step's weights"
            )
        named = [name for name in getattr(self.model, "peft_config", {}) if name != "default"]
        if not named or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
            return
        for name in self.model.active_adapters:
            part = Path(self.state.best_model_checkpoint, "" if name == "default" else name)
            self.model.load_adapter(str(part), name)
