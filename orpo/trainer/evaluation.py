"""Evaluation of a trainer: any pairs that it could train on, with means over all their tokens and pairs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput

from orpo.data.preview import check_stream, check_token_ids
from orpo.layouts.batch import pair_batch, without_repeats
from orpo.layouts.sequences import SEQUENCES, with_sequences
from orpo.model.attach import embeddings
from orpo.tokens.pretokenized import COLUMNS, NOT_COUNTED
from orpo.trainer.adapt import router_coefficient
from orpo.trainer.means import EVALUATED, WeightedMeans
from orpo.trainer.positions import check_positions


def each_set(data: Any, name: str, function: Any, columns: dict[str, str] | None) -> Any:
    """``function(data, name)``, for each data set where `data` is a dict of them. `columns` are their other names."""
    if not _are_sets(data, columns):
        return function(data, name)
    if not data:
        raise ValueError(f"the {name} set is an empty dict: give a data set, or several by their names")
    return {key: function(part, f"{name} ({key})") for key, part in data.items()}


def _are_sets(data: Any, columns: dict[str, str] | None) -> bool:
    answers = {"chosen", "preferred_output", "completion", *COLUMNS, *(columns or {}).values()}
    return isinstance(data, dict) and not answers & data.keys()


def check_best_metric(args: Any, data: Any, has_own: bool) -> None:
    """Refuses a ``metric_for_best_model`` that no evaluation has: the first evaluation would end the run.

    Args:
        args: the settings.
        data: the prepared evaluation set, a dict of several, or None.
        has_own: whether the user's ``compute_metrics`` adds others.

    Raises:
        ValueError: the message has the names that there are.
    """
    wanted = args.metric_for_best_model
    if wanted is None or args.eval_strategy == "no" or data is None:
        return
    # With several sets, a metric's name begins with its set's.
    parts = [f"{name}_" for name in data] if isinstance(data, dict) else [""]
    name = wanted.removeprefix("eval_")
    if any(name.startswith(part) and (has_own or name.removeprefix(part) in EVALUATED) for part in parts):
        return
    raise ValueError(
        f"metric_for_best_model is {wanted!r}; it has to be one of "
        f"{', '.join(part + metric for part in parts for metric in sorted(EVALUATED))}"
        f"{', or one of compute_metrics' if has_own else ''}"
    )


class EvaluatingTrainer(Trainer):
    """``Trainer`` that evaluates pairs with ORPO's loss and TRL's metrics.

    The class that derives from it has ``_prepare(data, name)``, ``_run`` and ``_streams``, a
    :class:`orpo.data.streams.StreamReport`.
    """

    _eval_means: WeightedMeans

    def _prepared(self, data: Any, name: str) -> Any:
        """`data` prepared like the trainer's own data sets, its tokens known to the model."""

        def prepare(part: Any, name: str) -> Any:
            part = self._prepare(part, name)
            check_stream(part)
            check_token_ids(part, embeddings(self.model))
            check_positions(part, self.model, self.args)
            return part

        if isinstance(data, str):
            # It names one of the trainer's own data sets.
            names = list(self.eval_dataset) if isinstance(self.eval_dataset, dict) else []
            if data not in names:
                own = ", ".join(map(repr, names)) or "no named ones: give a data set, or eval_dataset a dict of several"
                raise ValueError(f"{data!r} names no evaluation set of this trainer; it has {own}")
            return data
        return None if data is None else each_set(data, name, prepare, self.args.columns)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """``Trainer.evaluate`` for pairs in any form that the trainer takes, prepared or not."""
        data = self._prepared(eval_dataset, "eval")
        with self._streams.counting(data):
            return super().evaluate(data, ignore_keys, metric_key_prefix)

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """``Trainer.predict`` for pairs in any form: predictions (pairs, 2), mean log-probabilities, chosen first."""
        if test_dataset is None or _are_sets(test_dataset, self.args.columns):
            given = "None" if test_dataset is None else f"a dict with {', '.join(map(str, test_dataset)) or 'nothing'}"
            raise ValueError(f"predict takes one data set, not {given}: call it for each")
        data = self._prepared(test_dataset, "test")
        with self._streams.counting(data):
            return super().predict(data, ignore_keys, metric_key_prefix)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """``Trainer.get_eval_dataloader``, with the tokens of each pair where `compute_metrics` asks for inputs."""
        with self._keeping_sequences():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """``Trainer.get_test_dataloader``, with the same."""
        with self._keeping_sequences():
            return super().get_test_dataloader(test_dataset)

    @contextmanager
    def _keeping_sequences(self) -> Iterator[None]:
        collator = self.data_collator
        if "inputs" in self.args.include_for_metrics:
            self.data_collator = with_sequences(collator)
        try:
            yield
        finally:
            self.data_collator = collator

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Scores one batch into the running means; returns predictions for `compute_metrics` only.

        With "loss" in ``include_for_metrics`` also the batch's loss, which ``Trainer`` repeats for each of its pairs;
        with "inputs" it finds their tokens in the batch, :func:`orpo.layouts.sequences.with_sequences`.
        """
        if (sequences := inputs.pop(SEQUENCES, None)) is not None:
            given, inputs = inputs, dict(inputs)
            # Trainer gathers this entry. The layout's own ids need not be one row a pair.
            given[getattr(self.model, "main_input_name", "input_ids")] = sequences
        inputs = self._prepare_inputs(inputs)
        batch = inputs["orpo"] = without_repeats(pair_batch(inputs), self.accelerator)
        counts = batch.counts
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = self._run(model, inputs, counts, logit_metrics=True)
        loss = outputs.loss
        self._eval_means.add({"nll_loss": outputs.metrics.pop("nll_loss")}, counts.nll_tokens)
        if outputs.aux_loss is not None:
            loss = loss + router_coefficient(self.model) * outputs.aux_loss
            outputs.metrics["aux_loss"] = outputs.aux_loss
        self._eval_means.add_batch(outputs.metrics, counts)
        if prediction_loss_only:
            return None, None, None
        self._tell_remainder(batch.pair_ids)
        logps = torch.stack([outputs.chosen_logps, outputs.rejected_logps], dim=1)
        loss = loss.detach() if "loss" in self.args.include_for_metrics else None
        return loss, logps, torch.zeros(len(logps), device=logps.device)

    def _tell_remainder(self, pair_ids: Tensor) -> None:
        """Tells accelerate how many pairs of a stream's last batch count: the others are cut off the predictions."""
        loader = self.accelerator.gradient_state.active_dataloader
        if self.accelerator.num_processes == 1 or loader.remainder != -1:
            return
        counted = int(self._sum_over_ranks((pair_ids != NOT_COUNTED).sum().to(self.args.device)))
        whole = counted == len(pair_ids) * self.accelerator.num_processes
        if whole:
            return
        if not loader.end_of_dataloader:
            raise ValueError(
                f"{self.args.dataloader_num_workers} dataloader workers each end with a batch that is not full, of "
                "which predictions cannot be cut: set dataloader_num_workers to 0 or 1, or evaluate without "
                "compute_metrics"
            )
        loader.remainder = counted

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        try:
            return super()._determine_best_metric(metrics, trial)
        except KeyError as error:
            name, given = self.args.metric_for_best_model, ", ".join(metrics)
            raise ValueError(f"metric_for_best_model is {name!r}, and the evaluation has given {given}") from error

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """``Trainer``'s, with the loss and TRL's metrics as means over all tokens and pairs of the data set."""
        self._eval_means = WeightedMeans()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        means = self._eval_means.reduce(self._sum_over_ranks, self.args.device)
        if not means:
            raise ValueError(
                f"the {metric_key_prefix} set gave no batch to evaluate: it is empty, or dataloader_drop_last leaves "
                f"out a batch of fewer pairs than per_device_eval_batch_size ({self.args.per_device_eval_batch_size})"
            )
        loss = self.args.nll_weight * means["nll_loss"] - self.args.beta * means["log_odds_ratio"]
        means["loss"] = loss + router_coefficient(self.model) * means.pop("aux_loss", 0.0)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values) if self.accelerator.num_processes > 1 else values
