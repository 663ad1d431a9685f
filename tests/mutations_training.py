"""Deliberate faults of the rest around the kernels, those of a careless edit, each with the test to notice it."""

from mutations import within

_TWO_ANSWERS = "test_metrics_are_means_over_the_pairs_with_two_answers"

TRAINING = [
    *within(
        "loss/logprobs.py",
        "loss/test_preferences.py",
        (
            "sequences: means over all positions",
            "sums / lengths.clamp(min=1)",
            "sums / labels.shape[1]",
            "test_sums_means_and_lengths_by_hand",
        ),
    ),
    *within(
        "integrations/trl.py",
        "integrations/test_integration_trl.py",
        (
            "TRL: the NLL of the answer alone",
            "if scores_prompt:\n        # ORPO's",
            "if False:\n        # ORPO's",
            "test_trls_trainer_logs_the_same",
        ),
        (
            "TRL: pairs without an answer count",
            "weights = answered * (len(answered) / answered.sum().clamp(min=1))",
            "weights = answered.float()",
            "test_a_pair_with_an_empty_answer_is_left_out_where_trl_gives_nan",
        ),
    ),
    *within(
        "loss/call.py",
        "loss/test_loss.py",
        ("metrics: means over all pairs", "self.pair_mask.sum().clamp(min=1)", "self.pair_mask.numel()", _TWO_ANSWERS),
        ("metrics: log odds of all pairs", "mean(self.log_odds),", "self.log_odds.mean(),", _TWO_ANSWERS),
        (
            "metrics: log odds ratio of all pairs",
            "mean(-reference.softplus(-self.log_odds))",
            "(-reference.softplus(-self.log_odds)).sum() / count",
            _TWO_ANSWERS,
        ),
        (
            "metrics: a tie is a success",
            "mean(self.chosen_logps > self.rejected_logps)",
            "mean(self.chosen_logps >= self.rejected_logps)",
            "test_answers_that_are_as_likely_are_no_success",
        ),
        (
            "metrics: rewards without beta",
            "self.beta * self.chosen_logps, self.beta",
            "self.chosen_logps, self.beta",
            "test_metrics_are_trls",
        ),
    ),
    *within(
        "trainer/means.py",
        "trainer/test_means.py",
        (
            "means: nothing times NaN",
            "value * weight if weight else torch.zeros_like(value)",
            "value * weight",
            "test_a_mean_over_nothing_does_not_count",
        ),
        ("means: sums are carried on", "self.sums.clear()", "pass", "test_means_weigh_each_micro_batch"),
        (
            "means: the last weight alone",
            "self.weights.get(name, 0.0) + weight",
            "weight",
            "test_means_weigh_each_micro_batch",
        ),
    ),
    *within(
        "runs/non_finite.py",
        "trainer/test_means.py",
        (
            "guard: chosen answers alone",
            "chosen_logps + rejected_logps]",
            "chosen_logps]",
            "test_a_pair_is_named_for_either_of_its_answers",
        ),
    ),
    *within(
        "trainer/trainer.py",
        "trainer/test_trainer.py",
        (
            "guard: not given the gradient's norm",
            "None if scaled else grad_norm",
            "None",
            "test_a_nan_in_the_gradient_alone_stops_the_run_too",
        ),
        (
            "guard: not given the rejected answers",
            "outputs.chosen_logps, outputs.rejected_logps, batch",
            "outputs.chosen_logps, outputs.chosen_logps, batch",
            "test_a_nan_in_a_rejected_answer_names_its_pair",
        ),
        (
            "router: loss of each micro-batch whole",
            "outputs.aux_loss / parts",
            "outputs.aux_loss",
            "test_router_loss_is_added_as_trl_adds_it",
        ),
        (
            "micro-batches: means are added",
            "Counts(*(count * parts for count in batch.counts))",
            "batch.counts",
            "test_normalization_by_micro_batch_is_trls",
        ),
    ),
    *within(
        "trainer/evaluation.py",
        "trainer/test_trainer.py",
        (
            "evaluation: nll_weight forgotten",
            "loss = self.args.nll_weight * means",
            "loss = means",
            "test_evaluation_weighs_the_nll_as_training_does",
        ),
        (
            "evaluation: batches weigh the same",
            "self._eval_means.add_batch(outputs.metrics, counts)",
            "self._eval_means.add_batch(outputs.metrics, type(counts)(1, 1, 1, 1))",
            "test_evaluation_weighs_tokens_and_pairs",
        ),
    ),
    *within(
        "trainer/trainer.py",
        "ranks/test_trainer_ranks.py",
        (
            "router: loss of each rank whole",
            "self.current_gradient_accumulation_steps * ranks",
            "self.current_gradient_accumulation_steps",
            "test_router_losses_of_two_ranks_are_means",
            1,
        ),
    ),
    *within(
        "runs/record.py",
        "runs/test_checkpoints.py",
        (
            "record: lengths of the data alone",
            "        digest.append(",
            "        repr(",
            "test_a_run_with_other_settings_is_refused_in_words",
        ),
        (
            "record: truncation_mode may change",
            '"truncation_mode", "escape',
            '"escape',
            "test_a_run_with_other_settings_is_refused_in_words",
        ),
    ),
    *within(
        "runs/checkpoints.py",
        "runs/test_checkpoints.py",
        (
            "checkpoints: the best one is removed",
            "kept = {complete[-1].resolve(), Path(self.state.best_model_checkpoint or complete[-1]).resolve()}",
            "kept = {complete[-1].resolve()}",
            "test_the_best_checkpoint_is_kept_by_its_final_name",
        ),
    ),
    *within(
        "runs/async_saves.py",
        "ranks/test_async_saves.py",
        (
            "async saves: the tensors of training themselves",
            "    return BlockingAsyncStager().stage(state)",
            "    return state",
            "test_training_goes_on_up_to_the_next_save_while_one_is_written",
        ),
        (
            "async saves: an error is kept by its rank",
            "self._exchange(_words(error, dist.get_rank()))",
            "self._exchange()",
            "test_an_error_of_the_writing_ends_the_run_on_all_ranks",
        ),
    ),
    *within(
        "runs/checkpoints.py",
        "ranks/test_async_saves.py",
        (
            "async saves: two at once",
            "            self._beside.finish()\n        folder, name",
            "            pass\n        folder, name",
            "test_training_goes_on_up_to_the_next_save_while_one_is_written",
        ),
        (
            "async saves: the end does not wait",
            "            self._beside.finish()\n        limit, self.args",
            "            pass\n        limit, self.args",
            "test_an_error_of_the_last_save_is_not_lost",
        ),
        (
            "async saves: an error of training leaves the save to itself",
            "self._beside.finish_after(error)",
            "pass",
            "test_an_error_of_training_waits_for_the_save_in_flight",
        ),
    ),
    *within(
        "runs/find_checkpoint.py",
        "runs/test_checkpoints.py",
        (
            "checkpoints: an interrupted save is whole",
            "if (checkpoint / JIT_SIGN).exists():",
            "if False:",
            "test_a_checkpoint_that_trainer_calls_incomplete_is_none",
        ),
        (
            "checkpoints: the longest run is the newest",
            'for name in ("number", "saved_at"))',
            "for name in ())",
            "test_a_run_that_starts_anew_has_the_newest_checkpoint",
        ),
    ),
    *within(
        "trainer/positions.py",
        "data/test_lengths.py",
        (
            "positions: a stream has no length",
            "longest = None if None in limits.values() else max(limits.values())",
            "longest = 0",
            "test_sequences_beyond_a_table_of_positions_are_refused_before_training",
        ),
    ),
    *within(
        "model/encoder_decoder.py",
        "model/test_encoder_decoder.py",
        (
            "encoder: run for each answer",
            'ids, mask = inputs["input_ids"], inputs["attention_mask"]',
            'ids, mask = inputs["input_ids"].repeat(2, 1), inputs["attention_mask"].repeat(2, 1)',
            "test_the_encoder_runs_once_a_pair",
        ),
        (
            "encoder: its output for another pair's answers",
            "last_hidden_state.repeat(answers, 1, 1)",
            "last_hidden_state.repeat_interleave(answers, 0)",
            "test_the_loss_and_its_gradient_are_those_of_the_models_own_logits",
        ),
        (
            "encoder: no gradient comes back to it",
            "encoded.last_hidden_state.repeat",
            "encoded.last_hidden_state.detach().repeat",
            "test_the_loss_and_its_gradient_are_those_of_the_models_own_logits",
        ),
        (
            "head: the model's own bias is left out",
            "return None if bias is None else bias.flatten()",
            "return None",
            "test_the_loss_and_its_gradient_are_those_of_the_models_own_logits",
        ),
    ),
    *within(
        "model/attach.py",
        "model/test_encoder_decoder.py",
        (
            "head: T5's scale is left out",
            "self.seen.append(hidden)",
            "self.seen.append(hidden * self.head.weight.shape[1] ** 0.5)",
            "test_the_loss_and_its_gradient_are_those_of_the_models_own_logits",
        ),
    ),
    *within(
        "generation.py",
        "model/test_encoder_decoder.py",
        (
            "generation: an encoder's prompt is filled up on the left",
            "place = slice(len(ids[i])) if encodes else",
            "place =",
            "test_an_answer_does_not_depend_on_the_other_prompts_of_its_batch",
        ),
    ),
    *within(
        "cli/before_imports.py",
        "cli/test_start_and_end.py",
        (
            "first: options with hyphens are none",
            'for form in (name, name.replace("_", "-"))',
            "for form in (name,)",
            "test_what_the_parser_has_to_judge_is_left_to_it",
        ),
    ),
    *within(
        "runs/finished.py",
        "cli/test_start_and_end.py",
        (
            "finished: whatever is gone",
            "return step if whole else None",
            "return step",
            "test_a_finished_run_called_again_writes_nothing",
        ),
    ),
    *within(
        "runs/signals.py",
        "cli/test_start_and_end.py",
        (
            "Ctrl-C: a second one waits too",
            "            raise KeyboardInterrupt",
            "            return",
            "test_ctrl_c_twice_or_without_saves_ends_at_once",
        ),
        (
            "Ctrl-C: the handler stays",
            "signal.signal(signal.SIGINT, before)",
            "pass",
            "test_ctrl_c_saves_the_step_in_progress_and_says_how_to_go_on",
        ),
    ),
    *within(
        "trainer/start.py",
        "cli/test_start_and_end.py",
        (
            "start: two numbers of 4 bits are one",
            "return 2 * parameter.element_size() * count if",
            "return count if",
            "test_numbers_of_4_bits_are_counted_by_twos",
        ),
    ),
    *within(
        "report/glossary.py",
        "report/test_page.py",
        (
            "report: a metric that ends as another",
            "return max(found)[1:]",
            "return found[0][1:]",
            "test_a_metric_is_explained_by_its_whole_name",
        ),
    ),
    *within(
        "data/whole_batches.py",
        "data/test_positions.py",
        (
            "place in a stream: the next pass begins there too",
            "self.stream.load_state_dict(None)",
            "pass",
            "test_rows_before_the_place_are_not_read_again",
        ),
    ),
    *within(
        "data/positions.py",
        "data/test_positions.py",
        (
            "place in a stream: that of another reading",
            "_ex_iterable=_copied(parts)",
            "_ex_iterable=parts",
            "test_a_pass_goes_on_with_the_rows_of_a_whole_one",
        ),
    ),
    *within(
        "trainer/compared_step.py",
        "ranks/test_check_ranks.py",
        (
            "check_ranks: one process has the counts of one rank",
            "for samples in parts for s in samples",
            "for s in parts[0]",
            "test_two_ranks_that_are_well",
        ),
    ),
]
