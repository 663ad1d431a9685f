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
        "loss/test_preferences.py",
        (
            "sequences: means over all positions",
            "sums / lengths.clamp(min=1)",
            "sums / labels.shape[1]",
            "test_sums_means_and_lengths_by_hand",
        ),
    ),
    *_in(
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
    *_in(
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
    *_in(
        "layouts/layout.py",
        "model/test_layout.py",
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
        "data/test_turns.py",
        (
            "turns: what a tool says is scored",
            "response = response & (mask_T[1:] > 0)",
            "response = response & (mask_T[1:] >= 0)",
            "test_loss_and_gradient_are_those_of_the_scored_tokens",
        ),
        (
            "turns: the NLL scores what is left out",
            "scored = scored & (mask_T[1:] >= 0)",
            "pass",
            "test_loss_and_gradient_are_those_of_the_scored_tokens",
        ),
    ),
    *_in(
        "data/forms/turns.py",
        "data/test_turns.py",
        (
            "turns: the last alone",
            '(which == "all" or k + 1 == len(messages))',
            "k + 1 == len(messages)",
            "test_the_assistants_turns_alone_are_scored",
        ),
        (
            "turns: all, though the last is asked for",
            '(which == "all" or k + 1 == len(messages))',
            "True",
            "test_the_last_turn_alone_where_that_is_asked",
        ),
        (
            "turns: a turn without its thoughts",
            "shown[shared(opening, shown) : len(shown) - length] == frame",
            "True",
            "test_turns_that_the_template_alters_once_others_follow_are_dropped",
        ),
        (
            "turns: an opening takes the answer's first character",
            "return min(start, shared(opening, framed))",
            "return start",
            "test_an_opening_that_the_turn_does_not_begin_with_takes_nothing_of_it",
        ),
    ),
    *_in(
        "data/masks.py",
        "data/test_turns.py",
        (
            "turns: the prompt is scored",
            "mask = [0] * length",
            "mask = [1] * length",
            "test_the_assistants_turns_alone_are_scored",
        ),
        (
            "turns: a mask is not cut with its prompt",
            "if len(kept) < len(prompt):",
            "if False:",
            "test_masks_are_cut_along",
        ),
    ),
    *_in(
        "data/forms/messages.py",
        "data/test_tools.py",
        (
            "tools: nulls within lists stay",
            "[without_none(part) for part in value]",
            "value",
            "test_what_arrow_adds_is_taken_out_at_every_depth",
        ),
    ),
    *_in(
        "data/forms/tools.py",
        "data/test_tools.py",
        (
            "tools: arguments stay JSON text",
            'return {**function, "arguments": parsed} if _is_dict(parsed) else function',
            "return function",
            "test_arguments_are_given_as_the_template_takes_them",
        ),
    ),
    *_in(
        "layouts/batch.py",
        "model/test_layout.py",
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
        "trainer/test_means.py",
        (
            "guard: chosen answers alone",
            "chosen_logps + rejected_logps]",
            "chosen_logps]",
            "test_a_pair_is_named_for_either_of_its_answers",
        ),
    ),
    *_in(
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
    *_in(
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
    *_in(
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
    *_in(
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
    *_in(
        "runs/checkpoints.py",
        "runs/test_checkpoints.py",
        (
            "checkpoints: the best one is removed",
            "kept = {complete[-1].resolve(), Path(self.state.best_model_checkpoint or complete[-1]).resolve()}",
            "kept = {complete[-1].resolve()}",
            "test_the_best_checkpoint_is_kept_by_its_final_name",
        ),
    ),
    *_in(
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
    *_in(
        "tokens/limits.py",
        "data/test_prepare.py",
        (
            "data: BOS is cut off",
            "if ids[0] == bos_token_id:",
            "if ids[0] == bos_token_id and not ids:",
            "test_a_long_prompt_is_cut_and_keeps_its_bos",
        ),
    ),
    *_in(
        "data/pair_tokens.py",
        "data/test_prepare.py",
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
    *_in(
        "data/bad_rows.py",
        "data/test_bad_rows.py",
        (
            "bad rows: the share itself is too much",
            "if bad <= most * rows:",
            "if bad < most * rows:",
            "test_one_row_in_ten_is_too_many_by_default",
        ),
    ),
    *_in(
        "data/account.py",
        "data/test_lengths.py",
        (
            "account: the rejected answer's cut is the chosen one's",
            "sum(lost << bit for bit, lost in enumerate([*answers, prompt]))",
            "sum(lost << bit for bit, lost in enumerate([*answers[::-1], prompt]))",
            "test_the_side_that_is_cut_is_named",
        ),
    ),
    *_in(
        "data/labelled.py",
        "data/test_pairs_of_rows.py",
        (
            "labelled: good and bad change places",
            '[not row["label"]].append(number)',
            '[int(row["label"])].append(number)',
            "test_answers_marked_one_by_one_are_paired_by_prompt",
        ),
    ),
    *_in(
        "trainer/positions.py",
        "data/test_lengths.py",
        (
            "positions: a stream has no length",
            "longest = args.max_length",
            "longest = 0",
            "test_sequences_beyond_a_table_of_positions_are_refused_before_training",
        ),
    ),
    *_in(
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
    *_in(
        "model/attach.py",
        "model/test_encoder_decoder.py",
        (
            "head: T5's scale is left out",
            "self.seen.append(hidden)",
            "self.seen.append(hidden * self.head.weight.shape[1] ** 0.5)",
            "test_the_loss_and_its_gradient_are_those_of_the_models_own_logits",
        ),
    ),
    *_in(
        "layouts/encoder_decoder.py",
        "model/test_encoder_decoder.py",
        (
            "encoder: padding is attended to",
            "attention_mask[p, : len(ids)] = 1",
            "attention_mask[p] = 1",
            "test_the_loss_and_its_gradient_are_those_of_the_models_own_logits",
        ),
        (
            "decoder: the first token is not scored",
            "first + np.arange(len(ids) + 1), np.concatenate([ids[:1], ids]), 1, counted",
            "first + np.arange(len(ids)), ids, 1, counted",
            "test_a_pair_becomes_one_prompt_and_two_answers",
        ),
    ),
    *_in(
        "data/encoder_decoder.py",
        "model/test_encoder_decoder.py",
        (
            "data: the end of a cut prompt is lost",
            "return [*ids[:start], *middle, *ids[len(ids) - end :]]",
            "return [*ids[:start], *middle]",
            "test_long_texts_are_cut_within_their_special_tokens",
        ),
    ),
    *_in(
        "generation.py",
        "model/test_encoder_decoder.py",
        (
            "generation: an encoder's prompt is filled up on the left",
            "place = slice(len(ids[i])) if encodes else",
            "place =",
            "test_an_answer_does_not_depend_on_the_other_prompts_of_its_batch",
        ),
    ),
    *_in(
        "cli/first.py",
        "cli/test_first.py",
        (
            "first: options with hyphens are none",
            'for form in (name, name.replace("_", "-"))',
            "for form in (name,)",
            "test_what_the_parser_has_to_judge_is_left_to_it",
        ),
    ),
    *_in(
        "runs/finished.py",
        "cli/test_first.py",
        (
            "finished: whatever is gone",
            "return step if whole else None",
            "return step",
            "test_a_finished_run_called_again_writes_nothing",
        ),
    ),
    *_in(
        "runs/signals.py",
        "cli/test_first.py",
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
    *_in(
        "trainer/start.py",
        "cli/test_first.py",
        (
            "start: two numbers of 4 bits are one",
            "return 2 * parameter.element_size() * count if",
            "return count if",
            "test_numbers_of_4_bits_are_counted_by_twos",
        ),
    ),
    *_in(
        "report/glossary.py",
        "report/test_page.py",
        (
            "report: a metric that ends as another",
            "return max(found)[1:]",
            "return found[0][1:]",
            "test_a_metric_is_explained_by_its_whole_name",
        ),
    ),
]
