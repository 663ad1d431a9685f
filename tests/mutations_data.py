"""Deliberate faults on the way from rows to batches, those of a careless edit, each with the test to notice it."""

from mutations import within

DATA = [
    *within(
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
            "(len(prompt) if b else 0)",
            "(len(prompt) if b == 1 else 0)",
            "test_shared_has_the_prompt_once_and_both_answers_behind_it",
        ),
        (
            "shared: a third answer is taken for another prompt",
            "branches = 1 + max(",
            "branches = 0 + max(",
            "test_pairs_of_one_prompt_have_it_once_and_an_answer_of_several_pairs_too",
        ),
        (
            "shared: every pair reads its row's first answers",
            "group.of_pair[p] = [_place(a, group.answers) for a in answers]",
            "group.of_pair[p] = [0, 1]",
            "test_pairs_of_one_prompt_have_it_once_and_an_answer_of_several_pairs_too",
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
    *within(
        "layouts/segments.py",
        "model/test_flash.py",
        (
            "segments: the second answer sees itself alone",
            "segments.append((len(own), [prompt, own]))",
            "segments.append((len(own), [own]))",
            "test_outputs_and_gradients_are_those_of_the_mask",
        ),
        (
            "segments: an answer without a prompt gets that of another pair",
            "elif prompt_group != group:",
            "elif prompt_group < 0:",
            "test_outputs_and_gradients_are_those_of_the_mask",
        ),
        (
            "segments: the prompt's keys a second time for its first answer",
            "elif prompt[-1] + 1 == start:",
            "elif False:",
            "test_a_prompt_serves_its_first_answer_as_it_stands_and_is_repeated_for_the_others",
        ),
    ),
    *within(
        "layouts/flash.py",
        "model/test_flash.py",
        (
            "flash: each call wraps the attention function again",
            "if not (isinstance(registered, partial) and registered.func is attend):",
            "if True:",
            "test_other_calls_reach_the_function_as_before",
        ),
    ),
    *within(
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
    *within(
        "data/forms/turns.py",
        "data/test_turns.py",
        (
            "turns: what others say is never left out",
            'if message.get("train") is False and k not in silent]',
            'if message.get("train") is False and k in own]',
            "test_another_speakers_message_that_says_so_is_left_out",
        ),
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
    *within(
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
    *within(
        "data/forms/messages.py",
        "data/test_tools.py",
        (
            "tools: nulls within lists stay",
            "[without_none(part) for part in value]",
            "value",
            "test_what_arrow_adds_is_taken_out_at_every_depth",
        ),
    ),
    *within(
        "data/forms/tools.py",
        "data/test_tools.py",
        (
            "tools: arguments stay JSON text",
            'return {**function, "arguments": parsed} if _is_dict(parsed) else function',
            "return function",
            "test_arguments_are_given_as_the_template_takes_them",
        ),
    ),
    *within(
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
    *within(
        "tokens/limits.py",
        "data/test_prepare.py",
        (
            "data: BOS is cut off",
            "if ids[0] == bos_token_id:",
            "if ids[0] == bos_token_id and not ids:",
            "test_a_long_prompt_is_cut_and_keeps_its_bos",
        ),
    ),
    *within(
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
    *within(
        "data/bad_rows.py",
        "data/test_bad_rows.py",
        (
            "bad rows: the share itself is too much",
            "if bad <= most * rows:",
            "if bad < most * rows:",
            "test_one_row_in_ten_is_too_many_by_default",
        ),
    ),
    *within(
        "data/account.py",
        "data/test_lengths.py",
        (
            "account: the rejected answer's cut is the chosen one's",
            "sum(lost << bit for bit, lost in enumerate([*answers, prompt]))",
            "sum(lost << bit for bit, lost in enumerate([*answers[::-1], prompt]))",
            "test_the_side_that_is_cut_is_named",
        ),
    ),
    *within(
        "data/labelled.py",
        "data/test_pairs_of_rows.py",
        (
            "labelled: system messages are not looked at",
            "*(row.get(column) for column in CONTEXT)]",
            "]",
            "test_answers_to_one_prompt_under_other_instructions_are_no_pair",
        ),
        (
            "labelled: good and bad change places",
            "[not label].append(number)",
            "[int(label)].append(number)",
            "test_answers_marked_one_by_one_are_paired_by_prompt",
        ),
    ),
    *within(
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
    *within(
        "data/encoder_decoder.py",
        "model/test_encoder_decoder.py",
        (
            "data: the end of a cut prompt is lost",
            "return [*ids[:start], *middle, *ids[len(ids) - end :]]",
            "return [*ids[:start], *middle]",
            "test_long_texts_are_cut_within_their_special_tokens",
        ),
    ),
]
