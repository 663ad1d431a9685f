"""ORPOTrainer: transformers' Trainer with the fused loss, exact normalisation and TRL's metrics.

Four things differ from a plain Trainer: the counts that an optimizer step divides by (`_get_num_items_in_batch`), the
loss (`compute_loss`), the log (`log`), and evaluation (orpo.trainer.evaluation).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import datasets
import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from transformers import PreTrainedModel

from orpo.data.preview import check_token_ids, describe_example, first_of_stream, first_pair
from orpo.data.streams import StreamReport, counters
from orpo.data.whole_batches import WholeBatches
from orpo.layouts.batch import Counts, pair_batch
from orpo.layouts.encoder_decoder import EncoderDecoderLayout
from orpo.layouts.layout import PaddedLayout
from orpo.model.attach import LossCall, base_model, embeddings
from orpo.model.encoder_decoder import is_encoder_decoder
from orpo.model.probe import check_fused_logps, choose_layout
from orpo.ranks import agreed, data_ranks, prepare_ranks, refuse_other_streams
from orpo.runs.checkpoints import CheckpointingTrainer
from orpo.runs.non_finite import NonFiniteGuard
from orpo.runs.resuming import ResumingTrainer
from orpo.trainer.adapt import adapt, pad_token_id, router_coefficient
from orpo.trainer.check_call import check_call
from orpo.trainer.config import ORPOConfig
from orpo.trainer.diagnose import gradient_norms, pair_statistics, refuse_cut_gradients
from orpo.trainer.evaluation import EvaluatingTrainer
from orpo.trainer.means import WeightedMeans
from orpo.trainer.pairs import preparation, prepare_sets, read_forms
from orpo.trainer.positions import check_positions
from orpo.trainer.reports import ReportingTrainer
from orpo.trainer.sanity import RunawayLoss, refuse_frozen, refuse_no_gradient, refuse_no_step
from orpo.trainer.start import check_model_argument, find_tokenizer, start_model
from orpo.trainer.tensor_parallel import refuse_part


class ORPOTrainer(ReportingTrainer, EvaluatingTrainer, ResumingTrainer, CheckpointingTrainer):
    """Trains a language model on preference pairs with ORPO, in the call shape of TRL's trainer.

    Args:
        model: a causal language model or an encoder-decoder of transformers, a PEFT model around one, or the name or
            folder of either. An adapter by name is trained further; with `peft_config` it is merged first, in
            ``output_dir/base``.
        args: the settings.
        data_collator: makes batches of prepared examples. Default: the layout of ``args.layout``.
        train_dataset, eval_dataset: pairs in any form of :mod:`orpo.data.forms`, as a ``datasets.Dataset`` or
            ``IterableDataset``, a dict of lists, or a list of dicts; `eval_dataset` may also be a dict of data sets.
        processing_class: the tokenizer. Default: the one that belongs to the model's name.
        tokenizer: the older name of `processing_class`.
        peft_config: a PEFT configuration to wrap the model in.
        compute_metrics: called with predictions (pairs, 2), the mean log-probabilities of chosen and rejected answers.
            With "loss" in ``args.include_for_metrics`` it also gets ``losses`` (pairs,), for each pair its batch's
            loss; with "inputs" ``inputs`` (pairs, tokens): prompt, chosen answer, rejected answer, filled up with -100.
        model_init, callbacks, optimizers, preprocess_logits_for_metrics: as in ``transformers.Trainer``.

    Raises:
        ValueError: the model, its head, the data or the settings do not allow training; the message says why.
        orpo.runs.non_finite.NonFiniteError: from ``train()``, when a loss or gradient is NaN or infinite.
    """

    # The loss is divided by the counts of the whole optimizer step; Trainer must not divide it again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | str | None = None,
        args: ORPOConfig | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        peft_config: Any = None,
        compute_metrics: Callable[[Any], dict[str, float]] | None = None,
        *,
        tokenizer: Any = None,
    ) -> None:
        args = check_call(args, train_dataset, eval_dataset, processing_class, tokenizer)
        name, encoder_decoder = check_model_argument(model, args, peft_config)
        # Data first: a wrong column shows in a second, and the weights may take minutes to load.
        processing_class = find_tokenizer(tokenizer if processing_class is None else processing_class, name, args)
        text_tokenizer = getattr(processing_class, "tokenizer", processing_class)
        read_forms(train_dataset, text_tokenizer, args, encoder_decoder)
        self._prepare = preparation(args, text_tokenizer, encoder_decoder)
        train_dataset, eval_dataset = prepare_sets(
            train_dataset, eval_dataset, args, self._prepare, has_own_metrics=compute_metrics is not None
        )
        self._streams = StreamReport(counters(train_dataset), counters(eval_dataset))
        model = start_model(model, args, peft_config)
        layout_options = {
            "pad_token_id": pad_token_id(args, text_tokenizer, model),
            "nll": args.nll(text_tokenizer.eos_token_id),
        }
        chooses_layout = data_collator is None
        if chooses_layout:
            data_collator = (EncoderDecoderLayout if encoder_decoder else PaddedLayout)(**layout_options)
            if args.should_log and train_dataset is not None:
                print(describe_example(first_pair(train_dataset), data_collator, text_tokenizer))
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            # Trainer counts the arguments of model_init by its signature, which the wrapper has to keep.
            model_init=model_init
            and functools.wraps(model_init)(lambda *trial: adapt(model_init(*trial), args, peft_config)),
            compute_metrics=compute_metrics,
            callbacks=[*(callbacks or []), self._streams],
            optimizers=optimizers,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        self._forget()
        self._check_model(encoder_decoder)
        layout = agreed(self.accelerator, lambda: self._probe(layout_options if chooses_layout else None))
        self.data_collator = layout or self.data_collator

    def _check_model(self, encoder_decoder: bool) -> None:
        """Refuses what can only be checked with the model and its ranks."""
        if is_encoder_decoder(self.model) != encoder_decoder:
            name = type(base_model(self.model)).__name__
            raise ValueError(
                f"is_encoder_decoder is {self.args.is_encoder_decoder}, and model_init makes a {name}: set it to "
                f"{not encoder_decoder}"
            )
        if self.args.diagnose:
            # accelerate launch leaves args.fsdp and args.deepspeed empty.
            refuse_cut_gradients(self.is_fsdp_enabled or self.is_deepspeed_enabled)
        held_out = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        for data in (self.train_dataset, *held_out):
            check_token_ids(data, embeddings(self.model))
            check_positions(data, self.model, self.args)
            refuse_other_streams(self.accelerator, lambda data=data: first_of_stream(data))
        prepare_ranks(self.accelerator, self.model)

    def _probe(self, layout_options: dict[str, Any] | None) -> Any:
        """The layout to train in, or None where there is nothing to choose."""
        args = self.args
        check_fused_logps(self.model, args.loss_settings())
        if layout_options is None:
            return None
        layout, why = choose_layout(args.layout, self.model, max_length=args.max_length, **layout_options)
        if args.should_log:
            print(why)
        return layout

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """``Trainer.train``. To resume: True for the newest complete checkpoint, "auto" if there is one, or a folder.

        Raises:
            ValueError: there is no such checkpoint, it is of a run with settings that this one does not have, or
                another process trains in ``output_dir``.
            orpo.runs.non_finite.NonFiniteError: a loss, a gradient or a weight became NaN or infinite.
            orpo.trainer.sanity.NothingTrainsError: no parameter is trained, or every gradient of the first step is 0.
        """
        output = self._train_in_folder(resume_from_checkpoint, **kwargs)
        self._runaway.flush()
        refuse_no_step(self.state, self._starved)
        return output

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """``Trainer``'s, cleared of an earlier try: ``auto_find_batch_size`` starts again with a smaller batch."""
        self._forget()
        return super()._inner_training_loop(*args, **kwargs)

    @property
    def _data_ranks(self) -> int:
        return data_ranks(self.accelerator.parallelism_config, self.accelerator.num_processes)

    def _forget(self) -> None:
        self._guard = NonFiniteGuard(self.args.process_index)
        self._train_means, self._runaway = WeightedMeans(), RunawayLoss(self.args)
        self._saw_gradient = self._has_counted = self._starved = False

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """``Trainer``'s, after a check that the model has something to train."""
        given = None if isinstance(self.optimizer, AcceleratedOptimizer) else self.optimizer
        refuse_frozen(self.model if model is None else model, given)
        return super().create_optimizer(model)

    def _get_dataloader(self, dataset: Any, description: str, batch_size: int, *args: Any, **kwargs: Any) -> Any:
        """``Trainer``'s, but several ranks share a stream by example, not by file."""
        ranks, trains = self.accelerator.num_processes, kwargs.get("is_training", False)
        if isinstance(dataset, datasets.IterableDataset):
            refuse_part(self.args, "and a data set is a stream")
        if isinstance(dataset, datasets.IterableDataset) and (trains or ranks > 1):
            dataset = WholeBatches(dataset, batch_size, ranks)
            self._train_stream = dataset if trains else self._train_stream
        return super()._get_dataloader(dataset, description, batch_size, *args, **kwargs)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """``Trainer``'s, but the rest of a stream that does not fill an optimizer step is dropped."""
        samples, counts = super().get_batch_samples(epoch_iterator, num_batches, device)
        # Trainer takes no step for this rest, and would add its gradients to the next epoch's first step.
        if len(samples) == num_batches:
            return samples, counts
        self._starved = True
        return [], None

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Counts | None:
        """The counts of the optimizer step, over its micro-batches and all ranks."""
        if self.args.normalization != "global" or not batch_samples:
            return None
        counts = torch.tensor([pair_batch(sample).counts for sample in batch_samples]).sum(0)
        if self.accelerator.num_processes > 1:
            # Ranks that share a matmul have counted the same rows.
            counts = self.accelerator.reduce(counts.to(device)) * self._data_ranks // self.accelerator.num_processes
        return Counts(*counts.tolist())

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Counts | None = None,
    ) -> Any:
        """One micro-batch's share of the optimizer step's loss."""
        batch, ranks = pair_batch(inputs), self._data_ranks
        if num_items_in_batch is None:
            parts = self.current_gradient_accumulation_steps * ranks
            num_items_in_batch = Counts(*(count * parts for count in batch.counts))
        outputs = self._run(model, inputs, num_items_in_batch, logit_metrics=True)
        shares = Counts(*(own / max(all_, 1) for own, all_ in zip(batch.counts, num_items_in_batch, strict=True)))
        self._has_counted = self._has_counted or num_items_in_batch.nll_tokens > 0 or num_items_in_batch.pairs > 0
        self._train_means.add_part("nll_loss", outputs.metrics.pop("nll_loss"), shares.nll_tokens)
        self._train_means.add_batch(outputs.metrics, shares)
        if self.args.diagnose:
            self._diagnose(model, inputs, outputs, shares.pairs)
        loss = outputs.loss
        if outputs.aux_loss is not None:
            parts = self.current_gradient_accumulation_steps * ranks
            loss = loss + router_coefficient(self.model) * outputs.aux_loss / parts
        self._guard.watch(loss, outputs.chosen_logps, outputs.rejected_logps, batch.pair_ids)
        # DDP, FSDP and ZeRO average over ranks, but these are parts of one mean, to be added.
        loss = loss * ranks
        if self.args.should_log:
            self._runaway.add(loss)
        return (loss, outputs) if return_outputs else loss

    def _run(
        self, model: nn.Module, inputs: dict[str, Any], counts: Counts, logit_metrics: bool, **settings: Any
    ) -> Any:
        """Runs the model with the loss of `inputs`, whose means are over the NLL tokens and pairs of `counts`."""
        rows = inputs["orpo"].to(self.args.device).rows
        # At least 1: a batch may hold nothing that counts, and its sum is 0 then.
        settings = {"num_nll_tokens": max(counts.nll_tokens, 1), "num_pairs": max(counts.pairs, 1), **settings}
        call = LossCall(rows, replace(self.args.loss_settings(), **settings), logit_metrics)
        return model(**{name: value for name, value in inputs.items() if name != "orpo"}, orpo=call)

    def _diagnose(self, model: nn.Module, inputs: dict[str, Any], outputs: Any, share: float) -> None:
        self._train_means.add(pair_statistics(outputs.log_odds, outputs.pair_mask), share)
        if not (self._logs_this_step() and self.accelerator.sync_gradients):
            return
        # Not through DDP, whose forward expects a backward to follow.
        plain, batch = self.accelerator.unwrap_model(model), inputs["orpo"]

        def loss_of(nll: float, odds_ratio: float) -> Tensor:
            weights = {"nll_weight": nll * self.args.nll_weight, "beta": odds_ratio * self.args.beta}
            return self._run(plain, inputs, batch.counts, False, **weights).loss

        self._train_means.add(gradient_norms(plain, loss_of), 1.0)

    def _logs_this_step(self) -> bool:
        """Whether the step in progress will be logged."""
        step, args = self.state.global_step + 1, self.args
        if args.logging_strategy == "epoch":
            return step == self.state.max_steps or self.accelerator.gradient_state.end_of_dataloader
        return (args.logging_first_step and step == 1) or (
            args.logging_strategy == "steps" and step % max(self.state.logging_steps, 1) == 0
        )

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Any:
        """``Trainer``'s. Also checks the step here, the last point before the update."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        # A loss scaler, accelerate's or DeepSpeed's, overflows on purpose, and skips the update then.
        scaled = self.accelerator.mixed_precision == "fp16"
        self._guard.end_step(self.state.global_step + 1, None if scaled else grad_norm)
        self._runaway.end_step(self.state.global_step + 1)
        # A step in which nothing counts has no gradient either.
        if self._has_counted and not self._saw_gradient:
            refuse_no_gradient(grad_norm, self.args)
            self._saw_gradient = True
        return grad_norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """``Trainer``'s, with TRL's metrics of the steps since the last log."""
        if "train_loss" in logs and self._took_no_step():
            # Without a step it would be logged as 0.
            del logs["train_loss"]
            return
        if "loss" in logs:
            self._guard.flush()
            logs.update(self._train_means.reduce(self._sum_over_ranks, self.args.device))
        super().log(logs, start_time)
