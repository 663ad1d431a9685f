"""Deliberate faults of what is around the kernels, those of a careless edit, each with the test to notice it."""

from mutations import Mutation


def _in(file: str, tests: str, *faults: tuple) -> list[Mutation]:
    return [
        Mutation(fault, f"orpo/{file}", old, new, *which, test=f"tests/{tests}::{test}")
        for fault, old, new, test, *which in faults
    ]


_TWO_ANSWERS = "test_metrics_are_means_over_the_pairs_with_two_answers"

TRAINING = [
    *_in(
        "loss/logprobs.py",
        "test_preferences.py",
        (
            "sequences: means over all positions",
            "sums / lengths.clamp(min=1)",
            "sums / labels.shape[1]",
            "test_sums_means_and_lengths_by_hand",
        ),
    ),
    *_in(
        "integrations/trl.py",
        "test_integration_trl.py",
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
    *_in(
        "loss/call.py",
        "test_loss.py",
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
            "mean(chosen > rejected)",
            "mean(chosen >= rejected)",
            "test_answers_that_are_as_likely_are_no_success",
        ),
        (
            "metrics: rewards without beta",
            "self.beta * self.chosen_logps, self.beta",
            "self.chosen_logps, self.beta",
            "test_metrics_are_trls",
        ),
    ),
    *_in(
        "trainer/means.py",
        "test_means.py",
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
    *_in(
        "layouts/layout.py",
        "test_layout.py",
        (
            "shared: a token that differs",
            "return int(differs[0]) if",
            "return int(differs[0]) + 1 if",
            "test_prompts_that_differ_share_what_comes_before",
        ),
        (
            "shared: the rejected answer begins at 0",
            "np.arange(n, len(rejected))",
            "np.arange(len(rejected) - n)",
            "test_shared_has_the_prompt_once_and_both_answers_behind_it",
        ),
        (
            "packed: positions go on",
            "np.arange(lengths[s])",
            "t + np.arange(lengths[s])",
            "test_packed_restarts_positions_and_has_no_mask",
        ),
        (
            "padded: padding is attended to",
            "attention_mask[s, : len(ids)] = 1",
            "attention_mask[s] = 1",
            "test_padded_puts_the_chosen_half_first_and_pads_on_the_right",
        ),
    ),
    *_in(
        "layouts/batch.py",
        "test_layout.py",
        (
            "rows: a token is skipped in answers only",
            "(targets != self.nll.skip_token_id)",
            "((targets != self.nll.skip_token_id) | ~response)",
            "test_a_skipped_token_is_skipped_in_the_prompt_too",
        ),
        (
            "rows: an answer without its first token",
            "np.arange(1, len(ids_T)) >= prompt_length",
            "np.arange(1, len(ids_T)) > prompt_length",
            "test_each_term_scores_its_tokens",
        ),
        (
            "rows: one answer makes a pair",
            ".all(axis=0)",
            ".any(axis=0)",
            "test_answer_without_a_predecessor_is_not_counted_as_scored",
        ),
        (
            "rows: repeated pairs keep their rejected answers",
            "r.sequence_N % r.pairs < pairs",
            "(r.sequence_N < pairs) | (r.sequence_N >= r.pairs)",
            "test_the_first_pairs_of_a_batch",
        ),
    ),
    *_in(
        "runs/non_finite.py",
        "test_means.py",
        (
            "guard: chosen answers alone",
            "chosen_logps + rejected_logps]",
            "chosen_logps]",
            "test_a_pair_is_named_for_either_of_its_answers",
        ),
    ),
    *_in(
        "trainer/trainer.py",
        "test_trainer.py",
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
    *_in(
        "trainer/evaluation.py",
        "test_trainer.py",
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
    *_in(
        "trainer/trainer.py",
        "test_trainer_ranks.py",
        (
            "router: loss of each rank whole",
            "self.current_gradient_accumulation_steps * ranks",
            "self.current_gradient_accumulation_steps",
            "test_router_losses_of_two_ranks_are_means",
            1,
        ),
    ),
    *_in(
        "runs/record.py",
        "test_checkpoints.py",
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
    *_in(
        "runs/checkpoints.py",
        "test_checkpoints.py",
        (
            "checkpoints: the best one is removed",
            "kept = {complete[-1].resolve(), Path(self.state.best_model_checkpoint or complete[-1]).resolve()}",
            "kept = {complete[-1].resolve()}",
            "test_the_best_checkpoint_is_kept_by_its_final_name",
        ),
    ),
    *_in(
        "runs/find_checkpoint.py",
        "test_checkpoints.py",
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
    *_in(
        "tokens/limits.py",
        "test_prepare.py",
        (
            "data: BOS is cut off",
            "if ids[0] == bos_token_id:",
            "if ids[0] == bos_token_id and not ids:",
            "test_a_long_prompt_is_cut_and_keeps_its_bos",
        ),
    ),
    *_in(
        "data/prepare.py",
        "test_prepare.py",
        (
            "data: a pair of max_length is too long",
            "for p, a in sides) > limits.max_length",
            "for p, a in sides) >= limits.max_length",
            "test_a_pair_of_exactly_max_length_is_not_cut",
        ),
        (
            "data: a prompt of max_length has room",
            "for p, _ in sides) >= limits.max_length",
            "for p, _ in sides) > limits.max_length",
            "test_truncation_never_leaves_an_empty_answer",
        ),
        (
            "data: EOS twice",
            "ended = bool(answer) and answer[-1] == eos",
            "ended = False",
            "test_bos_and_eos_are_not_doubled",
        ),
        (
            "data: a merge stays in the prompt",
            "prompt, answer = whole[:split], whole[split:]",
            "answer = whole[split:]",
            "test_a_merge_over_the_boundary_belongs_to_the_answer",
        ),
    ),
]
